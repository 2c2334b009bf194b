"""Rewards out of all proportion to the others of their preference group.

A single reward of 3e38 gives a history a standard deviation of 1e37. All later advantages of its preference group are
then 0, for ever and silently. Such a reward is a defect (a sentinel, a division by nearly 0, another unit), so it is
named. What is only rare or large is ordinary: 0 and 1, a 100 now and then, log-normal rewards, the first 1 after
thousands of 0.

    out of proportion:  |R - usual| > 1e5 max(|usual|, |mean|, std, 1),  or |R| > 1e30

mean and std are those of the history. `usual` is its mean once it has seen 16 samples, or as many as the batch has:
fewer do not outvote it. Before, it is the reward of the batch that three quarters of the batch do not exceed in size.
All of this is of the same preference group. Samples that a half-life has made light were seen all the same.

Axes: B samples, G segments (preference groups, or everybody).
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from openrlhf_pgrpo.core.estimator import RewardBatch, SampleError
from openrlhf_pgrpo.core.history import RewardHistory
from openrlhf_pgrpo.core.options import option

ENOUGH = 16  # samples after which a standard deviation is known to about 18 percent
PROPORTION = 1e5
NEVER_ORDINARY = 1e30
CLIPPED_TO = 10  # standard deviations from the mean: more would still make the history wide for long


def outliers_option() -> Any:
    """The option that says what happens to such a reward; every options class with a history has it."""
    return option(
        "refuse",
        "A reward out of all proportion to its history, such as 3e38 among 0 and 1. refuse (default): the run stops "
        "and names it, since it is a defect of the reward function, and would be the largest advantage of its batch. "
        "clip: it is named in a warning and counts as ten standard deviations from the mean of the history, or as a "
        "usual reward of the batch while there is no history.",
        ("refuse", "clip"),
    )


def in_proportion(
    batch: RewardBatch, names: Sequence[str], codes: np.ndarray, history: RewardHistory, outliers: str
) -> RewardBatch:
    """The batch without rewards that are out of all proportion to `history`, which stays as it is.

    Args:
        names: (G,) rows of the history, which may be new to it. codes: (B,) that of each sample.
        outliers: refuse or clip.

    Raises:
        SampleError: such a reward, and `outliers` is refuse, or there is no usual reward to clip it to.
    """
    rewards = batch.rewards
    if not (np.abs(rewards) > PROPORTION - 1).any():  # |R - c| > p max(|c|, 1) needs |R| > p - 1
        return batch
    seen, mean, std = known_moments(history, names)
    decides = seen >= np.minimum(ENOUGH, np.bincount(codes, minlength=len(names)))  # the history, not the batch
    usual = np.where(decides, mean, typical(rewards, codes, len(names)))
    scale = np.maximum.reduce([np.abs(usual), np.abs(mean), std, np.ones(len(names))])
    found = (np.abs(rewards - usual[codes]) > PROPORTION * scale[codes]) | (np.abs(rewards) > NEVER_ORDINARY)
    if not found.any():
        return batch
    hopeless = found & (np.abs(usual[codes]) > NEVER_ORDINARY)
    i = int(np.argmax(hopeless if hopeless.any() else found))
    g = codes[i]
    against = (
        f"whose history has mean {mean[g]:.4g} and standard deviation {std[g]:.4g} ({seen[g]:.0f} samples seen)"
        if decides[g]
        else f"which has {seen[g]:.0f} samples so far; a usual one of this batch is {usual[g]:.4g}"
    )
    what = (
        f"every reward needs to be in proportion to the others of its preference group, got {rewards[i]:.4g} for "
        f"sample {i} of preference group {batch.pref_groups[i]!r}, {against} ({found.sum()} of {len(rewards)} samples)"
    )
    if outliers == "refuse" or hopeless.any():
        raise SampleError(
            i,
            f"{what}: correct the reward function, give rewards in a smaller unit, or set the option outliers to clip",
        )
    warnings.warn(f"{what}: clipped, because the option outliers is clip", RuntimeWarning, stacklevel=2)
    reach = CLIPPED_TO * np.where(decides, std, 0.0)
    clipped = np.clip(rewards, (usual - reach)[codes], (usual + reach)[codes])
    return replace(batch, rewards=np.where(found, clipped, rewards))


def known_moments(history: RewardHistory, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples seen, and mean and standard deviation (G,) of the rewards that a history has of `names`; 0 of a new
    name."""
    rows, (_, *spread) = history.names.find(names), history.spread()
    seen, mean, std = (np.append(column, 0.0)[rows] for column in (history.seen, *spread))  # row -1 is appended
    return seen, mean, std


def typical(rewards: np.ndarray, codes: np.ndarray, size: int) -> np.ndarray:
    """The reward (G,) of each segment that three quarters of its samples do not exceed in size; codes (B,)."""
    order = np.lexsort((np.abs(rewards), codes))
    count = np.bincount(codes, minlength=size)
    first = np.cumsum(count) - count
    return rewards[order[first + 3 * (count - 1) // 4]]
