"""A reward out of all proportion to its history is named; ordinary heavy tails are not. And: finite, or refused."""

import pickle
import warnings

import numpy as np
import pytest
from batches import PAST, batch, estimator
from hypothesis import given, settings
from hypothesis import strategies as st

from openrlhf_pgrpo.core.estimator import RewardBatch, SampleError, estimate
from openrlhf_pgrpo.core.group_robust import GroupRobust
from openrlhf_pgrpo.core.group_weights import RobustOptions
from openrlhf_pgrpo.core.signals import SIGNALS, SignalOptions

pytestmark = pytest.mark.core

OURS = ["pgrpo", "pgrpo_eb", "pgrpo_global", "pref_group_norm"]
every = pytest.mark.parametrize("name", OURS)


@every
@pytest.mark.parametrize("value", [3e38, -3e38, 1e10, 1e100])
def test_e7_a_reward_out_of_all_proportion_is_named_and_changes_nothing(name, value):
    """One reward of 3e38 among 1 and 5: refused with sample, preference group and history; the history stays."""
    running = estimator(name)
    running(PAST)
    before = pickle.dumps(running.state_dict())
    with pytest.raises(SampleError, match="for sample 2 of preference group 'a'.*outliers to clip") as error:
        running(batch([[1, 5], [value, 3], [1, 5]], "aab"))
    assert error.value.sample == 2 and f"got {value:.4g}" in str(error.value)
    if name in ("pgrpo", "pgrpo_global"):
        assert "mean 3 and standard deviation 2 (16 samples seen)" in str(error.value)
    assert pickle.dumps(running.state_dict()) == before


@every
def test_e7_a_first_batch_has_no_history_and_is_judged_by_itself(name):
    """Without history the other rewards of the batch say what is usual."""
    with pytest.raises(SampleError, match="which has 0 samples so far; a usual one of this batch is 1"):
        estimator(name)(batch([[0, 1, 1, 3e38]], "a"))


@pytest.mark.parametrize("name", ["pgrpo", "pgrpo_eb", "pgrpo_global"])
def test_e7_clipped_it_is_named_in_a_warning_and_the_history_stays_narrow(name):
    """With the option clip it counts as ten standard deviations from the mean."""
    running = estimator(name, outliers="clip")
    running(PAST)
    with pytest.warns(RuntimeWarning, match="got 3e.38 for sample 1 of preference group 'a'.*clipped"):
        advantages = running(batch([[1, 3e38], [5, 3]], "aa"))
    assert np.isfinite(advantages).all() and advantages[1] > 0 and np.abs(advantages).max() < 10
    assert running.history.spread()[2][0] < 10


def test_e7_the_signals_of_robust_weights_refuse_it_too():
    """Weights over a host estimator keep a history of their own."""
    for signal in ("quantiles", "excess", "improvement"):
        weights = GroupRobust(RobustOptions(), SIGNALS[signal](SignalOptions(signal=signal)))
        weights(batch([[1, 5]] * 16, "ab" * 8))
        before = pickle.dumps(weights.state_dict())
        with pytest.raises(SampleError, match="3e.38 for sample 3 of preference group 'b'"):
            weights(batch([[1, 5], [1, 3e38]], "ab"))
        assert pickle.dumps(weights.state_dict()) == before


RUNNING = ["pgrpo", "pgrpo_eb", "pgrpo_global"]


@pytest.mark.parametrize("name", RUNNING)
def test_a_short_half_life_does_not_make_a_long_history_none(name):
    """Its weight levels off below 16; it has seen a thousand samples all the same."""
    running = estimator(name, half_life=8, min_count=11)
    for _ in range(250):
        running(batch([[0, 1, 0, 1]], "a"))
    assert running.history.spread()[0][0] < 16
    for value in (-1e9, 1e20):
        with pytest.raises(SampleError, match=r"whose history has mean .* \(1000 samples seen\) \(4 of 4 samples\)"):
            running(batch([[value] * 4], "a"))


def sentinels_after(samples, makes):
    """What is made of `samples` of 0 and 1, a few at a time, and then of four sentinels."""
    for start in range(0, samples, 4):
        makes(batch([[0, 1, 0, 1][: samples - start]], "a"))
    return makes(batch([[-1e9] * 4], "a"))


@pytest.mark.parametrize("name", RUNNING)
def test_a_batch_of_sentinels_is_not_its_own_norm_once_as_many_ordinary_samples_were_seen(name):
    """Else they would spoil the history for hundreds of samples."""
    for samples in (4, 5, 12, 15, 16):
        running = estimator(name)
        with pytest.raises(SampleError, match=rf"mean 0\.\d+ .* \({samples} samples seen\) \(4 of 4 samples\)"):
            sentinels_after(samples, running)
        clipping = estimator(name, outliers="clip")
        with pytest.warns(RuntimeWarning, match="4 of 4 samples.*clipped"):
            sentinels_after(samples, clipping)
        assert -10 < clipping.history.mean[0] < 0.5 and clipping.history.spread()[2][0] < 10
        # fewer than the batch has: nobody knows which of the two is usual
        assert np.isfinite(sentinels_after(3, estimator(name))).all()


@pytest.mark.parametrize("signal", ["quantiles", "excess", "improvement"])
def test_a_batch_of_sentinels_is_not_its_own_norm_for_signals_either(signal):
    weights = GroupRobust(RobustOptions(), SIGNALS[signal](SignalOptions(signal=signal)))
    with pytest.raises(SampleError, match=r"\(12 samples seen\) \(4 of 4 samples\)"):
        sentinels_after(12, weights)
    assert weights.signal.history.mean[0] == 0.5


ORDINARY = {
    "0 and 1": lambda rng, size: rng.binomial(1, 0.5, size),
    "rarely 1": lambda rng, size: rng.binomial(1, 1e-3, size),
    "rarely 100": lambda rng, size: 100.0 * rng.binomial(1, 1e-3, size),
    "log-normal": lambda rng, size: np.exp(2 * rng.standard_normal(size)),
    "Cauchy, clipped": lambda rng, size: rng.standard_cauchy(size).clip(-1e3, 1e3),
    "large unit": lambda rng, size: 1e8 * rng.normal(1, 1, size),
    "large offset": lambda rng, size: 1e8 + rng.normal(0, 1, size),
}


@pytest.mark.parametrize("kind", ORDINARY)
@pytest.mark.parametrize("groups, samples", [("aaab", 4), ("a", 1), ("a", 2)])
@every
def test_e7_ordinary_heavy_tails_are_never_refused(kind, name, groups, samples):
    """Many runs of 30 steps from an empty history, where it is most doubtful what is usual."""
    for seed in range(20):
        rng, running = np.random.default_rng(seed), estimator(name)
        for _ in range(30):
            rewards = ORDINARY[kind](rng, (len(groups), samples)).astype(float)
            assert np.isfinite(running(batch(list(rewards), groups))).all()


def test_e7_above_what_squares_can_hold_a_batch_is_refused():
    """The square of 1e160 is no float64: refused for every estimator, also of the user's."""
    with pytest.raises(SampleError, match="at most 1e.140 in size, got 1e.160 for sample 1 of preference group 'a'"):
        batch([[1, 1e160]], "a")


numbers = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, 1.0, -0.0, 1e-320, 1e-160, 1e8, 1e30, 3e38, 1e154, 1e200]),
    st.floats(-10, 10),
)
steps = st.lists(st.lists(st.tuples(numbers, st.sampled_from("ab")), min_size=1, max_size=6), min_size=1, max_size=3)
EXAMPLES = 300


@pytest.mark.parametrize("outliers", ["refuse", "clip"])
@pytest.mark.parametrize("update", ["before", "after"])
@every
def test_e7_any_rewards_give_finite_advantages_or_a_refusal_that_changes_nothing(
    name, update, outliers, record_property
):
    """Property: finite, or a ValueError and the state as before."""
    inputs = set()

    @settings(max_examples=EXAMPLES, deadline=None, database=None)
    @given(steps, st.sampled_from([0.0, 1e-6]), st.sampled_from(["history", "prompt"]))
    def check(steps, eps, center):
        inputs.add(repr((steps, eps, center)))
        running = estimator(name, update=update, outliers=outliers, min_count=2, eps=eps, center=center)
        for rows in steps:
            rewards, names = [reward for reward, _ in rows for _ in "12"], [owner for _, owner in rows for _ in "12"]
            rewards[1::2] = [reward + 1 for reward in rewards[1::2]]
            before = pickle.dumps(running.state_dict())
            try:
                new = RewardBatch(np.array(rewards), np.arange(len(rewards)) // 2, names, names, names)
                assert np.isfinite(estimate(name, running, new)).all()
            except ValueError as error:
                assert "got" in str(error)
                assert pickle.dumps(running.state_dict()) == before

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        check()
    record_property("inputs", len(inputs))


def test_d18_bounds_that_no_mean_reward_meets_are_named_once():
    """[0, 1] for rewards around 7: the loss is 0 for ever, which a warning says, once."""
    bounds = SignalOptions(signal="bounds", bounds='{"a": [0, 1], "b": [0, 10]}')
    weights = GroupRobust(RobustOptions(), SIGNALS["bounds"](bounds))
    with pytest.warns(RuntimeWarning, match=r"got \[0, 1\] for 'a', whose mean reward is 7 .*1 of 2 pref.*stays 0"):
        for _ in range(4):
            weights(batch([[6, 8], [6, 8]] * 2, "abab"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights(batch([[6, 8], [6, 8]] * 2, "abab"))


def test_d18_bounds_that_are_met_now_and_then_are_no_reason_for_a_warning():
    """With 0 and 1 and few samples, means are often outside [0.2, 0.8]."""
    weights = GroupRobust(RobustOptions(), SIGNALS["bounds"](SignalOptions(signal="bounds", bounds="[0.2, 0.8]")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for last in (0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1):
            weights(batch([[1, last], [0, 1]], "ab"))
