"""P-GRPO by hand, and what holds for every estimator of ours: symmetries, no explosion, state, metrics."""

import itertools
import pickle

import numpy as np
import pytest
from batches import PAST, after_past, batch, estimator, random_batch

from openrlhf_pgrpo.core.estimator import RewardBatch
from openrlhf_pgrpo.core.pgrpo import PGRPOOptions, batch_advantages

pytestmark = pytest.mark.core

OURS = ["pgrpo", "pgrpo_eb", "pgrpo_global", "pref_group_norm"]
every = pytest.mark.parametrize("name", OURS)
updates = pytest.mark.parametrize("update", ["before", "after"])
centers = pytest.mark.parametrize("center", ["history", "prompt"])


# --- P-GRPO --------------------------------------------------------------------------------------------------------


def test_the_formula_by_hand():
    advantages = after_past("pgrpo", eps=0.5)(batch([[7, 3], [1]], "aa"))
    np.testing.assert_allclose(advantages, [(7 - 3) / (2 + 0.5), 0, (1 - 3) / (2 + 0.5)], rtol=1e-14)  # 1.6, 0, -0.8


def test_update_after_knows_the_past_alone_and_update_before_the_batch_too():
    past = after_past("pgrpo", eps=0)
    before = estimator("pgrpo", eps=0, update="before")
    before.load_state_dict(past.state_dict())
    new = batch([[20]], "a")
    np.testing.assert_allclose(past(new), [(20 - 3) / 2], rtol=1e-14)
    # with the 20: mean = 3 + 17/17 = 4, M2 = 64 + 17^2 * 16/17 = 336
    np.testing.assert_allclose(before(new), [(20 - 4) / np.sqrt(336 / 17)], rtol=1e-14)
    np.testing.assert_array_equal(past.history.m2, before.history.m2)  # afterwards both know the same


def test_corollary_3_1():
    # A' = (sigma_G / sigma_p) A + (mu_G - mu_p) / sigma_p, exact for eps = 0
    past, new = random_batch(0, "a" * 50), random_batch(1, "aaa")
    pgrpo = estimator("pgrpo", update="after", eps=0)
    pgrpo(past)
    mu_p, sigma_p = past.rewards.mean(), past.rewards.std()
    R = new.rewards.reshape(3, 4)
    mu_G, sigma_G = R.mean(1, keepdims=True), R.std(1, keepdims=True)
    grpo = (R - mu_G) / sigma_G
    expected = sigma_G / sigma_p * grpo + (mu_G - mu_p) / sigma_p
    np.testing.assert_allclose(pgrpo(new).reshape(3, 4), expected, atol=1e-12)


def test_advantages_of_a_prompt_group_sum_to_n_times_its_bias_term():
    new = batch([[2, 4, 9], [0, 1, 2]], "aa")
    sums = after_past("pgrpo", eps=0)(new).reshape(2, 3).sum(1)
    np.testing.assert_allclose(sums, [3 * (5 - 3) / 2, 3 * (1 - 3) / 2], rtol=1e-14)


def test_a_prompt_group_without_variance_keeps_its_bias_term_only():
    new = batch([[6, 6], [3, 3]], "aa")
    np.testing.assert_allclose(after_past("pgrpo", eps=0)(new), [1.5, 1.5, 0, 0])  # (6 - 3) / 2
    np.testing.assert_allclose(after_past("pgrpo", center="prompt", eps=0)(new), [0, 0, 0, 0])


def test_each_sample_meets_the_history_of_its_own_preference_group():
    pgrpo = after_past("pgrpo", eps=0)
    pgrpo(batch([[10, 30]] * 8, "b" * 8))  # b: mean 20, standard deviation 10
    np.testing.assert_allclose(pgrpo(batch([[25, 15], [5, 1]], "ba")), [0.5, -0.5, 1, -1])


def test_centred_on_prompts_it_is_the_prompt_baseline_on_the_scale_of_the_history():
    new = batch([[10, 14], [0, 1, 5]], "aa")
    expected = [-1, 1, -1, -0.5, 1.5]  # minus 12 and minus 2, over 2
    np.testing.assert_allclose(after_past("pgrpo", center="prompt", eps=0)(new), expected)


# --- symmetries ----------------------------------------------------------------------------------------------------


@every
@updates
@centers
def test_order_of_samples_and_numbers_of_prompts_do_not_matter(name, update, center):
    rng = np.random.default_rng(0)
    straight, shuffled = (estimator(name, update=update, center=center, min_count=8) for _ in range(2))
    for seed in range(4):
        new = random_batch(seed)
        order, renumber = rng.permutation(len(new.rewards)), rng.permutation(6)
        mixed = RewardBatch(
            new.rewards[order],
            renumber[new.prompt_groups[order]],
            [new.pref_groups[i] for i in order],
            new.users,
            new.labels,
        )
        np.testing.assert_allclose(shuffled(mixed), straight(new)[order], rtol=1e-10, atol=1e-10)


def changed(new, pref_group, scale, shift):
    """The same batch with rewards scale * R + shift in one preference group, and where that is."""
    there = np.array([p == pref_group for p in new.pref_groups])
    rewards = np.where(there, scale * new.rewards + shift, new.rewards)
    return RewardBatch(rewards, new.prompt_groups, new.pref_groups, new.users, new.labels), there


@pytest.mark.parametrize("name", [name for name in OURS if name != "pgrpo_global"])
@updates
@centers
@pytest.mark.parametrize("scale, shift", [(1, 1000), (1e-3, 0), (7, -50)])
def test_the_unit_of_one_preference_group_changes_no_advantage(name, update, center, scale, shift):
    plain, other = (estimator(name, update=update, center=center, eps=0, min_count=8) for _ in range(2))
    for seed in range(4):
        new, there = changed(random_batch(seed), "a", scale, shift)
        expected, got = plain(random_batch(seed)), other(new)
        np.testing.assert_allclose(got[there], expected[there], rtol=1e-8, atol=1e-8)
        np.testing.assert_array_equal(got[~there], expected[~there])


def test_only_eps_depends_on_the_unit():
    # rewards times 1/100: (R - mu)/100 / (sigma/100 + eps) = (R - mu) / (sigma + 100 eps)
    small = estimator("pgrpo", update="after", eps=0.01)
    small(changed(PAST, "a", 0.01, 0)[0])
    np.testing.assert_allclose(small(batch([[0.07]], "a")), [(7 - 3) / (2 + 100 * 0.01)])


# --- the first steps -----------------------------------------------------------------------------------------------

constant, coin = np.full(16, 5.0), np.tile([0.0, 1.0], 8)
scenarios = {
    "one sample": [batch([[7.0]], "a")],
    "one sample per prompt": [batch(coin.reshape(16, 1), "a" * 16)] * 2,
    "constant": [batch(constant.reshape(4, 4), "aaaa")] * 2,
    "constant, but a tenth": [batch([[0.1] * 3] * 7, "a" * 7)] * 2,
    "constant, then one different": [batch([constant], "a"), batch([[5, 5, 5, 6]], "a")],
    "constant, then one alone": [batch([constant], "a"), batch([[6.0]], "a")],
    "constant prompts": [batch([[0, 0], [0, 0], [1, 1]] * 6, "a" * 18)] * 2,
    "one in sixteen": [batch((np.arange(16.0).reshape(8, 2) == 3), "a" * 8)],
    "offset 1e8": [batch(1e8 + coin.reshape(4, 4), "aaaa")] * 2,
    "constant at 1e8 and a tenth": [batch(0.1 + 1e8 * np.ones((6, 3)), "a" * 6)] * 2,
    "scale 1e-9": [batch(1e-9 * coin.reshape(4, 4), "aaaa")] * 2,
    "scale 1e8": [batch(1e8 * coin.reshape(4, 4), "aaaa")] * 2,
    "a newcomer alone": [batch([constant, coin, [9.0]], "abc"), batch([coin, [8.0]], "bc")],
    "a newcomer": [batch([coin, [9.0, 8.0]], "ab")] * 2,
    "prompts of 5 and 1": [batch([[0, 1, 2, 3, 4]] * 3 + [[50.0]], "aaaa")] * 2,
}


@every
@pytest.mark.parametrize("scenario", scenarios)
def test_the_first_steps_never_explode(name, scenario):
    # One of n samples is at most sqrt(n - 1) of their standard deviations away from their mean. With two variance
    # components there are two such bounds, sqrt(df) and sqrt(prompts - 1), together at most sqrt(2 (n - 1)).
    # With update="after" this holds here because no later step leaves the range of the past, unless that is a point.
    for update, center in itertools.product(("before", "after"), ("history", "prompt")):
        first_steps, n = estimator(name, update=update, center=center), 0
        for step, new in enumerate(scenarios[scenario]):
            n += len(new.rewards)
            bound = np.sqrt((2 if name == "pgrpo_eb" else 1) * (n - 1))
            advantages = first_steps(new)
            assert advantages.shape == new.rewards.shape and np.isfinite(advantages).all()
            assert np.abs(advantages).max() <= bound * (1 + 1e-6), (update, center, step)


@every
def test_an_empty_batch_is_no_batch(name):
    quiet = estimator(name)
    quiet(PAST)
    before = pickle.dumps(quiet.state_dict())
    assert quiet(batch([[]], "a")).shape == (0,)
    assert pickle.dumps(quiet.state_dict()) == before


# --- fallback: history, else the preference group in this batch, else the prompt group, else 0 ---------------------


def fallback(past, new, **options):
    young = estimator("pgrpo", **{"update": "after", "min_count": 4, "eps": 0, **options})
    young(batch([past], "a"))
    return young(new)


def test_rung_1_a_history_of_min_count_samples_is_used():
    new = batch([[9, 9], [5, 7]], "aa")
    np.testing.assert_allclose(fallback([1, 1, 5, 5], new), [3, 3, 1, 2])  # (R - 3) / 2


def test_rung_2_below_it_the_preference_group_of_this_batch():
    new = batch([[1, 1], [5, 5], [100]], "aab")
    np.testing.assert_allclose(fallback([0, 8, 40], new), [-1, -1, 1, 1, 0])  # mean 3, standard deviation 2


def test_rung_2_keeps_the_baseline_of_the_prompt_group():
    new = batch([[1, 1], [3, 7]], "aa")  # standard deviation sqrt(6) around 3
    np.testing.assert_allclose(fallback([0, 8, 40], new, center="prompt"), np.array([0, 0, -2, 2]) / np.sqrt(6))


def test_rung_3_below_min_count_in_the_batch_the_prompt_group():
    new = batch([[1, 5], [100], [7, 7, 8]], "aab")
    expected = [-1, 1, 0, *(np.array([-1, -1, 2]) / np.sqrt(2))]  # mean 22/3, deviations -1/3 -1/3 2/3, std sqrt(2)/3
    np.testing.assert_allclose(fallback([0, 8, 40], new), expected)


def test_rung_4_a_lonely_sample_gets_0():
    np.testing.assert_array_equal(fallback([0, 8, 40], batch([[100], [-3]], "ab")), [0, 0])


@pytest.mark.parametrize("eps", [0, 1e-6])
@pytest.mark.parametrize("reward", [0.1, 1e10 + 0.1])
def test_what_rounding_leaves_of_a_constant_is_no_scale(eps, reward):
    pgrpo = estimator("pgrpo", update="after", eps=eps)
    constant = batch([[reward] * 3] * 7, "a" * 7)  # the mean of 21 times 0.1 is not 0.1: a standard deviation of 1e-17
    pgrpo(constant)
    np.testing.assert_array_equal(pgrpo(constant), 0)
    assert np.abs(pgrpo(batch([[reward, reward, reward + 1]], "a"))).max() <= np.sqrt(3 - 1)


def test_a_history_that_never_varied_is_no_history():
    # std 0 is not above eps = 0, although 4 samples were seen: rung 2 for the four, rung 3 for the two
    np.testing.assert_allclose(fallback([5, 5, 5, 5], batch([[1, 1, 5, 5]], "a")), [-1, -1, 1, 1])
    np.testing.assert_allclose(fallback([5, 5, 5, 5], batch([[6, 8]], "a")), [-1, 1])


def test_a_standard_deviation_of_eps_is_no_scale_and_just_above_it_is_one():
    assert fallback([1, 1, 5, 5], batch([[7]], "a"), eps=2) == [0]  # sigma_p = 2
    np.testing.assert_allclose(fallback([1, 1, 5, 5], batch([[7]], "a"), eps=1.75), [4 / 3.75])


def test_update_before_counts_the_batch_itself():
    # 2 + 2 samples make the 4 of min_count: history 1, 1, 5, 5
    np.testing.assert_allclose(fallback([1, 5], batch([[1, 5]], "a"), update="before"), [-1, 1])
    np.testing.assert_allclose(fallback([1, 1], batch([[5, 5]], "a"), update="before"), [1, 1])
    np.testing.assert_allclose(fallback([1, 1], batch([[5, 5]], "a"), update="after"), [0, 0])


@pytest.mark.parametrize("min_count, expected", [(8.0, [3, 4]), (8.1, [-1, 1])])
def test_with_a_half_life_min_count_means_weight(min_count, expected):
    # half-life 6: after 6 more samples the first 4 weigh 2, so 8 in all although 10 were seen; mean 3, std 2
    young = estimator("pgrpo", update="after", half_life=6, min_count=min_count, eps=0)
    young(batch([[1, 1, 5, 5]], "a"))
    young(batch([[1, 1, 1, 5, 5, 5]], "a"))
    np.testing.assert_allclose(young(batch([[9, 11]], "a")), expected)


def test_batch_advantages_by_hand():
    options = PGRPOOptions(min_count=3, eps=0.5)
    new = batch([[1, 5], [3], [0, 4], [6]], "aabc")  # a has 3 samples: mean 3, M2 = 8
    a = 2 / (np.sqrt(8 / 3) + 0.5)
    b = 2 / (2 + 0.5)  # b has 2: its prompt group
    np.testing.assert_allclose(batch_advantages(new, np.array([0, 0, 0, 1, 1, 2]), options), [-a, a, 0, -b, b, 0])


@pytest.mark.parametrize("eps, expected", [(1, 0), (0.5, 1 / (1 + 0.5))])
def test_the_fallback_keeps_to_eps(eps, expected):
    # M2 = 2: the standard deviation is 1, which is above eps or is not
    options = PGRPOOptions(eps=eps)
    advantages = batch_advantages(batch([[1, 3]], "a"), np.zeros(2, int), options)
    np.testing.assert_allclose(advantages, [-expected, expected])


# --- half-life -----------------------------------------------------------------------------------------------------


def test_an_undecayed_history_lags_behind_a_drift_and_a_half_life_follows():
    # 50 preference groups are 50 repetitions: mean reward 0 -> 1 over 500 steps, 64 samples a step, noise 0.1
    rng = np.random.default_rng(0)
    names, numbers = [str(i) for i in range(50)] * 64, np.arange(50 * 64)
    plain, follows = estimator("pgrpo", update="after"), estimator("pgrpo", update="after", half_life=640)
    for step in range(500):
        rewards = step / 499 + 0.1 * rng.standard_normal(50 * 64)
        new = RewardBatch(rewards, numbers, names, names, names)
        last, last_followed = plain(new), follows(new)
    # history: uniform on 0 ... 1 plus noise: mean 1/2, variance 1/12 + 0.01; the last step is 1/2 above it
    assert last.mean() == pytest.approx(0.5 / np.sqrt(1 / 12 + 0.01), abs=0.02)  # 1.64
    assert (last > 0).mean() > 0.995
    # half-life of 10 steps: 1 / (1 - 2^(-1/10)) = 14.9 steps behind on average, that is 0.030 on a scale of 0.104
    assert last_followed.mean() == pytest.approx(0.28, abs=0.03)


@every
@updates
@centers
def test_prompt_numbers_may_have_gaps(name, update, center):
    dense, gaps = (estimator(name, update=update, center=center, min_count=8) for _ in range(2))
    for seed in range(3):
        new = random_batch(seed)
        holes = RewardBatch(new.rewards, 3 * new.prompt_groups[::-1] + 2, new.pref_groups, new.users, new.labels)
        new = RewardBatch(new.rewards, new.prompt_groups[::-1], new.pref_groups, new.users, new.labels)
        np.testing.assert_array_equal(gaps(holes), dense(new))


# --- state ---------------------------------------------------------------------------------------------------------


@every
@updates
@pytest.mark.parametrize("half_life", [None, 64])
def test_save_and_resume_give_the_same_next_advantages_bit_for_bit(name, update, half_life):
    options = dict(update=update, half_life=half_life)
    running, resumed = estimator(name, **options), estimator(name, **options)
    for seed in range(4):
        running(random_batch(seed))
    resumed.load_state_dict(pickle.loads(pickle.dumps(running.state_dict())))
    for seed in range(4, 6):
        new = random_batch(seed, "bcaaa")
        np.testing.assert_array_equal(resumed(new), running(new))


@every
def test_a_saved_state_does_not_move_on_with_the_run(name):
    running = estimator(name)
    running(random_batch(0))
    state = running.state_dict()
    before = pickle.dumps(state)
    running(random_batch(1, "abc"))
    assert pickle.dumps(state) == before


@pytest.mark.parametrize("name", ["pgrpo", "pgrpo_global"])
def test_a_state_of_another_estimator_is_refused(name):
    with pytest.raises(ValueError, match="needs keys"):
        estimator(name).load_state_dict(estimator("pgrpo_eb").state_dict())


@every
def test_a_state_without_its_keys_is_refused_with_what_it_needs(name):
    with pytest.raises(ValueError, match="got"):
        estimator(name).load_state_dict({"hitsory": {}})


# --- what a run logs and asks --------------------------------------------------------------------------------------


def test_metrics_by_hand():
    expected = {"history_count": 16, "history_mean": 3, "history_std": 2}
    assert after_past("pgrpo").metrics(["a"]) == {"a": expected}
    assert after_past("pgrpo_global").metrics(["a", "b"]) == {"a": expected, "b": expected}
    # pgrpo_eb: each of the 8 prompt means is 3, within SS = 8 * 8 on 8 degrees of freedom
    within = {"history_within_std": np.sqrt(8), "history_between_std": 0}
    assert after_past("pgrpo_eb").metrics(["a"]) == {"a": {**expected, "history_std": np.sqrt(8), **within}}
    assert after_past("pref_group_norm").metrics(["a"]) == {}


@every
def test_metrics_of_a_preference_group_without_samples(name):
    for numbers in estimator(name).metrics(["newcomer"]).values():
        assert set(numbers.values()) == {0}


def test_what_each_estimator_needs():
    assert [name for name in OURS if not estimator(name).uses_pref_groups] == ["pgrpo_global"]
    assert [name for name in OURS if estimator(name).min_samples_per_prompt > 1] == []
    assert estimator("pgrpo", center="prompt").min_samples_per_prompt == 2


nan, inf = float("nan"), float("inf")


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("update", "during", "update needs one of before, after, got 'during'"),
        ("center", "none", "center needs one of history, prompt, got 'none'"),
        ("eps", -1e-6, "eps needs a finite number >= 0, got -1e-06"),
        ("eps", nan, "eps needs a finite number >= 0, got nan"),
        ("eps", inf, "eps needs a finite number >= 0, got inf"),
        ("min_count", 1.9, "min_count needs a finite number >= 2, got 1.9"),
        ("min_count", nan, "min_count needs a finite number >= 2, got nan"),
        ("min_count", inf, "min_count needs a finite number >= 2, got inf"),
        ("half_life", 0, "half_life needs a positive number of samples, got 0"),
        ("half_life", nan, "half_life needs a positive number of samples, got nan"),
        ("half_life", inf, "half_life needs a positive number of samples, got inf"),
        (
            "half_life",
            2,
            "half_life 2 levels the history off at 2.9 samples (or little more) where batches have few of a "
            "preference group, but min_count needs 4",
        ),
    ],
)
def test_an_impossible_option_is_refused_with_name_needs_and_got(option, value, message):
    with pytest.raises(ValueError) as error:
        PGRPOOptions(**{option: value})
    assert str(error.value).startswith(message)


def test_the_limits_of_the_options_are_allowed():
    PGRPOOptions(eps=0, min_count=2, half_life=1.4)  # 1.4 / ln 2 = 2.02 >= 2


def test_every_option_explains_its_default():
    for name, spec in PGRPOOptions.__dataclass_fields__.items():
        assert "efault" in spec.metadata["help"], name
