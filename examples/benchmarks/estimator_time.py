"""How long advantages take: P-GRPO's estimators and the host's group_norm, on the same rewards, in one run.

    python examples/benchmarks/estimator_time.py [--largest 1000000] [--repeats 15] [--threads 1]

There are three tables. Times are medians. A ratio is the median of the ratios of all repeats; in each, both sides run
one after the other.

1. The estimator call alone and the host's arithmetic alone: rewards into prompt order, mean and standard deviation of
   each prompt group, back into sample order. Neither includes reading experiences, or the host's logging of
   `group_reward_std`. "first" is the first step of a run, which has no history and uses the batch alone. "batch" is
   the `RewardBatch`: names become numbers and every prompt group is checked.
2. The whole `compute_advantages_and_returns`, ours and the host's, in micro-batches of 16 answers of 8 tokens. This is
   the real cost in a step. Ours includes the batch, and the metrics of every preference group.
3. Memory per preference group, for a history of each size, and after ten times as many samples.

The host's arithmetic is float32 in torch, on one thread unless --threads says otherwise. Ours is float64 in NumPy, on
one thread. Samples come prompt by prompt, as the host numbers them, 8 per prompt. The preference group of a prompt is
drawn at random.
"""

import argparse
import logging
import os
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import torch

from openrlhf_pgrpo.core.estimator import RewardBatch, make_advantage_estimator
from openrlhf_pgrpo.core.pgrpo import PGRPOOptions

OURS = ("pgrpo", "pgrpo_eb")
SAMPLES_PER_PROMPT, MICRO_BATCH, TOKENS = 8, 16, 8
WARM_UP = 2  # steps after which every preference group has `--pgrpo.min_count` samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--largest", type=int, default=10**6, help="most samples: 1000, 10,000, ... up to this")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="threads of the host's arithmetic, in torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = [10**k for k in range(3, 10) if 10**k <= args.largest]

    print(f"1. the estimator alone; threads: host {args.threads}, ours 1")
    print(f"{'':20}{'time in ms':>36}   {'ratio to the host':>39}")
    columns = ("host", "batch", *OURS, *OURS, *(f"{name} first" for name in OURS))
    print(f"{'samples':>9}{'pref. groups':>14}" + "".join(f"{name:>{max(9, len(name) + 2)}}" for name in columns))
    for samples in sizes:
        for pref_groups in pref_group_counts(samples):
            print(f"{samples:9}{pref_groups:14}{estimators_alone(samples, pref_groups, args.repeats)}", flush=True)

    print("\n2. all of compute_advantages_and_returns")
    columns = ("host", *OURS, *OURS)
    print(f"{'':20}{'time in ms':>27}   {'ratio to the host':>18}")
    print(f"{'samples':>9}{'pref. groups':>14}" + "".join(f"{name:>10}" for name in columns))
    makers = {name: experience_maker(name) for name in ("group_norm", *OURS)}
    for samples in sizes:
        pref_groups = pref_group_counts(samples)[-1]
        print(f"{samples:9}{pref_groups:14}{whole_call(makers, samples, pref_groups, args.repeats)}", flush=True)

    print("\n3. bytes per preference group: in memory with its name, and as saved")
    print(f"{'pref. groups':>14}{'':4}" + "".join(f"{name:>11}{'x 10':>7}{'saved':>7}" for name in OURS))
    for pref_groups in sizes:
        print(f"{pref_groups:14}{'':4}" + "".join(memory(name, pref_groups) for name in OURS), flush=True)


def pref_group_counts(samples: int) -> list[int]:
    """10, 100, ... as long as each has a prompt."""
    return [10**k for k in range(1, 9) if 10**k * SAMPLES_PER_PROMPT <= samples]


class Step:
    """The samples of one training step. Every preference group has some."""

    def __init__(self, samples: int, pref_groups: int, seed: int, samples_per_prompt: int = SAMPLES_PER_PROMPT):
        rng = np.random.default_rng(seed)
        prompts = samples // samples_per_prompt
        self.prompt_groups = np.repeat(np.arange(prompts), samples_per_prompt)
        self.owners = [f"preference group {g}" for g in rng.permutation(prompts) % pref_groups]  # a string per prompt
        self.rewards = torch.from_numpy(rng.standard_normal(samples).astype(np.float32))

    def batch(self) -> tuple[float, RewardBatch]:
        """The batch, and the seconds it takes to make it."""
        names = [self.owners[prompt] for prompt in self.prompt_groups]
        return timed(RewardBatch, self.rewards.double().numpy(), self.prompt_groups, names, names, names)


def timed(function, *args):
    """(seconds, result)"""
    began = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - began, result


def group_norm(rewards: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The host's arithmetic for `group_norm`. `whole_call` checks that the host gives the same result."""
    by_prompt = torch.empty_like(rewards)
    by_prompt[index] = rewards
    by_prompt = by_prompt.reshape(-1, SAMPLES_PER_PROMPT)
    mean, std = by_prompt.mean(-1, keepdim=True), by_prompt.std(-1, keepdim=True)
    return ((by_prompt - mean) / (std + 1e-9)).reshape(-1)[index]


def fresh_call(name: str, batch: RewardBatch) -> np.ndarray:
    """The advantages of an estimator without history."""
    return make_advantage_estimator(name, PGRPOOptions())(batch)


def estimators_alone(samples: int, pref_groups: int, repeats: int) -> str:
    known = {name: make_advantage_estimator(name, PGRPOOptions()) for name in OURS}
    index = torch.arange(samples)
    seconds = []
    for repeat in range(WARM_UP + repeats):
        step = Step(samples, pref_groups, repeat)
        encoding, batch = step.batch()
        row = [timed(group_norm, step.rewards, index)[0], encoding]
        row += [timed(known[name], batch)[0] for name in OURS]
        row += [timed(fresh_call, name, batch)[0] for name in OURS]
        seconds.append(row)
    seconds = np.array(seconds[WARM_UP:])
    milliseconds, ratios = 1e3 * np.median(seconds[:, :4], 0), np.median(seconds[:, 2:] / seconds[:, :1], 0)
    texts = [f"{value:9.2f}" for value in milliseconds] + [f"{value:9.2f}" for value in ratios[:2]]
    return "".join(texts + [f"{value:{len(name) + 8}.2f}" for name, value in zip(OURS, ratios[2:])])


# ---- the whole call -------------------------------------------------------------------------------------------------


def experience_maker(name: str, samples_per_prompt: int = SAMPLES_PER_PROMPT):
    """The host's experience maker for `group_norm`, ours for our estimators. Neither needs Ray to compute
    advantages."""
    from openrlhf_pgrpo.host import device, hooks
    from openrlhf_pgrpo.host.ppo.seams import SEAMS

    os.environ[hooks.DEVICE] = "cpu"
    os.environ.update(device.environment())
    hooks.register(SEAMS)
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker as Ours

    logging.disable(logging.INFO)
    (host_class,) = Ours.__bases__
    # The arguments of a run that the two read.
    args = SimpleNamespace(
        algo=SimpleNamespace(
            advantage=SimpleNamespace(estimator=name, gamma=1.0, no_std_norm=False), dynamic_filtering_enable=False
        ),
        data=SimpleNamespace(pref_group_key="persona"),
        logger=SimpleNamespace(metrics_path=None),
        rollout=SimpleNamespace(n_samples_per_prompt=samples_per_prompt),
        reward=SimpleNamespace(clip_range=(-10, 10), remote_url="reward.py"),
        pgrpo=SimpleNamespace(plugin=None, **vars(PGRPOOptions())),
        robust=SimpleNamespace(estimator=None),
    )
    models = SimpleNamespace(async_run_method=None)
    tokenizer = SimpleNamespace(decode=lambda *args, **kwargs: "")
    maker_class = host_class if name == "group_norm" else Ours
    kl_controller, strategy = SimpleNamespace(value=0.0), SimpleNamespace(args=args)
    return maker_class(models, None, None, None, kl_controller, strategy, tokenizer)


def experiences(step: Step) -> list:
    """The argument of `compute_advantages_and_returns` for `step`."""
    from openrlhf.trainer.ppo_utils.experience import Experience

    from openrlhf_pgrpo.host.tags import TaggedPrompt

    prompts = [TaggedPrompt(f"prompt {q}", owner, "user") for q, owner in enumerate(step.owners)]
    result = []
    for index in torch.arange(len(step.rewards)).split(MICRO_BATCH):
        rewards, shape = step.rewards[index], (len(index), TOKENS)
        result.append(
            Experience(
                index=index.tolist(),
                prompts=[prompts[step.prompt_groups[i]] for i in index.tolist()],
                labels=[""] * len(index),
                rewards=rewards,
                sequences=torch.zeros(len(index), TOKENS + 1, dtype=torch.int64),
                action_mask=torch.ones(shape, dtype=torch.bool),
                kl=torch.zeros(shape),
                response_length=torch.full((len(index),), TOKENS),
                truncated=torch.zeros(len(index), dtype=torch.bool),
                info={"reward": rewards},
            )
        )
    return result


def whole_call(makers: dict, samples: int, pref_groups: int, repeats: int) -> str:
    seconds = []
    for repeat in range(WARM_UP + max(1, repeats // 3)):  # the largest call takes seconds
        step = Step(samples, pref_groups, repeat)
        row = []
        for name, maker in makers.items():
            given = experiences(step)
            taken, made = timed(maker.compute_advantages_and_returns, given)
            row.append(taken)
            if name == "group_norm":
                found = torch.cat([experience.advantages[:, 0] for experience in made])
                if not torch.equal(found, group_norm(step.rewards, torch.arange(samples))):
                    raise SystemExit("table 1 needs the host's group_norm, got other advantages: correct group_norm")
        seconds.append(row)
    seconds = np.array(seconds[WARM_UP:])
    milliseconds, ratios = 1e3 * np.median(seconds, 0), np.median(seconds[:, 1:] / seconds[:, :1], 0)
    return "".join([f"{value:10.1f}" for value in milliseconds] + [f"{value:10.2f}" for value in ratios])


# ---- memory ---------------------------------------------------------------------------------------------------------


def memory(name: str, pref_groups: int) -> str:
    """Bytes per preference group: in memory after one and after ten samples of each, and in `state_dict`."""
    prompts, nobody = np.arange(pref_groups), [None] * pref_groups
    estimator = make_advantage_estimator(name, PGRPOOptions())
    held = []
    tracemalloc.start()
    for step in range(10):
        names = [f"preference group {g}" for g in prompts]
        estimator(RewardBatch(np.full(pref_groups, float(step)), prompts, names, nobody, nobody))
        del names
        held.append(tracemalloc.get_traced_memory()[0] / pref_groups)
    tracemalloc.stop()
    state = estimator.state_dict()["history"]
    saved = sum(getattr(value, "nbytes", 0) for value in state.values()) + len(state["names"])
    return f"{held[0]:11.0f}{held[-1]:7.0f}{saved / pref_groups:7.0f}"


if __name__ == "__main__":
    main()
