"""Each signal by hand, and what is not yet a signal."""

import re

import numpy as np
import pytest
from robust_batches import batch, make_signal

from openrlhf_pgrpo.core import signals
from openrlhf_pgrpo.core.signals import SignalOptions

pytestmark = pytest.mark.core


def losses(signal, **rewards):
    return signal(batch(**rewards), np.array([np.mean(values) for values in rewards.values()]))


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_bounds_by_hand():
    signal = make_signal("bounds", bounds='{"a": [0, 10], "b": [-4, 0]}')
    np.testing.assert_allclose(losses(signal, a=[7, 9], b=[-1, -3, -2]), [(10 - 8) / 10, (0 + 2) / 4])
    np.testing.assert_array_equal(losses(signal, b=[9], a=[-1]), [0, 1])  # outside the bounds


def test_one_pair_of_bounds_is_for_all():
    np.testing.assert_allclose(losses(make_signal("bounds", bounds="[0, 4]"), a=[1], b=[3]), [0.75, 0.25])


def test_quantiles_by_hand():
    signal = make_signal("quantiles")
    np.testing.assert_allclose(losses(signal, a=[1, 5] * 8), [0.5])  # in its own history: mean 3, standard deviation 2
    # sixteen rewards of 4 more: mean 3.5, variance 16 * 2^2 / 32 + 0.5^2 = 2.25, high 3.5 + 1.2816 * 1.5
    np.testing.assert_allclose(losses(signal, a=[4] * 16), [(1.2816 * 1.5 - 0.5) / (2 * 1.2816 * 1.5)])
    np.testing.assert_array_equal(losses(signal, a=[99]), [0])


def test_quantiles_are_those_of_a_normal_distribution():
    draws = np.random.default_rng(0).normal(7, 3, 100_000)
    low, high = draws.mean() + signals.Z * draws.std() * np.array([-1, 1])
    np.testing.assert_allclose([low, high], np.quantile(draws, [0.1, 0.9]), atol=0.05)  # a density of 0.06: 0.016


def test_the_error_of_quantiles_vanishes():
    # Two groups that differ in nothing but chance: the error of L_a - L_b falls, and its sum does not run away.
    signal, rng = make_signal("quantiles"), np.random.default_rng(0)
    difference = [np.subtract(*losses(signal, a=rng.normal(size=16), b=rng.normal(size=64))) for _ in range(4000)]
    # one step: sd sqrt(1/16 + 1/64) / 2.56 = 0.11; the mean of 2000 of them: 0.0024
    assert abs(np.mean(difference[2000:])) < 4 * 0.0024


def test_an_outlier_leaves_a_group_near_the_middle():
    signal, rng = make_signal("quantiles"), np.random.default_rng(1)
    losses(signal, a=np.r_[rng.normal(size=127), 1e6])
    assert losses(signal, a=rng.normal(size=16)) == pytest.approx(0.5, abs=0.05)


def test_excess_by_hand():
    signal = make_signal("excess", reference_samples=4)
    assert np.isnan(losses(signal, a=[1, 5])).all()  # not yet
    np.testing.assert_allclose(losses(signal, a=[1, 5]), [0.5])  # the reference: mean 3, standard deviation 2
    np.testing.assert_allclose(losses(signal, a=[9, 5]), [1 / (1 + np.exp((7 - 3) / 2))])
    np.testing.assert_allclose(losses(signal, a=[-1]), [1 / (1 + np.exp(-2))])
    assert signal.history.count == [4] and signal.history.mean == [3]  # recorded once
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(losses(signal, a=[1e9]), [0])


# --- not yet a signal ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", ["quantiles", "excess"])
def test_few_rewards_are_no_signal(signal):
    signal = make_signal(signal, reference_samples=16)
    assert np.isnan(losses(signal, a=np.arange(15))).all()
    assert np.isfinite(losses(signal, a=[3])).all()


@pytest.mark.parametrize("signal", ["quantiles", "excess"])
def test_rewards_that_never_varied_are_no_signal_until_they_do(signal):
    signal = make_signal(signal)
    for _ in range(3):
        assert np.isnan(losses(signal, a=np.full(100, 0.1))).all()
    assert np.isfinite(losses(signal, a=np.r_[0.3, np.full(99, 0.1)])).all()


# --- options ---------------------------------------------------------------------------------------------------------


REFUSALS = {
    "signal needs one of quantiles, bounds, excess, got 'reward'": {"signal": "reward"},
    "need each other, got signal 'bounds' and bounds None": {"signal": "bounds"},
    "need each other, got signal 'quantiles' and bounds '[0, 1]'": {"bounds": "[0, 1]"},
    "needs finite low < high, got {'all': [1, 0]}": {"signal": "bounds", "bounds": "[1, 0]"},
    "needs finite low < high, got {'b': [2, 2]}": {"signal": "bounds", "bounds": '{"a": [0, 1], "b": [2, 2]}'},
    "needs finite low < high, got {'all': [0, nan]}": {"signal": "bounds", "bounds": "[0, NaN]"},
    "bounds needs JSON, [low, high] or": {"signal": "bounds", "bounds": "0, 1"},
    "got '[0, 1, 2]'": {"signal": "bounds", "bounds": "[0, 1, 2]"},
    "got '3'": {"signal": "bounds", "bounds": "3"},
    """got '{"a": "zero"}'""": {"signal": "bounds", "bounds": '{"a": "zero"}'},
    "reference_samples needs at least 2, got 1": {"reference_samples": 1},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_bad_values_are_refused(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SignalOptions(**REFUSALS[message])
