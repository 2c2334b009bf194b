"""Running moments: one pass over a stream must equal two passes over everything at once."""

import pickle

import numpy as np
import pytest

from openrlhf_pgrpo.core.history import (
    RewardHistory,
    VarianceComponents,
    segment_moments,
    segment_owners,
    without_gaps,
)

pytestmark = pytest.mark.core

both = pytest.mark.parametrize("kind", [RewardHistory, VarianceComponents])
decay = pytest.mark.parametrize("half_life", [None, 50.0])


def stream(seed, batches=20, offset=0.0):
    """Batches of (names, rewards, prompt numbers): 5 preference groups, 24 prompt groups of 1 to 4 samples.

    Rewards are multiples of 2^-20, so adding an offset of a million loses no bit of them.
    """
    rng = np.random.default_rng(seed)
    for _ in range(batches):
        owner = rng.integers(5, size=24)
        prompts = np.repeat(np.arange(24), rng.integers(1, 5, size=24))
        rewards = (1 + owner[prompts]) * rng.standard_normal(len(prompts)) + rng.standard_normal(24)[prompts]
        yield [f"group {owner[q]}" for q in prompts], np.round(rewards * 2**20) / 2**20 + offset, prompts


def absorb(history, batches):
    for names, rewards, prompts in batches:
        rows = history.rows(names)
        if isinstance(history, VarianceComponents):
            size = prompts.max(initial=-1) + 1
            history.add_prompts(segment_owners(prompts, rows, size), segment_moments(prompts, rewards, size))
        else:
            history.update(rows, rewards)
    return history


def add(history, names, rewards, prompts):
    """One batch of single letters, rewards and prompt numbers."""
    return absorb(history, [(names, np.array(rewards, float), np.array(prompts))])


def content(history):
    """Everything a history holds, keyed by preference group, so that row order does not matter."""
    state = history.state_dict()
    return {name: [state[column][row] for column in history.columns] for row, name in enumerate(history.names)}


def assert_same(a, b, rtol=1e-12):
    a, b = content(a), content(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=1e-12, err_msg=name)


def welford(rewards):
    n = mean = m2 = 0.0
    for reward in rewards:
        n += 1
        delta = reward - mean
        mean += delta / n
        m2 += delta * (reward - mean)
    return n, mean, m2


# --- moments -------------------------------------------------------------------------------------------------------


def test_batches_equal_welford_sample_by_sample_and_two_passes():
    history = absorb(RewardHistory(), stream(0))
    for row, name in enumerate(history.names):
        rewards = np.array([r for names, values, _ in stream(0) for n, r in zip(names, values) if n == name])
        got = history.count[row], history.mean[row], history.m2[row]
        np.testing.assert_allclose(got, welford(rewards), rtol=1e-12)
        np.testing.assert_allclose(got, (len(rewards), rewards.mean(), rewards.var() * len(rewards)), rtol=1e-12)
        assert history.seen[row] == len(rewards)


@both
def test_an_offset_of_a_million_costs_the_spread_no_more_than_its_six_digits(kind):
    near, far = absorb(kind(), stream(0)), absorb(kind(), stream(0, offset=1e6))
    np.testing.assert_allclose(far.mean, near.mean + 1e6, rtol=1e-15)
    np.testing.assert_allclose(far.m2, near.m2, rtol=1e-10)  # M2 as sum R^2 - n mean^2 would be off by 1e-3


def test_standard_deviation_divides_by_n_or_by_n_minus_1():
    history = RewardHistory()
    history.update(history.rows("aaab"), np.array([1.0, 2.0, 6.0, 7.0]))
    # a: mean 3, M2 = 4 + 1 + 9 = 14; b: a single sample
    np.testing.assert_allclose(history.moments.std(), [np.sqrt(14 / 3), 0])
    np.testing.assert_allclose(history.moments.std(ddof=1), [np.sqrt(14 / 2), 0])


@both
@decay
def test_order_of_samples_inside_a_batch_does_not_matter(kind, half_life):
    def shuffled():
        rng = np.random.default_rng(1)
        for names, rewards, prompts in stream(0):
            order, renumber = rng.permutation(len(rewards)), rng.permutation(24)
            yield [names[i] for i in order], rewards[order], renumber[prompts[order]]

    assert_same(absorb(kind(half_life), shuffled()), absorb(kind(half_life), stream(0)))


@both
@decay
def test_an_absent_preference_group_is_left_alone_bit_for_bit(kind, half_life):
    history = absorb(kind(half_life), stream(0))
    before = content(history)
    absorb(history, [(["newcomer"] * 3, np.array([1e3, 2e3, 4e3]), np.array([0, 0, 1]))])
    assert content(history).pop("newcomer")[0] == 3
    assert {name: content(history)[name] for name in before} == before


@both
@decay
def test_an_empty_batch_changes_nothing(kind, half_life):
    history = absorb(kind(half_life), stream(0))
    before = content(history)
    absorb(history, [([], np.zeros(0), np.zeros(0, int))])
    assert content(history) == before


# --- half-life -----------------------------------------------------------------------------------------------------


def test_a_weight_halves_after_half_life_samples_of_its_own_preference_group():
    history = RewardHistory(half_life=4)
    history.update(history.rows("aabb"), np.array([6.0, 10.0, 1.0, 3.0]))
    history.update(history.rows("a"), np.array([2.0]))
    history.update(history.rows("aaa"), np.array([2.0, 2.0, 2.0]))
    # a, after 1 + 3 = 4 more samples: [6, 10] weigh 1/2 each, the first 2 weighs w = 2^(-3/4), the last three 1 each
    w = 2 ** (-3 / 4)
    weights, rewards = [0.5, 0.5, w, 1, 1, 1], [6, 10, 2, 2, 2, 2]
    mean = np.average(rewards, weights=weights)
    assert history.count[0] == pytest.approx(1 + w + 3, rel=1e-14)
    assert history.mean[0] == pytest.approx(mean, rel=1e-14)
    assert history.m2[0] == pytest.approx(np.dot(weights, (np.array(rewards) - mean) ** 2), rel=1e-14)
    # b was absent: it forgot nothing
    assert (history.count[1], history.mean[1], history.m2[1]) == (2, 2, 2)
    assert list(history.seen) == [6, 2]


def test_count_levels_off_near_half_life_over_ln_2():
    history = RewardHistory(half_life=100)
    for _ in range(2000):
        history.update(history.rows("a"), np.ones(1))
    assert history.count[0] == pytest.approx(1 / (1 - 2 ** (-1 / 100)), rel=1e-5)  # the geometric series: 144.77
    assert history.count[0] == pytest.approx(100 / np.log(2), rel=0.01)  # 144.27
    assert history.seen[0] == 2000


@pytest.mark.parametrize("samples", [1, 5, 16, 64])
def test_count_levels_off_higher_in_larger_batches(samples):
    history = RewardHistory(half_life=16)
    for _ in range(600):
        history.update(np.repeat(history.rows("a"), samples), np.ones(samples))
    level = samples / (1 - 2 ** (-samples / 16))  # 23.6, 25.7, 32, 68.3, and never below 16 / ln 2 = 23.1
    assert history.count[0] == pytest.approx(level) and level > 16 / np.log(2)


def test_variance_components_forget_by_samples_all_numbers_alike():
    history = VarianceComponents(half_life=3)
    first, second = np.array([0.0, 2.0, 5.0, 5.0, 8.0]), np.array([4.0, 4.0, 4.0])
    add(history, "aaaaa", first, [0, 0, 1, 1, 1])
    add(history, "aaa", second, [0, 0, 0])
    # 3 samples later everything old weighs 1/2: prompt means 1 and 6 at weight 1/2 each, then 4 at weight 1
    assert history.count[0] == pytest.approx(0.5 * 2 + 1)
    assert history.mean[0] == pytest.approx((0.5 * 1 + 0.5 * 6 + 4) / 2)  # 3.75
    assert history.m2[0] == pytest.approx(0.5 * 2.75**2 + 0.5 * 2.25**2 + 0.25**2)
    assert history.within_ss[0] == pytest.approx(0.5 * (2 + 6) + 0)
    assert history.within_df[0] == pytest.approx(0.5 * (1 + 2) + 2)
    assert history.inverse_n[0] == pytest.approx(0.5 * (1 / 2 + 1 / 3) + 1 / 3)
    assert history.samples[0] == pytest.approx(0.5 * 5 + 3)
    assert history.seen[0] == 8


@pytest.mark.parametrize("half_life", [0, -1.0, float("nan")])
def test_half_life_is_positive(half_life):
    with pytest.raises(ValueError, match="positive number of samples or None, got"):
        RewardHistory(half_life)


# --- names ---------------------------------------------------------------------------------------------------------


def test_a_name_is_any_string():
    names = ["", " ", "a", "A", "a/b", "../a", "line\nbreak", "Grüße", "猫", "🙂", "0", "None", "x" * 10_000]
    names += ["\0", "\ud83d", "\ude42"]  # side by side, the two halves of 🙂 must not become one
    history = RewardHistory()
    history.update(history.rows(names), np.arange(len(names), dtype=float))
    copy = RewardHistory()
    copy.load_state_dict(history.state_dict())
    assert list(copy.names) == names
    assert list(copy.mean[copy.rows(names[::-1])]) == list(range(len(names)))[::-1]


def test_a_new_name_gets_the_next_row_and_nothing_else_moves():
    history = RewardHistory()
    assert list(history.rows(["b", "a", "b"])) == [0, 1, 0]
    assert list(history.rows(["a", "c"])) == [1, 2]
    assert list(history.names) == ["b", "a", "c"] and len(history) == 3
    assert list(history.count) == [0, 0, 0]


def test_a_million_preference_groups():
    names, rewards = [str(i) for i in range(10**6)], np.arange(1e6)
    history = RewardHistory()
    history.update(history.rows(names), rewards)
    state = history.state_dict()
    assert sum(state[column].nbytes for column in history.columns) == 32 * 10**6  # 4 float64 each
    copy = RewardHistory()
    copy.load_state_dict(state)
    copy.update(copy.rows(["999999"]), np.array([0.0]))
    assert (len(copy), copy.mean[-1], copy.mean[-2]) == (10**6, 999_999 / 2, 999_998)


# --- state ---------------------------------------------------------------------------------------------------------


@both
@decay
def test_state_is_exact_to_the_bit_pickles_and_goes_on_equally(kind, half_life):
    history, copy = absorb(kind(half_life), stream(0)), kind(half_life)
    copy.load_state_dict(pickle.loads(pickle.dumps(history.state_dict())))
    assert list(copy.names) == list(history.names) and content(copy) == content(history)
    assert content(absorb(copy, stream(1))) == content(absorb(history, stream(1)))


@both
def test_state_is_a_copy_in_both_directions(kind):
    history, copy = absorb(kind(), stream(0)), kind()
    before, state = content(history), history.state_dict()
    for column in kind.columns:
        getattr(history, column)[:] = -1  # like any later in-place arithmetic
    history.rows(["newcomer"])
    copy.load_state_dict(state)
    for column in kind.columns:
        state[column][:] = -2
    state["name_lengths"][:] = 0
    assert content(copy) == before


damages = {
    "other half-life": (lambda s: s.update(half_life=7.0), "half_life is None here but 7.0 in the saved history"),
    "missing key": (lambda s: s.pop("m2"), "needs keys .*'m2'.*, got"),
    "additional key": (lambda s: s.update(colour=1), "needs keys .*, got .*'colour'"),
    "duplicate names": (
        lambda s: s.update(names=b"group 0" * 5),
        "saved names need to be distinct, got 1 distinct ones of 5",
    ),
    "too few names": (
        lambda s: s.update(names=s["names"][:-7], name_lengths=s["name_lengths"][:-1]),
        "one row for each of 4 names, got shapes",
    ),
    "too few characters": (lambda s: s.update(names=s["names"][:-1]), "the 35 characters .*, got 34"),
    "no text": (lambda s: s.update(names=b"\xff" * 35), "can't decode"),
    "short column": (
        lambda s: s.update(mean=s["mean"][:-1]),
        r"one row for each of 5 names, got shapes .*'mean': \(4,\)",
    ),
    "words for numbers": (lambda s: s.update(m2=["many"] * 5), "many"),
}


@both
@pytest.mark.parametrize("damage", damages)
def test_load_refuses_a_foreign_state_and_changes_nothing(kind, damage):
    history = absorb(kind(), stream(0))
    before, state = content(history), absorb(kind(), stream(1)).state_dict()
    spoil, message = damages[damage]
    spoil(state)
    with pytest.raises(ValueError, match=message):
        history.load_state_dict(state)
    assert content(history) == before


def test_load_refuses_the_state_of_the_other_kind():
    with pytest.raises(ValueError, match="VarianceComponents state needs keys"):
        VarianceComponents().load_state_dict(RewardHistory().state_dict())


# --- variance components -------------------------------------------------------------------------------------------


def test_one_way_anova_by_hand_with_unequal_n():
    history = VarianceComponents()
    add(history, "aaaaaa", [0, 2, 4, 6, 8, 5], [0, 0, 1, 1, 1, 2])
    # prompt means 1, 6, 5: mean 4, M2 = 9 + 4 + 1 = 14      within: SS = 2 + 8 + 0 on 1 + 2 + 0 degrees of freedom
    assert (history.count[0], history.mean[0], history.m2[0], history.samples[0]) == (3, 4, 14, 6)
    assert history.sig2()[0] == pytest.approx(10 / 3)
    # tau2 = Var(prompt means) - sig2 * mean(1/n),  mean(1/n) = (1/2 + 1/3 + 1) / 3 = 11/18
    assert history.tau2()[0] == pytest.approx(14 / 3 - 10 / 3 * 11 / 18)


def test_single_samples_put_everything_between_prompts():
    history = VarianceComponents()
    add(history, "aaa", [1, 2, 6], [0, 1, 2])
    assert (history.sig2()[0], history.tau2()[0]) == (0, pytest.approx(14 / 3))


def test_tau2_is_never_negative():
    history = VarianceComponents()
    add(history, "aaaa", [-1, 1, -1, 1], [0, 0, 1, 1])
    assert (history.sig2()[0], history.tau2()[0]) == (2, 0)  # equal prompt means: 0 - 2/2 < 0


def test_known_components_are_recovered():
    # 400 preference groups are 400 repetitions, each of 100 prompt groups of 1 to 4 samples; sig2 = 1, tau2 = 2
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(400), 100)
    prompts = np.repeat(np.arange(len(owner)), rng.integers(1, 5, size=len(owner)))
    rewards = np.sqrt(2) * rng.standard_normal(len(owner))[prompts] + rng.standard_normal(len(prompts))
    history = VarianceComponents()
    add(history, [str(p) for p in owner[prompts]], rewards, prompts)
    # The variance of 100 prompt means divides by 100, so it lacks a hundredth of 2 + mean(1/n) = 2.52.
    for estimate, truth in ((history.sig2(), 1), (history.tau2(), 2 - 0.0252)):
        error = estimate.std() / np.sqrt(400)
        assert abs(estimate.mean() - truth) < 4 * error
        assert 4 * error < 0.12  # so 1/mean(n) = 0.40 in place of mean(1/n) = 0.52 would be seen


def test_prompt_numbers_may_have_gaps():
    np.testing.assert_array_equal(without_gaps(np.array([70, 70, 10**12, 3, 3])), [1, 1, 2, 0, 0])
    dense = np.array([1, 0, 0, 2])
    assert without_gaps(dense) is dense  # no sort
