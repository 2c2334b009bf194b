"""How long the weights of group-robust training take, for a batch with every preference group once.

    python examples/benchmarks/group_weights.py [--largest 1000000] [--repeats 15]

Median milliseconds of processor time, on one thread. "first" is the first update, "update" a later one. "alpha" is the
number to log, "samples" the weights of as many samples as there are preference groups, and "clipped" the same in a
range so narrow that many are clipped. Finding rows by name is not included; `estimator_time.py` measures it for
histories.
"""

import argparse
import time

import numpy as np

from openrlhf_pgrpo.core.group_weights import GroupWeights, RobustOptions, mean_one

PARTS = ("first", "update", "alpha", "samples", "clipped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--largest", type=int, default=10**6, help="most preference groups: 10, 100, ... up to this")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    print(f"{'pref. groups':>12}" + "".join(f"{part:>9}" for part in PARTS))
    for pref_groups in (10**k for k in range(1, 9) if 10**k <= args.largest):
        line = np.median([times(pref_groups, i) for i in range(args.repeats)], 0)
        print(f"{pref_groups:12}" + "".join(f"{1e3 * seconds:9.3f}" for seconds in line), flush=True)


def times(pref_groups: int, seed: int) -> list[float]:
    """Seconds of each of PARTS."""
    rng = np.random.default_rng(seed)
    weights = GroupWeights(RobustOptions())
    rows = rng.permutation(weights.rows([f"preference group {g}" for g in range(pref_groups)]))
    samples, losses = rng.integers(1, 9, pref_groups), rng.random((2, pref_groups))
    clock = [time.process_time()]
    for part in (
        lambda: weights.update(rows, losses[0], samples),
        lambda: weights.update(rows, losses[1], samples),
        lambda: weights.alpha,
        lambda: weights.sample_weights(rows),
        lambda: mean_one(weights.group_weights()[rows], 0.9, 1.1),
    ):
        part()
        clock.append(time.process_time())
    return list(np.diff(clock))


if __name__ == "__main__":
    main()
