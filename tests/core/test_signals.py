"""Each signal by hand, and what is not yet a signal."""

import re
from statistics import fmean, pstdev

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


def test_improvement_by_hand():
    signal = make_signal("improvement", improvement_lambda=0.5)
    assert np.isnan(losses(signal, a=[1, 5] * 8)).all()  # the first batch: nothing to improve on
    # mean 3.5 and standard deviation 1.5 so far, as for quantiles; the batch has mean 4, the last one had 3
    reach = 1.2816 * 1.5
    now, before = (reach - 0.5) / (2 * reach), (reach + 0.5) / (2 * reach)
    np.testing.assert_allclose(losses(signal, a=[4] * 16), [0.5 * now + (now - before)])
    assert signal.history.last == [4]


@pytest.mark.parametrize("lam", [0.0, 0.2, 1.0])
def test_improvement_is_that_of_a_loop_over_groups_and_rewards(lam):
    signal, rng = make_signal("improvement", improvement_lambda=lam), np.random.default_rng(0)
    past, last, known = {}, {}, 0
    for step in range(60):
        present = [name for name in "abc" if rng.random() < 0.6] or ["a"]
        rewards = {name: rng.normal(step / 40, 1 + (name == "b"), rng.integers(1, 9)) for name in present}
        expected = []
        for name, values in rewards.items():
            past.setdefault(name, []).extend(values)
            reach = 1.2816 * pstdev(past[name])
            low, high = fmean(past[name]) - reach, fmean(past[name]) + reach
            if len(past[name]) >= 16 and name in last:
                before, reward = (min(max((m - low) / (high - low), 0), 1) for m in (last[name], fmean(values)))
                expected.append(lam - (reward - before + lam * reward))  # lam: the same for all, so it does not count
                known += 1
            else:
                expected.append(np.nan)
            last[name] = fmean(values)
        np.testing.assert_allclose(losses(signal, **rewards), expected, rtol=1e-9, atol=1e-12)
    assert known > 60


def test_improvement_counts_what_a_group_gained_while_it_was_absent():
    kept, signal = make_signal("improvement"), make_signal("improvement")
    start, end = np.arange(16.0), np.arange(16.0) + 3
    for _ in range(2):
        losses(kept, a=start, b=start), losses(signal, a=start, b=start)
    losses(kept, a=end, b=start), losses(signal, a=end)
    np.testing.assert_array_equal(losses(kept, a=end, b=start)[0], losses(signal, a=end, b=end)[0])
    assert signal.history.last.tolist() == [10.5, 10.5]


# --- not yet a signal ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", ["quantiles", "excess", "improvement"])
def test_few_rewards_are_no_signal(signal):
    signal = make_signal(signal, reference_samples=16)
    assert np.isnan(losses(signal, a=np.arange(15))).all()
    assert np.isfinite(losses(signal, a=[3])).all()


@pytest.mark.parametrize("signal", ["quantiles", "excess", "improvement"])
def test_rewards_that_never_varied_are_no_signal_until_they_do(signal):
    signal = make_signal(signal)
    for _ in range(3):
        assert np.isnan(losses(signal, a=np.full(100, 0.1))).all()
    assert np.isfinite(losses(signal, a=np.r_[0.3, np.full(99, 0.1)])).all()


# --- options ---------------------------------------------------------------------------------------------------------


REFUSALS = {
    "signal needs one of quantiles, bounds, excess, improvement, got 'reward'": {"signal": "reward"},
    "need each other, got signal 'bounds' and bounds None": {"signal": "bounds"},
    "need each other, got signal 'quantiles' and bounds '[0, 1]'": {"bounds": "[0, 1]"},
    "needs finite low < high, got {'all': [1, 0]}": {"signal": "bounds", "bounds": "[1, 0]"},
    "needs finite low < high, got {'b': [2, 2]}": {
        "signal": "bounds",
        "bounds": '{"a": [0, 1], "b": [2, 2]}',
    },
    "needs finite low < high, got {'all': [0, nan]}": {
        "signal": "bounds",
        "bounds": "[0, NaN]",
    },
    "bounds needs JSON, [low, high] or": {"signal": "bounds", "bounds": "0, 1"},
    "got '[0, 1, 2]'": {"signal": "bounds", "bounds": "[0, 1, 2]"},
    "got '3'": {"signal": "bounds", "bounds": "3"},
    """got '{"a": "zero"}'""": {"signal": "bounds", "bounds": '{"a": "zero"}'},
    "or {\"group\": [low, high]}, got '{}'": {"signal": "bounds", "bounds": "{}"},
    "got '[true, 2]'": {"signal": "bounds", "bounds": "[true, 2]"},
    "got '[false, true]'": {"signal": "bounds", "bounds": "[false, true]"},
    """got '{"a": {"low": 0, "high": 1}}'""": {"signal": "bounds", "bounds": '{"a": {"low": 0, "high": 1}}'},
    """[0, 1], "a": [0, 2]}', with 'a' more than once""": {
        "signal": "bounds",
        "bounds": '{"a": [0, 1], "b": [0, 1], "a": [0, 2]}',
    },
    "at most 1e+140 in size, as rewards are, got {'all': [-1e+308, 1e+308]}": {
        "signal": "bounds",
        "bounds": "[-1e308, 1e308]",
    },
    "in size, as rewards are, got {'all': [0, 1000": {"signal": "bounds", "bounds": "[0, 1" + 400 * "0" + "]"},
    'bounds needs JSON, [low, high] or {"group": [low, high]}, got \'[[[': {
        "signal": "bounds",
        "bounds": 10**5 * "[",
    },
    "need each other, got signal 'improvement' and bounds '[0, 1]'": {"signal": "improvement", "bounds": "[0, 1]"},
    "reference_samples needs at least 2, got 1": {"reference_samples": 1},
    "improvement_lambda needs a finite number >= 0, got -0.1": {"improvement_lambda": -0.1},
    "improvement_lambda needs a finite number >= 0, got inf": {"improvement_lambda": np.inf},
    "improvement_lambda needs a finite number >= 0, got nan": {"improvement_lambda": np.nan},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_bad_values_are_refused(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SignalOptions(**REFUSALS[message])
