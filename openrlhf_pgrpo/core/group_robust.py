"""Online group-robust training: the preference group that does worst gets larger advantages (after arXiv 2405.20304).

    max over the policy of  min over preference groups g of  J_g,      A_i <- w_i A_i,    w_i ~ alpha_g(i) / p_g(i)

The paper trains offline, on losses that are comparable between groups. Online there are rewards, and what to call the
loss of a preference group is a choice. Two natural ones are traps, derived and measured in our reference on the method
(`examples/group_robust_signals.py` repeats the measurement):

    the negative mean reward       compares zero points and units: the group whose rewards lie lowest, or, if they are
                                   negative, are largest, takes all the weight, however well it does.
    the loss of the policy update  is -mean(A) on the policy's own samples, and A is centred: 0, no signal at all.

So a signal here says how far a preference group is from what *it* can have, as a number in [0, 1] that does not change
when all its rewards are shifted or scaled:

    signal      L_g                                         what it needs
    quantiles   regret between its own running quantiles    nothing (default)
    bounds      regret between given bounds                 bounds of the mean reward, `--robust.bounds`
    excess      1 / (1 + exp(gain over the reference))      a start from the policy that is the reference

A preference group without a signal yet (new, or its rewards never varied) counts as average. Losses enter the weights
as differences from their mean over preference groups: in expectation that changes no ratio of weights, and it spares
them a random walk, of the common level of losses times the chance that decides how much of each group is in a batch.

Axes: B samples, G preference groups.
"""

import json
from dataclasses import dataclass
from typing import Optional, Sequence

import numpy as np

from openrlhf_pgrpo.core.advantages import varies
from openrlhf_pgrpo.core.history import RewardHistory, segment_means, segment_owners
from openrlhf_pgrpo.core.options import option
from openrlhf_pgrpo.core.registry import RewardBatch
from openrlhf_pgrpo.core.robust import GroupWeights, RobustOptions

# What `--advantage_estimator` may say, and the estimator whose advantages are weighted unless --robust.base names one.
ROBUST_ESTIMATORS = {"group_robust": "group_norm", "pgrpo_robust": "pgrpo"}

ENOUGH = 16  # rewards before quantiles mean something: as many as --pgrpo.min_count asks of a history
Z = 1.2816  # standard deviations from the mean of a normal distribution to its tenth and ninetieth percentile


@dataclass(frozen=True)
class SignalOptions:
    """What counts as the loss of a preference group. Each field is a flag `--robust.<name>`.

    Raises:
        ValueError: bounds missing, of no use, or the wrong way round; no reference.
    """

    signal: str = option(
        "quantiles",
        str,
        "Loss of a preference group. quantiles (default): where its mean reward lies between low and high quantiles "
        "of its own rewards so far, so neither their offset nor their scale counts; needs nothing. bounds: the same "
        "between --robust.bounds; best where they are known. excess: falls as its mean reward rises above the first "
        "ones of the run.",
        ("quantiles", "bounds", "excess"),
    )
    bounds: Optional[str] = option(
        None,
        str,
        "Worst and best mean reward that a preference group can have, as JSON: [0, 1] for all, or "
        '{"ana": [0, 1], "ben": [-5, 5]}. Default: none.',
    )
    reference_samples: int = option(
        256,
        int,
        "Samples at the start of training, of each preference group, that stand for the reference policy in the "
        "signal excess. Default 256: their mean is known to a sixteenth of their standard deviation, if they answer "
        "as many prompts.",
    )

    def __post_init__(self):
        choices = self.__dataclass_fields__["signal"].metadata["choices"]
        if self.signal not in choices:
            raise ValueError(f"--robust.signal needs one of {', '.join(choices)}, got {self.signal!r}")
        if (self.bounds is None) == (self.signal == "bounds"):
            raise ValueError(
                f"--robust.signal bounds and --robust.bounds need each other, got signal {self.signal!r} and bounds "
                f"{self.bounds!r}: give both or neither"
            )
        if self.bounds is not None:
            read_bounds(self.bounds)
        if self.reference_samples < 2:
            raise ValueError(f"--robust.reference_samples needs at least 2, got {self.reference_samples!r}")


def read_bounds(text: str) -> dict[str, list[float]] | list[float]:
    """`--robust.bounds` as numbers: [low, high] for all preference groups, or for each by name.

    Raises:
        ValueError: it is neither, or low is not below high.
    """
    try:
        found = json.loads(text)
        pairs = found if isinstance(found, dict) else {"all": found}
        wrong = {name: [low, high] for name, (low, high) in pairs.items() if not -np.inf < low < high < np.inf}
    except (ValueError, TypeError) as error:
        raise ValueError(
            f'--robust.bounds needs JSON, [low, high] or {{"group": [low, high]}}, got {text!r}'
        ) from error
    if wrong:
        raise ValueError(f"--robust.bounds needs finite low < high, got {wrong}")
    return found


def check_names(names: Sequence[str], robust: RobustOptions, signal: SignalOptions) -> None:
    """Raises ValueError if --robust.mu or --robust.bounds is given by name and leaves out one of `names`."""
    bounds = None if signal.bounds is None else read_bounds(signal.bounds)
    given = {"mu": GroupWeights(robust).names, "bounds": [*bounds] if isinstance(bounds, dict) else []}
    for flag, known in given.items():
        missing = [name for name in names if known and name not in known]
        if missing:
            raise ValueError(
                f"--robust.{flag} needs every preference group, got none of {', '.join(map(repr, missing))}: add them"
            )


class Signal:
    """Losses of preference groups from the rewards of a step. What it remembers travels in checkpoints."""

    def __init__(self, options: SignalOptions):
        self.options = options

    def __call__(self, batch: RewardBatch, means: np.ndarray) -> np.ndarray:
        """Losses (G,) of `batch.pref_group_names`, of mean reward `means` (G,); NaN for one of which none is known.

        May change the state; must not if it raises.
        """
        raise NotImplementedError

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        need_keys(self, state, set())


def need_keys(owner, state: dict, needs: set[str]) -> None:
    if set(state) != needs:
        raise ValueError(f"{type(owner).__name__} state needs keys {sorted(needs)}, got {sorted(state)}")


def regret(means: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(high - mean) / (high - low) in [0, 1]; NaN where there is nothing between low and high. All (G,)."""
    apart = high > low
    gap = np.divide(high - means, high - low, out=np.full(len(means), np.nan), where=apart)
    return gap.clip(0, 1)


class Bounds(Signal):
    """L_g = (high_g - mean_g) / (high_g - low_g) between bounds that the user knows. No state."""

    def __init__(self, options: SignalOptions):
        super().__init__(options)
        self.bounds = read_bounds(options.bounds)

    def __call__(self, batch, means):
        names, bounds = batch.pref_group_names, self.bounds
        if isinstance(bounds, dict):
            bounds = [bounds[name] for name in names]
        low, high = np.broadcast_to(np.array(bounds, np.float64), (len(names), 2)).T
        return regret(means, low, high)


class Remembering(Signal):
    """A signal whose state is a `RewardHistory`."""

    def __init__(self, options: SignalOptions):
        super().__init__(options)
        self.history = RewardHistory()

    def known(self, least: float) -> np.ndarray:
        """Has a preference group had `least` rewards, not all equal? (all rows,)"""
        h = self.history
        return (h.count >= least) & varies(h.moments.std(), h.mean, 0.0)

    def state_dict(self):
        return {"history": self.history.state_dict()}

    def load_state_dict(self, state):
        need_keys(self, state, {"history"})
        self.history.load_state_dict(state["history"])


class Quantiles(Remembering):
    """L_g = (high_g - mean_g) / (high_g - low_g) between running quantiles of all rewards that g has ever had.

    low and high are the tenth and ninetieth percentile of a normal distribution with the running mean and standard
    deviation of g. Empirical percentiles, of a reservoir or the furthest apart of recent windows, were measured to be
    the worse choice: what they are off by stays, adds up in the weights, and can end in a collapse that no difference
    between the groups explains. The error of running moments falls with every sample.

    L_g is 1/2 where g is as well off as it has been on average, less while it learns, more while it unlearns; a group
    that stands still while others learn gets the weight. As history catches up with a policy that no longer moves, L_g
    returns to 1/2 and weights stay as they are. Two groups that both stand still look alike, however much they could
    have: only bounds can tell. A positive affine change of g's rewards leaves L_g as it is, and an outlier shrinks the
    signal instead of turning it.

    State: the history, updated before it is used.
    """

    def __call__(self, batch, means):
        history = self.history
        groups = history.rows(batch.pref_group_names)
        history.update(groups[batch.pref_group_codes], batch.rewards)
        mean, reach = history.mean[groups], Z * history.moments.std()[groups]
        return np.where(self.known(ENOUGH)[groups], regret(means, mean - reach, mean + reach), np.nan)


class Excess(Remembering):
    """L_g = 1 / (1 + exp((mean_g - m_g) / s_g)), m_g and s_g being mean and standard deviation of g's first rewards.

    They are recorded until g has had `--robust.reference_samples` rewards that were not all equal, and then stay: the
    reference policy is the one that the run starts from. 1/2 is where g began; less is better. What m_g is off by
    stays, too: take many samples.

    State: the history of the first rewards.
    """

    def __call__(self, batch, means):
        history, least = self.history, self.options.reference_samples
        groups = history.rows(batch.pref_group_names)
        rows = groups[batch.pref_group_codes]
        recording = ~self.known(least)[rows]
        history.update(rows[recording], batch.rewards[recording])
        mean, std = history.mean[groups], history.moments.std()[groups]
        gain = np.divide(means - mean, std, out=np.full(len(means), np.nan), where=self.known(least)[groups])
        return 0.5 - 0.5 * np.tanh(gain / 2)  # the logistic function, without overflow


SIGNALS = {"quantiles": Quantiles, "bounds": Bounds, "excess": Excess}


class GroupRobust:
    """Weights of the samples of each step, by which advantages of any estimator are multiplied.

    As in Algorithm 1 of the paper, a step's losses move the weights before these scale the step's own update.

    Args:
        options: how the weights move. signal: what says how badly off a preference group is.

    State: the `GroupWeights`, the signal's, and `latest`, the last loss (G,) of each preference group, NaN before.
    """

    def __init__(self, options: RobustOptions, signal: Signal):
        self.weights, self.signal = GroupWeights(options), signal
        self.latest = np.full(len(self.weights), np.nan)
        self.applied: dict[str, float] = {}

    def __call__(self, batch: RewardBatch) -> np.ndarray:
        """Weights (B,) of the samples, mean 1, after this step's losses.

        Raises:
            ValueError: a preference group that --robust.mu or --robust.bounds leaves out. Nothing is changed.
        """
        names, codes = batch.pref_group_names, batch.pref_group_codes
        check_names(names, self.weights.options, self.signal.options)
        samples, means = segment_means(codes, batch.rewards, len(names))
        losses = self.signal(batch, means)
        rows = self._rows(names)
        latest = self.latest.copy()
        latest[rows] = losses
        known = latest[np.isfinite(latest)]
        average = known.mean() if len(known) else 0.0
        self.weights.update(rows, np.where(np.isnan(losses), 0.0, losses - average), samples)
        self.latest = latest
        weights = self.weights.sample_weights(rows[codes])
        self.applied = dict(zip(names, segment_owners(codes, weights, len(names))))
        return weights

    def _rows(self, names: Sequence[str]) -> np.ndarray:
        rows = self.weights.rows(names)
        self.latest = np.append(self.latest, np.full(len(self.weights) - len(self.latest), np.nan))
        return rows

    def metrics(self, pref_groups: Sequence[str]) -> dict[str, dict[str, float]]:
        """Of each of `pref_groups` in the last step: the weight of its samples, its alpha, and its smoothed loss, less
        the average of all: above 0, and its weight grows."""
        rows, w = self.weights.rows(pref_groups), self.weights
        return {
            name: {
                "weight": self.applied[name],
                "robust_alpha": alpha,
                "robust_loss": loss,
            }
            for name, alpha, loss in zip(pref_groups, w.alpha[rows], w.smoothed[rows])
        }

    def state_dict(self) -> dict:
        """A copy of everything, exact to the bit after `load_state_dict`."""
        return {
            "weights": self.weights.state_dict(),
            "signal": self.signal.state_dict(),
            "latest": self.latest.copy(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Replaces the content by `state`.

        Raises:
            ValueError: not a state of this class, or one of another signal.
        """
        need_keys(self, state, {"weights", "signal", "latest"})
        self.signal.load_state_dict(state["signal"])
        self.weights.load_state_dict(state["weights"])
        self.latest = np.array(state["latest"], np.float64)
