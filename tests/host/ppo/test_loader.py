"""Which prompts a run draws, through the host's own loops: sync, async, filtered, over-sampled and resumed."""

import importlib.metadata
from copy import deepcopy
from types import SimpleNamespace as Space

import pytest

pytestmark = pytest.mark.host


class Sampled(str):
    """A sample of a prompt; every second prompt has a score that filtering drops."""

    labels = ("",)

    @property
    def prompts(self):
        return [str(self)]

    @property
    def scores(self):
        return [Space(item=lambda: 0.5 if int(self.split()[0]) % 2 else 5.0)]


class World:
    """One process of a run: its loader and generator as the host makes them, and its loop on them."""

    def __init__(self, args, queue=None):
        from openrlhf.trainer import ppo_trainer
        from openrlhf.utils import get_strategy

        self.args, self.trained, self.saved = args, [], []
        self.loader, _, self.max_steps = ppo_trainer.prepare_datasets(get_strategy(args), None)
        self.generator = ppo_trainer.SamplesGenerator(get_strategy(args), self.loader, None, None, [])
        n = args.rollout.n_samples_per_prompt
        self.generator._dispatch_prompts_to_vllm = lambda prompts, labels, **_: [[prompt] * n for prompt in prompts]
        self.generator._process_response_into_experience = lambda response, **_: Sampled(response)

    def run(self, state=None, stop_after=None):
        """Runs to the end, or until a step was saved `stop_after` times. Returns the prompts of each step."""
        state = deepcopy(state) or {"episode": 0, "global_step": 0, "total_consumed_prompts": 0}
        try:
            (self._run_async if self.args.train.async_enable else self._run_sync)(state, stop_after)
        except StopIteration:
            pass
        return self.trained

    def _step(self, samples, client_states, stop_after):
        self.trained.append([str(sample) for sample in samples])
        self.saved.append(deepcopy(client_states))
        if len(self.saved) == stop_after:
            raise StopIteration

    def _run_sync(self, state, stop_after):
        from openrlhf.trainer.ppo_trainer import PPOTrainer

        trainer = Space(
            args=self.args, prompts_dataloader=self.loader, samples_generator=self.generator, generate_kwargs={},
            init_checkpoint_states=lambda: state, restore_best_checkpoint_state=lambda state: None,
            broadcast_to_vllm=lambda: None, eval_dataloader=None, wandb_logger=None, tensorboard_logger=None,
            train_step=lambda samples, step: ({"samples": samples, "timing/x": 0.0}, step + 1),
            save_logs_and_checkpoints=lambda step, status, states: self._step(status["samples"], states, stop_after),
        )  # fmt: skip
        PPOTrainer.__ray_metadata__.modified_class.__ray_actor_class__.fit(trainer)

    def _run_async(self, state, stop_after):
        from openrlhf.trainer.ppo_trainer_async import GenerateSamplesActor

        def put(payload, block):
            if payload != "done":
                self._step(payload[0], {**payload[1], "global_step": len(self.trained) + 1}, stop_after)

        actor = Space(
            args=self.args, prompts_dataloader=self.loader, samples_generator=self.generator, generate_kwargs={},
            _should_eval=lambda step: False, _partial_rollout=True, eval_dataloader=None, _eval_just_done=False,
            rollout_slots=Space(get=lambda block: 0, put=lambda step, block: None), rollout_queue=Space(put=put),
        )  # fmt: skip
        cls = GenerateSamplesActor.__ray_metadata__.modified_class.__ray_actor_class__
        if state["global_step"]:
            cls.load_state_dict(actor, state["data_loader_state_dict"])
        cls.fit(actor, state["episode"], state["total_consumed_prompts"])


@pytest.fixture
def world(host_args, jsonl, monkeypatch):
    """Makes processes of a run on `rows` prompts: "0", "1", ..."""
    monkeypatch.setattr("ray.wait", lambda refs, num_returns, timeout: (refs[:1], refs[1:]))
    monkeypatch.setattr("ray.get", lambda refs: refs)

    def world(rows, *flags):
        path = jsonl(f"prompts{rows}.jsonl", [{"input": f"{row} says"} for row in range(rows)])
        sizes = {
            "--data.prompt_dataset": path, "--rollout.batch_size": 4, "--rollout.n_samples_per_prompt": 2,
            "--rollout.micro_batch_size": 4, "--train.batch_size": 8, "--train.micro_batch_size": 4,
            "--train.num_episodes": 2, "--actor.num_gpus_per_node": 1, "--reward.remote_url": "x.py",
            "--algo.kl.init_coef": 0, "--data.max_len": 64, "--advantage_estimator": "group_norm",
        }  # fmt: skip
        words = [str(word) for pair in sizes.items() for word in pair]
        return World(host_args(*words, *map(str, flags)))

    return world


MODES = [(), ("--train.async_enable",), ("--data.dataloader_num_workers", 2)]
BOTH = MODES[:2]


def drawn(steps):
    """The prompts of all steps, each once, in order."""
    return [prompt for step in steps for prompt in step[::2]]


@pytest.mark.parametrize("mode", MODES)
def test_a18_the_order_of_prompts_follows_the_seed(world, mode):
    """Two runs with the same --train.seed saw their prompts in different orders."""
    one, again, other = (world(12, *mode, "--train.seed", seed).run() for seed in (1, 1, 2))
    assert one == again != other
    first, second = drawn(one)[:12], drawn(one)[12:]
    assert sorted(first) == sorted(second) == sorted(f"{row} says" for row in range(12)) and first != second


@pytest.mark.parametrize("mode", MODES)
def test_a9_an_episode_draws_whole_updates_and_leaves_out_others_each_time(world, mode):
    """10 prompts in batches of 4: the last 2 made no update, and their gradient leaked into the next one."""
    run = world(10, *mode, "--train.num_episodes", 6)
    steps = run.run()
    assert [len(step) for step in steps] == [8] * 12 and run.max_steps == 12
    left = [{f"{row} says" for row in range(10)} - set(drawn(steps[i : i + 2])) for i in range(0, 12, 2)]
    assert {len(prompts) for prompts in left} == {2} and len(set.union(*left)) > 2


def test_a_last_rollout_of_whole_updates_is_trained_on(world):
    run = world(11, "--train.batch_size", 4)
    assert [len(step) for step in run.run()] == [8, 8, 4] * 2 and run.max_steps == 10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows, batch", [(8, 8), (10, 8), (11, 4), (3, 4)])
def test_a10_a_resumed_run_makes_exactly_the_steps_that_are_left(world, mode, rows, batch, capsys):
    """At the end of an episode too, and a finished run makes none: it trained a whole episode more, each time."""
    flags = (*mode, "--train.batch_size", batch, "--train.num_episodes", 3)
    whole = world(rows, *flags)
    steps = whole.run()
    assert sorted(drawn(steps)) != [] and len(steps) == len(whole.saved)
    for stop_after in range(1, len(steps) + 1):
        begun, resumed = world(rows, *flags), world(rows, *flags)
        before = begun.run(stop_after=stop_after)
        assert before + resumed.run(begun.saved[-1]) == steps
        complete = "[pgrpo] the run is complete: " in capsys.readouterr().out
        assert complete == (stop_after == len(steps))


@pytest.mark.parametrize("mode", BOTH)
def test_a10_a_complete_run_goes_on_with_more_episodes(world, mode, capsys):
    whole, begun = world(10, *mode, "--train.num_episodes", 3), world(10, *mode)
    steps = whole.run()
    before = begun.run()
    longer = world(10, *mode, "--train.num_episodes", 3)
    assert before + longer.run(begun.saved[-1]) == steps
    assert world(10, *mode, "--train.num_episodes", 1).run(begun.saved[-1]) == []
    assert "is the end of episode 2, and --train.num_episodes is 1. Raise it to go on" in capsys.readouterr().out


@pytest.mark.parametrize("mode", BOTH)
def test_the_seed_of_the_checkpoint_goes_on(world, mode):
    begun, whole = world(10, *mode), world(10, *mode)
    before = begun.run(stop_after=1)
    assert before + world(10, *mode, "--train.seed", 7).run(begun.saved[-1]) == whole.run()


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize("rows", [8, 4, 30])
def test_d7_a_resume_with_other_prompts_names_both_lengths(world, mode, rows):
    """It ended in a StopIteration, and the advice to repeat it."""
    begun = world(24, *mode)
    begun.run(stop_after=5)
    words = rf"needs the prompts of the checkpoint, got 24 there and {rows} now \(--data.prompt_dataset, .*\): give"
    with pytest.raises(ValueError, match=words):
        world(rows, *mode).run(begun.saved[-1])


@pytest.mark.parametrize("mode", BOTH)
def test_d7_a_resume_with_other_sizes_that_leave_nothing_to_draw(world, mode):
    begun = world(11, *mode, "--train.batch_size", 4)
    begun.run(stop_after=3)
    with pytest.raises(ValueError, match="got 10 prompts drawn there of an episode, which has 8 now: use its --roll"):
        world(11, *mode).run(begun.saved[-1])


@pytest.mark.parametrize("mode", BOTH)
def test_a_resume_with_other_sizes_that_fit_makes_whole_updates(world, mode, capsys):
    begun = world(10, *mode)
    begun.run(stop_after=1)
    resumed = world(10, *mode, "--rollout.batch_size", 5, "--train.batch_size", 10, "--train.micro_batch_size", 5)
    assert [len(step) for step in resumed.run(begun.saved[-1])] == [10, 10, 10]
    assert "2 of 2 samples of this rollout are left out" in capsys.readouterr().out


@pytest.mark.parametrize("mode", BOTH)
def test_a_checkpoint_of_the_host_begins_its_episode_anew(world, mode, capsys):
    begun = world(8, *mode)
    begun.run(stop_after=3)
    theirs = {**begun.saved[-1], "data_loader_state_dict": {"_sampler_iter_yielded": 4, "_num_yielded": 4}}
    assert len(world(8, *mode).run(theirs)) == 2
    assert "holds no place in this order of prompts: its last episode begins anew" in capsys.readouterr().out


@pytest.mark.parametrize("mode", BOTH)
def test_what_filtering_leaves_is_trimmed_to_whole_updates(world, mode, capsys):
    """Every second prompt is dropped and replaced: 7 of 14 are left, and the last 3 fill no update."""
    run = world(14, *mode, "--algo.dynamic_filtering_enable", "--train.num_episodes", 1)
    assert [len(step) for step in run.run()] == [8] and run.max_steps == 3
    assert all(int(prompt.split()[0]) % 2 for prompt in drawn(run.trained))
    assert "[pgrpo] 6 of 6 samples of this rollout are left out: they do not fill an update of 8" in (
        capsys.readouterr().out
    )


def test_over_sampling_draws_no_more_than_whole_updates(world):
    run = world(27, "--train.async_enable", "--rollout.vllm_generate_batch_size", 10)
    assert [len(step) for step in run.run()] == [8] * 12 and run.max_steps == 12


# Before 0.11.2 the host cancels what is under way when no prompt is left to replace a filtered one.
drops = pytest.mark.skipif(importlib.metadata.version("openrlhf") != "0.11.2", reason="drops the last answers itself")


@pytest.mark.parametrize(
    "flags",
    [
        (),
        pytest.param(("--algo.dynamic_filtering_enable",), marks=drops),
        ("--rollout.n_samples_per_prompt", 1),
    ],
)
def test_prompts_that_wait_for_a_step_are_drawn_again_after_a_kill(world, flags):
    """They counted as drawn, and no step trained on them."""
    flags = ("--train.async_enable", "--rollout.vllm_generate_batch_size", 8, "--train.num_episodes", 1,
             "--train.batch_size", 4, *flags)  # fmt: skip
    n = 1 if "--rollout.n_samples_per_prompt" in flags else 2
    whole = world(32, *flags).run()
    trained = [prompt for step in whole for prompt in step[::n]]
    for stop_after in (1, 2, 3, len(whole) - 1):
        begun = world(32, *flags)
        before = begun.run(stop_after=stop_after)
        after = world(32, *flags).run(begun.saved[-1])
        assert sorted(prompt for step in before + after for prompt in step[::n]) == sorted(trained)
        assert len(before + after) == len(whole)


def test_prompts_that_wait_are_not_lost_by_two_kills(world):
    """The first resume draws fewer at a time than there are waiting."""
    flags = ("--train.async_enable", "--train.num_episodes", 1, "--train.batch_size", 4, "--rollout.batch_size", 2)
    begun, again = (world(32, *flags, "--rollout.vllm_generate_batch_size", size) for size in (8, 2))
    first = begun.run(stop_after=1)
    second = again.run(begun.saved[-1], stop_after=1)
    third = world(32, *flags).run(again.saved[-1])
    assert sorted(drawn(first + second + third)) == sorted(f"{row} says" for row in range(32))


def test_the_loader_is_found_by_every_actor(world):
    """Ray sends classes with the functions that they use. Ours must arrive as names, not as copies."""
    from openrlhf.trainer import ppo_trainer
    from ray import cloudpickle

    assert cloudpickle.loads(cloudpickle.dumps(ppo_trainer.prepare_datasets)) is ppo_trainer.prepare_datasets
    assert len(world(8).loader) == 8


def test_sizes_that_do_not_fit_are_refused_where_the_data_is_read(world):
    with pytest.raises(ValueError, match="one update needs 8 samples .*, the run draws 6 samples"):
        world(3)
