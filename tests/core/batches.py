"""Small batches and fresh estimators for the tests of estimators."""

import numpy as np

from openrlhf_pgrpo.core.estimator import RewardBatch, make_advantage_estimator
from openrlhf_pgrpo.core.pgrpo import PGRPOOptions


def batch(prompts, pref_groups):
    """One list of rewards per prompt group, and for each of them the name of its preference group."""
    numbers = np.repeat(np.arange(len(prompts)), [len(p) for p in prompts])
    nobody = [None] * len(numbers)
    return RewardBatch(np.concatenate(prompts), numbers, [pref_groups[q] for q in numbers], nobody, nobody)


def estimator(name, **options):
    return make_advantage_estimator(name, PGRPOOptions(**options))


PAST = batch([[1, 5]] * 8, "a" * 8)  # 16 samples: mean 3, M2 = 16 * 4, standard deviation 2


def after_past(name, **options):
    """An estimator of the past alone (update after) that has seen PAST."""
    past = estimator(name, update="after", **options)
    past(PAST)
    return past


def random_batch(seed, pref_groups="aabbbc", n=4):
    """Preference groups of different offset and scale; prompts of different difficulty."""
    rng = np.random.default_rng(seed)
    scale = {"a": 1, "b": 5, "c": 0.2}
    return batch([scale[p] * (rng.normal(2, 1) + rng.standard_normal(n)) for p in pref_groups], pref_groups)
