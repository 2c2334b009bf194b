"""The plan of a run, against a simulation of the host's loops: as many updates as planned, no gradient that leaks into
another rollout or epoch, and equally many micro batches on all ranks; or the sizes are refused."""

import math
from itertools import product
from random import Random
from types import SimpleNamespace as Space

import pytest

from openrlhf_pgrpo.host import plan

pytestmark = pytest.mark.host


def optimizer(lr=1e-3, **values):
    return dict(
        **dict(optim="adam", adam=Space(lr=lr), muon=Space(lr=lr), lr_scheduler="cosine_with_min_lr"),
        **dict(lr_warmup_ratio=0.03),
        **values,
    )


def group(ranks, **values):
    return Space(num_nodes=1, num_gpus_per_node=ranks, **values)


def ppo_args(**changes):
    """Nested host arguments; `changes` maps a flag with _ for its first dot to a value."""
    args = Space(
        actor=group(1, **optimizer()),
        ref=group(1),
        reward=group(1, remote_url=["reward.py"], clip_range=(-10, 10)),
        critic=group(1, freezing_steps=-1),
        algo=Space(kl=Space(init_coef=0), advantage=Space(estimator="pgrpo"), dynamic_filtering_enable=False),
        data=Space(max_len=64, max_samples=int(1e8)),
        rollout=Space(
            batch_size=4, n_samples_per_prompt=2, micro_batch_size=4, vllm_generate_batch_size=None, max_new_tokens=16
        ),
        train=Space(
            batch_size=8, micro_batch_size=4, num_episodes=1, max_epochs=1, dynamic_batch_enable=False,
            agent_func_path=None, enable_ema=False, ema_beta=0.992, async_enable=False, async_queue_size=1,
            colocate_actor_ref=False, colocate_critic_reward=False, colocate_all=False,
        ),
        vllm=Space(num_engines=1, tensor_parallel_size=1),
        ds=Space(ring_attn_size=1, tensor_parallel_size=1, zero_stage=2),
        ckpt=Space(save_steps=-1),
        eval=Space(steps=-1, dataset=None, n_samples_per_prompt=4),
        logger=Space(logging_steps=1),
    )  # fmt: skip
    return changed(args, changes)


def pairs_args(trainer="dpo", **changes):
    args = Space(
        **optimizer(),
        data=Space(max_samples=int(1e8)),
        model=Space(beta=0.1, label_smoothing=0.0, ipo_enable=False),
        train=Space(batch_size=8, micro_batch_size=4, max_epochs=1),
        ds=Space(ring_attn_size=1, tensor_parallel_size=1),
        ckpt=Space(save_steps=-1),
        eval=Space(steps=-1, dataset="eval.jsonl"),
        logger=Space(logging_steps=1),
        **({"ref": Space()} if trainer == "dpo" else {"reward": Space(factors=None)}),
    )
    return changed(args, changes)


def changed(args, changes):
    for flag, value in changes.items():
        target, *path = args, *flag.split("__")
        for name in path[:-1]:
            target = getattr(target, name)
        assert hasattr(target, path[-1]), flag
        setattr(target, path[-1], value)
    return args


# ---- the host's loops ----


class Defect(Exception):
    """The run ends with an error, waits for ever, or a gradient leaks."""


class Engine:
    """The ranks of a model that trains, as DeepSpeed counts: an update after each `every` micro batches of a rank."""

    def __init__(self, args, ranks):
        self.micro, self.ranks = args.train.micro_batch_size, ranks
        # DeepspeedStrategy.get_ds_train_config, and DeepSpeed's own check of it
        self.every = args.train.batch_size // self.micro // ranks
        if args.train.batch_size != self.micro * self.every * ranks or not self.every:
            raise Defect("DeepSpeed: batch sizes do not fit")
        self.micro_batches = self.updates = 0

    def train(self, samples_of_ranks):
        """One pass over the replay buffers of all ranks: DataLoader(drop_last=True)."""
        batches = {samples // self.micro for samples in samples_of_ranks}
        if len(batches) > 1:
            raise Defect("ranks wait for each other in training")
        self.micro_batches += batches.pop()
        self.updates = self.micro_batches // self.every

    def check_no_leak(self, samples_of_ranks):
        if self.micro_batches % self.every or any(samples % self.micro for samples in samples_of_ranks):
            raise Defect("a gradient leaks, or samples are dropped")


def chunks(items, ranks):
    """RayActorGroup.async_run_method_batch: contiguous chunks, one for each rank."""
    if len(items) < ranks:
        raise Defect("Insufficient batch size for async_run_method_batch")
    size = -(-len(items) // ranks)
    return [items[rank * size : (rank + 1) * size] for rank in range(ranks)]


class DynamicEngine(Engine):
    """With --train.dynamic_batch_enable: replay_buffer.setup_dynamic_batch and its optimizer steps."""

    def __init__(self, args, ranks):
        self.args, self.ranks, self.updates, self.left = args, ranks, 0, 0

    def train(self, samples_of_ranks):
        args = self.args
        local = args.train.batch_size // self.ranks
        if local * self.ranks != args.train.batch_size:
            raise Defect("updates are smaller than asked for, or a division by zero")
        most = args.rollout.batch_size * args.rollout.n_samples_per_prompt // args.train.batch_size
        steps = min(min(most, samples // local) for samples in samples_of_ranks)
        self.updates += steps
        self.left = sum(samples_of_ranks) - steps * args.train.batch_size

    def check_no_leak(self, samples_of_ranks):
        if self.left:
            raise Defect("samples are dropped")


def simulate(args, drawn):
    """Updates of policy and critic in a run whose loader draws `drawn` prompts an episode; raises Defect."""
    rollout, n = args.rollout, args.rollout.n_samples_per_prompt
    if not args.train.batch_size:
        raise Defect("division by zero")
    sizes = {role: getattr(args, role).num_gpus_per_node for role in plan.roles(args)}
    kind = DynamicEngine if args.train.dynamic_batch_enable else Engine
    engines = {role: kind(args, ranks) for role, ranks in sizes.items() if role in ("actor", "critic")}
    global_step = 0
    for _ in range(args.train.num_episodes):
        left, buffer, exhausted = drawn, 0, False
        while not exhausted:  # SamplesGenerator.generate_samples
            if buffer < rollout.batch_size * n and left is not None:
                generate = rollout.vllm_generate_batch_size or rollout.batch_size
                buffer += min(left, generate) * n
                left = None if left < generate else left - generate
            samples = min(buffer, rollout.batch_size * n)
            buffer -= samples
            exhausted = left is None and not buffer
            if not samples:
                continue
            if (rollout.vllm_generate_batch_size or rollout.batch_size) < rollout.batch_size:
                raise Defect("steps are smaller than asked for")
            experiences = split(args, samples, sizes["actor"])
            for ranks in sizes.values():  # forward passes
                batches = {len(chunk) for chunk in chunks(experiences, ranks)}
                if args.ds.zero_stage == 3 and len(batches) > 1:
                    raise Defect("ranks wait for each other in a forward pass")
            if args.train.dynamic_batch_enable:  # balance_experiences
                ranks = sizes["actor"]
                experiences = [samples // ranks + (rank < samples % ranks) for rank in range(ranks)]
            for role, engine in engines.items():
                if role == "actor" and global_step <= args.critic.freezing_steps:
                    continue
                shares = [sum(chunk) for chunk in chunks(experiences, sizes[role])]
                for _ in range(args.train.max_epochs):
                    engine.train(shares)
                    engine.check_no_leak(shares)
            global_step += 1
    return {role: engine.updates for role, engine in engines.items()}


def split(args, samples, actor_ranks):
    """RemoteExperienceMaker.split_rollout_samples: samples of each experience."""
    if args.train.dynamic_batch_enable:
        count = actor_ranks  # or a multiple, for longer texts
        if count > samples:
            raise Defect("fewer samples than ranks")
        return [samples // count + (i < samples % count) for i in range(count)]
    size = args.rollout.micro_batch_size
    return [min(size, samples - begin) for begin in range(0, samples, size)]


def simulate_pairs(args, rows, ranks):
    """Updates of a preference or reward trainer whose loader is a WholeSteps; raises Defect."""
    engine = Engine(args, ranks)
    of_rank = math.ceil((rows - ranks) / ranks) if rows % ranks else rows // ranks  # DistributedSampler, drop_last
    micro_batches = max(0, of_rank) // engine.micro  # StatefulDataLoader, drop_last
    if rows // args.train.batch_size <= 0:
        raise Defect("num_update_steps_per_epoch must be positive")
    whole = micro_batches // engine.every * engine.every  # WholeSteps
    for _ in range(args.train.max_epochs):
        engine.train([whole * engine.micro] * ranks)
        engine.check_no_leak([0])
    return engine.updates


# ---- any sizes ----

# They come from `random`, not hypothesis: that repeats most of what it draws, and is slower than what is tested.


def any_sizes(rng):
    size = {name: rng.randint(1, 4) for name in ("micro", "ranks", "steps", "n")}
    size |= {name: rng.choice([0, 0, 0, 0, 1, -1]) for name in ("noise", "shift")}
    size |= {name: rng.randint(0, 3) for name in ("ref", "reward", "dynamic")}
    size |= {name: rng.randint(1, 3) for name in ("per_rollout", "episodes")}
    return dict(
        **size,
        rollout_micro=rng.choice([0, 0, 0, 1, 2, 3, 5]),
        critic=rng.choice([0, 0, 1, 2, 4]),
        zero=rng.choice([2, 2, 3]),
        extra=rng.randint(-1, 5),
        epochs=rng.randint(1, 2),
        freezing=rng.randint(-2, 3),
    )


def sized_args(size):
    """Sizes of which many fit: a batch of whole micro batches of all ranks, a rollout of whole batches."""
    batch = size["micro"] * size["ranks"] * size["steps"] + size["noise"]
    rollout = max(1, math.lcm(max(1, batch), size["n"]) // size["n"] * size["per_rollout"] + size["shift"])
    critic = size["critic"]
    args = ppo_args(
        train__batch_size=batch, train__micro_batch_size=size["micro"], rollout__batch_size=rollout,
        rollout__n_samples_per_prompt=size["n"], rollout__micro_batch_size=size["rollout_micro"] or size["micro"],
        train__num_episodes=size["episodes"], train__max_epochs=size["epochs"], ds__zero_stage=size["zero"],
        algo__advantage__estimator="gae" if critic else "pgrpo", critic__num_gpus_per_node=critic or 8,
        critic__freezing_steps=size["freezing"] if critic else -1, actor__num_gpus_per_node=size["ranks"],
        algo__kl__init_coef=float(size["ref"] > 0), ref__num_gpus_per_node=size["ref"] or 8,
        reward__remote_url=None if size["reward"] else ["x.py"], reward__num_gpus_per_node=size["reward"] or 8,
        train__dynamic_batch_enable=size["dynamic"] == 3, actor__lr_warmup_ratio=0,
        rollout__vllm_generate_batch_size=None if size["extra"] == 0 else rollout + size["extra"],
    )  # fmt: skip
    return args


def outcome(run, *args):
    try:
        return run(*args)
    except (Defect, ValueError) as error:
        return error


def test_any_sizes_of_ppo_make_the_planned_updates_or_are_refused(record_property):
    """A8, A9, C1: whatever rows, batches, micro batches, ranks, samples and episodes."""
    rng, inputs, accepted = Random(0), set(), 0
    for _ in range(5_000):
        size = any_sizes(rng)
        args = sized_args(size)
        for rows in rng.sample(range(81), 8):
            inputs.add((*size.values(), rows))
            planned = outcome(plan.ppo, args, rows)
            if isinstance(planned, ValueError):
                assert ": " in str(planned) and "--" in str(planned), (size, rows, planned)
                continue
            accepted += 1
            updates = outcome(simulate, args, planned.drawn)
            assert not isinstance(updates, Defect), (size, rows, updates)
            assert updates["actor"] == planned.updates > 0, (size, rows)
            assert updates.get("critic", planned.schedule) == planned.schedule, (size, rows)
            assert planned.drawn <= rows, (size, rows)
    record_property("inputs", len(inputs))
    assert accepted > len(inputs) / 10


def test_no_more_is_refused_or_left_out_than_the_host_cannot_do():
    """A refused run has a defect with all its prompts and with fewer, an accepted one with any more than planned. But
    a rollout that was asked for is never made smaller to fit."""
    rng = Random(1)
    for _ in range(400):
        size, rows = any_sizes(rng), rng.randint(0, 80)
        args = sized_args(size)
        planned = outcome(plan.ppo, args, rows)
        drawn = 0 if isinstance(planned, ValueError) else planned.drawn
        of_rollout = args.rollout.batch_size if rows >= args.rollout.batch_size else 1
        for more in range(drawn + 1 if drawn else of_rollout, rows + 1):
            found = outcome(simulate, args, more)
            frozen = args.critic.freezing_steps >= 0 and not isinstance(found, Defect) and not found["actor"]
            assert isinstance(found, Defect) or frozen, (size, more, planned)


def test_all_small_sizes_of_pairs_make_the_planned_updates_or_are_refused(record_property):
    """A8, A9 for DPO and reward models."""
    rng, inputs, accepted = Random(2), set(), 0
    for size in product(range(1, 5), range(1, 5), range(1, 5), (0, 1, -1), range(1, 4)):
        micro, ranks, steps, off, epochs = size
        args = pairs_args(
            train__micro_batch_size=micro, train__batch_size=micro * ranks * steps + off, train__max_epochs=epochs,
            lr_warmup_ratio=0,
        )  # fmt: skip
        for rows in rng.sample(range(201), 40):
            inputs.add((size, rows))
            planned, updates = outcome(plan.pairs, args, rows, ranks), outcome(simulate_pairs, args, rows, ranks)
            if isinstance(planned, ValueError):
                assert isinstance(updates, Defect) and "--" in str(planned), (size, rows, planned, updates)
                continue
            accepted += 1
            assert updates == planned.updates > 0, (size, rows)
    record_property("inputs", len(inputs))
    assert accepted > len(inputs) / 3


# ---- the simulation is the host's ----


def test_the_simulation_gives_the_ranks_what_the_host_gives_them(monkeypatch):
    from openrlhf.trainer.ray.launcher import RayActorGroup

    class Actor:
        def __init__(self):
            self.execute_batch = Space(remote=lambda name, data, begin, end: data["experience"][begin:end])

    monkeypatch.setattr("ray.put", lambda content: content)
    for ranks in range(1, 6):
        actors = object.__new__(RayActorGroup)
        actors._actor_handlers, actors.duplicate_actors = [Actor() for _ in range(ranks)], 1
        for count in range(ranks, 12):
            items = list(range(count))
            assert actors.async_run_method_batch("append", experience=items) == chunks(items, ranks)


def test_the_simulation_cuts_a_rollout_as_the_host_does(monkeypatch):
    from openrlhf.trainer.ppo_utils.experience import Experience
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    monkeypatch.setattr(Experience, "concat_experiences", lambda samples, pad: len(samples))
    for micro, count in ((1, 5), (4, 8), (4, 11), (9, 3)):
        args = ppo_args(rollout__micro_batch_size=micro)
        maker = Space(args=args, tokenizer=Space(pad_token_id=0))
        found = RemoteExperienceMaker.split_rollout_samples(maker, [Space() for _ in range(count)])
        assert found == split(args, count, 1)


def test_the_first_update_of_a_warm_up_changes_nothing():
    """Of the schedules of transformers, those with a warm-up begin at the learning rate 0."""
    import torch
    from transformers.trainer import get_scheduler

    for name in ("linear", "cosine", "cosine_with_min_lr", "constant_with_warmup", "polynomial", "constant"):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        more = {"min_lr_rate": 0.1} if name == "cosine_with_min_lr" else {}
        get_scheduler(name, optimizer, math.ceil(1 * 0.03), 1, scheduler_specific_kwargs=more)
        assert (optimizer.param_groups[0]["lr"] == 0) == (name not in plan.NO_WARMUP), name


# ---- the cases ----


def test_a8_a_batch_larger_than_the_run_is_refused():
    """24 prompts x 2 samples at the host's batch of 128 made no update at all, with exit code 0."""
    words = r"one update needs 128 samples \(--train.batch_size\), the run draws 48 samples \(24 prompts x 2\): lower"
    with pytest.raises(ValueError, match=words + " --train.batch_size to at most 8, or give more rows"):
        plan.ppo(ppo_args(train__batch_size=128), 24)


def test_a8_pairs_that_fill_no_update_are_refused():
    words = r"one update needs 128 pairs \(--train.batch_size\), the run draws 24 pairs: lower .* at most 24, or give"
    with pytest.raises(ValueError, match=words):
        plan.pairs(pairs_args(train__batch_size=128), 24, 1)


@pytest.mark.parametrize(
    "batch, words",
    [
        (16, "one update needs 16 samples .*, a rollout of 4 prompts x 2 gives 8: lower .* to at most 8"),
        (4, None),
        (6, "--train.batch_size needs a multiple of 4 .*, got 6: change it, for example to 4"),
    ],
)
def test_a9_a_rollout_makes_whole_updates(batch, words):
    """What does not fill an update leaked its gradient into the next rollout."""
    if words is None:
        assert plan.ppo(ppo_args(train__batch_size=batch), 24).updates == 12
        return
    with pytest.raises(ValueError, match=words):
        plan.ppo(ppo_args(train__batch_size=batch), 24)


def test_a9_what_an_episode_leaves_out_is_said():
    """10 prompts in batches of 4 and two episodes made 5 updates instead of 4."""
    planned = plan.ppo(ppo_args(train__num_episodes=2), 10)
    assert (planned.updates, planned.schedule, planned.drawn) == (4, 4, 8)
    assert planned.sentences == [
        "this run makes 4 updates of 8 samples in 4 steps: 2 episodes of 8 prompts, 4 a step, 2 samples each",
        "each episode leaves out 2 of 10 prompts, others each time, because they do not fill an update",
    ]


def test_a9_what_an_epoch_of_pairs_leaves_out_is_said():
    planned = plan.pairs(pairs_args(train__max_epochs=3), 34, 2)
    assert (planned.updates, planned.drawn) == (12, 32)
    assert planned.sentences == [
        "this run makes 12 updates of 8 pairs: 3 epochs of 32 pairs",
        "each epoch leaves out 2 of 34 pairs, others each time, because they do not fill an update",
    ]


def test_a_last_rollout_that_makes_whole_updates_is_kept():
    planned = plan.ppo(ppo_args(train__batch_size=4), 27)  # 6 rollouts of 4 prompts, one of 2
    assert (planned.drawn, planned.updates) == (26, 13)
    assert "in 7 steps" in planned.sentences[0] and "leaves out 1 of 27" in planned.sentences[1]


def test_c1_two_ranks_get_as_many_micro_batches():
    """11 prompts on two ranks: the last 3 gave one rank more micro batches than the other, for ever."""
    args = ppo_args(actor__num_gpus_per_node=2, train__micro_batch_size=2)
    assert plan.ppo(args, 11).drawn == 8
    assert plan.whole_samples(args, 6) == 0
    words = "as many samples for each of the 2 ranks of the actor, in batches of --rollout.micro_batch_size 3: got 8"
    with pytest.raises(ValueError, match=words):
        plan.ppo(changed(args, dict(rollout__micro_batch_size=3)), 11)


@pytest.mark.parametrize("new, length", [(64, 64), (100, 64), (0, 64), (-1, 64), (None, 1)])
def test_a17_a_prompt_needs_room_for_its_answer(new, length):
    """A sample without an action token trains on nothing, while its reward enters baseline and history."""
    with pytest.raises(ValueError, match="--data.max_len"):
        plan.ppo(ppo_args(rollout__max_new_tokens=new, data__max_len=length), 24)
    assert plan.ppo(ppo_args(rollout__max_new_tokens=63), 24).updates == 6


@pytest.mark.parametrize("rows", [1, 99])
def test_d14_a_reward_model_needs_pairs_to_evaluate(rows):
    """It takes 1 % of the pairs, and of 99 that is none: "Column 'prompt' doesn't exist"."""
    args = pairs_args("rm", eval__dataset=None, train__batch_size=1, train__micro_batch_size=1, train__max_epochs=2)
    with pytest.raises(ValueError, match=f"train_rm needs --eval.dataset, or at least 100 pairs.*got {rows}: name"):
        plan.pairs(args, rows, 1)
    assert plan.pairs(args, 100, 1).updates == 200
    assert plan.pairs(changed(args, dict(eval__dataset="x.jsonl")), rows, 1).updates == 2 * rows


REFUSED = [
    (dict(train__micro_batch_size=3), 24, "--train.batch_size needs a multiple of 3"),
    (dict(train__batch_size=0), 24, "--train.batch_size needs a number of at least 1, got 0"),
    (dict(train__num_episodes=0), 24, "--train.num_episodes needs a number of at least 1, got 0"),
    (dict(train__max_epochs=0), 24, "--train.max_epochs needs a number of at least 1, got 0"),
    (dict(data__max_samples=0), 24, "--data.max_samples needs a number of at least 1, got 0"),
    (dict(data__max_samples=2), 24, r"one update needs 8 samples .*, the run draws 4 samples \(2 prompts x 2\)"),
    (dict(), 0, "training needs rows in --data.prompt_dataset, got none"),
    (dict(rollout__vllm_generate_batch_size=2), 24, "needs at least --rollout.batch_size 4, got 2: raise it"),
    (dict(actor__adam=Space(lr=0)), 24, "--actor.adam.lr needs a number > 0, got 0: raise it"),
    (dict(actor__adam=Space(lr=math.nan)), 24, "--actor.adam.lr needs a finite number > 0, got nan"),
    (dict(train__num_episodes=1), 4, "needs a second update, got one, .* --actor.lr_warmup_ratio 0, or train on more"),
    (dict(critic__freezing_steps=1), 24, "--critic.freezing_steps needs a critic .*, got 1 with pgrpo: leave it out"),
    (
        dict(critic__freezing_steps=5, algo__advantage__estimator="gae"),
        24,
        "the policy needs a step after --critic.freezing_steps 5, got a run of 6 steps",
    ),
    (dict(actor__num_gpus_per_node=3), 24, "--train.batch_size needs a multiple of 12"),
    (dict(ds__ring_attn_size=2), 24, "the actor needs a multiple of --ds.ring_attn_size .* = 2 GPUs, got 1"),
    (
        dict(reward__remote_url=None, reward__num_gpus_per_node=3),
        24,
        "at least 3 batches of --rollout.micro_batch_size 4, as many as ranks of the reward, got 2: lower",
    ),
    (
        dict(reward__remote_url=None, reward__num_gpus_per_node=3, rollout__micro_batch_size=1, ds__zero_stage=3),
        24,
        "a multiple of 3 batches of --rollout.micro_batch_size 1, as many as ranks of the reward, got 8",
    ),
    (dict(ckpt__save_steps=0), 24, "--ckpt.save_steps needs a number of steps of at least 1, or -1 for none, got 0"),
    (
        dict(train__async_enable=True, train__async_queue_size=0),
        24,
        "--train.async_queue_size needs a number of at le",
    ),
    (dict(eval__dataset="x", eval__n_samples_per_prompt=0), 24, "--eval.n_samples_per_prompt needs a number of at le"),
    (
        dict(train__colocate_all=True, vllm__num_engines=2),
        24,
        "as many GPUs for the vllm engines as for the actor, got",
    ),
    (
        dict(train__colocate_actor_ref=True, algo__kl__init_coef=0.1, ref__num_gpus_per_node=2),
        24,
        "--train.colocate_actor_ref needs as many GPUs for the ref as for the actor, got 2 and 1: make them equal",
    ),
    (dict(reward__clip_range=(5.0, -5.0)), 24, "--reward.clip_range needs a lower and a higher number, got 5.0 -5.0"),
    (dict(reward__clip_range=(5.0, 5.0)), 24, "--reward.clip_range needs a lower and a higher number, got 5.0 5.0"),
    (dict(reward__clip_range=(math.nan, 1.0)), 24, "--reward.clip_range needs a lower and a higher number, got nan"),
    (dict(logger__logging_steps=0), 24, "--logger.logging_steps needs a number of at least 1, got 0"),
]


@pytest.mark.parametrize("changes, rows, words", REFUSED)
def test_a_run_that_cannot_work_is_refused_in_a_sentence(changes, rows, words):
    with pytest.raises(ValueError, match=words):
        plan.ppo(ppo_args(**changes), rows)


@pytest.mark.parametrize(
    "changes, rows, words",
    [
        (dict(train__batch_size=6), 24, "--train.batch_size needs a multiple of 8"),
        (dict(adam=Space(lr=0.0)), 24, "--adam.lr needs a number > 0, got 0"),
        (dict(), 8, "needs a second update, got one"),
        (dict(), 0, "training needs rows in --data.dataset, got none"),
        (dict(eval__steps=0), 24, "--eval.steps needs a number of steps of at least 1, or -1 for none, got 0"),
        (dict(ds__tensor_parallel_size=4), 24, "training needs a multiple of .* = 4 GPUs, got 2"),
    ],
)
def test_a_run_on_pairs_that_cannot_work_is_refused_in_a_sentence(changes, rows, words):
    with pytest.raises(ValueError, match=words):
        plan.pairs(pairs_args(**changes), rows, 2)


def test_users_alone_may_be_trained():
    args = pairs_args("rm", adam=Space(lr=0.0), reward=Space(factors=3))
    assert plan.pairs(args, 200, 1).updates == 25


def test_frozen_steps_count_for_the_schedule_alone():
    args = ppo_args(critic__freezing_steps=1, algo__advantage__estimator="gae", train__max_epochs=2)
    planned = plan.ppo(args, 24)
    assert (planned.updates, planned.schedule) == (8, 12)
    assert "the policy is frozen in the first 2 steps (--critic.freezing_steps)" in planned.sentences


def test_filtering_may_need_all_prompts():
    planned = plan.ppo(ppo_args(algo__dynamic_filtering_enable=True), 10)
    assert planned.drawn == 10 and planned.sentences[0].startswith("this run makes at most 2 updates of 8 samples")


def test_checkpoints_and_evaluations_that_will_not_come_are_said():
    args = ppo_args(ckpt__save_steps=7, eval__steps=9, eval__dataset="x.jsonl")
    assert plan.ppo(args, 24).sentences[1:] == [
        "there will be no checkpoint: --ckpt.save_steps is 7, and the run has 6 steps",
        "there will be no evaluation: --eval.steps is 9, and the run has 6 steps",
    ]
    assert len(plan.ppo(changed(args, dict(ckpt__save_steps=6, eval__steps=math.inf)), 24).sentences) == 1


def test_d18_data_to_evaluate_on_that_are_never_used_are_said():
    """Without --eval.steps PPO evaluates never, while the other trainers do once an epoch."""
    (_, said) = plan.ppo(ppo_args(eval__dataset="e.jsonl"), 24).sentences
    assert said == "there will be no evaluation on --eval.dataset: --eval.steps says after how many steps"
    assert len(plan.ppo(ppo_args(eval__dataset="e.jsonl", eval__steps=2), 24).sentences) == 1
    assert len(plan.ppo(ppo_args(), 24).sentences) == len(plan.pairs(pairs_args(), 24, 1).sentences) == 1


def test_without_the_number_of_rows_the_sizes_are_checked_all_the_same():
    assert plan.ppo(ppo_args(), None) == plan.pairs(pairs_args(), None, 1) == (None, None, None, [])
    with pytest.raises(ValueError, match="a rollout of 4 prompts x 2 gives 8"):
        plan.ppo(ppo_args(train__batch_size=128), None)
