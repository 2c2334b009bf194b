"""Saving and loading a large reward history: seconds, and bytes on disk.

    python examples/benchmarks/history_file.py [--pref-groups 1000000] [--repeats 7]

The steps are those of a run: `state_dict`, the deep copy of every save, and `torch.save`, with which DeepSpeed writes
its model file and our state in it; then `torch.load` and `load_state_dict`. The loaded state is compared to the bit.
The policy's weights, which are in the same file, are not included. Times are medians.
"""

import argparse
import tempfile
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch

from openrlhf_pgrpo.core.estimator import RewardBatch, make_advantage_estimator
from openrlhf_pgrpo.core.pgrpo import PGRPOOptions

SAMPLES_PER_PROMPT = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pref-groups", type=int, default=10**6)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    parts = ("state_dict", "deepcopy", "torch.save", "torch.load", "load_state_dict")
    print(f"a history of {args.pref_groups} preference groups: seconds, and size on disk")
    print(f"{'':10}" + "".join(f"{part:>16}" for part in (*parts, "all of saving", "all of loading", "MB")))
    for name in ("pgrpo", "pgrpo_eb"):
        estimator = filled(name, args.pref_groups)
        runs = [save_and_load(estimator) for _ in range(args.repeats)]
        seconds, size = np.array([seconds for seconds, _ in runs]), runs[0][1]
        seconds = np.column_stack([seconds, seconds[:, :3].sum(1), seconds[:, 3:].sum(1)])
        texts = [f"{value:16.3f}" for value in np.median(seconds, 0)]
        print(f"{name:10}{''.join(texts)}{size / 1e6:16.3f}", flush=True)


def filled(name: str, pref_groups: int):
    """An estimator that has seen one prompt of each preference group. Names are as long as typical ids."""
    rng = np.random.default_rng(0)
    prompt_groups = np.repeat(np.arange(pref_groups), SAMPLES_PER_PROMPT)
    names = [f"preference group {g}" for g in prompt_groups]
    estimator = make_advantage_estimator(name, PGRPOOptions())
    estimator(RewardBatch(rng.standard_normal(len(names)), prompt_groups, names, names, names))
    return estimator


def save_and_load(estimator) -> tuple[list[float], int]:
    """Seconds of each part, and bytes of the file.

    Raises:
        SystemExit: the loaded state differs from the saved one.
    """
    clock = [time.perf_counter()]

    def lap(value):
        clock.append(time.perf_counter())
        return value

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model_states.pt"
        state = lap(estimator.state_dict())
        state = lap(deepcopy(state))
        lap(torch.save(state, path))
        loaded = lap(torch.load(path, weights_only=False))
        copy = type(estimator)(estimator.options)
        clock[-1] = time.perf_counter()
        lap(copy.load_state_dict(loaded))
        size = path.stat().st_size
    restored = copy.state_dict()["history"]
    if not all(np.array_equal(restored[key], value) for key, value in state["history"].items()):
        raise SystemExit("the loaded state needs to equal the saved one, got another")
    return list(np.diff(clock)), size


if __name__ == "__main__":
    main()
