"""What counts as the loss of a preference group in online training.

The paper on group-robust optimisation (arXiv 2405.20304) trains offline, on losses that are comparable between groups.
Online there are rewards, and the loss of a preference group is a choice. Two natural choices are traps
(`examples/group_robust_signals.py` measures both):

    the negative mean reward       compares zero points and units. The group whose rewards lie lowest takes all the
                                   weight, however well it does.
    the loss of the policy update  is -mean(A) on the policy's own samples. A is centred, so this is 0: no signal.

A signal here says how far a preference group is from what *it* can have. It is a number, in [0, 1] unless its class
says otherwise, that does not change when all rewards of the group are shifted or scaled:

    signal        L_g                                         what it needs
    quantiles     regret between its own running quantiles    nothing (default)
    bounds        regret between given bounds                 bounds of the mean reward, the option `bounds`
    excess        1 / (1 + exp(gain over the reference))      a start from the policy that is the reference
    improvement   lambda regret - fall of regret              lambda, the option `improvement_lambda`

Axes: B samples, G preference groups.
"""

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from openrlhf_pgrpo.core.estimator import LARGEST, RewardBatch
from openrlhf_pgrpo.core.group_weights import is_number, read_json
from openrlhf_pgrpo.core.history import RewardHistory, varies
from openrlhf_pgrpo.core.names import need_keys
from openrlhf_pgrpo.core.options import check_options, option
from openrlhf_pgrpo.core.outliers import ENOUGH, in_proportion, outliers_option

Z = 1.2816  # standard deviations from the mean of a normal distribution to its tenth and ninetieth percentile


@dataclass(frozen=True)
class SignalOptions:
    """What counts as the loss of a preference group.

    Raises:
        ValueError: bounds that are missing, not used, or the wrong way round; no reference.
    """

    signal: str = option(
        "quantiles",
        "Loss of a preference group. quantiles (default): where its mean reward lies between low and high quantiles "
        "of its own rewards so far, so neither their offset nor their scale counts; needs nothing. bounds: the same "
        "between given bounds; best where they are known. excess: falls as its mean reward rises above that of its "
        "first samples in the run. improvement: falls as its mean reward rises above that of its last batch, and with "
        "its mean reward (MT-GRPO, arXiv 2602.05547), on the scale of quantiles.",
        ("quantiles", "bounds", "excess", "improvement"),
    )
    bounds: str | None = option(
        None,
        "Worst and best mean reward that a preference group can have, for the signal bounds. JSON: [0, 1] for all "
        'groups, or {"ana": [0, 1], "ben": [-5, 5]}. Default: none.',
    )
    reference_samples: int = option(
        256,
        "Samples of each preference group at the start of training that stand for the reference policy, for the "
        "signal excess. Default 256: their mean is known to a sixteenth of their standard deviation, if they answer "
        "256 different prompts.",
    )
    improvement_lambda: float = option(
        1.0,
        "What the mean reward of a preference group counts beside its improvement, for the signal improvement. Large: "
        "weights follow the worst group; small: they stay balanced. Default 1 (ours): as fast as quantiles. MT-GRPO's "
        "own runs have 0.1 to 1.2.",
    )
    outliers: str = outliers_option()

    def __post_init__(self):
        check_options(
            self,
            {
                "reference_samples": ("at least 2", self.reference_samples >= 2),
                "improvement_lambda": ("a finite number >= 0", 0 <= self.improvement_lambda < np.inf),
            },
        )
        if (self.bounds is None) == (self.signal == "bounds"):
            raise ValueError(
                f"bounds and the signal bounds need each other, got signal {self.signal!r} and bounds "
                f"{self.bounds!r}: give both or neither"
            )
        if self.bounds is not None:
            read_bounds(self.bounds)


def read_bounds(text: str) -> dict[str, list[float]] | list[float]:
    """The option `bounds` as numbers: [low, high] for all preference groups, or one pair per group.

    Raises:
        ValueError: it is neither, names a preference group twice, low is not below high, or one of them is larger than
            a reward can be.
    """
    found = read_json("bounds", text)
    pairs = found if isinstance(found, dict) else {"all": found}
    if not pairs or not all(isinstance(p, list) and len(p) == 2 and all(map(is_number, p)) for p in pairs.values()):
        raise ValueError(f'bounds needs JSON, [low, high] or {{"group": [low, high]}}, got {text!r}')
    wrong = {name: [low, high] for name, (low, high) in pairs.items() if not -np.inf < low < high < np.inf}
    if wrong:
        raise ValueError(f"bounds needs finite low < high, got {wrong}")
    large = {name: [low, high] for name, (low, high) in pairs.items() if max(-low, high) > LARGEST}
    if large:
        raise ValueError(f"bounds needs numbers of at most {LARGEST:g} in size, as rewards are, got {large}")
    return found


class Signal:
    """Losses of preference groups from the rewards of a step. `state_dict` puts what it remembers into checkpoints."""

    def __init__(self, options: SignalOptions):
        self.options = options

    def without_outliers(self, batch: RewardBatch) -> RewardBatch:
        """The batch as the signal wants to see it.

        Raises:
            SampleError: a reward out of all proportion to what the signal remembers. Nothing is changed.
        """
        return batch

    def __call__(self, batch: RewardBatch, means: np.ndarray) -> np.ndarray:
        """Losses (G,) of `batch.pref_group_names`, whose mean rewards are `means` (G,); NaN where not yet known.

        May change the state, but not if it raises.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        need_keys(self, state, set())


def regret(means: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(high - mean) / (high - low), clipped to [0, 1]; NaN unless low < high. All (G,)."""
    gap = np.divide(high - means, high - low, out=np.full(len(means), np.nan), where=high > low)
    return gap.clip(0, 1)


class Bounds(Signal):
    """L_g = (high_g - mean_g) / (high_g - low_g) between bounds that the user knows.

    Outside the bounds L_g stays 0 or 1, and says nothing. So there is a warning, once, if a preference group has had
    ENOUGH rewards and in no step a mean within its bounds. No state but for that.
    """

    def __init__(self, options: SignalOptions):
        super().__init__(options)
        assert options.bounds is not None  # SignalOptions has checked it
        self.bounds = read_bounds(options.bounds)
        self.met: set[str] = set()  # preference groups that had a mean within their bounds
        self.missed: Counter[str] = Counter()  # rewards of the others
        self.warned = False

    def __call__(self, batch: RewardBatch, means: np.ndarray) -> np.ndarray:
        names, bounds = batch.pref_group_names, self.bounds
        pairs = [bounds[name] for name in names] if isinstance(bounds, dict) else bounds
        low, high = np.broadcast_to(np.array(pairs, np.float64), (len(names), 2)).T
        if not self.warned:
            self._look(batch, means, low, high)
        return regret(means, low, high)

    def _look(self, batch: RewardBatch, means: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        names, samples = batch.pref_group_names, np.bincount(batch.pref_group_codes)
        self.met |= {names[g] for g in np.flatnonzero((low <= means) & (means <= high))}
        outside = [g for g, name in enumerate(names) if name not in self.met]
        self.missed.update({names[g]: int(samples[g]) for g in outside})
        never = [g for g in outside if self.missed[names[g]] >= ENOUGH]
        if never:
            g, self.warned = never[0], True
            warnings.warn(
                f"bounds needs the worst and best mean reward of a preference group, got [{low[g]:g}, {high[g]:g}] "
                f"for {names[g]!r}, whose mean reward is {means[g]:.4g} and was outside in every step so far "
                f"({len(never)} of {len(names)} preference groups): its loss stays {regret(means, low, high)[g]:g} "
                "and does not tell how well it does: correct the option bounds",
                RuntimeWarning,
                stacklevel=2,
            )


class Remembering(Signal):
    """A signal whose state is a `RewardHistory`."""

    def __init__(self, options: SignalOptions):
        super().__init__(options)
        self.history = RewardHistory()

    def without_outliers(self, batch: RewardBatch) -> RewardBatch:
        names, codes = batch.pref_group_names, batch.pref_group_codes
        return in_proportion(batch, names, codes, self.history, self.options.outliers)

    def known(self, least: float) -> np.ndarray:
        """Whether each preference group of the history (G,) has had at least `least` rewards, not all equal."""
        h = self.history
        return (h.count >= least) & varies(h.moments.std(), h.mean, 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        need_keys(self, state, {"history"})
        self.history.load_state_dict(state["history"])


class Quantiles(Remembering):
    """L_g = (high_g - mean_g) / (high_g - low_g) between running quantiles of all rewards that g has ever had.

    low and high are the tenth and ninetieth percentile of a normal distribution with the running mean and standard
    deviation of g. Empirical percentiles (of a reservoir, or the widest of recent windows) were worse in measurements:
    their error stays, adds up in the weights, and can end in a collapse that no difference between the groups
    explains. The error of running moments falls with every sample.

    L_g is 1/2 where g does as well as on average so far, less while it learns, more while it unlearns. A group that
    stands still while others learn gets the weight. Once the policy no longer moves, the history catches up, L_g
    returns to 1/2, and weights stay as they are. Two groups that both stand still look alike, even if one could have
    much more: only bounds tell them apart. L_g does not change under a positive affine change of g's rewards, and an
    outlier shrinks the signal instead of reversing it.

    State: the history, updated before it is used.
    """

    def __call__(self, batch: RewardBatch, means: np.ndarray) -> np.ndarray:
        return regret(means, *self.quantiles(batch))

    def quantiles(self, batch: RewardBatch) -> tuple[np.ndarray, np.ndarray]:
        """low and high (G,), once the history has the rewards of the batch; NaN where they are not yet known."""
        history = self.history
        groups = history.rows(batch.pref_group_names)
        history.update(groups[batch.pref_group_codes], batch.rewards)
        mean, reach = history.mean[groups], Z * history.moments.std()[groups]
        reach = np.where(self.known(ENOUGH)[groups], reach, np.nan)
        return mean - reach, mean + reach


class LastMeans(RewardHistory):
    """A history with one more column: `last` (G,), the mean reward in the last batch with the group; NaN before it."""

    columns = {**RewardHistory.columns, "last": np.nan}
    last: np.ndarray


class Improvement(Quantiles):
    """L_g = -(I_g + lambda J_g), the signal of MT-GRPO (arXiv 2602.05547): little gained lately, or little had at all.

        J_g = 1 - regret(mean_g),    I_g = regret(last mean_g) - regret(mean_g)

    Both regrets are taken between the quantiles that `Quantiles` has now, because MT-GRPO's rewards are accuracies and
    ours have scales of their own. A constant lambda changes no weight, so this is computed as

        L_g = (1 + lambda) regret(mean_g) - regret(last mean_g),    in [-1, 1 + lambda]

    In log alpha the improvements of a run add up to what a group has gained since its first batch. That ends where
    learning ends, and lambda J_g adds up without end, as other signals do. So lambda works like a smaller eta, and the
    improvement alone hardly moves weights. What a group gained while it was absent from batches counts at its return.

    Unlike in MT-GRPO, the step has no factor alpha_g, and J_g is relative to the group's own history: one that is low
    and stands still looks like one that is high and stands still.

    L_g is NaN in the first batch of a group.

    State: the history, updated before it is used, and in it the last means, updated after.
    """

    history: LastMeans

    def __init__(self, options: SignalOptions):
        super().__init__(options)
        self.history = LastMeans()

    def __call__(self, batch: RewardBatch, means: np.ndarray) -> np.ndarray:
        low, high = self.quantiles(batch)
        groups = self.history.rows(batch.pref_group_names)
        now, before = regret(means, low, high), regret(self.history.last[groups], low, high)
        self.history.last[groups] = means
        return (1 + self.options.improvement_lambda) * now - before


class Excess(Remembering):
    """L_g = 1 / (1 + exp((mean_g - m_g) / s_g)), with mean m_g and standard deviation s_g of g's first rewards.

    Rewards are recorded until g has had `reference_samples` of them (an option), not all equal. Then m_g and s_g stay
    as they are, because the reference policy is the one that the run starts from. 1/2 is where g began; less is
    better. An error of m_g stays too, so take many samples.

    State: the history of the first rewards.
    """

    def __call__(self, batch: RewardBatch, means: np.ndarray) -> np.ndarray:
        history, least = self.history, self.options.reference_samples
        groups = history.rows(batch.pref_group_names)
        rows = groups[batch.pref_group_codes]
        recording = ~self.known(least)[rows]
        history.update(rows[recording], batch.rewards[recording])
        mean, std = history.mean[groups], history.moments.std()[groups]
        gain = np.divide(means - mean, std, out=np.full(len(means), np.nan), where=self.known(least)[groups])
        return 0.5 - 0.5 * np.tanh(gain / 2)  # the logistic function, without overflow


SIGNALS = {"quantiles": Quantiles, "bounds": Bounds, "excess": Excess, "improvement": Improvement}
