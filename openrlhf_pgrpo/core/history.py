"""Running reward statistics per preference group, in float64, vectorised over a batch.

Axes: B samples, P prompt groups, G preference groups.

Updates follow Welford's online moments in their batch form, the pairwise merge of Chan, Golub and LeVeque (1979):

    n = n_a + n_b      d = mean_b - mean_a
    mean = mean_a + d n_b / n        M2 = M2_a + M2_b + d^2 n_a n_b / n
"""

from typing import NamedTuple, Optional, Sequence

import numpy as np

VARIANCES = ("population", "sample")


class Moments(NamedTuple):
    """Count, mean and M2 (sum of squared deviations) of each of G segments, all (G,) float64."""

    count: np.ndarray
    mean: np.ndarray
    m2: np.ndarray

    def std(self, variance: str = "population") -> np.ndarray:
        """Standard deviation (G,): M2/n ("population") or M2/(n-1) ("sample"); 0 where that is undefined."""
        return np.sqrt(ratio(self.m2, self.count - (variance == "sample")))


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """`numerator / denominator` where the denominator is positive, else 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator, dtype=np.float64), where=denominator > 0)


def segment_means(rows: np.ndarray, values: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Count and mean of `values` (B,) in each of `size` segments named by `rows` (B,)."""
    count = np.bincount(rows, minlength=size).astype(np.float64)
    return count, ratio(np.bincount(rows, values, size), count)


def segment_moments(rows: np.ndarray, values: np.ndarray, size: int) -> Moments:
    """Moments of `values` (B,) in each of `size` segments named by `rows` (B,); two passes, so large offsets cost
    no digits."""
    count, mean = segment_means(rows, values, size)
    return Moments(count, mean, np.bincount(rows, np.square(values - mean[rows]), size))


def segment_owners(segments: np.ndarray, owners: np.ndarray, size: int) -> np.ndarray:
    """The owner of each of `size` segments, given that of each sample (B,); in a mixed segment the last one's."""
    of_segment = np.zeros(size, owners.dtype)
    of_segment[segments] = owners
    return of_segment


def without_gaps(prompt_groups: np.ndarray) -> np.ndarray:
    """Prompt groups renumbered 0 ... P-1; as they are if numbered so already, which spares a sort."""
    size = prompt_groups.max(initial=-1) + 1
    if size <= len(prompt_groups) and np.bincount(prompt_groups).all():
        return prompt_groups
    return np.unique(prompt_groups, return_inverse=True)[1]


def pack_names(names: list[str]) -> tuple[bytes, np.ndarray]:
    """Names as one text in UTF-8 and the characters of each: strings one by one would fill most of a checkpoint's
    time. Half a surrogate pair, which JSON allows, passes too."""
    return "".join(names).encode("utf-8", "surrogatepass"), np.fromiter(map(len, names), np.int32, len(names))


def unpack_names(text: bytes, lengths: np.ndarray) -> list[str]:
    text, ends = text.decode("utf-8", "surrogatepass"), [0, *np.cumsum(lengths).tolist()]
    if len(text) != ends[-1]:
        raise ValueError(f"names need as many characters as their lengths add up to, {ends[-1]}, got {len(text)}")
    return [text[start:end] for start, end in zip(ends, ends[1:])]


class _Rows(dict):
    """Name -> row number; an unknown name gets the next row."""

    def __missing__(self, name: str) -> int:
        self[name] = len(self)
        return self[name]


class RewardHistory:
    """Count, mean and M2 of all rewards a preference group has ever received (arXiv 2603.10009, Welford).

    Nothing happens to a group that is absent from a batch. A whole batch is one update, so the order of samples
    inside it does not matter.

    Args:
        half_life: None keeps every reward for ever (the paper). A number h > 0 lets a reward's weight fall to one half
            after h further samples *of its own preference group*; `count` is then the sum of weights and levels off
            near h / ln 2.

    Attributes, all (G,) float64, one row per name in `names`:
        seen: samples ever received, never forgotten.
        count, mean, m2: moments under the weights above; without a half-life `count` equals `seen`.
    """

    columns = ("seen", "count", "mean", "m2")

    def __init__(self, half_life: Optional[float] = None):
        if half_life is not None and not half_life > 0:
            raise ValueError(f"half_life needs a positive number of samples or None, got {half_life!r}")
        self.half_life = half_life
        self._rows = _Rows()
        for column in self.columns:
            setattr(self, column, np.zeros(0))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def names(self) -> list[str]:
        """Preference groups in row order."""
        return list(self._rows)

    @property
    def moments(self) -> Moments:
        return Moments(self.count, self.mean, self.m2)

    def rows(self, names: Sequence[str]) -> np.ndarray:
        """Row numbers (B,) int64 of preference groups `names` (B,); a new name gets an empty row."""
        rows = np.fromiter(map(self._rows.__getitem__, names), np.int64, len(names))
        new = np.zeros(len(self._rows) - len(self.count))
        if len(new):
            for column in self.columns:
                setattr(self, column, np.concatenate([getattr(self, column), new]))
        return rows

    def update(self, rows: np.ndarray, rewards: np.ndarray) -> None:
        """Adds one batch: `rewards` (B,) of the preference groups `rows` (B,), as `rows()` gives them."""
        batch = segment_moments(rows, rewards, len(self))
        self._absorb(seen=batch.count, **batch._asdict())

    def merge(self, later: "RewardHistory") -> None:
        """Adds a history of a later stream; the result is the history of both streams, one after the other.

        Raises:
            ValueError: the two were built with different half-lives.
        """
        if later.half_life != self.half_life:
            raise ValueError(f"merge needs equal half-lives, got {self.half_life!r} and {later.half_life!r}")
        rows = self.rows(later.names)
        columns = {column: np.zeros(len(self)) for column in self.columns}
        for column, values in columns.items():
            values[rows] = getattr(later, column)
        self._absorb(**columns)

    def _absorb(self, seen, count, mean, m2, **sums) -> None:
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

    def state_dict(self) -> dict:
        """A copy of everything, exact to the bit after `load_state_dict`."""
        columns = {column: getattr(self, column).copy() for column in self.columns}
        text, lengths = pack_names(self.names)
        return {"half_life": self.half_life, "names": text, "name_lengths": lengths, **columns}

    def load_state_dict(self, state: dict) -> None:
        """Replaces the content by `state`.

        Raises:
            ValueError: `state` was made under another half-life, or is not a state of this class. Nothing is changed.
        """
        needs = {"half_life", "names", "name_lengths", *self.columns}
        if set(state) != needs:
            raise ValueError(f"{type(self).__name__} state needs keys {sorted(needs)}, got {sorted(state)}")
        if state["half_life"] != self.half_life:
            raise ValueError(f"half_life is {self.half_life!r} here but {state['half_life']!r} in the saved history")
        names = unpack_names(state["names"], state["name_lengths"])
        rows = _Rows(zip(names, range(len(names))))
        sizes = {"names": len(names), **{column: len(state[column]) for column in self.columns}}
        if {*sizes.values()} != {len(rows)}:
            raise ValueError(f"{type(self).__name__} state needs one row per distinct name, got sizes {sizes}")
        columns = {column: np.array(state[column], np.float64) for column in self.columns}
        self._rows = rows
        for column, values in columns.items():
            setattr(self, column, values)


class VarianceComponents(RewardHistory):
    """One-way random effects per preference group: how prompts differ, and how answers to one prompt differ.

        R = mean + b + e,   b ~ (0, tau2) per prompt group,   e ~ (0, sig2) per sample

    Here count, mean and m2 are moments of the *prompt-group means*; beside them stand `within_ss` and `within_df`, the
    pooled sum of squares inside prompt groups and its degrees of freedom, and `inverse_n`, the sum of 1/n over prompt
    groups of n samples. A half-life is still counted in samples and forgets all of them alike.
    """

    columns = (*RewardHistory.columns, "within_ss", "within_df", "inverse_n")

    def update(self, rows: np.ndarray, rewards: np.ndarray, prompt_groups: np.ndarray) -> None:
        """Adds one batch; `prompt_groups` (B,) numbers the prompt groups 0 ... P-1.

        Raises:
            ValueError: one prompt group holds samples of two preference groups. Nothing is changed.
        """
        prompt_groups = without_gaps(prompt_groups)
        prompt_rows = segment_owners(prompt_groups, rows, prompt_groups.max(initial=-1) + 1)
        if not np.array_equal(prompt_rows[prompt_groups], rows):
            raise ValueError("variance components need prompt groups of one preference group each, got a mixed one")
        self.add_prompts(prompt_rows, segment_moments(prompt_groups, rewards, len(prompt_rows)))

    def add_prompts(self, prompt_rows: np.ndarray, prompts: Moments) -> None:
        """Adds one batch, of which the moments of each prompt group are known already, (P,), and its row, (P,)."""
        size = len(self)
        between = segment_moments(prompt_rows, prompts.mean, size)
        self._absorb(
            seen=np.bincount(prompt_rows, prompts.count, size),
            **between._asdict(),
            within_ss=np.bincount(prompt_rows, prompts.m2, size),
            within_df=np.bincount(prompt_rows, prompts.count - 1, size),
            inverse_n=np.bincount(prompt_rows, 1 / prompts.count, size),
        )

    @property
    def samples(self) -> np.ndarray:
        """Weight of all samples, (G,)."""
        return self.count + self.within_df

    def sig2(self) -> np.ndarray:
        """Variance within prompt groups, (G,); 0 while every prompt group had a single sample."""
        return ratio(self.within_ss, self.within_df)

    def tau2(self, variance: str = "population") -> np.ndarray:
        """Variance between prompts, (G,): what the prompt means vary beyond sig2 * mean(1/n), not below 0."""
        noise = self.sig2() * ratio(self.inverse_n, self.count)
        return np.maximum(np.square(self.moments.std(variance)) - noise, 0.0)
