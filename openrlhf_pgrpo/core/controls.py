"""Controls for P-GRPO: each takes away one part of it, preference groups or history, to show what that part does."""

from collections.abc import Sequence

import numpy as np

from openrlhf_pgrpo.core.estimator import AdvantageEstimator, RewardBatch, register_advantage_estimator
from openrlhf_pgrpo.core.history import RewardHistory
from openrlhf_pgrpo.core.outliers import in_proportion
from openrlhf_pgrpo.core.pgrpo import PGRPO, PGRPOOptions, segment_advantages


@register_advantage_estimator("pgrpo_global")
class PGRPOGlobal(PGRPO):
    """P-GRPO with one history for everybody: history without preference groups."""

    uses_pref_groups = False

    def histories(self, batch: RewardBatch) -> tuple[Sequence[str], np.ndarray]:
        return [""], np.zeros(len(batch.rewards), np.int64)

    def metrics(self, pref_groups: Sequence[str]) -> dict[str, dict[str, float]]:
        everybody = super().metrics([""])[""]
        return dict.fromkeys(pref_groups, everybody)


@register_advantage_estimator("pref_group_norm", options=PGRPOOptions)
class PrefGroupNorm(AdvantageEstimator):
    """A = (R - mean) / (std + eps) over the samples of a preference group in this batch: preference groups without
    history.

    A preference group with a single sample, or a constant reward, in the batch gets 0. No state.

    Raises:
        SampleError: when called, a reward out of all proportion to the others of its preference group in the batch.
    """

    def __call__(self, batch: RewardBatch) -> np.ndarray:
        names, codes = batch.pref_group_names, batch.pref_group_codes
        batch = in_proportion(batch, names, codes, RewardHistory(), self.options.outliers)
        return segment_advantages(batch.rewards, batch.pref_group_codes, self.options.eps)
