"""Online group-robust weights: what they must not react to, names in options, and exact resuming."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from robust_batches import batch, every, make_signal

from openrlhf_pgrpo.core.group_robust import GroupRobust, check_names
from openrlhf_pgrpo.core.group_weights import RobustOptions
from openrlhf_pgrpo.core.signals import Signal, SignalOptions

pytestmark = pytest.mark.core


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


# --- preference groups without a signal ----------------------------------------------------------------------------


def test_a_group_without_signal_keeps_the_average_weight_and_a_new_one_starts_there():
    weights, rng = robust(eta=1.0), np.random.default_rng(0)
    for step in range(40):
        weights(batch(learns=rng.normal(step, 1, 32), lags=rng.normal(0, 1, 32), constant=np.zeros(32)))
    learns, lags, constant = weights.weights.log_alpha
    assert lags > constant > learns
    assert weights.weights.loss[2] == 0
    new = batch(learns=rng.normal(40, 1, 32), lags=rng.normal(0, 1, 32), new=[7.0] * 8)
    weights(new)
    assert np.nanmax(weights.weights.log_alpha) == weights.weights.log_alpha[1]
    assert weights.weights.log_alpha[0] < weights.weights.log_alpha[3] < weights.weights.log_alpha[1]


def test_with_tokens_weights_have_mean_one_over_tokens_and_a_group_counts_as_without():
    rewards = batch(short=[0.0, 1.0, 2.0], long=[4.0, 5.0, 6.0, 7.0, 8.0])
    tokens = np.array([3, 5, 4, 40, 60, 50, 30, 70])
    by_samples, by_tokens = robust(eta=1.0), robust(eta=1.0)
    samples, weights = by_samples(rewards), by_tokens(rewards, tokens)
    assert samples.mean() == pytest.approx(1) and (tokens * weights).sum() / tokens.sum() == pytest.approx(1)
    shares = [(tokens * weights)[part].sum() / tokens.sum() for part in (slice(3), slice(3, None))]
    assert shares == pytest.approx([samples[:3].sum() / 8, samples[3:].sum() / 8])
    assert_equal(by_tokens.state_dict(), by_samples.state_dict())


def test_a_group_without_a_token_to_train_leaves_the_weights_of_others_finite():
    weights = robust(eta=1.0)(batch(empty=[0.0, 1.0], long=[4.0, 5.0]), np.array([0, 0, 40, 60]))
    assert np.isfinite(weights).all()


@pytest.mark.parametrize("short", [[0, 1] * 16, [0, 4] * 16, [0] * 31 + [1], [0] * 32])
def test_the_mean_over_tokens_is_1_also_where_a_group_has_few(short):
    """A mean length below 1 counts as 1, and a group without tokens does not count."""
    tokens = np.r_[short, np.full(32, 10)]
    weights = robust(eta=1.0)(batch(short=np.arange(32.0), long=np.arange(32.0)), tokens)
    assert (tokens * weights).sum() / tokens.sum() == pytest.approx(1) and np.isfinite(weights).all()
    if sum(short) >= 32:
        assert (tokens * weights)[:32].sum() / tokens.sum() == pytest.approx(0.5)


def test_without_a_token_to_train_weights_are_those_of_samples():
    rewards = batch(a=[0.0, 1.0], b=[4.0, 5.0])
    np.testing.assert_array_equal(robust()(rewards, np.zeros(4)), robust()(rewards))


# --- what must not move the weights --------------------------------------------------------------------------------

CHANGES = {"offset -10": (1, -10), "scale x5": (5, 0), "both": (5, -10)}


def learning(seed, change=(1, 0), steps=120):
    """Batches in which two preference groups of unequal size learn alike; `change` applies to the small one."""
    rng, (scale, shift) = np.random.default_rng(seed), change
    for step in range(steps):
        small, large = (rng.normal(2 * step / steps, 1, size) for size in (16, 48))
        yield batch(small=scale * small + shift, large=large)


def alphas(weights, **kwargs):
    for step in learning(**kwargs):
        weights(step)
    return weights.weights.alpha


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("signal", ["quantiles", "excess", "improvement"])
def test_offset_and_scale_change_nothing(signal, change):
    changed, unchanged = (alphas(robust(signal), seed=0, change=change) for change in (CHANGES[change], (1, 0)))
    np.testing.assert_allclose(changed, unchanged, rtol=1e-9)
    assert abs(unchanged[0] - 0.5) > 1e-4  # there was something to change


@pytest.mark.parametrize("signal", ["quantiles", "excess", "improvement"])
def test_any_positive_affine_change_of_a_group_changes_nothing_and_alphas_add_up_to_1(signal, record_property):
    """Property, with groups that are not in every step."""
    inputs = set()

    @settings(max_examples=40, deadline=None, database=None)
    @given(st.integers(0, 10**6), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
    def check(seed, scale, shift):
        inputs.add((seed, scale, shift))
        one, other, rng = robust(signal, eta=0.5), robust(signal, eta=0.5), np.random.default_rng(seed)
        for step in range(12):
            sizes = rng.integers(0, 12, 3)
            rewards = {name: rng.normal(step / 6, 1, size) for name, size in zip("abc", sizes) if size}
            changed = {name: scale * r + shift if name == "a" else r for name, r in rewards.items()}
            if rewards:
                np.testing.assert_allclose(one(batch(**rewards)), other(batch(**changed)), rtol=1e-6)
                assert one.weights.alpha.sum() == pytest.approx(1)
        np.testing.assert_allclose(one.weights.alpha, other.weights.alpha, rtol=1e-6)

    check()
    record_property("inputs", len(inputs))


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


def test_improvement_moves_nothing_in_the_first_batch_of_a_group():
    weights, rng = robust("improvement", eta=1.0), np.random.default_rng(0)
    weights(batch(a=rng.normal(5, 1, 32), b=rng.normal(-5, 1, 32)))
    np.testing.assert_array_equal(weights.weights.alpha, [0.5, 0.5])
    weights(batch(a=rng.normal(6, 1, 32), b=rng.normal(-5, 1, 32)))
    a, b = weights.weights.alpha
    assert a < 0.45 and b > 0.55
    weights(batch(a=rng.normal(6, 1, 32), b=rng.normal(-5, 1, 32), new=rng.normal(9, 1, 32)))
    assert weights.weights.loss[2] == 0 and np.isnan(weights.latest[2])  # as much as the average


def test_equal_losses_do_not_move_the_weights():
    # The sizes of groups in a batch are random. Equal losses must not turn that into weights.
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
    # p = 1/4 and 3/4: weights 0.8 and 3.2 / 3; the batch has one sample of each
    expected = np.array([0.2 / 0.25, 0.8 / 0.75])
    np.testing.assert_allclose(weights(batch(a=[1.0], b=[2.0])), expected / expected.mean())


@pytest.mark.parametrize(
    "option, options",
    [("mu", {"mu": '{"a": 0.9, "z": 0.1}'}), ("bounds", {"signal": "bounds", "options": {"bounds": '{"a": [0, 1]}'}})],
)
def test_a_group_left_out_is_refused_and_nothing_is_changed(option, options):
    weights = robust(**options)
    before = weights.state_dict()
    with pytest.raises(ValueError, match=f"^{option} needs every preference group, got none of 'b', 'c': add"):
        weights(batch(a=[0.5], b=[1.0], c=[1.0]))
    assert_equal(weights.state_dict(), before)


def test_groups_that_are_not_named_anywhere_are_fine():
    check_names(["a", "b"], RobustOptions(mu="share"), SignalOptions(signal="bounds", bounds="[0, 1]"))


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
def test_a_resumed_run_goes_on_bit_by_bit(signal):
    steps = [*learning(seed=3, steps=30)]
    steps[1::3] = [batch(large=step.rewards[-8:]) for step in steps[1::3]]  # the small group is not in every step
    for cut in (1, 2, 11):
        straight = robust(signal, eta=0.3)
        for step in steps[:cut]:
            straight(step)
        resumed = robust(signal, eta=0.3)
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


def seen(signal="quantiles", names="ab", **options):
    """Weights that have seen a step of some preference groups."""
    weights = robust(signal, eta=1.0, **options)
    weights(batch(**{name: np.linspace(-3, 3, 32) for name in names}))
    return weights


LATEST = "state needs the latest loss of each of 2 preference groups, got shape "
REFUSED_STATES = {  # what is wrong -> the weights that refuse it, what differs from the state of `seen()`, and why
    "other data": (
        lambda: seen(names="ac", mu='{"a": 0.5, "c": 0.5}'),
        {},
        "resuming needs the preference groups 'a', 'b', got 'a', 'c'",
    ),
    "other signal": (lambda: seen("bounds"), {}, r"Bounds state needs keys \[\], got \['history'\]"),
    "less signal": (lambda: seen("improvement"), {}, "LastMeans state needs keys .*'last'"),
    "half a signal": (seen, {"signal": {"history": {}}}, "RewardHistory state needs keys"),
    "half the weights": (seen, {"weights": {}}, "GroupWeights state needs keys"),
    "more latest": (seen, {"latest": np.zeros(5)}, rf"{LATEST}\(5,\)"),
    "less latest": (seen, {"latest": np.zeros(1)}, rf"{LATEST}\(1,\)"),
    "no row of latest": (seen, {"latest": np.zeros((2, 1))}, rf"{LATEST}\(2, 1\)"),
    "a key more": (seen, {"loss": 0}, "GroupRobust state needs keys"),
}


@pytest.mark.parametrize("kind", REFUSED_STATES)
def test_a_state_that_is_refused_changes_nothing(kind):
    make, change, message = REFUSED_STATES[kind]
    weights, state = make(), {**seen().state_dict(), **change}
    before = pickle.dumps(weights.state_dict())
    with pytest.raises(ValueError, match=message):
        weights.load_state_dict(state)
    assert pickle.dumps(weights.state_dict()) == before


def test_a_state_saved_after_a_refused_batch_can_be_loaded():
    """The batch may have named preference groups that are new."""

    class Broken(type(make_signal("quantiles"))):
        def __call__(self, batch, means):
            return np.full(len(means), np.inf)

    weights, signal = seen(), Broken(SignalOptions())
    signal.load_state_dict(weights.signal.state_dict())
    weights.signal = signal
    with pytest.raises(ValueError, match="finite loss"):
        weights(batch(a=[1.0], new=[2.0]))
    again = robust(eta=1.0)
    again.load_state_dict(weights.state_dict())
    assert again.latest.shape == (3,) and np.isnan(again.latest[2])
