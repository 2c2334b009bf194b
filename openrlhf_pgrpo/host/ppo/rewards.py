"""What reward functions, servers and agents may return, and what happens to anything else.

The host hides their exceptions, hands on None, and fails much later, or not at all, for another reason. Here a defect
becomes a sentence that says what came, for which prompt and preference group. It is made in the rollout process, which
has the exception, travels with the response, and stops the run where responses become samples: in the trainer's
process, or in async training the sampler's, in training and in evaluation alike.

Remove it once the host passes on exceptions of reward functions and checks what they return.
"""

import copy
import inspect
import math
import traceback
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
import wrapt

from openrlhf_pgrpo.core.names import in_words, listed

DEFECT = "openrlhf_pgrpo: defect"  # key of a response's extra_logs that holds the sentence instead of numbers
LARGEST = torch.finfo(torch.float32).max

# Names under which the host logs numbers of its own. One of them in extra_logs would replace its number.
TAKEN = {
    *("reward", "score", "response_clip_ratio", "kl", "logprobs_diff", "return", "group_reward_std", "ppo_clip_ratio"),
    *("ppo_kl", "vllm_kl", "is_filter_ratio", "policy_loss", "entropy_loss", "actor_lr", "actor_grad_norm"),
    *("critic_loss", "critic_lr", "critic_grad_norm", "values", "response_length", "truncated", "total_length"),
    *("_num_samples", "_num_action_tokens", "_weights"),
}


def install_executors(module) -> None:
    """Makes executors say what went wrong. `module` is the host's utils.agent; it runs in the rollout process."""
    wrapt.wrap_function_wrapper(module, "SingleTurnAgentExecutor.__init__", with_reward_file)
    wrapt.wrap_function_wrapper(module, "SingleTurnAgentExecutor._fetch_rewards_via_func", fetch)
    wrapt.wrap_function_wrapper(module, "SingleTurnAgentExecutor._fetch_rewards_via_http", fetch)
    wrapt.wrap_function_wrapper(module, "MultiTurnAgentExecutor.__init__", with_checked_agents)


def install_samples(module) -> None:
    """Checks each response before it becomes a sample. `module` is the host's samples_generator."""
    wrapt.wrap_function_wrapper(module, "SamplesGenerator._process_response_into_experience", to_sample)


# ---- what is a reward ----


def number(value: Any) -> float:
    """The one finite number in `value`: a number, or a tensor, array or list that holds just one.

    One of float64 comes back as such, so that the host computes with the precision that it was given.

    Raises:
        ValueError: `value` is anything else. The message says in a few words what.
    """
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return number(value[0])
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex() or value.is_meta:
            raise ValueError(f"a tensor of {value.dtype} and shape {tuple(value.shape)}")
        one, double = value.item(), value.dtype == torch.float64
    elif isinstance(value, (np.ndarray, np.generic)):
        if value.size != 1 or value.dtype.kind not in "biuf":
            raise ValueError(f"an array of {value.dtype} and shape {value.shape}")
        one, double = value.item(), value.dtype.itemsize >= 8 and value.dtype.kind == "f"
    elif isinstance(value, str):
        raise ValueError(f"the text {value[:80]!r}")
    elif isinstance(value, Real):
        one, double = value, False
    else:
        raise ValueError(in_words(value))
    try:
        one = float(one)
    except OverflowError as error:
        raise ValueError("a whole number beyond float64") from error
    if not math.isfinite(one):
        raise ValueError(f"{one}")
    if abs(one) > LARGEST:
        raise ValueError(f"{one:.4g}, which is beyond float32")
    return np.float64(one) if double else one


def checked(rewards: Any, scores: Any, extra_logs: Any) -> dict[str, Any]:
    """Rewards, scores and extra_logs of one sample as numbers; scores are the rewards if there are none.

    A key of extra_logs whose value is None is left out: it does not apply to this sample.

    Raises:
        ValueError: anything else than numbers. The message says what was needed and what came.
    """
    need = "needs one finite number under 'rewards', got"
    if rewards is None:
        raise ValueError(f"{need} null")
    try:
        reward = number(rewards)
    except ValueError as error:
        raise ValueError(f"{need} {error}") from error
    try:
        score = reward if scores is None else number(scores)
    except ValueError as error:
        raise ValueError(f"needs one finite number, or nothing, under 'scores', got {error}") from error
    return {"rewards": reward, "scores": score, "extra_logs": logs(extra_logs)}


def logs(extra_logs: Any) -> dict[str, Any]:
    """`extra_logs` of one sample as numbers.

    Raises:
        ValueError: as `checked`.
    """
    if extra_logs is None:
        return {}
    if not isinstance(extra_logs, Mapping):
        raise ValueError(f"needs a dictionary of numbers under 'extra_logs', got {in_words(extra_logs)}")
    found = {}
    for key, value in extra_logs.items():
        if not isinstance(key, str) or key in TAKEN:
            why = "which the host uses for a number of its own: rename it" if key in TAKEN else "which is no text"
            raise ValueError(f"needs names of your own in 'extra_logs', got {key!r}, {why}")
        if value is None:
            continue
        try:
            found[key] = number(value)
        except ValueError as error:
            raise ValueError(
                f"needs one finite number for {key!r} in 'extra_logs', got {error}; leave the key out for a sample to "
                "which it does not apply"
            ) from error
    return found


def of_returned(returned: Any) -> dict[str, Any]:
    """What a reward function or server returned for one sample, checked.

    Raises:
        ValueError: as `checked`, or it is no dictionary.
    """
    if not isinstance(returned, Mapping):
        raise ValueError(f"needs to return a dictionary with the key 'rewards', got {in_words(returned)}")
    if "rewards" not in returned:
        keys = f"the keys {listed([*map(str, returned)])}" if returned else "an empty dictionary"
        raise ValueError(f"needs to return a dictionary with the key 'rewards', got {keys}")
    return checked(returned["rewards"], returned.get("scores"), returned.get("extra_logs"))


# ---- who it is for ----


def whose(prompt: str, label: Any = None) -> str:
    """A sample in words: preference group, prompt, and the label if there is one."""
    of_group = f"preference group {getattr(prompt, 'pref_group', None)!r}, prompt {excerpt(str(prompt))}"
    return of_group if label is None or label == "" else f"{of_group}, label {excerpt(str(label))}"


def excerpt(text: str) -> str:
    return repr(str(text) if len(text) <= 80 else f"...{text[-77:]}")


def raised(error: BaseException, file: str) -> str:
    """An exception in one line: type, text, and the last line of the user's file that led to it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f" in line {lines[-1]} of {file}" if lines else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text[:500]}{where}"


# ---- in the rollout process ----


def with_reward_file(init, executor, args, kwargs) -> None:
    """The host's executor whose reward function raises nothing that asyncio cannot hand on."""
    init(*args, **kwargs)
    if executor.reward_func is not None:
        function = executor.reward_func

        def reward_func(queries, prompts, labels):
            try:
                return function(queries, prompts, labels)
            except (SystemExit, StopIteration) as error:  # asyncio ends the process, or waits for ever
                raise RuntimeError(f"{type(error).__name__} {error}") from error

        executor.reward_func = reward_func


async def fetch(wrapped, executor, args, kwargs):
    """The rewards of one sample, checked; or, instead of an exception that the host would hide, a sentence.

    `execute` of the host asks for one sample at a time, and hides what goes wrong. A caller with another number of
    them hears of it, and the sentence would not say which sample it is about; so the host alone answers.
    """
    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    if len(call["queries_list"]) != 1:
        return await wrapped(*args, **kwargs)
    (prompt,), (label,) = call["prompts_list"], call["labels_list"]
    source = ", ".join(executor.reward_endpoints)
    kind = "the reward function" if executor.reward_func else "the reward server"
    try:
        (returned,) = await wrapped(*args, **kwargs)
    except Exception as error:  # whatever the user's code raises
        hint = "" if executor.reward_func else ": see the lines 'Request error, please check' above"
        sentence = f"{kind} {source} raised {raised(error, executor.reward_endpoints[0])}{hint}"
        return [{"rewards": None, "extra_logs": {DEFECT: f"{sentence}, for {whose(prompt, label)}"}}]
    try:
        found = of_returned(returned)
    except ValueError as error:
        return [{"rewards": None, "extra_logs": {DEFECT: f"{kind} {source} {error}, for {whose(prompt, label)}"}}]
    # Objects of a function may not reach another process. A server's JSON may, and stays a list for each sample.
    return [found if executor.reward_func else returned]


def with_checked_agents(init, executor, args, kwargs) -> None:
    """The host's executor of agents, each of which is a `CheckedAgent`."""
    init(*args, **kwargs)
    executor.agent_instance_cls = CheckedAgents(executor.agent_instance_cls)


class CheckedAgents:
    """Makes the agents of a class of the user's. All else that an executor may ask of the class is the class's."""

    def __init__(self, agent_class: type):
        self.agent_class = agent_class

    def __call__(self, *args, **kwargs) -> "CheckedAgent":
        return CheckedAgent(self.agent_class(*args, **kwargs))

    def __getattr__(self, name: str):
        if name == "agent_class" or name.startswith("__"):  # which copies are made without
            raise AttributeError(name)
        return getattr(self.agent_class, name)


class CheckedAgent(wrapt.ObjectProxy):
    """An agent of the user's whose errors say for which prompt they happened, and whose steps are checked. All else
    that an executor of the user's own may ask of it is the agent's, and what it calls of itself is not checked."""

    def __init__(self, agent, sample: str = ""):
        super().__init__(agent)
        self._self_sample = sample

    def __copy__(self):
        return CheckedAgent(copy.copy(self.__wrapped__), self._self_sample)

    def __deepcopy__(self, memo):
        return CheckedAgent(copy.deepcopy(self.__wrapped__, memo), self._self_sample)

    def __reduce_ex__(self, protocol):
        return CheckedAgent, (self.__wrapped__, self._self_sample)

    async def reset(self, states: dict, **kwargs):
        self._self_sample = whose(states["observation"], states["label"])
        result = await self._call("reset", states, kwargs)
        self._need(result, "reset", "observation")
        return result

    async def step(self, states: dict, **kwargs):
        result = await self._call("step", states, kwargs)
        self._need(result, "step", "rewards", "environment_feedback", "done")
        try:
            found = checked(result["rewards"], result.get("scores"), result.get("extra_logs"))
        except ValueError as error:
            raise ValueError(f"{self._named('step')} {error}, for {self._self_sample}") from error
        if result.get("scores") is None:  # the host then takes the sum of all steps
            del found["scores"]
            result = {key: value for key, value in result.items() if key != "scores"}
        return {**result, **found, "rewards": torch.tensor(found["rewards"], dtype=torch.float64)}  # it asks for .item

    async def _call(self, method: str, states: dict, kwargs: dict):
        called = getattr(self.__wrapped__, method)
        try:
            return await called(states, **kwargs)
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            file = getattr(getattr(called, "__code__", None), "co_filename", "")
            what = f"{self._named(method)} raised {raised(error, file)}"
            raise ValueError(f"{what}, for {self._self_sample}") from error

    def _need(self, result: Any, method: str, *keys: str) -> None:
        missing = [key for key in keys if not isinstance(result, Mapping) or key not in result]
        if missing:
            got = f"the keys {listed([*map(str, result)])}" if isinstance(result, Mapping) else in_words(result)
            raise ValueError(
                f"{self._named(method)} needs to return a dictionary with {listed(missing)}, got {got}, for "
                f"{self._self_sample}"
            )

    def _named(self, method: str) -> str:
        return f"the agent {type(self.__wrapped__).__name__}.{method}"


# ---- where responses become samples ----


def to_sample(process, generator, args, kwargs):
    """The host's `_process_response_into_experience` of a response whose reward and logs are numbers.

    Raises:
        ValueError: the response has no reward though no local model will give one, or carries a defect.
    """
    (response,) = args
    logged = response.get("extra_logs")
    if isinstance(logged, Mapping) and DEFECT in logged:
        raise ValueError(f"every sample needs a reward: {logged[DEFECT]}")
    if response.get("reward") is None and not generator.args.reward.remote_url:
        return process(*args, **kwargs)  # a local reward model gives it later
    try:
        found = checked(response.get("reward"), response.get("scores"), logged)
    except ValueError as error:
        sample = whose(response["prompt"], response.get("label"))
        raise ValueError(f"every sample needs a reward: the executor {error}, for {sample}") from error
    response = {**response, "reward": found["rewards"], "scores": found["scores"], "extra_logs": found["extra_logs"]}
    return process(response, **kwargs)
