"""Weights that lift the preference group that does worst: mirror ascent on the simplex (arXiv 2405.20304).

    min over the policy, max over alpha in the simplex, of  sum_g alpha_g L_g

The paper's Algorithm 1 draws a sample of preference group g with loss l and first updates the weights,

    alpha_g <- alpha_g exp(eta (N / N_g) l),    alpha <- alpha / sum(alpha)

and then takes the gradient of N alpha_g / N_g times l. For a batch of B samples, B_g of them of g with mean loss
L_g, the exponent is eta (N / N_g) (B_g / B) L_g: one sample gives Algorithm 1, all samples give eta L_g (Algorithms 2
and 3), and the size of the batch does not change the pace. Everything is kept as log alpha, so no step size or loss
overflows.

Axes: B samples, G preference groups, N_g samples of a preference group in the data, N = sum N_g.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openrlhf_pgrpo.core.names import NamedColumns, Names, listed
from openrlhf_pgrpo.core.options import check_options, option

LARGEST = 1e300  # Exponents are clipped to +-1e300 so that float64 never overflows.
SMALLEST = 1e-150  # Weights that underflowed to 0 count as this, so that they can be raised to a least weight.


@dataclass(frozen=True)
class RobustOptions:
    """How the weights move. The text of each field says where it comes from.

    Raises:
        ValueError: a value outside its range.
    """

    eta: float = option(
        0.1,
        "Step size of the mirror ascent (arXiv 2405.20304, Algorithm 1). Default 0.1: a preference group whose loss "
        "stays 0.1 above another's doubles its weight relative to the other in 70 steps. Losses of IPO are large: for "
        "them the paper's language model uses 5e-7.",
    )
    sampling: str = option(
        "natural",
        "natural (default): batches are drawn from all data, and exponents carry N / N_g (arXiv 2405.20304, "
        "Algorithm 1). balanced: every preference group is drawn equally often, and exponents do not carry it "
        "(Algorithm 3).",
        ("natural", "balanced"),
    )
    chi: float = option(
        1.0,
        "Trade-off (1 - chi) mu + chi alpha between fixed weights and the adversary (arXiv 2405.20304, appendix B.4). "
        "Default 1: the adversary alone. 0: static importance weights, the baseline.",
    )
    mu: str = option(
        "uniform",
        "The fixed weights. uniform (default): the same for all; with chi 0, importance sampling. share: each group's "
        "share of the data; with chi 0, ordinary training, but for lengths in a loss over tokens. Or a JSON object of "
        'numbers that add up to 1, {"ana": 0.7, "ben": 0.3}.',
    )
    weight_min: float = option(
        0.1, "Least weight of a sample, before lengths count; the mean over a batch stays 1. Default 0.1 (ours)."
    )
    weight_max: float = option(
        10.0, "Largest weight of a sample, before lengths count; the mean over a batch stays 1. Default 10 (ours)."
    )

    def __post_init__(self):
        check_options(
            self,
            {
                "eta": ("a finite number >= 0", 0 <= self.eta < np.inf),
                "chi": ("a number from 0 to 1", 0 <= self.chi <= 1),
                "weight_min": ("a number from 0 to 1", 0 <= self.weight_min <= 1),
                "weight_max": ("a number of at least 1", self.weight_max >= 1),
            },
        )
        fixed_weights(self.mu)


def fixed_weights(mu: str) -> dict[str, float]:
    """The weights of the option `mu` by name, rescaled to add up to exactly 1; {} for uniform and share."""
    if mu in ("uniform", "share"):
        return {}
    weights = read_json("mu", mu)
    numbers = [value for value in weights.values() if is_number(value)] if isinstance(weights, dict) else []
    if not numbers or len(numbers) < len(weights):
        raise ValueError(f"mu needs uniform, share or a JSON object of numbers, got {mu!r}")
    if not all(0 <= value <= 1 for value in numbers) or abs(sum(numbers) - 1) > 1e-6:
        raise ValueError(f"mu needs numbers from 0 to 1 that add up to 1, got {mu!r}")
    total = sum(numbers)
    return {name: value / total for name, value in weights.items()}


def read_json(name: str, text: str) -> Any:
    """What the option `name` says in JSON; None if it is not JSON.

    Raises:
        ValueError: an object has a key more than once, of which Python would silently take the last.
    """
    twice: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        twice.extend(key for key, count in counts.items() if count > 1)
        return dict(pairs)

    try:
        found = json.loads(text, object_pairs_hook=once)
    except (ValueError, TypeError, RecursionError):
        return None
    if twice:
        raise ValueError(
            f"{name} needs every preference group once, got {text!r}, with {listed(twice)} more than once"
        )
    return found


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a number: true and false, which Python counts as 1 and 0, are none."""
    return type(value) in (int, float)


def uniform(size: int) -> np.ndarray:
    """1 / size, (size,)."""
    return np.full(size, 1 / max(size, 1))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log of the weights (..., G) that are proportional to exp(logits)."""
    logits = np.clip(logits, -LARGEST, LARGEST)  # a new array, so the rest may happen in place
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits


def ascend(log_alpha: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """One step of exponentiated gradient on log alpha (..., G): alpha_g exp(gain_g), renormalised; gains (..., G)."""
    return log_softmax(log_alpha + gains)


def trade_off(alpha: np.ndarray, mu: np.ndarray, chi: float) -> np.ndarray:
    """Weights (..., G): (1 - chi) mu + chi alpha."""
    return (1 - chi) * mu + chi * alpha


def mean_one(weights: np.ndarray, low: float, high: float) -> np.ndarray:
    """c times weights (B,), clipped to low ... high, with the c that makes their mean 1; low <= 1 <= high.

    Clipping changes the mean and rescaling leaves the range, so neither can come last; one c does both. If nothing
    needs clipping, c is 1 / mean. Otherwise it is found by bisection: with c = 1 / max all weights are at most 1, with
    c = 1 / min at least 1, and in between the mean only rises.
    """
    if not len(weights):
        return weights
    weights = np.maximum(weights, SMALLEST)
    scaled = weights / weights.mean()
    if low <= scaled.min() and scaled.max() <= high:
        return scaled
    below, above = 1 / weights.max(), 1 / weights.min()
    for _ in range(64):  # halvings of log c, after which below and above are neighbours in float64
        c = np.sqrt(below * above)
        if (c * weights).clip(low, high).mean() < 1:
            below = c
        else:
            above = c
    return (above * weights).clip(low, high)


class GroupWeights(NamedColumns):
    """alpha, one weight per preference group, and the weights of samples that follow from it.

    Args:
        options: how the weights move.
        counts: N_g of every preference group in the data. None: preference groups (unless `options.mu` names them) and
            their samples are counted as they appear. A new preference group gets the average weight, the 1 / G that
            all begin with. The others keep their ratios.

    Attributes, all (G,) float64, one row per name in `names`:
        log_alpha: of the adversary, before the trade-off.
        loss: the last one of each preference group, NaN before the first.
        count: N_g.

    Raises:
        ValueError: a preference group without samples; a single one, which leaves nothing to weigh; or preference
            groups that differ from those of `options.mu`.
    """

    columns = {"log_alpha": 0.0, "loss": np.nan, "count": 0.0}
    log_alpha: np.ndarray
    loss: np.ndarray
    count: np.ndarray

    def __init__(self, options: RobustOptions, counts: Mapping[str, float] | None = None):
        super().__init__()
        self.options = options
        self.fixed = counts is not None
        self._mu = fixed_weights(options.mu)
        self._complete = False
        names = list(self._mu if counts is None else counts)
        self.rows(names)
        self._complete = self.fixed or bool(names)
        if self._complete and len(names) < 2:
            raise ValueError(f"weights need at least two preference groups, got {names}: train without them")
        if self._mu and set(names) != set(self._mu):
            raise ValueError(f"mu needs the preference groups {listed(names)}, got {listed(self._mu)}")
        if counts is not None:
            self.count = np.array([*counts.values()], np.float64)
            empty = [name for name, count in counts.items() if not 0 < count < np.inf]
            if empty:
                raise ValueError(f"every preference group needs samples, got {counts[empty[0]]} of {listed(empty)}")

    @property
    def share(self) -> np.ndarray:
        """p_g = N_g / N, (G,); equal shares before the first sample."""
        total = self.count.sum()
        return self.count / total if total else uniform(len(self))

    @property
    def mu(self) -> np.ndarray:
        """The fixed weights (G,)."""
        if self._mu:
            return np.array([self._mu[name] for name in self.names])
        return self.share if self.options.mu == "share" else uniform(len(self))

    @property
    def alpha(self) -> np.ndarray:
        """The weights (G,), on the simplex, after the trade-off."""
        return trade_off(np.exp(self.log_alpha), self.mu, self.options.chi)

    def rows(self, names: Sequence[str]) -> np.ndarray:
        """Row numbers (k,) int64 of preference groups `names` (k,).

        Raises:
            ValueError: all preference groups were given at the start, and a name is not among them.
        """
        unknown = [name for name in dict.fromkeys(names) if name not in self.names] if self._complete else []
        if unknown:
            raise ValueError(f"weights need one of the preference groups {listed(self.names)}, got {listed(unknown)}")
        before = len(self)
        rows = super().rows(names)
        if len(self) > before:
            self.log_alpha[before:] = -np.log(max(before, 1))
            self.log_alpha = log_softmax(self.log_alpha)
        return rows

    def update(self, rows: np.ndarray, losses: np.ndarray, samples: np.ndarray) -> None:
        """One step of ascent on the losses of a batch. A preference group that is not in it keeps its loss.

        Args:
            rows: (k,) preference groups in the batch, each once. losses: (k,) means. samples: (k,) numbers of them.

        Raises:
            ValueError: a loss that is not finite, a preference group without samples, or a row that appears twice.
                Nothing is changed.
        """
        if not len(rows):
            return
        rows, losses, samples = np.asarray(rows), np.asarray(losses, np.float64), np.asarray(samples, np.float64)
        self._check(rows, losses, samples)
        self.loss[rows] = losses
        if not self.fixed:
            self.count[rows] += samples
        gains = np.zeros(len(self))
        with np.errstate(over="ignore"):  # `ascend` clips infinity to LARGEST
            gains[rows] = self.options.eta * losses
            if self.options.sampling == "natural":
                gains[rows] *= samples / self.count[rows] * (self.count.sum() / samples.sum())
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
                name = self.names[rows[bad]]
                raise ValueError(f"weights need {need}, got {values[bad]} of preference group {name!r}")
        seen = np.zeros(len(self), bool)
        seen[rows] = True
        if seen.sum() < len(rows):
            twice = self.names[int(np.bincount(rows).argmax())]
            raise ValueError(f"weights need each row once, got preference group {twice!r} more than once")

    def sample_weights(self, rows: np.ndarray) -> np.ndarray:
        """w = alpha_g / p_g (B,) of samples of the preference groups `rows` (B,), brought to mean 1 inside the range
        of `options` by `mean_one`."""
        return mean_one(self.group_weights()[rows], self.options.weight_min, self.options.weight_max)

    def group_weights(self) -> np.ndarray:
        """alpha_g / p_g (G,), neither clipped nor rescaled: the N alpha_g / N_g of the paper; 1 before a preference
        group has samples."""
        share = self.share
        return np.divide(self.alpha, share, out=np.ones(len(self)), where=share > 0)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces the content by `state`, including the order of rows.

        Raises:
            ValueError: this is no state of this class, or it was made on other data: preference groups or their counts
                differ. Nothing is changed.
        """
        self._replace(*self.check_state(state))

    def check_state(self, state: dict[str, Any]) -> tuple[Names, dict[str, np.ndarray]]:
        """Raises what `load_state_dict` would and changes nothing. Returns the names (G,) and columns of `state`."""
        names, columns = self._read(state)
        self._check_data(names, columns["count"])
        return names, columns

    def _check_data(self, names: Names, count: np.ndarray) -> None:
        if self._complete and {*names} != {*self.names}:
            raise ValueError(f"resuming needs the preference groups {listed(names)}, got {listed(self.names)}")
        here = self.count[self.rows(names)] if self.fixed else count
        differ = np.flatnonzero(count != here)
        if len(differ):
            row = differ[0]
            raise ValueError(
                f"resuming needs the data on which the weights were made, {count[row]:.0f} samples of "
                f"preference group {names[row]!r}, got {here[row]:.0f}"
            )
