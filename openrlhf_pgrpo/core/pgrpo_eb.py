"""P-GRPO with an empirical-Bayes baseline between history and prompt group.

Shrinking a prompt's baseline to a wider mean was published before, as JSPO (arXiv 2511.03710) and EBPO (2602.05165).
Here mean, weight and scale are of the preference group, and a sample is not in its own baseline (docs/relatives.md).

Letters as in `pgrpo.py`, and: tau2 the variance between prompts of p, sig2 the variance within a prompt group,
m_other the mean of the other n-1 samples of the prompt group.
"""

from collections.abc import Sequence

import numpy as np

from openrlhf_pgrpo.core.estimator import RewardBatch, register_advantage_estimator
from openrlhf_pgrpo.core.history import (
    VarianceComponents,
    ratio,
    segment_moments,
    segment_owners,
    varies,
    without_gaps,
)
from openrlhf_pgrpo.core.pgrpo import PGRPO, PGRPOOptions, divisor


@register_advantage_estimator("pgrpo_eb")
class PGRPOEmpiricalBayes(PGRPO):
    """P-GRPO with prompt difficulty taken out of its scale.

    P-GRPO's sigma_p mixes how prompts differ (tau2) with how answers to one prompt differ (sig2). Where prompts vary
    much in difficulty, the contrast between answers shrinks. A random-effects model per preference group,
    `VarianceComponents`, separates the two. The best linear predictor of a prompt's mean from its other samples is

        lam  = (n-1) tau2 / ((n-1) tau2 + sig2)
        base = mu_p + lam (m_other - mu_p)
        A    = (R - base) / sqrt(sig2 + lam^2 sig2/(n-1) + (1-lam)^2 tau2)

    The denominator is the standard deviation of the numerator. With mean_q, the mean of all n, the numerator is

        R - base = (1 + lam/(n-1)) (R - mean_q) + (1-lam) (mean_q - mu_p)

    Everything but R belongs to the prompt group here, so it is computed once per prompt group.

    The baseline leaves the sample itself out. Limits: tau2 = 0 is P-GRPO; tau2 -> infinity is leave-one-out (RLOO) on
    a stable scale; n = 1 is P-GRPO on the history of single samples. `center="prompt"` fixes lam = 1. While answers to
    one prompt have never differed, there is no scale within prompts, and the fallback of `PGRPO` is used.

    State: the `VarianceComponents`. It is updated, and forgets, as in `PGRPO`.
    """

    history: VarianceComponents

    def __init__(self, options: PGRPOOptions):
        super().__init__(options)
        self.history = VarianceComponents(options.half_life)

    def __call__(self, batch: RewardBatch) -> np.ndarray:
        o, history = self.options, self.history
        batch, rows = self.checked(batch)
        q = without_gaps(batch.prompt_groups)
        prompts = segment_moments(q, batch.rewards, q.max(initial=-1) + 1)  # (P,), like all arrays below without [q]
        p = segment_owners(q, rows, len(prompts.count))
        if o.update == "before":
            history.add_prompts(p, prompts)
        mean, sig2, tau2, others = history.mean[p], history.sig2()[p], history.tau2()[p], prompts.count - 1
        lam = ratio(others * tau2, others * tau2 + sig2) if o.center == "history" else np.ones_like(mean)
        std = np.sqrt(sig2 + ratio(lam**2 * sig2, others) + (1 - lam) ** 2 * tau2)
        size = np.sqrt(np.square(mean) + tau2)  # of the means of prompts, whose rounding sig2 may be alone
        usable = (history.samples[p] >= o.min_count) & varies(std, size, o.eps)
        scale = divisor(std, usable, o.eps)
        within, between = (1 + ratio(lam, others)) / scale, (1 - lam) * (prompts.mean - mean) / scale
        advantages = within[q] * (batch.rewards - prompts.mean[q]) + between[q]
        advantages = self.with_fallback(advantages, usable[q], batch, rows)
        if o.update == "after":
            history.add_prompts(p, prompts)
        return advantages

    def metrics(self, pref_groups: Sequence[str]) -> dict[str, dict[str, float]]:
        found, rows = super().metrics(pref_groups), self.history.rows(pref_groups)
        within, between = np.sqrt(self.history.sig2()), np.sqrt(self.history.tau2())
        for name, row in zip(pref_groups, rows):
            found[name] |= {"history_within_std": within[row], "history_between_std": between[row]}
        return found
