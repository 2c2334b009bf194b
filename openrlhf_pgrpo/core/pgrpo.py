"""P-GRPO: rewards normalised by the running history of their preference group (arXiv 2603.10009).

Letters: R reward of a sample, p its preference group, q its prompt group with n samples; mu_p, sigma_p the running
mean and standard deviation of all rewards of p; mean_q the mean of the prompt group. One advantage per sample:

    A = (R - mu_p) / (sigma_p + eps)

The other estimators, and what each isolates:

    name                        advantage                                 what it isolates
    pgrpo, center="prompt"      (R - mean_q) / (sigma_p + eps)            the history's scale alone
    pgrpo_global                pgrpo with all samples in one history     history without preference groups
    pref_group_norm             pgrpo with this batch as the history      preference groups without history
    pgrpo_eb                    see `pgrpo_eb.py`                         prompt difficulty taken out of sigma_p
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openrlhf_pgrpo.core.estimator import AdvantageEstimator, RewardBatch, register_advantage_estimator
from openrlhf_pgrpo.core.history import RewardHistory, segment_means, segment_moments, varies
from openrlhf_pgrpo.core.names import need_keys
from openrlhf_pgrpo.core.options import check_options, option
from openrlhf_pgrpo.core.outliers import in_proportion, outliers_option


@dataclass(frozen=True)
class PGRPOOptions:
    """What the paper leaves open. The text of each field says why it has its default.

    Raises:
        ValueError: a value outside its range.
    """

    update: str = option(
        "before",
        "Update the history before or after it normalises the current batch. before (default): the batch is part of "
        "its own history, which bounds advantages by about sqrt(count); costs a self-reference bias of order 1/count. "
        "after: the past alone is the baseline, unbiased but unbounded.",
        ("before", "after"),
    )
    half_life: float | None = option(
        None,
        "Half-life of the history in samples of a preference group. Default: none, every reward counts for ever, as "
        "in the paper. Set it when rewards drift: an undecayed history lags behind, and all advantages become "
        "positive.",
    )
    eps: float = option(
        1e-6,
        "Added to the standard deviation; a history whose standard deviation is not above eps has no scale and is "
        "not used. Default 1e-6: small enough to leave a preference group with tiny rewards its own scale.",
    )
    min_count: float = option(
        4,
        "Samples (with a half-life: their weight) that a history needs before it is used. Below it the batch "
        "decides: the statistics of the preference group there if it has this many samples, else those of the prompt "
        "group. Default 4: where preference groups are many and rare, waiting for 16 gives much of the gain away "
        "(docs/pgrpo.md), and where they are few it makes no difference.",
    )
    center: str = option(
        "history",
        "Subtract the mean of the history (default, the paper) or that of the prompt group (prompt; needs 2 samples "
        "per prompt).",
        ("history", "prompt"),
    )
    outliers: str = outliers_option()

    def __post_init__(self):
        # Of the count, in small batches. Larger ones raise it, see `RewardHistory`, but then hardly anything lasts
        # from one batch to the next, and preference groups that are rare in batches would never have a history.
        level = np.inf if self.half_life is None else self.half_life / np.log(2)
        check_options(
            self,
            {
                "half_life": (
                    "a positive number of samples",
                    self.half_life is None or 0 < self.half_life < np.inf,
                ),
                "eps": ("a finite number >= 0", 0 <= self.eps < np.inf),
                "min_count": ("a finite number >= 2", 2 <= self.min_count < np.inf),
            },
        )
        if level < self.min_count:
            raise ValueError(
                f"half_life {self.half_life} levels the history off at {level:.1f} samples (or little more) where "
                f"batches have few of a preference group, but min_count needs {self.min_count}: raise the one or "
                "lower the other"
            )


@register_advantage_estimator("pgrpo", options=PGRPOOptions)
class PGRPO(AdvantageEstimator):
    """A = (R - mu_p) / (sigma_p + eps), one running history per preference group (arXiv 2603.10009).

    A new group, and a group whose rewards never varied, use the fallback that the option `min_count` describes. A
    sample about which nothing is known (alone in its prompt group, in a new preference group) gets 0. So advantages
    are finite and bounded from the first batch on.

    State: the `RewardHistory`, updated once per call, before or after the advantages are computed.

    Raises:
        SampleError: when called, a reward out of all proportion to the history, see `outliers.py`; then nothing is
            changed.
    """

    def __init__(self, options: PGRPOOptions):
        super().__init__(options)
        self.history = RewardHistory(options.half_life)

    @property
    def min_samples_per_prompt(self) -> int:
        return 2 if self.options.center == "prompt" else 1

    def histories(self, batch: RewardBatch) -> tuple[Sequence[str], np.ndarray]:
        """The names (G,) of the histories that a batch belongs to, and for each sample (B,) the position of its own
        among them."""
        return batch.pref_group_names, batch.pref_group_codes

    def checked(self, batch: RewardBatch) -> tuple[RewardBatch, np.ndarray]:
        """The batch without outliers, and the row (B,) of the history that each sample belongs to."""
        names, codes = self.histories(batch)
        batch = in_proportion(batch, names, codes, self.history, self.options.outliers)
        return batch, self.history.rows(names)[codes]

    def __call__(self, batch: RewardBatch) -> np.ndarray:
        o, history = self.options, self.history
        batch, rows = self.checked(batch)
        if o.update == "before":
            history.update(rows, batch.rewards)
        mean, std = history.mean, history.moments.std()
        usable = (history.count >= o.min_count) & varies(std, mean, o.eps)
        baseline = mean[rows] if o.center == "history" else prompt_means(batch)
        advantages = (batch.rewards - baseline) / divisor(std, usable, o.eps)[rows]
        advantages = self.with_fallback(advantages, usable[rows], batch, rows)
        if o.update == "after":
            history.update(rows, batch.rewards)
        return advantages

    def with_fallback(
        self, advantages: np.ndarray, usable: np.ndarray, batch: RewardBatch, rows: np.ndarray
    ) -> np.ndarray:
        """`advantages` where the history is `usable`, else those of the batch alone; all (B,)."""
        if usable.all():
            return advantages
        return np.where(usable, advantages, batch_advantages(batch, rows, self.options))

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        need_keys(self, state, {"history"})
        self.history.load_state_dict(state["history"])

    def metrics(self, pref_groups: Sequence[str]) -> dict[str, dict[str, float]]:
        rows = self.history.rows(pref_groups)
        count, mean, std = self.history.spread()
        return {
            name: {"history_count": count[row], "history_mean": mean[row], "history_std": std[row]}
            for name, row in zip(pref_groups, rows)
        }


def prompt_means(batch: RewardBatch) -> np.ndarray:
    """Mean reward (B,) of the prompt group of each sample."""
    _, means = segment_means(batch.prompt_groups, batch.rewards, batch.prompt_groups.max(initial=-1) + 1)
    return means[batch.prompt_groups]


def segment_advantages(
    rewards: np.ndarray, rows: np.ndarray, eps: float, baseline: np.ndarray | None = None
) -> np.ndarray:
    """(R - baseline) / (std + eps) of samples (B,), with the std of those that share a row; 0 where they do not vary.

    The baseline is their mean unless one is given.
    """
    moments = segment_moments(rows, rewards, rows.max(initial=-1) + 1)
    std = moments.std()
    baseline = moments.mean[rows] if baseline is None else baseline
    return (rewards - baseline) / divisor(std, varies(std, moments.mean, eps), eps)[rows]


def divisor(std: np.ndarray, usable: np.ndarray, eps: float) -> np.ndarray:
    """std + eps where the scale is `usable`, else infinity, which turns the quotient into 0."""
    return np.where(usable, std + eps, np.inf)


def batch_advantages(batch: RewardBatch, rows: np.ndarray, options: PGRPOOptions) -> np.ndarray:
    """The fallback (B,): normalised in the preference group of the batch if large enough, else in the prompt group."""
    enough = np.bincount(rows)[rows] >= options.min_count
    baseline = prompt_means(batch) if options.center == "prompt" else None
    by_pref_group = segment_advantages(batch.rewards, rows, options.eps, baseline)
    return np.where(enough, by_pref_group, segment_advantages(batch.rewards, batch.prompt_groups, options.eps))
