"""Online group-robust weights: each signal by hand, what it must not react to, and exact resuming."""

import pickle
import re

import numpy as np
import pytest

from openrlhf_pgrpo.core import group_robust
from openrlhf_pgrpo.core.group_robust import SIGNALS, GroupRobust, Signal, SignalOptions, check_names
from openrlhf_pgrpo.core.registry import RewardBatch
from openrlhf_pgrpo.core.robust import RobustOptions

pytestmark = pytest.mark.core

OPTIONS = {"quantiles": {}, "bounds": {"bounds": "[-5, 5]"}, "excess": {"reference_samples": 32}}
every = pytest.mark.parametrize("signal", OPTIONS)


def batch(**rewards):
    """One preference group per argument; every sample is a prompt of its own."""
    names = [name for name, values in rewards.items() for _ in values]
    nobody = [None] * len(names)
    return RewardBatch(np.concatenate([*rewards.values()]), np.arange(len(names)), names, nobody, nobody)


def make_signal(name, **options):
    return SIGNALS[name](SignalOptions(signal=name, **{**OPTIONS[name], **options}))


def losses(signal, **rewards):
    return signal(batch(**rewards), np.array([np.mean(values) for values in rewards.values()]))


def robust(signal="quantiles", options=None, **robust_options):
    return GroupRobust(RobustOptions(**robust_options), make_signal(signal, **(options or {})))


def assert_equal(one, other):
    """Equality to the bit of nested states."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    else:
        np.testing.assert_array_equal(one, other)


class NegativeReward(Signal):
    """The trap: compares zero points and units."""

    def __call__(self, batch, means):
        return -means


# --- the signals, by hand ------------------------------------------------------------------------------------------


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
    low, high = draws.mean() + group_robust.Z * draws.std() * np.array([-1, 1])
    np.testing.assert_allclose([low, high], np.quantile(draws, [0.1, 0.9]), atol=0.05)  # a density of 0.06: 0.016


def test_what_quantiles_are_off_by_vanishes():
    # Two groups that differ in nothing but chance: what L_a - L_b is off by sinks, and its sum does not run away.
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


# --- what a preference group knows nothing of ----------------------------------------------------------------------


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


def test_a_group_without_signal_keeps_the_average_weight_and_a_new_one_starts_there():
    weights, rng = robust(eta=1.0), np.random.default_rng(0)
    for step in range(40):
        weights(batch(learns=rng.normal(step, 1, 32), lags=rng.normal(0, 1, 32), constant=np.zeros(32)))
    learns, lags, constant = weights.weights.log_alpha
    assert lags > constant > learns
    assert weights.weights.smoothed[2] == 0
    new = batch(learns=rng.normal(40, 1, 32), lags=rng.normal(0, 1, 32), new=[7.0] * 8)
    weights(new)
    assert np.nanmax(weights.weights.log_alpha) == weights.weights.log_alpha[1]
    assert weights.weights.log_alpha[0] < weights.weights.log_alpha[3] < weights.weights.log_alpha[1]


# --- what must not move the weights --------------------------------------------------------------------------------

CHANGES = {"offset -10": (1, -10), "scale x5": (5, 0), "both": (5, -10)}


def learning(seed, change=(1, 0), steps=120):
    """Batches in which two preference groups of unequal size learn alike; `change` is made to the small one's."""
    rng, (scale, shift) = np.random.default_rng(seed), change
    for step in range(steps):
        small, large = (rng.normal(2 * step / steps, 1, size) for size in (16, 48))
        yield batch(small=scale * small + shift, large=large)


def alphas(weights, **kwargs):
    for step in learning(**kwargs):
        weights(step)
    return weights.weights.alpha


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("signal", ["quantiles", "excess"])
def test_offset_and_scale_change_nothing(signal, change):
    changed, unchanged = (alphas(robust(signal), seed=0, change=change) for change in (CHANGES[change], (1, 0)))
    np.testing.assert_allclose(changed, unchanged, rtol=1e-9)
    assert abs(unchanged[0] - 0.5) > 1e-4  # there was something to change


@pytest.mark.parametrize("change", CHANGES)
def test_the_default_does_not_collapse_where_the_negative_reward_does(change):
    for seed in range(5):
        assert alphas(robust(), seed=seed, change=CHANGES[change]) == pytest.approx([0.5, 0.5], abs=0.2)
    trap = GroupRobust(RobustOptions(), NegativeReward(SignalOptions()))
    # scale alone: the group of larger units earns more, and is abandoned
    winner = 1 if change == "scale x5" else 0
    assert alphas(trap, seed=0, change=CHANGES[change])[winner] > 0.99


@every
def test_the_group_that_does_not_learn_gets_the_weight(signal):
    weights, rng = robust(signal, eta=0.5), np.random.default_rng(0)
    for step in range(60):
        last = batch(lags=rng.normal(0, 1, 16), learns=rng.normal(step / 20, 1, 48))
        applied = weights(last)
    assert weights.weights.alpha[0] > 0.6
    assert applied[0] / applied[-1] > 3  # alpha / p, p = 1/4 and 3/4
    assert applied.mean() == pytest.approx(1)


def test_the_weights_move_before_they_are_applied():
    weights = robust("bounds", eta=2.0)
    # losses 1 and 0, less their mean: exponents 2 * 0.5 and -2 * 0.5 in a batch that is all there is
    alpha = np.exp([1, -1]) / np.exp([1, -1]).sum()
    np.testing.assert_allclose(weights(batch(a=[-5, -5], b=[5, 5])), (2 * alpha).repeat(2))


def test_a_common_level_of_losses_is_no_random_walk():
    # Shares of a batch are chance; equal losses must not turn that into weights.
    weights, rng = robust("bounds", eta=0.5), np.random.default_rng(0)
    for _ in range(300):
        of_a = rng.binomial(8, 0.5)
        weights(batch(a=np.zeros(of_a), b=np.zeros(8 - of_a)) if 0 < of_a < 8 else batch(a=np.zeros(8)))
    np.testing.assert_allclose(weights.weights.alpha, [0.5, 0.5], rtol=1e-12)


def test_a_batch_of_one_group_is_measured_against_what_the_others_last_showed():
    weights = robust("bounds", eta=1.0)
    weights(batch(a=[-5] * 4, b=[5] * 4))  # losses 1 and 0
    before = weights.weights.log_alpha
    weights(batch(a=[-5] * 8))  # p_a = 12 / 16: the exponent is (1 - 1/2) / (3/4)
    np.testing.assert_allclose(np.diff(before - weights.weights.log_alpha), [0.5 / 0.75])


def test_metrics_are_what_was_applied():
    weights = robust("bounds", eta=2.0)
    applied = weights(batch(a=[-5, -5, -5], b=[5]))
    metrics = weights.metrics(["b", "a"])
    assert metrics["a"]["weight"] == applied[0] and metrics["b"]["weight"] == applied[3]
    assert metrics["a"]["robust_alpha"] == pytest.approx(np.exp(1) / (np.exp(1) + np.exp(-1)))
    assert (metrics["a"]["robust_loss"], metrics["b"]["robust_loss"]) == (0.5, -0.5)


# --- names in mu and bounds ----------------------------------------------------------------------------------------


def test_mu_by_name_fits_a_step_in_which_a_group_is_absent():
    weights = robust(chi=0.0, mu='{"a": 0.2, "b": 0.8}')
    np.testing.assert_array_equal(weights(batch(b=[1.0, 2.0])), [1, 1])
    # p = 1/4 and 3/4: weights 0.8 and 3.2 / 3, of which the batch is one half each
    expected = np.array([0.2 / 0.25, 0.8 / 0.75])
    np.testing.assert_allclose(weights(batch(a=[1.0], b=[2.0])), expected / expected.mean())


@pytest.mark.parametrize(
    "flag, options",
    [("mu", {"mu": '{"a": 0.9, "z": 0.1}'}), ("bounds", {"signal": "bounds", "options": {"bounds": '{"a": [0, 1]}'}})],
)
def test_a_group_left_out_is_refused_and_nothing_is_changed(flag, options):
    weights = robust(**options)
    before = weights.state_dict()
    with pytest.raises(ValueError, match=f"--robust.{flag} needs every preference group, got none of 'b', 'c': add"):
        weights(batch(a=[0.5], b=[1.0], c=[1.0]))
    assert_equal(weights.state_dict(), before)


def test_groups_that_are_not_named_anywhere_are_fine():
    check_names(["a", "b"], RobustOptions(mu="share"), SignalOptions(signal="bounds", bounds="[0, 1]"))


REFUSALS = {
    "--robust.signal needs one of quantiles, bounds, excess, got 'reward'": {"signal": "reward"},
    "need each other, got signal 'bounds' and bounds None": {"signal": "bounds"},
    "need each other, got signal 'quantiles' and bounds '[0, 1]'": {"bounds": "[0, 1]"},
    "needs finite low < high, got {'all': [1, 0]}": {"signal": "bounds", "bounds": "[1, 0]"},
    "needs finite low < high, got {'b': [2, 2]}": {"signal": "bounds", "bounds": '{"a": [0, 1], "b": [2, 2]}'},
    "needs finite low < high, got {'all': [0, nan]}": {"signal": "bounds", "bounds": "[0, NaN]"},
    "--robust.bounds needs JSON, [low, high] or": {"signal": "bounds", "bounds": "0, 1"},
    "got '[0, 1, 2]'": {"signal": "bounds", "bounds": "[0, 1, 2]"},
    "got '3'": {"signal": "bounds", "bounds": "3"},
    """got '{"a": "zero"}'""": {"signal": "bounds", "bounds": '{"a": "zero"}'},
    "--robust.reference_samples needs at least 2, got 1": {"reference_samples": 1},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_bad_values_are_refused(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SignalOptions(**REFUSALS[message])


def test_a_loss_that_is_not_finite_is_refused():
    class Broken(Signal):
        def __call__(self, batch, means):
            return np.full(len(means), np.inf)

    weights = GroupRobust(RobustOptions(), Broken(SignalOptions()))
    with pytest.raises(ValueError, match="need a finite loss, got inf of preference group 'a'"):
        weights(batch(a=[1.0], b=[2.0]))
    assert np.isnan(weights.latest).all() and not weights.weights.count.any()


# --- state ---------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("update", ["cumulative", "softmax"])
def test_a_resumed_run_goes_on_bit_by_bit(signal, update):
    options = dict(eta=0.3, update=update, smoothing=0.3)
    steps = [*learning(seed=3, steps=30)]
    steps[1::3] = [batch(large=step.rewards[-8:]) for step in steps[1::3]]  # the small group is not in every step
    for cut in (1, 2, 11):
        straight = robust(signal, **options)
        for step in steps[:cut]:
            straight(step)
        resumed = robust(signal, **options)
        resumed.load_state_dict(pickle.loads(pickle.dumps(straight.state_dict())))
        for step in steps[cut:]:
            np.testing.assert_array_equal(straight(step), resumed(step))
        assert_equal(straight.state_dict(), resumed.state_dict())


@every
def test_the_saved_state_is_a_copy(signal):
    weights = robust(signal)
    steps = [*learning(seed=0, steps=3)]
    weights(steps[0])
    saved = weights.state_dict()
    before = pickle.loads(pickle.dumps(saved))
    for step in steps[1:]:
        weights(step)
    assert_equal(saved, before)


def test_the_state_of_another_signal_is_refused():
    with pytest.raises(ValueError, match=r"Bounds state needs keys \[\], got \['history'\]"):
        robust("bounds").load_state_dict(robust("quantiles").state_dict())
