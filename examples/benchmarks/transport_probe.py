"""The probe that `transport.py` puts into every process of a run: counts what Ray serializes, and clocks our own code.

Run as a script, it is the driver of the run: the host's PPO script through our door, with a setup hook for workers
that installs the probe together with ours. Every process writes lines of JSON into its own file, in the folder that
the environment variable TRANSPORT_PROBE names. Seconds are processor time of the thread that does the work.
"""

import json
import os
import random
import threading
import time
from copy import copy, deepcopy
from functools import partial
from types import SimpleNamespace

import wrapt

FOLDER = "TRANSPORT_PROBE"
PROMPTS, TOKENIZER, RESPONSES, QUEUE = "prompts", "tokenizer", "responses", "queue"
TOKENS, LOG_PROBS, EXPERIENCES = "tokens", "log-probs", "experiences"
local = threading.local()
coin = random.Random(0)  # which of two comes first


def leg_of(value) -> tuple[str, int] | None:
    """The leg on which the host sends `value`, and the number of samples in it; None for all other values.

    The prompts' leg is not among them, because there every argument of a call is serialized separately.
    """
    match value:
        case {"experience": [_, *_] as batches}:
            return EXPERIENCES, sum(len(batch.sequences) for batch in batches)
        case {"sequences": [_, *_] as batches}:
            return TOKENS, sum(map(len, batches))
        case [{"observation_tokens": _}, *_] as samples:
            return RESPONSES, len(samples)
        case (list() as samples, dict(), _, _) if samples and _is(samples[0], "Experience"):
            return QUEUE, len(samples)
        case [first, *_] as batches if _is(first, "Tensor"):
            return LOG_PROBS, sum(map(len, batches))
    return None


def _is(value, name: str) -> bool:
    """By name, because this must not import torch into a process."""
    return type(value).__name__ == name


def _is_tokenizer(value) -> bool:
    """A tokenizer, or what our runs send once in its place."""
    return any(base.__name__ in ("PreTrainedTokenizerBase", "Sent") for base in type(value).__mro__)


def argument(values: list, name: str):
    """The argument `name` of a call, which Ray turns into a list of names and values; None if there is none."""
    places = [i for i, value in enumerate(values) if type(value) is str and value == name]
    return values[places[0] + 1] if places else None


# ---- bytes and seconds of Ray's serialization -----------------------------------------------------------------------


def serialize(wrapped, _context, args, kwargs):
    result, seconds = timed(wrapped, *args, **kwargs)
    value, call = args[0], state("call")
    if state("spent") is not None:
        local.spent += seconds
    elif call is not None:
        part = call[TOKENIZER if _is_tokenizer(value) else PROMPTS]
        for name, number in {"bytes": result.total_bytes, **compare(value)}.items():
            part[name] += number
    elif leg := leg_of(value):
        write(leg=leg[0], samples=leg[1], side="out", bytes=result.total_bytes)
        if not _in_event_loop():
            write(leg=leg[0], samples=leg[1], side="both", **compare(value))
    return result


def dispatch(wrapped, generator, args, kwargs):
    """The host's `_dispatch_prompts_to_vllm`. It serializes only arguments of calls, one call for each prompt."""
    local.call = {part: {"bytes": 0, "stock": 0.0, "ours": 0.0} for part in (PROMPTS, TOKENIZER)}
    try:
        refs = wrapped(*args, **kwargs)
        samples = len(refs) * generator.args.rollout.n_samples_per_prompt
        for part, sums in local.call.items():
            write(leg=part, samples=samples, side="out", bytes=sums.pop("bytes"))
            write(leg=part, samples=samples, side="both", **sums)
    finally:
        local.call = None
    return refs


def deserialize(wrapped, _context, args, kwargs):
    received, seconds = timed(wrapped, *args, **kwargs)
    if state("spent") is not None:
        local.spent += seconds
        return received
    if samples := argument(received, "num_samples"):
        for leg in (PROMPTS, TOKENIZER):
            write(leg=leg, samples=samples, side="in")
    for value in received:
        if found := leg_of(value):
            leg, samples = found
            write(leg=leg, samples=samples, side="in")
            if leg == RESPONSES and not _in_event_loop():  # the sender has an event loop
                write(leg=leg, samples=samples, side="both", **compare(value))
    return received


def compare(value) -> dict[str, float]:
    """Seconds of serializing and deserializing `value`, and the stock host's value in its place.

    The same process does both, moments apart, so that other work on the machine affects both.
    """
    import ray

    pair, seconds = [("stock", without_tags(value)), ("ours", value)], {"stock": 0.0, "ours": 0.0}
    coin.shuffle(pair)
    try:
        for name, value in (pair + pair[::-1]) * 2:
            local.spent = 0.0
            ray.get(ray.put(value))
            seconds[name] += local.spent / 4
    finally:
        local.spent = None
    return seconds


def without_tags(value):
    """`value` with plain strings instead of tagged prompts.

    Each is a separate string, because an engine returns one copy of a plain prompt for each sample.
    """
    match value:
        case str() if type(value) is not str:
            return str(value)
        case list() | tuple():
            return type(value)(map(without_tags, value))
        case dict():
            return {key: without_tags(entry) for key, entry in value.items()}
    if _is(value, "Experience"):
        value = copy(value)
        value.prompts = without_tags(value.prompts)
    return value


def timed(function, *args, **kwargs):
    """(result, seconds)"""
    began = time.thread_time()
    result = function(*args, **kwargs)
    return result, time.thread_time() - began


def state(name: str):
    return getattr(local, name, None)


def _in_event_loop() -> bool:
    """In an event loop, waiting for an object would block all other work."""
    import ray

    return ray._private.worker.global_worker.core_worker.current_actor_is_asyncio()


# ---- seconds of our own code, and of the host's code instead of it --------------------------------------------------


def clock(module, path: str, part: str) -> None:
    def clocked(wrapped, _instance, args, kwargs):
        result, seconds = timed(wrapped, *args, **kwargs)
        write(part=part, seconds=seconds)
        return result

    wrapt.wrap_function_wrapper(module, path, clocked)


def clock_log(module) -> None:
    def step(wrapped, _log, args, kwargs):
        the_hosts, *rest = args
        inside = []

        def clocked(*args, **kwargs):
            result, seconds = timed(the_hosts, *args, **kwargs)
            inside.append(seconds)
            return result

        result, seconds = timed(wrapped, clocked, *rest, **kwargs)
        write(part="log", seconds=seconds - sum(inside))
        return result

    wrapt.wrap_function_wrapper(module, "StepLog.step", step)


DATASET = {
    "openrlhf.datasets.utils": "blending_datasets",
    "openrlhf.datasets.prompts_dataset": "PromptDataset.__init__",
}


def clock_advantages(module) -> None:
    def compute(wrapped, maker, args, kwargs):
        (experiences,) = args
        the_hosts, first = deepcopy(experiences), coin.random() < 0.5
        if first:
            host_advantages(maker, the_hosts)
        result, seconds = timed(wrapped, experiences)
        write(part="advantages", seconds=seconds)
        if not first:
            host_advantages(maker, the_hosts)
        return result

    wrapt.wrap_function_wrapper(module, "PreferenceExperienceMaker.compute_advantages_and_returns", compute)
    clock(module, "PreferenceExperienceMaker._reward_batch", "reward batch")


def host_advantages(maker, experiences) -> None:
    """Runs the host's own `group_norm` in the process of ours, on the same experiences."""
    args = deepcopy(maker.args)
    args.algo.advantage.estimator = "group_norm"
    stand_in = copy(maker)
    stand_in.advantage_estimator, stand_in.strategy = "group_norm", SimpleNamespace(args=args)
    (host_class,) = type(maker).__bases__
    _, seconds = timed(host_class.compute_advantages_and_returns, stand_in, experiences)
    write(part="advantages, host", seconds=seconds)


def clock_metrics(module) -> None:
    clock(module, "by_pref_group", "metrics")
    clock_log(module)


def watch_generator(module) -> None:
    module.SamplingParams = partial(module.SamplingParams, ignore_eos=True)  # answers of equal length
    wrapt.wrap_function_wrapper(module, "SamplesGenerator._dispatch_prompts_to_vllm", dispatch)


# ---- how the probe gets into every process --------------------------------------------------------------------------


def setup_worker() -> None:
    """Ray's `worker_process_setup_hook`: the probe in two halves, and our own hooks between them."""
    import ray._private.serialization as serialization

    from openrlhf_pgrpo.host.ppo import worker

    for name, path in DATASET.items():  # before ours, so that our replacements call them
        wrapt.register_post_import_hook(partial(clock, path=path, part="dataset, host"), name)
    worker.setup()
    for name, path in DATASET.items():
        wrapt.register_post_import_hook(partial(clock, path=path, part="dataset"), name)
    wrapt.register_post_import_hook(clock_advantages, "openrlhf_pgrpo.host.ppo.experience_maker")
    pick = partial(clock, path="SamplePicker.pick", part="samples")
    wrapt.register_post_import_hook(pick, "openrlhf_pgrpo.host.run_log")
    wrapt.register_post_import_hook(clock_metrics, "openrlhf_pgrpo.host.ppo.metrics")
    wrapt.register_post_import_hook(watch_generator, "openrlhf.trainer.ppo_utils.samples_generator")
    count_serialization(serialization)


def count_serialization(module) -> None:
    wrapt.wrap_function_wrapper(module, "SerializationContext.serialize", serialize)
    wrapt.wrap_function_wrapper(module, "SerializationContext.deserialize_objects", deserialize)


def write(**row) -> None:
    import ray

    row |= {"node": ray.get_runtime_context().get_node_id(), "process": _actor_class(ray)}
    with open(os.path.join(os.environ[FOLDER], f"{os.getpid()}.jsonl"), "a") as file:
        file.write(json.dumps(row) + "\n")


def _actor_class(ray) -> str | None:
    return next((type(actor).__name__ for actor in ray._private.worker.global_worker.actors.values()), None)


def main() -> None:
    import ray

    from openrlhf_pgrpo.host import doors

    def init(wrapped, _instance, args, kwargs):
        environment = kwargs["runtime_env"]
        environment["worker_process_setup_hook"] = f"transport_probe.{setup_worker.__name__}"
        environment["env_vars"] |= {
            name: os.environ[name] for name in (FOLDER, "PYTHONPATH")
        }  # nodes may have been started without them
        return wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(ray, "init", init)
    doors.PPO.run()


if __name__ == "__main__":
    main()
