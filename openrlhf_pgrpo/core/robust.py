"""Weights that lift the preference group that does worst: mirror ascent on the simplex (arXiv 2405.20304).

    min over the policy, max over alpha in the simplex, of  sum_g alpha_g L_g

The paper's Algorithm 1 draws a sample of preference group g with loss l and then updates the weights,

    alpha_g <- alpha_g exp(eta (N / N_g) l),    alpha <- alpha / sum(alpha)

before its gradient, of N alpha_g / N_g times l, is taken. For a batch of B samples, B_g of them of g with mean loss
L_g, the exponent is eta (N / N_g) (B_g / B) L_g: one sample gives Algorithm 1, all samples give eta L_g (Algorithms 2
and 3), and the size of the batch does not change the pace. Everything is kept as log alpha, so no step size or loss
overflows.

Axes: B samples, G preference groups, N_g samples of a preference group in the data, N = sum N_g.
"""

import json
from dataclasses import dataclass, fields
from typing import Mapping, Optional, Sequence

import numpy as np

from openrlhf_pgrpo.core.history import pack_names, unpack_names
from openrlhf_pgrpo.core.options import option

LARGEST = 1e300  # of an exponent: what float64 cannot hold, and what is larger, counts as this
SMALLEST = 1e-150  # of a weight: what underflowed to 0 can still be raised to a least weight


@dataclass(frozen=True)
class RobustOptions:
    """How the weights move. Each field is a flag `--robust.<name>`; its help says where it comes from.

    Raises:
        ValueError: a value outside its range.
    """

    eta: float = option(
        0.1,
        float,
        "Step size of the mirror ascent (arXiv 2405.20304, Algorithm 1). Default 0.1: a preference group whose loss "
        "stays 0.1 above another's doubles its weight against it in 70 steps. Losses of IPO are large: the paper's "
        "language model takes 5e-7 there.",
    )
    update: str = option(
        "cumulative",
        str,
        "cumulative (default, arXiv 2405.20304): exponents add up, so a preference group that never catches up takes "
        "all. softmax (arXiv 2601.19280): alpha is the softmax of eta times the smoothed losses, so ratios stay "
        "within exp(eta x range).",
        ("cumulative", "softmax"),
    )
    sampling: str = option(
        "natural",
        str,
        "natural (default): batches are drawn from all data, and cumulative exponents carry N / N_g (arXiv "
        "2405.20304, Algorithm 1). balanced: every preference group is drawn equally often, and they do not "
        "(Algorithm 3).",
        ("natural", "balanced"),
    )
    smoothing: float = option(
        1.0,
        float,
        "Weight of the new loss in the running mean of a preference group's losses (arXiv 2601.19280, which takes "
        "0.12). Default 1: no memory, as in arXiv 2405.20304.",
    )
    adjustment: float = option(
        0.0,
        float,
        "C of C / sqrt(N_g), added to the loss of a preference group because small ones generalise worse "
        "(arXiv 1911.08731, section 3.3). Default 0.",
    )
    floor: float = option(
        0.0,
        float,
        "gamma of (1 - gamma) alpha + gamma / G, which keeps the adversary's weight on each preference group above "
        "gamma / G (arXiv 2601.19280, which takes 0.01). Default 0, as in arXiv 2405.20304.",
    )
    chi: float = option(
        1.0,
        float,
        "Trade-off (1 - chi) mu + chi alpha between fixed weights and the adversary (arXiv 2405.20304, appendix B.4). "
        "Default 1: the adversary alone. 0: static importance weights, the baseline.",
    )
    mu: str = option(
        "uniform",
        str,
        "The fixed weights: uniform (default; with chi 0 importance sampling), share (that of the data; with chi 0 "
        'ordinary training), or a JSON object of numbers that add up to 1, {"ana": 0.7, "ben": 0.3}.',
    )
    weight_min: float = option(
        0.1, float, "Least weight of a sample; the mean over a batch is 1 all the same. Default 0.1 (ours)."
    )
    weight_max: float = option(
        10.0, float, "Largest weight of a sample; the mean over a batch is 1 all the same. Default 10 (ours)."
    )

    def __post_init__(self):
        for spec in fields(self):
            value, choices = getattr(self, spec.name), spec.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"--robust.{spec.name} needs one of {', '.join(choices)}, got {value!r}")
        ranges = {
            "eta": ("a finite number >= 0", 0 <= self.eta < np.inf),
            "smoothing": ("a number above 0 and up to 1", 0 < self.smoothing <= 1),
            "adjustment": ("a finite number >= 0", 0 <= self.adjustment < np.inf),
            "floor": ("a number from 0 to 1", 0 <= self.floor <= 1),
            "chi": ("a number from 0 to 1", 0 <= self.chi <= 1),
            "weight_min": ("a number from 0 to 1", 0 <= self.weight_min <= 1),
            "weight_max": ("a number of at least 1", 1 <= self.weight_max),
        }
        for name, (need, holds) in ranges.items():
            if not holds:
                raise ValueError(f"--robust.{name} needs {need}, got {getattr(self, name)!r}")
        _fixed_weights(self.mu)


def _fixed_weights(text: str) -> dict[str, float]:
    """The weights of `--robust.mu` by name, rescaled to add up to 1 to the last digit; {} for uniform and share."""
    if text in ("uniform", "share"):
        return {}
    try:
        weights = json.loads(text)
        numbers = [value for value in weights.values() if type(value) in (int, float)]
    except (ValueError, AttributeError, TypeError):
        weights, numbers = {}, []
    if not weights or len(numbers) < len(weights):
        raise ValueError(f"--robust.mu needs uniform, share or a JSON object of numbers, got {text!r}")
    if not all(0 <= value <= 1 for value in numbers) or abs(sum(numbers) - 1) > 1e-6:
        raise ValueError(f"--robust.mu needs numbers from 0 to 1 that add up to 1, got {text!r}")
    total = sum(numbers)
    return {name: value / total for name, value in weights.items()}


def some(names: Sequence[str], most: int = 8) -> str:
    """Names for an error message, which nobody reads to the end when there are a million."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def uniform(size: int) -> np.ndarray:
    """1 / size, (size,); nothing for nothing."""
    return np.full(size, 1 / max(size, 1))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log of the weights (..., G) that are proportional to exp(logits), with the maximum taken out first."""
    logits = np.clip(logits, -LARGEST, LARGEST)  # a new array, so that the rest may happen in place
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits


def ascend(log_alpha: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """One step of exponentiated gradient on log alpha (..., G): alpha_g exp(gain_g), renormalised; gains (..., G)."""
    return log_softmax(log_alpha + gains)


def trade_off(alpha: np.ndarray, mu: np.ndarray, chi: float, floor: float) -> np.ndarray:
    """Weights (..., G): (1 - chi) mu + chi ((1 - floor) alpha + floor / G)."""
    return (1 - chi) * mu + chi * ((1 - floor) * alpha + floor * uniform(alpha.shape[-1]))


def mean_one(weights: np.ndarray, low: float, high: float) -> np.ndarray:
    """c times weights (B,), clipped to low ... high, with the c that makes their mean 1; low <= 1 <= high.

    Clipping moves a mean and rescaling leaves a range, so neither can come last; one c does both. If nothing needs
    clipping, c is 1 / mean. Otherwise it is found by bisection: with c = 1 / max all are at most 1, and with 1 / min
    at least, and in between the mean only rises.
    """
    if not len(weights):
        return weights
    weights = np.maximum(weights, SMALLEST)
    scaled = weights / weights.mean()
    if low <= scaled.min() and scaled.max() <= high:
        return scaled
    below, above = 1 / weights.max(), 1 / weights.min()
    for _ in range(64):  # of the logarithm of c: after them below and above are neighbours in float64
        c = np.sqrt(below * above)
        if (c * weights).clip(low, high).mean() < 1:
            below = c
        else:
            above = c
    return (above * weights).clip(low, high)


class GroupWeights:
    """alpha, one weight per preference group, and the weights of samples that follow from it.

    Args:
        options: how the weights move.
        counts: N_g of every preference group in the data. None: preference groups (unless `options.mu` names them) and
            their samples are counted as they come. A new one gets the average weight, which is the 1 / G that all
            begin with, and the others keep their ratios.

    Attributes, all (G,) float64, one row per name in `names`: log_alpha of the adversary, before floor and trade-off;
    smoothed, the running mean of losses, NaN before the first; count, N_g.

    Raises:
        ValueError: a preference group without samples; a single one, over which there is nothing to weigh; or other
            preference groups than those of `options.mu`.
    """

    columns = ("log_alpha", "smoothed", "count")

    def __init__(self, options: RobustOptions, counts: Optional[Mapping[str, float]] = None):
        self.options = options
        self.fixed = counts is not None
        self._given_mu = _fixed_weights(options.mu)
        names = list(counts if self.fixed else self._given_mu)
        self._complete = self.fixed or bool(names)
        if self._complete and len(names) < 2:
            raise ValueError(f"weights need at least two preference groups, got {names}: train without them")
        if self._given_mu and set(names) != set(self._given_mu):
            raise ValueError(f"--robust.mu needs the preference groups {some(names)}, got {some([*self._given_mu])}")
        self._rows: dict[str, int] = {}
        self.log_alpha, self.smoothed, self.count = np.zeros((3, 0))
        self._add(names)
        if self.fixed:
            self.count = np.array([*counts.values()], np.float64)
            empty = [name for name, count in counts.items() if not 0 < count < np.inf]
            if empty:
                raise ValueError(f"every preference group needs samples, got {counts[empty[0]]} of {some(empty)}")

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def names(self) -> list[str]:
        """Preference groups in row order."""
        return list(self._rows)

    @property
    def share(self) -> np.ndarray:
        """p_g = N_g / N, (G,); equal shares before the first sample."""
        total = self.count.sum()
        return self.count / total if total else uniform(len(self))

    @property
    def alpha(self) -> np.ndarray:
        """The weights (G,), on the simplex, with floor and trade-off."""
        o = self.options
        return trade_off(np.exp(self.log_alpha), self._mu(), o.chi, o.floor)

    def rows(self, names: Sequence[str]) -> np.ndarray:
        """Row numbers (k,) int64 of preference groups `names` (k,).

        Raises:
            ValueError: the preference groups were given at the start, and a name is none of them.
        """
        new = [name for name in dict.fromkeys(names) if name not in self._rows]
        if new and self._complete:
            raise ValueError(f"weights need one of the preference groups {some(self.names)}, got {some(new)}")
        self._add(new)
        return np.fromiter(map(self._rows.__getitem__, names), np.int64, len(names))

    def update(self, rows: np.ndarray, losses: np.ndarray, samples: np.ndarray) -> None:
        """One step of ascent on what a batch showed; a preference group that was not in it keeps its loss.

        Args:
            rows: (k,) those in the batch, each once. losses: (k,) mean loss of each. samples: (k,) of each.

        Raises:
            ValueError: a loss that is not finite, a preference group without samples, or a row that comes twice.
                Nothing is changed.
        """
        if not len(rows):
            return
        o = self.options
        rows, losses, samples = np.asarray(rows), np.asarray(losses, np.float64), np.asarray(samples, np.float64)
        self._check(rows, losses, samples)
        smoothed = losses
        if o.smoothing < 1:
            before = self.smoothed[rows]
            smoothed = np.where(np.isnan(before), losses, (1 - o.smoothing) * before + o.smoothing * losses)
        count = self.count[rows] + (0 if self.fixed else samples)
        self.smoothed[rows], self.count[rows] = smoothed, count
        with np.errstate(over="ignore"):  # infinity then counts as LARGEST
            if o.update == "softmax":
                logits = np.clip(self._logits(self.smoothed, self.count), -LARGEST, LARGEST)
                unknown = np.isnan(logits)
                if unknown.any():
                    logits[unknown] = logits[~unknown].mean()
                self.log_alpha = log_softmax(logits)
            else:
                gains, scale = np.zeros(len(self)), 1.0
                if o.sampling == "natural":
                    scale = samples / count * (self.count.sum() / samples.sum())
                gains[rows] = self._logits(smoothed, count) * scale
                self.log_alpha = ascend(self.log_alpha, gains)

    def _check(self, rows: np.ndarray, losses: np.ndarray, samples: np.ndarray) -> None:
        if not (rows.ndim == 1 and rows.shape == losses.shape == samples.shape):
            shapes = rows.shape, losses.shape, samples.shape
            raise ValueError(f"weights need a loss and a number of samples for each row, got shapes {shapes}")
        needs = {
            "a finite loss": (losses, np.isfinite(losses)),
            "samples": (samples, (samples > 0) & (samples < np.inf)),
        }
        for need, (values, good) in needs.items():
            if not good.all():
                bad = np.argmin(good)
                raise ValueError(f"weights need {need}, got {values[bad]} of preference group {self._name(rows[bad])}")
        seen = np.zeros(len(self), bool)
        seen[rows] = True
        if seen.sum() < len(rows):
            twice = self._name(np.bincount(rows).argmax())
            raise ValueError(f"weights need each row once, got preference group {twice} more often")

    def _logits(self, smoothed: np.ndarray, count: np.ndarray) -> np.ndarray:
        """What a preference group's loss adds to its exponent; the arguments and the result have equal shapes."""
        if self.options.adjustment:
            smoothed = smoothed + self.options.adjustment / np.sqrt(np.maximum(count, 1))
        return self.options.eta * smoothed

    def sample_weights(self, rows: np.ndarray) -> np.ndarray:
        """w = alpha_g / p_g (B,) of samples of the preference groups `rows` (B,), brought to mean 1 inside the range
        of `options` by `mean_one`."""
        return mean_one(self.group_weights()[rows], self.options.weight_min, self.options.weight_max)

    def group_weights(self) -> np.ndarray:
        """alpha_g / p_g (G,), neither clipped nor rescaled: the N alpha_g / N_g of the paper; 1 before a preference
        group has samples."""
        share = self.share
        return np.divide(self.alpha, share, out=np.ones(len(self)), where=share > 0)

    def _add(self, names: list[str]) -> None:
        if names:
            average = np.full(len(names), -np.log(max(len(self), 1)))
            self._rows.update(zip(names, range(len(self), len(self) + len(names))))
            self.log_alpha = log_softmax(np.append(self.log_alpha, average))
            self.smoothed = np.append(self.smoothed, np.full(len(names), np.nan))
            self.count = np.append(self.count, np.zeros(len(names)))

    def _mu(self) -> np.ndarray:
        if self._given_mu:
            return np.array([self._given_mu[name] for name in self._rows])
        return self.share if self.options.mu == "share" else uniform(len(self))

    def _name(self, row: int) -> str:
        return repr(self.names[row])

    def state_dict(self) -> dict:
        """A copy of everything, exact to the bit after `load_state_dict`."""
        text, lengths = pack_names(self.names)
        columns = {column: getattr(self, column).copy() for column in self.columns}
        return {"names": text, "name_lengths": lengths, **columns}

    def load_state_dict(self, state: dict) -> None:
        """Replaces the content by `state`, whose order of rows it takes over.

        Raises:
            ValueError: not a state of this class, or one of other data: other preference groups, or counts of them.
                Nothing is changed.
        """
        needs = {"names", "name_lengths", *self.columns}
        if set(state) != needs:
            raise ValueError(f"GroupWeights state needs keys {sorted(needs)}, got {sorted(state)}")
        names = unpack_names(state["names"], state["name_lengths"])
        rows = dict(zip(names, range(len(names))))
        columns = {column: np.array(state[column], np.float64) for column in self.columns}
        shapes = {column: values.shape for column, values in columns.items()}
        if len(rows) != len(names) or {*shapes.values()} != {(len(names),)}:
            raise ValueError(f"GroupWeights state needs one row per distinct name of {len(rows)}, got shapes {shapes}")
        if self._complete and rows.keys() != self._rows.keys():
            raise ValueError(f"resuming needs the preference groups {some(names)}, got {some(self.names)}")
        if self.fixed:
            there, here = columns["count"], self.count[[self._rows[name] for name in names]]
            if (there != here).any():
                row = np.argmax(there != here)
                raise ValueError(
                    f"resuming needs the data under which the weights were made, {there[row]:.0f} samples of "
                    f"preference group {names[row]!r}, got {here[row]:.0f}"
                )
        self._rows = rows
        for column, values in columns.items():
            setattr(self, column, values)
