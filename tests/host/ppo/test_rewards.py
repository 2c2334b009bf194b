"""Whatever a reward function, server or agent gives: numbers for the estimator, or a sentence that says what."""

import asyncio
import copy
import struct
from random import Random
from types import SimpleNamespace

import cloudpickle
import numpy as np
import pytest
import torch

from openrlhf_pgrpo.host.ppo import rewards as rewards_module
from openrlhf_pgrpo.host.tags import TaggedPrompt

pytestmark = pytest.mark.host

PROMPT = TaggedPrompt("who is it?", "ann", "u1")
nan, inf = float("nan"), float("inf")


class Engine:
    """Generates two tokens for any prompt."""

    async def generate(self, tokens, sampling_params, multi_modal_data=None):
        answer = SimpleNamespace(token_ids=[5, 6], text="an answer", finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[answer])


class Tokenizer:
    def __call__(self, text, add_special_tokens, return_tensors):
        return {"input_ids": torch.tensor([[1, 2, 3]])}

    def decode(self, tokens, skip_special_tokens):
        return "who is it? an answer"


def rollout(executor):
    """The response of an executor of the host, and the sample that the host makes of it."""
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    params = SimpleNamespace(max_tokens=8, logprobs=None)
    response = asyncio.run(executor.execute(PROMPT, "x", params, 64, Tokenizer(), Engine()))
    generator = SamplesGenerator.__new__(SamplesGenerator)
    generator.args = SimpleNamespace(reward=SimpleNamespace(remote_url=["r.py"]))
    return generator._process_response_into_experience(response, max_len=64)


def by_function(function):
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    executor = SingleTurnAgentExecutor(["http://127.0.0.1:1"])
    executor.reward_func = function
    return rollout(executor)


@pytest.mark.parametrize(
    "value",
    [1.5, np.float32(1.5), np.array([1.5]), np.array(1.5), torch.tensor(1.5), torch.tensor([1.5]),
     torch.tensor([[1.5]]), [1.5], [[1.5]], torch.tensor([1.5], dtype=torch.bfloat16)],
)  # fmt: skip
def test_d2_one_number_in_any_form_is_a_reward(value):
    """A reward reaches the sample as one number of shape (1,), whatever holds it."""
    sample = by_function(lambda queries, prompts, labels: {"rewards": value})
    assert sample.rewards.tolist() == sample.scores.tolist() == sample.info["reward"].tolist() == [1.5]


@pytest.mark.parametrize(
    "returned, words",
    [
        (None, "needs to return a dictionary with the key 'rewards', got null"),
        ({}, "got an empty dictionary"),
        ({"reward": 1.0}, "with the key 'rewards', got the keys 'reward'"),
        ([1.0], "with the key 'rewards', got a list"),
        (1.0, "with the key 'rewards', got float 1.0"),
        ({"rewards": None}, "needs one finite number under 'rewards', got null"),
        ({"rewards": nan}, "under 'rewards', got nan"),
        ({"rewards": torch.tensor([inf])}, "under 'rewards', got inf"),
        ({"rewards": "1.5"}, "under 'rewards', got the text '1.5'"),
        ({"rewards": [1.0, 2.0]}, "under 'rewards', got a list"),
        ({"rewards": torch.tensor([1.0, 2.0])}, r"got a tensor of torch.float32 and shape \(2,\)"),
        ({"rewards": np.array(["a"])}, "got an array of <U1"),
        ({"rewards": 10**400}, "got a whole number beyond float64"),
        ({"rewards": 1e39}, "got 1e.39, which is beyond float32"),
        ({"rewards": 1.0, "scores": [1, 0]}, "under 'scores', got a list"),
        ({"rewards": 1.0, "extra_logs": [1]}, "a dictionary of numbers under 'extra_logs', got a list"),
        ({"rewards": 1.0, "extra_logs": {"math": "good"}}, "for 'math' in 'extra_logs', got the text 'good'"),
        ({"rewards": 1.0, "extra_logs": {"math": nan}}, "for 'math' in 'extra_logs', got nan"),
        ({"rewards": 1.0, "extra_logs": {"reward": 2}}, "got 'reward', which the host uses"),
        ({"rewards": 1.0, "extra_logs": {3: 2}}, "got 3, which is no text"),
    ],
)
def test_d2_d6_anything_else_says_what_came_and_for_whom(returned, words):
    """The sentence names what was returned, preference group, prompt and label. No exception is spoken of."""
    whom = ".*for preference group 'ann', prompt 'who is it.', label 'x'"
    with pytest.raises(ValueError, match=words + whom) as error:
        by_function(lambda queries, prompts, labels: returned)
    assert "raised" not in str(error.value)


@pytest.mark.parametrize(
    "code, words",
    [
        ("raise KeyError('math')", "raised KeyError: 'math' in line 2 of FILE"),
        ("raise ValueError('no answer\\nand more')", "raised ValueError: no answer and more in line 2 of FILE"),
        ("next(iter([]))", "raised RuntimeError: StopIteration"),  # asyncio would wait for ever
        ("raise SystemExit(3)", "raised RuntimeError: SystemExit 3"),  # it would end the rollout process
    ],
)
def test_d2_an_exception_is_told_with_its_type_and_line(code, words, tmp_path):
    """The host hides exceptions of reward functions; here the sentence has type, text and line."""
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    file = tmp_path / "reward.py"
    file.write_text(f"def reward_func(queries, prompts, labels):\n    {code}\n")
    with pytest.raises(ValueError) as raised:
        rollout(SingleTurnAgentExecutor([str(file)]))
    assert words.replace("FILE", str(file)) in str(raised.value)
    assert "for preference group 'ann'" in str(raised.value) and "\n" not in str(raised.value)


def test_d2_a_server_that_fails_is_named(monkeypatch):
    """The address of the server, and where the reason stands."""
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    async def at_once(seconds):
        return None

    monkeypatch.setattr("openrlhf.utils.agent.asyncio.sleep", at_once)
    with pytest.raises(
        ValueError, match="the reward server http://127.0.0.1:1 raised RuntimeError.*Request error, pl"
    ):
        rollout(SingleTurnAgentExecutor("http://127.0.0.1:1"))


def by_agent(step):
    from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor

    class Agent(AgentInstanceBase):
        def __init__(self):
            pass

        async def step(self, state_dict, **kwargs):
            return step(state_dict)

    return rollout(MultiTurnAgentExecutor(Agent))


STEP = {"rewards": torch.tensor(1.5), "environment_feedback": "", "done": True}


@pytest.mark.parametrize("value", [1.5, torch.tensor([1.5]), [1.5], np.array(1.5)])
def test_d2_a_step_of_an_agent_may_give_any_number(value):
    """The host asks for `.item()`, which a plain number does not have."""
    assert by_agent(lambda states: {**STEP, "rewards": value}).rewards.tolist() == [1.5]


@pytest.mark.parametrize(
    "step, words",
    [
        (lambda states: None, "Agent.step needs to return a dictionary with 'rewards', .*got null"),
        (lambda states: {**STEP, "rewards": nan}, "Agent.step needs one finite number under 'rewards', got nan"),
        (
            lambda states: {"reward": 1, "done": True},
            "dictionary with 'rewards', 'environment_feedback', got the keys",
        ),
        (lambda states: {}["x"], "Agent.step raised KeyError: 'x'"),
    ],
)
def test_d2_an_agent_says_what_went_wrong_and_for_whom(step, words):
    """Agents are a third source of rewards."""
    with pytest.raises(ValueError, match=words + ".*for preference group 'ann', prompt 'who is it.', label 'x'"):
        by_agent(step)


def test_an_executor_of_ones_own_makes_its_agents_and_asks_them_what_it_wants():
    """The host documents both as classes to derive from. Only reset and step are ours."""
    from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor

    class Agent(AgentInstanceBase):
        kind = "a maze"

        def __init__(self, size, *, seed):
            self.name, self.size, self.seed = "theseus", size, seed

        async def step(self, state_dict, **kwargs):
            await self.reset({"observation": "again"})  # which the host did not ask for
            return {**STEP, "rewards": self.size + self.seed}

        async def close(self):
            return f"{self.name} left {self.kind} of {self.size}"

    class Executor(MultiTurnAgentExecutor):
        async def execute(self, prompt, label, *args, **kwargs):
            agent = self.agent_instance_cls(1, seed=2)
            agent.size = 3
            await agent.reset({"observation": prompt, "label": label})
            result = await agent.step({})
            return (
                self.agent_instance_cls.kind,
                isinstance(agent, Agent) and isinstance(copy.copy(agent), Agent),
                cloudpickle.loads(cloudpickle.dumps(copy.deepcopy(agent))).size,
                copy.deepcopy(self).agent_instance_cls(1, seed=2).seed,
                await agent.close(),
                result["rewards"].item(),
            )

    executed = asyncio.run(Executor(Agent).execute(PROMPT, "x"))
    assert executed == ("a maze", True, 3, 2, "theseus left a maze of 3", 5)


def test_d3_an_executor_of_ones_own_without_reward_is_refused_in_evaluation_too():
    """Every response passes here, in training and evaluation, sync and async."""
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    generator = SamplesGenerator.__new__(SamplesGenerator)
    generator.args = SimpleNamespace(reward=SimpleNamespace(remote_url="agent"))
    response = {"prompt": PROMPT, "label": "x", "observation_tokens": [1, 2], "action_ranges": [(1, 2)],
                "rollout_log_probs": None, "reward": None}  # fmt: skip
    with pytest.raises(ValueError, match="every sample needs a reward: the executor .*got null, for preference group"):
        generator._process_response_into_experience(response, max_len=64)


# They come from `random`, not hypothesis: that repeats most of what it draws, and is slower than what is tested.


def any_float(rng):
    kinds = (rng.choice([0.0, -0.0, nan, inf, -inf, 5e-324, 3.4e38, 3.5e38, 1e308]), rng.uniform(-9, 9))
    (any_bits,) = struct.unpack("d", rng.randbytes(8))
    return rng.choice([*kinds, any_bits])


def any_text(rng):
    return "".join(
        rng.choice(["a", "7", " ", "\n", "\0", "{}", "é", "🙂", "\ud83d"]) for _ in range(rng.randint(0, 4))
    )


def any_plain(rng):
    kind = rng.randrange(10)
    if kind < 4:
        return any_float(rng)
    values = (None, rng.random() < 0.5, rng.randint(-(10 ** rng.choice([1, 20, 400])), 9), any_text(rng))
    return [*values, any_text(rng).encode("utf-8", "replace"), complex(any_float(rng), any_float(rng))][kind - 4]


def any_number(rng):
    """What is a number in one of its forms, if it is finite."""
    one = any_float(rng)
    with np.errstate(over="ignore"):
        return rng.choice(
            [lambda x: x, np.float32, torch.tensor, np.array, lambda x: [x], lambda x: torch.tensor([x])]
        )(one)


def any_value(rng, depth=2):
    kind = rng.randrange(6)
    if kind < 2 or not depth:
        return any_plain(rng)
    if kind < 4:
        numbers = [any_float(rng) for _ in range(rng.randint(0, 3))]
        return any_number(rng) if kind == 2 else rng.choice([torch.tensor, np.array])(numbers)
    if kind == 4:
        return [any_value(rng, depth - 1) for _ in range(rng.randint(0, 2))]
    return {rng.choice(["rewards", "reward", "scores"]): any_value(rng, depth - 1) for _ in range(rng.randint(0, 2))}


def any_return(rng):
    """Anything; usually of the right keys, and with numbers there in half of them."""
    if rng.random() < 0.2:
        return any_value(rng)
    value = any_number if rng.random() < 0.6 else any_value
    found = {"rewards": value(rng), "scores": value(rng), "extra_logs": None}
    logs = {any_text(rng): value(rng) for _ in range(rng.randint(0, 2))}
    found["extra_logs"] = logs if rng.random() < 0.9 else value(rng)
    return {key: of_key for key, of_key in found.items() if key == "rewards" or rng.random() < 0.5}


def test_d2_d6_whatever_is_returned_is_numbers_or_a_sentence(record_property):
    """Property: finite numbers that the host can take, or a ValueError in one line that says what came."""
    rng, inputs, accepted = Random(0), set(), 0
    for _ in range(16_000):
        returned = any_return(rng)
        inputs.add(repr(returned))
        try:
            found = rewards_module.of_returned(returned)
        except ValueError as error:
            assert "needs" in str(error) and "got" in str(error) and "\n" not in str(error), returned
            continue
        accepted += 1
        for value in (found["rewards"], found["scores"], *found["extra_logs"].values()):
            one = torch.tensor([value])
            assert one.shape == (1,) and one.isfinite().all() and one.float().isfinite().all(), returned
    record_property("inputs", len(inputs))
    assert len(inputs) / 10 < accepted < len(inputs) / 2


def test_c2_a_long_wait_says_what_for_and_again_at_growing_intervals(capsys):
    """A reward function that never returns: after three minutes a line, then after six, twelve, ..."""
    from openrlhf_pgrpo.host.ppo.waiting import Watch

    now = [0.0]
    watch = Watch(lambda: now[0])
    watch.sent([TaggedPrompt("a says", "ann", None), TaggedPrompt("b says", "bob", None)], ["a", "b"])
    watch.looked(["a"], ["b"])
    lines = []
    for turn in range(1, 80):
        now[0] = 10.0 * turn
        watch.looked([], ["b"])
        if said := capsys.readouterr().out:
            lines.append((now[0], said))
    assert [when for when, _ in lines] == [180, 360, 720]
    assert "still waiting for 1 prompts of the preference groups 'bob' (1)" in lines[0][1]
    assert "3 minutes ago. The first is 'b says'" in lines[0][1]
    watch.looked(["b"], [])
    assert watch.prompts == {}


def test_c2_the_hosts_loop_is_watched():
    """The host's `ray.wait`, in the module of the sampler alone, tells the watch."""
    import ray
    from openrlhf.trainer.ppo_utils import samples_generator

    assert type(samples_generator.ray).__name__ == "WatchedRay" and samples_generator.ray.get is ray.get
