"""Batches of preference groups, and signals, for the tests of group-robust weights."""

import numpy as np
import pytest

from openrlhf_pgrpo.core.estimator import RewardBatch
from openrlhf_pgrpo.core.signals import SIGNALS, SignalOptions

OPTIONS = {
    "quantiles": {},
    "bounds": {"bounds": "[-5, 5]"},
    "excess": {"reference_samples": 32},
    "improvement": {},
}
every = pytest.mark.parametrize("signal", OPTIONS)


def batch(**rewards):
    """One preference group per argument; every sample is a prompt of its own."""
    names = [name for name, values in rewards.items() for _ in values]
    nobody = [None] * len(names)
    return RewardBatch(np.concatenate([*rewards.values()]), np.arange(len(names)), names, nobody, nobody)


def make_signal(name, **options):
    return SIGNALS[name](SignalOptions(signal=name, **{**OPTIONS[name], **options}))
