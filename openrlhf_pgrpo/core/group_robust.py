"""Online group-robust training: the preference group that does worst gets larger advantages (after arXiv 2405.20304).

    max over the policy of  min over preference groups g of  J_g,      A_i <- w_i A_i,    w_i ~ alpha_g(i) / p_g(i)

A policy loss that is a mean over tokens counts a sample as often as it has tokens. There w_i is also divided by the
mean length of the preference group's samples in the batch, or people with short answers would get less than their
alpha.

A signal, see `signals.py`, says how badly off a preference group is; the weights follow by mirror ascent, see
`group_weights.py`. A preference group without a signal yet (new, or its rewards never varied) counts as average.
Losses enter the weights as differences from their mean over preference groups. In expectation this changes no ratio of
weights. Without this, weights would drift, because the samples of a group vary in number from batch to batch.

Axes: B samples, G preference groups.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from openrlhf_pgrpo.core.estimator import RewardBatch
from openrlhf_pgrpo.core.group_weights import GroupWeights, RobustOptions, fixed_weights
from openrlhf_pgrpo.core.history import segment_means, segment_owners
from openrlhf_pgrpo.core.names import listed, need_keys
from openrlhf_pgrpo.core.signals import Signal, SignalOptions, read_bounds


def check_names(names: Sequence[str], robust: RobustOptions, signal: SignalOptions) -> None:
    """Raises ValueError if the option mu or bounds is given by name and leaves out one of `names`."""
    bounds = None if signal.bounds is None else read_bounds(signal.bounds)
    given = {"mu": [*fixed_weights(robust.mu)], "bounds": [*bounds] if isinstance(bounds, dict) else []}
    for option, known in given.items():
        missing = [name for name in names if known and name not in known]
        if missing:
            raise ValueError(f"{option} needs every preference group, got none of {listed(missing)}: add them")


class GroupRobust:
    """Weights of the samples of each step, which multiply the advantages of any estimator.

    As in Algorithm 1 of the paper, a step's losses move the weights first, and then the weights scale the same step.

    Args:
        options: how the weights move. signal: how badly off each preference group is.

    State: that of the `GroupWeights` and of the signal, and `latest`, the last loss (G,) of each group or NaN.
    """

    def __init__(self, options: RobustOptions, signal: Signal):
        self.weights, self.signal = GroupWeights(options), signal
        self.latest = np.full(len(self.weights), np.nan)
        self.applied: dict[str, float] = {}

    def __call__(self, batch: RewardBatch, tokens: np.ndarray | None = None) -> np.ndarray:
        """Weights (B,) of the samples after this step's losses; their mean is 1, that over tokens if these are given.

        Args:
            tokens: (B,) of each sample, if the policy loss is a mean over tokens. They change no state.

        Raises:
            ValueError: a preference group that the option mu or bounds leaves out. Nothing is changed.
            SampleError: a reward out of all proportion to the others of its preference group. Nothing is changed.
        """
        names, codes = batch.pref_group_names, batch.pref_group_codes
        check_names(names, self.weights.options, self.signal.options)
        batch = self.signal.without_outliers(batch)
        samples, means = segment_means(codes, batch.rewards, len(names))
        losses = self.signal(batch, means)
        rows = self.weights.rows(names)
        latest = self._padded_latest()
        latest[rows] = losses
        known = latest[np.isfinite(latest)]
        average = known.mean() if len(known) else 0.0
        self.weights.update(rows, np.where(np.isnan(losses), 0.0, losses - average), samples)
        self.latest = latest
        weights = self.weights.sample_weights(rows[codes])
        if tokens is not None:
            tokens = np.asarray(tokens, np.float64)
            # A group may have no token to train, or so few that one of them would count as a whole batch.
            weights = weights / segment_means(codes, tokens, len(names))[1].clip(1)[codes]
            if tokens.any():
                weights = weights * (tokens.sum() / (tokens * weights).sum())
        self.applied = dict(zip(names, segment_owners(codes, weights, len(names))))
        return weights

    def _padded_latest(self) -> np.ndarray:
        """A copy of `latest` as long as the weights, which a batch that was refused may have made longer."""
        return np.append(self.latest, np.full(len(self.weights) - len(self.latest), np.nan))

    def metrics(self, pref_groups: Sequence[str]) -> dict[str, dict[str, float]]:
        """For each of `pref_groups` of the last step: the weight of its samples, its alpha, and its loss minus the
        average loss. If that is above 0, its weight grows."""
        rows, w = self.weights.rows(pref_groups), self.weights
        return {
            name: {"weight": self.applied[name], "robust_alpha": alpha, "robust_loss": loss}
            for name, alpha, loss in zip(pref_groups, w.alpha[rows], w.loss[rows])
        }

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything, exact to the bit after `load_state_dict`."""
        return {
            "weights": self.weights.state_dict(),
            "signal": self.signal.state_dict(),
            "latest": self._padded_latest(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces the content by `state`.

        Raises:
            ValueError: this is no state of this class, the state of another signal, or made on other data. Nothing is
                changed.
        """
        need_keys(self, state, {"weights", "signal", "latest"})
        names, _ = self.weights.check_state(state["weights"])
        latest = np.array(state["latest"], np.float64)
        if latest.shape != (len(names),):
            raise ValueError(
                f"{type(self).__name__} state needs the latest loss of each of {len(names)} preference groups, got "
                f"shape {latest.shape}"
            )
        self.signal.load_state_dict(state["signal"])  # changes nothing if it raises, and nothing after it raises
        self.weights.load_state_dict(state["weights"])
        self.latest = latest
