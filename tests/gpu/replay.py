"""An estimator of a user's own: P-GRPO that writes down every batch and the advantages that it gave. RECORD names the
file."""

import os
import pickle

from openrlhf_pgrpo.core.estimator import register_advantage_estimator
from openrlhf_pgrpo.core.pgrpo import PGRPO


@register_advantage_estimator("written_pgrpo")
class WrittenPGRPO(PGRPO):
    def __call__(self, batch):
        advantages = super().__call__(batch)
        with open(os.environ["RECORD"], "ab") as file:
            pickle.dump((batch, advantages), file)
        return advantages
