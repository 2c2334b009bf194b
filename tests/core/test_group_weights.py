"""Weights of preference groups: the paper's steps by hand, a ten-line reference, and refusals."""

import pickle
from math import e, exp

import numpy as np
import pytest

from openrlhf_pgrpo.core.group_weights import GroupWeights, RobustOptions, ascend, mean_one, trade_off

pytestmark = pytest.mark.core

COUNTS = {"a": 30, "b": 10, "c": 60}


def weights_of(counts=COUNTS, **options):
    return GroupWeights(RobustOptions(**options), counts)


def show(weights, **batch):
    """One update; `batch` is name=(mean loss, samples)."""
    losses, samples = zip(*batch.values())
    weights.update(weights.rows([*batch]), np.array(losses, float), np.array(samples))
    return weights


def on_simplex(*values):
    return pytest.approx(np.array(values) / sum(values), rel=1e-12)


def stream(seed, steps=30):
    """Batches that may lack any preference group, except the first batch."""
    rng = np.random.default_rng(seed)
    for step in range(steps):
        names = [name for name in COUNTS if step == 0 or rng.random() < 0.6] or ["c"]
        yield {name: (rng.normal(1, 2), rng.integers(1, 9)) for name in names}


def content(weights):
    """Everything the weights hold, as text that is exact to the bit, by preference group."""
    state = weights.state_dict()
    return {name: [state[column][row].hex() for column in weights.columns] for row, name in enumerate(weights.names)}


# --- the paper's steps -----------------------------------------------------------------------------------------------


def test_one_sample_is_algorithm_1():
    weights = show(weights_of({"a": 30, "b": 10}, eta=0.5), b=(2.0, 1))
    # exponent eta (N/N_b) l = 0.5 * 40/10 * 2 = 4, from alpha = 1/2 each
    assert weights.alpha == on_simplex(1, e**4)
    show(weights, a=(3.0, 1))  # 0.5 * 40/30 * 3 = 2
    assert weights.alpha == on_simplex(e**2, e**4)


def test_a_batch_under_natural_sampling_by_hand():
    weights = show(weights_of({"a": 30, "b": 10}, eta=0.5), a=(1.0, 3), b=(3.0, 1))
    # eta (N/N_g) (B_g/B) L_g:  a: 0.5 * 40/30 * 3/4 * 1 = 0.5,  b: 0.5 * 40/10 * 1/4 * 3 = 1.5
    assert weights.alpha == on_simplex(e**0.5, e**1.5)
    show(weights, a=(1.0, 1), b=(1.0, 3))  # a: 0.5 * 40/30 * 1/4 = 1/6,  b: 0.5 * 40/10 * 3/4 = 1.5
    assert weights.alpha == on_simplex(e ** (0.5 + 1 / 6), e**3)


def test_all_data_in_one_batch_is_algorithm_2_and_batch_size_does_not_change_the_pace():
    for part in (1, 10):  # every preference group as often as in the data: eta L_g
        weights = show(weights_of(eta=0.5), a=(1.0, 30 / part), b=(3.0, 10 / part), c=(2.0, 60 / part))
        assert weights.alpha == on_simplex(e**0.5, e**1.5, e)


def test_balanced_sampling_has_no_importance_scaling():
    weights = show(weights_of(eta=0.5, sampling="balanced"), a=(1.0, 1), b=(3.0, 7))
    assert weights.alpha == on_simplex(e**0.5, e**1.5, 1)  # eta L_g, Algorithm 3


def test_trade_off_by_hand():
    counts, common = {"a": 30, "b": 10}, dict(eta=1.0, sampling="balanced")
    weights = show(weights_of(counts, chi=0.5, **common), a=(np.log(3), 1))
    assert weights.alpha == pytest.approx([0.625, 0.375])  # half of the adversary (3/4, 1/4) and half of mu = 1/2
    weights = show(weights_of(counts, chi=0.25, mu="share", **common), b=(np.log(3), 1))
    assert weights.alpha == pytest.approx([0.625, 0.375])  # a quarter of (1/4, 3/4) and three of (3/4, 1/4)
    named = weights_of(counts, chi=0.0, mu='{"b": 0.3, "a": 0.7}')
    assert show(named, a=(5.0, 1)).alpha == pytest.approx([0.7, 0.3])


def ten_lines(o, mu, batches):
    alpha = dict.fromkeys(COUNTS, 1.0)
    for batch in batches:
        of_batch = {name: n / sum(n for _, n in batch.values()) for name, (_, n) in batch.items()}
        for name, (loss, _) in batch.items():
            scale = of_batch[name] * sum(COUNTS.values()) / COUNTS[name] if o.sampling == "natural" else 1
            alpha[name] *= exp(o.eta * scale * loss)
    adversary = np.array([*alpha.values()]) / sum(alpha.values())
    return (1 - o.chi) * mu + o.chi * adversary


@pytest.mark.parametrize("sampling", ["natural", "balanced"])
@pytest.mark.parametrize("rest", [{}, {"chi": 0.7}, {"chi": 0.4, "mu": "share"}])
def test_a_stream_equals_ten_lines_in_plain_numbers(sampling, rest):
    weights = weights_of(sampling=sampling, eta=0.05, **rest)
    for batch in stream(0):
        show(weights, **batch)
    mu = np.full(3, 1 / 3) if weights.options.mu == "uniform" else np.array([0.3, 0.1, 0.6])
    np.testing.assert_allclose(weights.alpha, ten_lines(weights.options, mu, stream(0)), rtol=1e-10)
    assert weights.alpha.sum() == pytest.approx(1, rel=1e-14)


def test_leading_axes_are_steps_side_by_side():
    rng = np.random.default_rng(0)
    log_alpha, gains, mu = rng.normal(size=(3, 4, 5, 6))
    gains += np.arange(20).reshape(4, 5, 1) * 1e4  # each step has a maximum of its own
    together = trade_off(np.exp(ascend(log_alpha, gains)), mu, 0.3)
    for index in np.ndindex(4, 5):
        alone = trade_off(np.exp(ascend(log_alpha[index], gains[index])), mu[index], 0.3)
        np.testing.assert_allclose(together[index], alone, rtol=1e-14)


# --- no overflow, absent ones, newcomers -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("eta, loss", [(1e6, 1e6), (0.5, 2500.0), (1e300, 1e300), (1e308, -1e308), (0.0, 1e308)])
def test_no_step_size_and_no_loss_overflows(eta, loss):
    weights = weights_of(eta=eta)
    for _ in range(50):
        show(weights, a=(loss, 3), b=(-loss, 1), c=(0.0, 6))
        assert np.isfinite(weights.log_alpha).all()
    assert weights.alpha.sum() == pytest.approx(1)
    if eta > 1:
        assert list(weights.alpha) == ([1, 0, 0] if loss > 0 else [0, 1, 0])
        samples = weights.sample_weights(np.array([0, 1, 2]))
        assert np.isfinite(samples).all() and samples.mean() == pytest.approx(1)
    if eta == 1e6:  # alpha underflowed to 0, its logarithm did not
        for _ in range(60):
            show(weights, a=(-loss, 3), b=(loss, 1), c=(0.0, 6))
        assert list(weights.alpha) == [0, 1, 0]


def test_an_absent_preference_group_keeps_its_value():
    weights = weights_of(eta=0.5)
    show(weights, a=(1.0, 1), b=(2.0, 1), c=(3.0, 1))
    before, log_alpha = content(weights), weights.log_alpha
    show(weights, a=(4.0, 1))
    after = content(weights)
    assert [after[name][1:] for name in "bc"] == [before[name][1:] for name in "bc"]  # loss, count: to the bit
    moved = weights.log_alpha - log_alpha
    assert moved[1] == pytest.approx(moved[2], rel=1e-12) and moved[0] > 0 > moved[1]  # only renormalised


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("counts", [COUNTS, None])
def test_an_empty_batch_changes_nothing(counts):
    weights = weights_of(counts)
    nothing = np.zeros(0)
    for _ in range(2):
        before = content(weights)
        weights.update(weights.rows([]), nothing, nothing)
        assert content(weights) == before and len(weights.sample_weights(weights.rows([]))) == 0
        show(weights, a=(1.0, 2), c=(3.0, 2))


def test_without_counts_samples_are_counted_as_they_come():
    weights = show(weights_of(None, eta=0.5), a=(1.0, 3), b=(1.0, 1))
    assert list(weights.share) == [0.75, 0.25]
    assert weights.alpha == on_simplex(1, 1)  # the batch is all there is: eta L_g
    show(weights, b=(2.0, 4))
    # now N = 8, N_b = 5, and the batch is b alone: 0.5 * 8/5 * 1 * 2 = 1.6
    assert list(weights.count) == [3, 5]
    assert weights.alpha == on_simplex(1, e**1.6)


def test_a_newcomer_gets_the_average_weight_and_the_others_keep_their_ratios():
    one_by_one, at_once = (show(weights_of(None, eta=0.5), a=(9.0, 1), b=(1.0, 1)) for _ in range(2))
    # all data in the batch: exponents 4.5 and 0.5, alpha = (e^4, 1) / (e^4 + 1)
    one_by_one.rows(["c"])
    assert one_by_one.alpha == pytest.approx([2 / 3 * e**4 / (e**4 + 1), 2 / 3 / (e**4 + 1), 1 / 3])
    one_by_one.rows(["d"])
    at_once.rows(["c", "b", "d", "c"])
    np.testing.assert_allclose(one_by_one.alpha, at_once.alpha, rtol=1e-14)
    assert np.isnan(at_once.loss[2:]).all()


def test_rows_are_given_in_order_of_names():
    weights = weights_of(None)
    assert list(weights.rows(["b", "a", "b"])) == [0, 1, 0] and list(weights.rows(["c", "a"])) == [2, 1]
    assert list(weights.names) == ["b", "a", "c"] and len(weights) == 3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mu", ["uniform", "share"])
def test_before_the_first_sample_all_are_equal(mu):
    weights = weights_of(None, mu=mu, chi=0.5)
    assert len(weights.alpha) == len(weights.share) == 0
    weights.rows(["a", "b"])
    assert list(weights.alpha) == list(weights.share) == [0.5, 0.5]
    assert list(weights.sample_weights(np.array([0, 1, 1]))) == [1, 1, 1]


def test_names_of_mu_are_the_preference_groups():
    weights = weights_of(None, mu='{"a": 0.2, "b": 0.8}', chi=0.0)
    assert list(weights.names) == ["a", "b"] and list(weights.alpha) == [0.2, 0.8]
    assert show(weights, b=(1.0, 4)).group_weights()[0] == 1  # no sample of a yet: neither lifted nor lowered
    with pytest.raises(ValueError, match="one of the preference groups 'a', 'b', got 'z'"):
        weights.rows(["z", "a"])
    off_by_a_rounding = weights_of(None, mu='{"a": 0.3333333, "b": 0.6666666}', chi=0.0)
    assert off_by_a_rounding.alpha.sum() == pytest.approx(1, rel=1e-15)


# --- weights of samples ----------------------------------------------------------------------------------------------


def test_sample_weights_by_hand():
    weights = show(weights_of(sampling="balanced", eta=1.0), a=(np.log(2), 1), b=(np.log(3), 1))
    # alpha = (2, 3, 1)/6, p = (.3, .1, .6): alpha/p = 10/9, 5, 5/18
    assert weights.group_weights() == pytest.approx([10 / 9, 5, 5 / 18])
    found = weights.sample_weights(weights.rows(["c", "a", "b", "c"]))
    raw = np.array([5 / 18, 10 / 9, 5, 5 / 18])  # mean 5/3
    assert found == pytest.approx(raw / (5 / 3)) and found.mean() == pytest.approx(1)


def test_fixed_weights_are_importance_sampling_and_ordinary_training():
    importance = show(weights_of(chi=0.0), a=(7.0, 3), b=(1.0, 4))
    assert importance.group_weights() == pytest.approx([1 / 3 / 0.3, 1 / 3 / 0.1, 1 / 3 / 0.6])
    ordinary = show(weights_of(chi=0.0, mu="share"), a=(7.0, 3), b=(1.0, 4))
    assert list(ordinary.sample_weights(np.array([0, 1, 1, 2]))) == [1, 1, 1, 1]


def test_clipped_weights_have_mean_one_inside_the_range():
    weights = weights_of({"a": 100, "b": 900}, chi=0.0, mu='{"a": 0.99, "b": 0.01}', weight_min=0.5, weight_max=4.0)
    # alpha/p = 9.9 and 1/90. One a and seven b: b at least 0.5, then a = 8 - 7/2 = 4.5 is too much: a = 4, b = 4/7
    found = weights.sample_weights(np.array([0, 1, 1, 1, 1, 1, 1, 1]))
    assert found == pytest.approx([4] + [4 / 7] * 7)
    # three a and three b: b = 0.5, a = 1.5
    assert weights.sample_weights(np.array([0, 1] * 3)) == pytest.approx([1.5, 0.5] * 3)
    assert list(weights.sample_weights(np.array([1, 1, 1]))) == [1, 1, 1]


@pytest.mark.filterwarnings("error")
def test_any_weights_come_inside_the_range_with_one_factor_for_those_not_clipped():
    rng = np.random.default_rng(0)
    clipped = 0
    for low, high in [(0.1, 10.0), (0.0, 2.0), (0.7, np.inf), (1.0, 1.0), (0.9, 1.1)]:
        for spread in (0.1, 3.0, 60.0, 2000.0):  # of the logarithm: at 2000 most underflow to 0
            weights = np.exp(np.minimum(spread * rng.normal(size=200), 20))
            found = mean_one(weights, low, high)
            assert found.mean() == pytest.approx(1, rel=1e-12) and low <= found.min() and found.max() <= high
            assert (np.diff(found[np.argsort(weights)]) >= 0).all()
            inside = (low < found) & (found < high) & (weights > 1e-150)
            if inside.any():
                factors = found[inside] / weights[inside]
                assert np.ptp(factors) <= 1e-12 * factors.max()
                clipped += 0 < inside.sum() < 200
    assert clipped > 5


# --- state -----------------------------------------------------------------------------------------------------------

kinds = pytest.mark.parametrize("counts", [COUNTS, None])


def trained(counts, seed=0, **options):
    weights = weights_of(counts, **options)
    for batch in stream(seed):
        show(weights, **batch)
    return weights


@kinds
def test_state_is_exact_to_the_bit_pickles_and_goes_on_equally(counts):
    weights, copy = trained(counts), weights_of(counts)
    weights.rows(["newcomer"]) if counts is None else None
    copy.load_state_dict(pickle.loads(pickle.dumps(weights.state_dict())))
    assert list(copy.names) == list(weights.names) and content(copy) == content(weights)
    for batch in stream(1):
        show(weights, **batch), show(copy, **batch)
    assert content(copy) == content(weights)


@kinds
def test_state_is_a_copy_in_both_directions(counts):
    weights, copy = trained(counts), weights_of(counts)
    before, state = content(weights), weights.state_dict()
    show(weights, a=(1.0, 1))
    copy.load_state_dict(state)
    for column in weights.columns:
        state[column][:] = -2
    assert content(copy) == before


def test_the_order_of_preference_groups_in_the_data_may_change():
    weights, other = trained(COUNTS), weights_of(dict(reversed(COUNTS.items())))
    other.load_state_dict(weights.state_dict())
    assert list(other.names) == ["a", "b", "c"] and content(other) == content(weights)


damages = {
    "missing key": (lambda s: s.pop("loss"), "needs keys .*'loss'.*, got"),
    "additional key": (lambda s: s.update(colour=1), "needs keys .*, got .*'colour'"),
    "duplicate names": (lambda s: s.update(names=b"aac"), "saved names need to be distinct, got 2 distinct ones of 3"),
    "too few names": (lambda s: s.update(names=b"ab", name_lengths=[1, 1]), "one row for each of 2 names"),
    "too few characters": (lambda s: s.update(names=b"ab"), "the 3 characters .*, got 2"),
    "short column": (lambda s: s.update(count=s["count"][:-1]), r"one row for each of 3 names, .*'count': \(2,\)"),
    "no column": (lambda s: s.update(count=3.0), r"one row for each of 3 names, .*'count': \(\)"),
    "words for numbers": (lambda s: s.update(log_alpha=["many"] * 3), "many"),
}


@kinds
@pytest.mark.parametrize("damage", damages)
def test_load_refuses_a_foreign_state_and_changes_nothing(counts, damage):
    weights = trained(counts)
    before, state = content(weights), trained(counts, seed=1).state_dict()
    spoil, message = damages[damage]
    spoil(state)
    with pytest.raises(ValueError, match=message):
        weights.load_state_dict(state)
    assert content(weights) == before


@pytest.mark.parametrize(
    "counts, mu, message",
    [
        ({"a": 30, "b": 10, "c": 61}, "uniform", "60 samples of preference group 'c', got 61"),
        ({"a": 30, "b": 10}, "uniform", "needs the preference groups 'a', 'b', 'c', got 'a', 'b'"),
        ({"a": 30, "b": 10, "d": 60}, "uniform", "needs the preference groups 'a', 'b', 'c', got 'a', 'b', 'd'"),
        (None, '{"a": 0.5, "b": 0.5}', "needs the preference groups 'a', 'b', 'c', got 'a', 'b'"),
    ],
)
def test_resuming_on_other_data_is_refused(counts, mu, message):
    weights = weights_of(counts, mu=mu)
    before = content(weights)
    with pytest.raises(ValueError, match=message):
        weights.load_state_dict(trained(COUNTS).state_dict())
    assert content(weights) == before


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, value, need",
    [
        ("eta", -0.1, "a finite number >= 0"),
        ("eta", np.inf, "a finite number >= 0"),
        ("eta", np.nan, "a finite number >= 0"),
        ("sampling", "even", "one of natural, balanced"),
        ("chi", -0.1, "a number from 0 to 1"),
        ("chi", 1.1, "a number from 0 to 1"),
        ("weight_min", -0.1, "a number from 0 to 1"),
        ("weight_min", 1.1, "a number from 0 to 1"),
        ("weight_max", 0.9, "a number of at least 1"),
        ("weight_max", np.nan, "a number of at least 1"),
        ("mu", "even", "uniform, share or a JSON object of numbers"),
        ("mu", "[0.5, 0.5]", "uniform, share or a JSON object of numbers"),
        ("mu", "{}", "uniform, share or a JSON object of numbers"),
        ("mu", '{"a": "0.5", "b": "0.5"}', "uniform, share or a JSON object of numbers"),
        ("mu", '{"a": true, "b": false}', "uniform, share or a JSON object of numbers"),
        ("mu", '{"a": null, "b": 1}', "uniform, share or a JSON object of numbers"),
        ("mu", '{"a": [1], "b": 0}', "uniform, share or a JSON object of numbers"),
        ("mu", '{"a": 0.2, "a": 0.5, "b": 0.5}', "every preference group once"),
        ("mu", '{"a": 0.5, "b": 0.6}', "numbers from 0 to 1 that add up to 1"),
        ("mu", '{"a": 1.5, "b": -0.5}', "numbers from 0 to 1 that add up to 1"),
        ("mu", '{"a": NaN, "b": 1}', "numbers from 0 to 1 that add up to 1"),
        ("mu", '{"a": Infinity, "b": 1}', "numbers from 0 to 1 that add up to 1"),
        ("mu", '{"a": 1' + 400 * "0" + ', "b": 0.5}', "numbers from 0 to 1 that add up to 1"),
    ],
)
def test_an_option_out_of_range_is_refused(option, value, need):
    with pytest.raises(ValueError) as refusal:
        RobustOptions(**{option: value})
    assert str(refusal.value).startswith(f"{option} needs {need}, got {value!r}")


@pytest.mark.parametrize(
    "counts, mu, message",
    [
        ({"a": 3, "b": 0}, "uniform", "needs samples, got 0 of 'b'"),
        ({"a": 3, "b": -1}, "uniform", "needs samples, got -1 of 'b'"),
        ({"a": 3, "b": np.nan}, "uniform", "needs samples, got nan of 'b'"),
        ({"a": 3, "b": np.inf}, "uniform", "needs samples, got inf of 'b'"),
        ({"a": 3}, "uniform", r"at least two preference groups, got \['a'\]: train without"),
        ({}, "uniform", r"at least two preference groups, got \[\]"),
        (None, '{"a": 1}', r"at least two preference groups, got \['a'\]"),
        ({"a": 3, "b": 4}, '{"a": 0.5, "c": 0.5}', "^mu needs the preference groups 'a', 'b', got 'a', 'c'"),
        ({str(i): 0 for i in range(10**4)}, "uniform", "got 0 of '0', .*'7' and 9992 more$"),
    ],
)
def test_preference_groups_that_cannot_be_weighed_are_refused(counts, mu, message):
    with pytest.raises(ValueError, match=message):
        weights_of(counts, mu=mu)


@kinds
@pytest.mark.parametrize(
    "rows, losses, samples, message",
    [
        ([0, 1], [1.0, np.nan], [1, 1], "a finite loss, got nan of preference group 'b'"),
        ([2, 1], [-np.inf, 1.0], [1, 1], "a finite loss, got -inf of preference group 'c'"),
        ([0, 1], [1.0, 1.0], [1, 0], "samples, got 0.0 of preference group 'b'"),
        ([0, 1], [1.0, 1.0], [1, np.inf], "samples, got inf of preference group 'b'"),
        ([1, 0, 1], [1.0, 1.0, 1.0], [1, 1, 1], "each row once, got preference group 'b' more than once"),
        ([0, 1], [1.0], [1, 1], r"for each row, got shapes \(\(2,\), \(1,\), \(2,\)\)"),
        ([0, 1], [[1.0], [1.0]], [1, 1], "for each row, got shapes"),
    ],
)
def test_a_bad_batch_is_refused_and_changes_nothing(counts, rows, losses, samples, message):
    weights = trained(counts)
    before = content(weights)
    with pytest.raises(ValueError, match=message):
        weights.update(np.array(rows), np.array(losses), np.array(samples))
    assert content(weights) == before


def test_an_unknown_preference_group_is_refused_if_all_are_known():
    weights = weights_of(COUNTS)
    with pytest.raises(ValueError, match="one of the preference groups 'a', 'b', 'c', got 'd', 'e'"):
        weights.rows(["a", "d", "e", "d"])
    assert list(weights.names) == ["a", "b", "c"]


def test_every_option_says_its_default():
    for spec in RobustOptions.__dataclass_fields__.values():
        assert "efault" in spec.metadata["help"], spec.name
