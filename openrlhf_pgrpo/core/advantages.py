"""P-GRPO, its empirical-Bayes extension, and the controls that tell which part of them helps.

Letters: R reward of a sample, p its preference group, q its prompt group with n samples; mu_p, sigma_p the running
mean and standard deviation of all rewards of p; mean_q the mean of the prompt group. One advantage per sample.

    name              advantage                                 what it isolates
    pgrpo             (R - mu_p) / (sigma_p + eps)              the paper, arXiv 2603.10009
    pgrpo_centered    (R - mean_q) / (sigma_p + eps)            the history's scale alone
    pgrpo_global      pgrpo with all samples in one history     history without preference groups
    pref_group_norm   pgrpo with this batch as the history      preference groups without history
    pgrpo_eb          see `PGRPOEmpiricalBayes`                 prompt difficulty taken out of sigma_p
"""

from dataclasses import dataclass, replace
from typing import Optional, Sequence

import numpy as np

from openrlhf_pgrpo.core.history import (
    VARIANCES,
    RewardHistory,
    VarianceComponents,
    ratio,
    segment_means,
    segment_moments,
    segment_owners,
    without_gaps,
)
from openrlhf_pgrpo.core.options import option
from openrlhf_pgrpo.core.registry import AdvantageEstimator, RewardBatch, register_advantage_estimator


@dataclass(frozen=True)
class PGRPOOptions:
    """What the paper leaves open. Each field is a flag `--pgrpo.<name>`; its help says why it has its default.

    Raises:
        ValueError: a value outside its range.
    """

    update: str = option(
        "before",
        str,
        "Update the history before or after it normalises the current batch. before (default): the batch is part of "
        "its own history, which bounds advantages by about sqrt(count); costs a self-reference bias of order 1/count. "
        "after: the past alone is the baseline, unbiased but unbounded.",
        ("before", "after"),
    )
    half_life: Optional[float] = option(
        None,
        float,
        "Half-life of the history in samples of a preference group. Default: none, every reward counts for ever, as "
        "in the paper. Set it when rewards drift: an undecayed history lags behind, and all advantages become "
        "positive.",
    )
    variance: str = option(
        "population",
        str,
        "Divide M2 by n (population, default: defined from the first sample on) or by n - 1 (sample).",
        VARIANCES,
    )
    eps: float = option(
        1e-6,
        float,
        "Added to the standard deviation; a history whose standard deviation is not above eps has no scale and is "
        "not used. Default 1e-6: small enough to leave a preference group with tiny rewards its own scale.",
    )
    min_count: float = option(
        16,
        float,
        "Samples (with a half-life: their weight) that a history needs before it is used. Below it the statistics of "
        "that preference group in the batch are used if they have as many samples, else those of the prompt group. "
        "Default 16: the standard deviation is then known to about 18 percent.",
    )
    center: str = option(
        "history",
        str,
        "Subtract the mean of the history (default, the paper) or that of the prompt group (prompt; needs 2 samples "
        "per prompt).",
        ("history", "prompt"),
    )

    def __post_init__(self):
        for name, spec in self.__dataclass_fields__.items():
            value, choices = getattr(self, name), spec.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"--pgrpo.{name} needs one of {', '.join(choices)}, got {value!r}")
        if self.half_life is not None and not 0 < self.half_life < np.inf:
            raise ValueError(f"--pgrpo.half_life needs a positive number of samples, got {self.half_life!r}")
        if not 0 <= self.eps < np.inf:
            raise ValueError(f"--pgrpo.eps needs a finite number >= 0, got {self.eps!r}")
        if not 2 <= self.min_count < np.inf:
            raise ValueError(f"--pgrpo.min_count needs a finite number >= 2, got {self.min_count!r}")
        if self.half_life is not None and self.half_life / np.log(2) < self.min_count:
            raise ValueError(
                f"--pgrpo.half_life {self.half_life} levels the history off at {self.half_life / np.log(2):.1f} "
                f"samples, --pgrpo.min_count needs {self.min_count}: raise the one or lower the other"
            )


@register_advantage_estimator("pgrpo")
class PGRPO(AdvantageEstimator):
    """A = (R - mu_p) / (sigma_p + eps), one running history per preference group (arXiv 2603.10009).

    The first steps of a group, and a group whose rewards never varied, fall back as `--pgrpo.min_count` says; a sample
    about which nothing is known (alone in its prompt group and too new a preference group) gets 0. So advantages are
    finite and bounded from the first batch on.

    State: the `RewardHistory`, updated once per call, before or after the advantages are computed.
    """

    def __init__(self, options: PGRPOOptions):
        super().__init__(options)
        self.history = RewardHistory(options.half_life)

    @property
    def min_samples_per_prompt(self) -> int:
        return 2 if self.options.center == "prompt" else 1

    def history_rows(self, batch: RewardBatch) -> np.ndarray:
        """The row (B,) of the history that each sample belongs to."""
        return self.history.rows(batch.pref_group_names)[batch.pref_group_codes]

    def __call__(self, batch: RewardBatch) -> np.ndarray:
        o, history = self.options, self.history
        rows = self.history_rows(batch)
        if o.update == "before":
            history.update(rows, batch.rewards)
        mean, std = history.mean, history.moments.std(o.variance)
        usable = (history.count >= o.min_count) & varies(std, mean, o.eps)
        baseline = mean[rows] if o.center == "history" else prompt_means(batch)
        advantages = (batch.rewards - baseline) / divisor(std, usable, o.eps)[rows]
        advantages = self.with_fallback(advantages, usable[rows], batch, rows)
        if o.update == "after":
            history.update(rows, batch.rewards)
        return advantages

    def with_fallback(self, advantages: np.ndarray, usable: np.ndarray, batch: RewardBatch, rows) -> np.ndarray:
        """`advantages` where the history is `usable`, else those of the batch alone; all (B,)."""
        if usable.all():
            return advantages
        return np.where(usable, advantages, batch_advantages(batch, rows, self.options))

    def state_dict(self) -> dict:
        return {"history": self.history.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        if set(state) != {"history"}:
            raise ValueError(f"{type(self).__name__} state needs keys ['history'], got {sorted(state)}")
        self.history.load_state_dict(state["history"])

    def metrics(self, pref_groups: Sequence[str]) -> dict[str, dict[str, float]]:
        rows = self.history.rows(pref_groups)
        count, mean, std = self.history.count, self.history.mean, self.history.moments.std(self.options.variance)
        return {
            name: {"history_count": count[row], "history_mean": mean[row], "history_std": std[row]}
            for name, row in zip(pref_groups, rows)
        }


@register_advantage_estimator("pgrpo_centered")
class PGRPOCentered(PGRPO):
    """A = (R - mean_q) / (sigma_p + eps): the prompt group's baseline on the history's scale.

    The only change with respect to `PGRPO` is `center="prompt"`.
    """

    def __init__(self, options: PGRPOOptions):
        super().__init__(replace(options, center="prompt"))


@register_advantage_estimator("pgrpo_global")
class PGRPOGlobal(PGRPO):
    """P-GRPO with one history for everybody: what remains when preference groups are taken away."""

    uses_pref_groups = False

    def history_rows(self, batch: RewardBatch) -> np.ndarray:
        return np.repeat(self.history.rows([""]), len(batch.rewards))

    def metrics(self, pref_groups: Sequence[str]) -> dict[str, dict[str, float]]:
        everybody = super().metrics([""])[""]
        return {name: everybody for name in pref_groups}


@register_advantage_estimator("pref_group_norm")
class PrefGroupNorm(AdvantageEstimator):
    """A = (R - mean) / (std + eps) over the samples of a preference group in this batch: what remains without history.

    A preference group with a single sample, or a constant reward, in the batch gets 0. No state.
    """

    def __call__(self, batch: RewardBatch) -> np.ndarray:
        return segment_advantages(batch.rewards, batch.pref_group_codes, self.options)


@register_advantage_estimator("pgrpo_eb")
class PGRPOEmpiricalBayes(PGRPO):
    """P-GRPO with variance components: an empirical-Bayes baseline between history and prompt group (ours).

    P-GRPO's sigma_p mixes how prompts differ (tau2) with how answers to one prompt differ (sig2); where prompt
    difficulty varies much, the contrast between answers shrinks. A random-effects model per preference group,
    `VarianceComponents`, separates the two, and the best linear predictor of a prompt's mean from its other samples is

        lam  = (n-1) tau2 / ((n-1) tau2 + sig2)
        base = mu_p + lam (m_other - mu_p)             m_other: mean of the other n-1 samples of the prompt group
        A    = (R - base) / sqrt(sig2 + lam^2 sig2/(n-1) + (1-lam)^2 tau2)

    the denominator being the standard deviation of the numerator. With mean_q, the mean of all n, it is computed as

        R - base = (1 + lam/(n-1)) (R - mean_q) + (1-lam) (mean_q - mu_p)

    where all but R belongs to the prompt group and is worked out once for each.

    The baseline leaves the sample itself out. Limits: tau2 = 0 is P-GRPO; tau2 -> infinity is leave-one-out (RLOO) on
    a stable scale; n = 1 is P-GRPO on the history of single samples. `center="prompt"` fixes lam = 1; `variance`
    chooses the divisor of the variance of prompt means. While answers to one prompt have never differed, there is no
    scale within prompts, and the fallback of `PGRPO` is used.

    State: the `VarianceComponents`; updated and forgotten as in `PGRPO`.
    """

    def __init__(self, options: PGRPOOptions):
        super().__init__(options)
        self.history = VarianceComponents(options.half_life)

    def __call__(self, batch: RewardBatch) -> np.ndarray:
        o, history = self.options, self.history
        rows = self.history_rows(batch)
        q = without_gaps(batch.prompt_groups)
        prompts = segment_moments(q, batch.rewards, q.max(initial=-1) + 1)  # (P,), as all below that is not at [q]
        p = segment_owners(q, rows, len(prompts.count))
        if o.update == "before":
            history.add_prompts(p, prompts)
        mean, sig2, tau2, others = history.mean[p], history.sig2()[p], history.tau2(o.variance)[p], prompts.count - 1
        lam = ratio(others * tau2, others * tau2 + sig2) if o.center == "history" else np.ones_like(mean)
        std = np.sqrt(sig2 + ratio(lam**2 * sig2, others) + (1 - lam) ** 2 * tau2)
        usable = (history.samples[p] >= o.min_count) & varies(std, mean, o.eps)
        scale = divisor(std, usable, o.eps)
        within, between = (1 + ratio(lam, others)) / scale, (1 - lam) * (prompts.mean - mean) / scale
        advantages = within[q] * (batch.rewards - prompts.mean[q]) + between[q]
        advantages = self.with_fallback(advantages, usable[q], batch, rows)
        if o.update == "after":
            history.add_prompts(p, prompts)
        return advantages

    def metrics(self, pref_groups: Sequence[str]) -> dict[str, dict[str, float]]:
        h = self.history
        rows = h.rows(pref_groups)
        sig2, tau2 = h.sig2(), h.tau2(self.options.variance)
        return {
            name: {
                "history_count": h.samples[row],
                "history_mean": h.mean[row],
                "history_std": np.sqrt(sig2[row] + tau2[row]),
                "history_within_std": np.sqrt(sig2[row]),
                "history_between_std": np.sqrt(tau2[row]),
            }
            for name, row in zip(pref_groups, rows)
        }


def prompt_means(batch: RewardBatch) -> np.ndarray:
    """Mean reward (B,) of the prompt group of each sample."""
    _, means = segment_means(batch.prompt_groups, batch.rewards, batch.prompt_groups.max(initial=-1) + 1)
    return means[batch.prompt_groups]


def segment_advantages(rewards: np.ndarray, rows: np.ndarray, options: PGRPOOptions, baseline=None) -> np.ndarray:
    """(R - baseline) / (std + eps), mean (unless given) and std over the samples that share a row; 0 where they do not
    vary."""
    moments = segment_moments(rows, rewards, rows.max(initial=-1) + 1)
    std = moments.std(options.variance)
    baseline = moments.mean[rows] if baseline is None else baseline
    return (rewards - baseline) / divisor(std, varies(std, moments.mean, options.eps), options.eps)[rows]


def varies(std: np.ndarray, mean: np.ndarray, eps: float) -> np.ndarray:
    """Is `std` a scale to divide by: more than eps, and more than what float64 leaves of a constant `mean`?"""
    return std > eps + 1e-12 * np.abs(mean)


def divisor(std: np.ndarray, usable: np.ndarray, eps: float) -> np.ndarray:
    """std + eps, infinite where the scale is not `usable`: what is divided by it becomes 0."""
    return np.where(usable, std + eps, np.inf)


def batch_advantages(batch: RewardBatch, rows: np.ndarray, options: PGRPOOptions) -> np.ndarray:
    """The fallback (B,): normalised in the batch's preference group if large enough, else in the prompt group."""
    enough = np.bincount(rows)[rows] >= options.min_count
    baseline = prompt_means(batch) if options.center == "prompt" else None
    by_pref_group = segment_advantages(batch.rewards, rows, options, baseline)
    return np.where(enough, by_pref_group, segment_advantages(batch.rewards, batch.prompt_groups, options))
