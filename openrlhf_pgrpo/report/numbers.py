"""The arithmetic of a report: rewards pooled over many steps, running means, quantiles over preference groups.

Axes: S steps, B bins of steps, N rows (step and preference group), G preference groups, D of them drawn.
"""

from dataclasses import dataclass

import numpy as np

from openrlhf_pgrpo.core.history import Moments, ratio
from openrlhf_pgrpo.report.runs import Run

MIN_SAMPLES = 8  # in both quarters; preference groups with fewer are the worst only if no group has this many
QUANTILES = (0.1, 0.5, 0.9)
EVALUATION = "eval_"  # begins the name of each metric of an evaluation


def reward_moments(run: Run, steps: np.ndarray) -> Moments:
    """Count, mean and M2 (G,) of all rewards in the steps where `steps` (S,) is true.

    Each row has the n, mean and standard deviation of its rewards, which is enough: M2 = sum n (std^2 + (mean - m)^2).
    A row that lacks one of the three does not count.
    """
    count, mean, std = (run.value(key) for key in ("samples", "reward_mean", "reward_std"))
    rows = steps[run.row_step] & np.isfinite(count + mean + std) & (count > 0)
    group, count, mean, std = run.row_group[rows], count[rows], mean[rows], std[rows]
    size = len(run.pref_groups)
    total = np.bincount(group, count, size)
    centre = ratio(np.bincount(group, count * mean, size), total)
    return Moments(total, centre, np.bincount(group, count * (std**2 + (mean - centre[group]) ** 2), size))


def standard_error(moments: Moments) -> np.ndarray:
    """The standard error (G,) of each mean, as if samples were independent: the root of M2 / (n (n - 1)). NaN below
    two samples, which say nothing about their spread."""
    return np.where(moments.count > 1, moments.std(ddof=1) / np.sqrt(np.maximum(moments.count, 1)), np.nan)


def samples_of(run: Run) -> np.ndarray:
    """Samples (G,) of each preference group in all steps, whether or not they have a reward: preference training calls
    its pairs so."""
    return np.bincount(run.row_group, np.nan_to_num(run.value("samples")), len(run.pref_groups))


def weight_of(run: Run, key: str) -> np.ndarray:
    """What each row (N,) of the metric `key` counts in a mean: its samples, and in an evaluation the pairs there, or 1
    if they were not recorded. A preference group may be in an evaluation and not in the batch of that step."""
    if not key.startswith(EVALUATION):
        return run.value("samples")
    pairs = run.value(EVALUATION + "pairs")
    return np.where(np.isfinite(pairs) & (key != EVALUATION + "pairs"), pairs, 1.0)


@dataclass(frozen=True)
class Summary:
    """How each preference group of a run did; all (G,).

    first, last, whole: moments of the rewards in the first quarter, the last quarter and all of the steps.
    samples: in all steps, with or without rewards. share: part of all samples. change, error: last mean - first mean
    and its standard error; NaN where a quarter is empty or there is one step only, and no error where it has one
    sample. gain, gain_error: both in standard deviations of the preference group's own rewards; NaN for constant
    rewards.
    """

    quarter: int
    first: Moments
    last: Moments
    whole: Moments
    samples: np.ndarray
    share: np.ndarray
    change: np.ndarray
    error: np.ndarray
    gain: np.ndarray
    gain_error: np.ndarray

    @property
    def worst(self) -> int | None:
        """The preference group that gained least; None unless two can be compared."""
        order = self.worst_first()
        return int(order[0]) if len(order) > 1 else None

    def worst_first(self) -> np.ndarray:
        """Preference groups with a gain, least gain first. Those with few samples come last."""
        known = np.flatnonzero(np.isfinite(self.gain))
        few = np.minimum(self.first.count, self.last.count)[known] < MIN_SAMPLES
        return known[np.lexsort((self.gain[known], few))]

    @property
    def lowest(self) -> int | None:
        """The preference group with the lowest mean reward in the last quarter; None unless there are two."""
        known = np.flatnonzero(self.last.count > 0)
        return int(known[np.argmin(self.last.mean[known])]) if len(known) > 1 else None


def summarise(run: Run) -> Summary:
    steps = len(run.steps)
    quarter = max(1, steps // 4)
    index = np.arange(steps)
    parts = (index < quarter, index >= steps - quarter, index >= 0)
    first, last, whole = (reward_moments(run, part) for part in parts)
    known = (first.count > 0) & (last.count > 0) & (steps > 1)
    change = np.where(known, last.mean - first.mean, np.nan)
    error = np.where(known, np.hypot(standard_error(first), standard_error(last)), np.nan)
    # Rewards that differ by rounding alone have no scale.
    std = whole.std()
    scale = np.where(std > 1e-9 * np.abs(whole.mean), std, np.nan)
    samples = samples_of(run)
    share = ratio(samples, np.full_like(samples, samples.sum()))
    return Summary(quarter, first, last, whole, samples, share, change, error, change / scale, error / scale)


def gains(run: Run, summary: Summary) -> np.ndarray:
    """Reward (N,) of each row minus its preference group's first quarter, in standard deviations of the group."""
    start = np.where(summary.first.count > 0, summary.first.mean, np.nan)
    scale = np.where(np.isfinite(summary.gain), summary.whole.std(), np.nan)
    return (run.value("reward_mean") - start[run.row_group]) / scale[run.row_group]


def bin_steps(steps: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The bin (S,) of each step, and the middle step (B,) of each bin: at most `limit` bins of nearly equal size."""
    bins = min(len(steps), limit)
    bin_of = np.arange(len(steps)) * bins // len(steps)
    edges = np.searchsorted(bin_of, np.arange(bins + 1))
    return bin_of, steps[(edges[:-1] + edges[1:] - 1) // 2]


def bin_means(values: np.ndarray, bin_of: np.ndarray) -> np.ndarray:
    """Mean (B,) of the finite `values` (S,) of each bin."""
    known = np.isfinite(values)
    bins = bin_of[-1] + 1
    return _mean(np.bincount(bin_of[known], minlength=bins), np.bincount(bin_of[known], values[known], bins))


def bin_groups(run: Run, values, std, groups: np.ndarray, bin_of: np.ndarray, weight=None) -> Moments:
    """Moments (D, B) of `values` (N,), weighted by `weight` (N,), of some preference groups.

    `groups` (D,) are rows of `run.pref_groups`, or -1 for one that the run does not have. `std` (N,): None is 0.
    `weight`: None is the number of samples.
    """
    wanted = np.full(len(run.pref_groups) + 1, -1)  # the last entry is for the -1
    wanted[groups] = np.arange(len(groups))
    std = np.zeros(len(values)) if std is None else std
    count = run.value("samples") if weight is None else weight
    rows = (wanted[run.row_group] >= 0) & np.isfinite(count + values + std) & (count > 0)
    shape = (len(groups), bin_of[-1] + 1)
    cell = wanted[run.row_group[rows]] * shape[1] + bin_of[run.row_step[rows]]
    count, values, std = count[rows], values[rows], std[rows]
    total = np.bincount(cell, count, shape[0] * shape[1])
    mean = ratio(np.bincount(cell, count * values, len(total)), total)
    m2 = np.bincount(cell, count * (std**2 + (values - mean[cell]) ** 2), len(total))
    return Moments(*(column.reshape(shape) for column in (total, mean, m2)))


def running(moments: Moments, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (..., B) of all samples in `window` bins around each bin. NaN without samples.

    Two passes over each window, so that a large reward costs only the windows with it any digits.
    """
    count = running_sum(moments.count, window)
    mean = _mean(count, running_sum(moments.count * moments.mean, window))
    off = _windows(moments.mean, window) - np.nan_to_num(mean)[..., None]
    m2 = running_sum(moments.m2, window) + (_windows(moments.count, window) * off**2).sum(-1)
    return mean, np.sqrt(_mean(count, m2))


def running_sum(values: np.ndarray, window: int) -> np.ndarray:
    """Sum over the `window` (odd) values around each along the last axis; fewer at the ends."""
    return _windows(values, window).sum(-1)


def _windows(values: np.ndarray, window: int) -> np.ndarray:
    """The values (..., B, window) around each along the last axis; 0 beyond the ends."""
    beyond = [(0, 0)] * (values.ndim - 1) + [(window // 2, window // 2)]
    return np.lib.stride_tricks.sliding_window_view(np.pad(values, beyond), window, axis=-1)


def quantile_band(run: Run, values: np.ndarray, among: np.ndarray, bin_of: np.ndarray, weight=None) -> np.ndarray:
    """QUANTILES (3, B) over the preference groups where `among` (G,) is true. Each group counts once in a bin, by its
    mean of `values` (N,) there, weighted by `weight` (N,), None being the number of samples."""
    count = run.value("samples") if weight is None else weight
    rows = among[run.row_group] & np.isfinite(count + values) & (count > 0)
    size, bins = len(run.pref_groups), int(bin_of[-1]) + 1
    cells, cell = np.unique(bin_of[run.row_step[rows]] * size + run.row_group[rows], return_inverse=True)
    total = np.bincount(cell, count[rows] * values[rows], len(cells))
    means = ratio(total, np.bincount(cell, count[rows], len(cells)))
    bin_of_cell = cells // max(size, 1)
    means = np.append(means[np.lexsort((means, bin_of_cell))], np.nan)  # for bins without a group
    edges = np.searchsorted(bin_of_cell, np.arange(bins + 1))
    place = edges[:-1] + np.multiply.outer(QUANTILES, np.diff(edges) - 1)
    low = np.floor(place).astype(int)
    inside = means[np.minimum(low + 1, len(means) - 1)] - means[low]
    band = means[low] + np.where(place > low, (place - low) * inside, 0)
    return np.where(np.diff(edges) > 0, band, np.nan)


def _mean(count: np.ndarray, total: np.ndarray) -> np.ndarray:
    return np.where(count > 0, ratio(total, count), np.nan)


def differing(tables: list[dict]) -> list[tuple[str, list]]:
    """Keys whose values differ between tables, with the value in each table. A missing value is None."""
    keys = {key: None for table in tables for key in table}
    rows = [(key, [table.get(key) for table in tables]) for key in keys]
    return [(key, values) for key, values in rows if any(_differ(value, values[0]) for value in values)]


def _differ(a, b) -> bool:
    return repr(a) != repr(b)  # by repr, NaN equals itself and True differs from 1
