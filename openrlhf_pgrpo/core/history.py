"""Running reward statistics per preference group, in float64, vectorised over a batch.

Axes: B samples, P prompt groups, G preference groups.

Updates follow Welford's online moments in their batch form, the pairwise merge of Chan, Golub and LeVeque (1979):

    n = n_a + n_b      d = mean_b - mean_a
    mean = mean_a + d n_b / n        M2 = M2_a + M2_b + d^2 n_a n_b / n
"""

from typing import Any, NamedTuple

import numpy as np

from openrlhf_pgrpo.core.names import NamedColumns, need_keys


class Moments(NamedTuple):
    """Count, mean and M2 (sum of squared deviations) of each of G segments, all (G,) float64."""

    count: np.ndarray  # type: ignore[assignment]  # hides the method of tuples, which nobody needs here
    mean: np.ndarray
    m2: np.ndarray

    def std(self, ddof: int = 0) -> np.ndarray:
        """Standard deviation (G,), the root of M2 / (n - ddof); 0 where that is undefined."""
        return np.sqrt(ratio(self.m2, self.count - ddof))


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """`numerator / denominator` where the denominator is positive, else 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator, dtype=np.float64), where=denominator > 0)


def varies(std: np.ndarray, mean: np.ndarray, eps: float) -> np.ndarray:
    """Whether `std` can be divided by: it is above eps, and above the rounding error of rewards as large as `mean`."""
    return std > eps + 1e-12 * np.abs(mean)


def segment_means(rows: np.ndarray, values: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Count and mean (G,) of `values` (B,) in each of `size` segments; `rows` (B,) has the segment of each value."""
    count = np.bincount(rows, minlength=size).astype(np.float64)
    return count, ratio(np.bincount(rows, values, size), count)


def segment_moments(rows: np.ndarray, values: np.ndarray, size: int) -> Moments:
    """Moments of `values` (B,) in each of `size` segments; `rows` (B,) has the segment of each value.

    Two passes over the values, so a large common offset costs no digits.
    """
    count, mean = segment_means(rows, values, size)
    return Moments(count, mean, np.bincount(rows, np.square(values - mean[rows]), size))


def segment_owners(segments: np.ndarray, owners: np.ndarray, size: int) -> np.ndarray:
    """The owner of each of `size` segments, from the owner of each sample (B,). Of several owners, the last wins."""
    of_segment = np.zeros(size, owners.dtype)
    of_segment[segments] = owners
    return of_segment


def without_gaps(prompt_groups: np.ndarray) -> np.ndarray:
    """Prompt groups (B,) renumbered 0 ... P-1. Numbers without gaps are returned as they are, which saves a sort."""
    size = prompt_groups.max(initial=-1) + 1
    if size <= len(prompt_groups) and np.bincount(prompt_groups).all():
        return prompt_groups
    return np.unique(prompt_groups, return_inverse=True)[1]


class RewardHistory(NamedColumns):
    """Count, mean and M2 of all rewards a preference group has ever received (arXiv 2603.10009, Welford).

    A group that is absent from a batch stays as it is. A whole batch is one update, so the order of its samples does
    not matter.

    Args:
        half_life: None keeps every reward for ever (the paper). A number h > 0 halves a reward's weight after h
            further samples *of its own preference group*; `count` is then the sum of weights. With b samples of the
            group in each batch it levels off at b / (1 - 2^(-b/h)): near h / ln 2 for small b, near b for large b.

    Attributes, all (G,) float64, one row per name in `names`:
        seen: samples ever received, never forgotten.
        count, mean, m2: moments under the weights above; without a half-life `count` equals `seen`.
    """

    columns = {"seen": 0.0, "count": 0.0, "mean": 0.0, "m2": 0.0}
    seen: np.ndarray
    count: np.ndarray
    mean: np.ndarray
    m2: np.ndarray

    def __init__(self, half_life: float | None = None):
        if half_life is not None and not half_life > 0:
            raise ValueError(f"half_life needs a positive number of samples or None, got {half_life!r}")
        super().__init__()
        self.half_life = half_life

    @property
    def moments(self) -> Moments:
        return Moments(self.count, self.mean, self.m2)

    def spread(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weight, mean and standard deviation of single rewards, all (G,)."""
        return self.count, self.mean, self.moments.std()

    def update(self, rows: np.ndarray, rewards: np.ndarray) -> None:
        """Adds one batch: `rewards` (B,) of the preference groups in `rows` (B,), row numbers from `rows()`."""
        batch = segment_moments(rows, rewards, len(self))
        self._absorb(seen=batch.count, **batch._asdict())

    def _absorb(self, seen: np.ndarray, count: np.ndarray, mean: np.ndarray, m2: np.ndarray, **sums) -> None:
        """Forgets by `seen` new samples, then merges moments and adds the other `sums`; every argument is (G,)."""
        keep = 1.0 if self.half_life is None else np.exp2(-seen / self.half_life)
        old_count = self.count * keep
        self.count = old_count + count
        share = ratio(count, self.count)
        delta = mean - self.mean
        self.m2 = self.m2 * keep + m2 + np.square(delta) * old_count * share
        self.mean = self.mean + delta * share
        self.seen = self.seen + seen
        for column, values in sums.items():
            setattr(self, column, getattr(self, column) * keep + values)

    def state_dict(self) -> dict[str, Any]:
        return {"half_life": self.half_life, **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces the content by `state`.

        Raises:
            ValueError: `state` was made under another half-life, or is no state of this class. Nothing is changed.
        """
        need_keys(self, state, {"half_life", "names", "name_lengths", *self.columns})
        if state["half_life"] != self.half_life:
            raise ValueError(f"half_life is {self.half_life!r} here but {state['half_life']!r} in the saved history")
        super().load_state_dict({key: value for key, value in state.items() if key != "half_life"})


class VarianceComponents(RewardHistory):
    """One-way random effects per preference group: how prompts differ, and how answers to one prompt differ.

        R = mean + b + e,   b ~ (0, tau2) per prompt group,   e ~ (0, sig2) per sample

    Here count, mean and m2 are moments of the *prompt-group means*. Besides, `within_ss` and `within_df` are the
    pooled sum of squares inside prompt groups and its degrees of freedom, and `inverse_n` is the sum of 1/n over
    prompt groups of n samples. A half-life is still counted in samples and forgets all of them alike.
    Only `add_prompts` adds batches.
    """

    columns = {**RewardHistory.columns, "within_ss": 0.0, "within_df": 0.0, "inverse_n": 0.0}
    within_ss: np.ndarray
    within_df: np.ndarray
    inverse_n: np.ndarray

    def add_prompts(self, prompt_rows: np.ndarray, prompts: Moments) -> None:
        """Adds one batch: the moments (P,) of each prompt group, and the row (P,) of its preference group."""
        size = len(self)
        between = segment_moments(prompt_rows, prompts.mean, size)
        self._absorb(
            seen=np.bincount(prompt_rows, prompts.count, size),
            **between._asdict(),
            within_ss=np.bincount(prompt_rows, prompts.m2, size),
            within_df=np.bincount(prompt_rows, prompts.count - 1, size),
            inverse_n=np.bincount(prompt_rows, 1 / prompts.count, size),
        )

    def spread(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.samples, self.mean, np.sqrt(self.sig2() + self.tau2())

    @property
    def samples(self) -> np.ndarray:
        """Weight of all samples, (G,)."""
        return self.count + self.within_df

    def sig2(self) -> np.ndarray:
        """Variance within prompt groups, (G,); 0 while every prompt group had a single sample."""
        return ratio(self.within_ss, self.within_df)

    def tau2(self) -> np.ndarray:
        """Variance between prompts, (G,): the variance of prompt means less sig2 * mean(1/n), but at least 0.

        The variance of k means divides by k, so that one sample a prompt makes `pgrpo_eb` the paper's `pgrpo`. After a
        few prompts it is therefore low, and the baseline nearer to the history.
        """
        noise = self.sig2() * ratio(self.inverse_n, self.count)
        return np.maximum(np.square(self.moments.std()) - noise, 0.0)
