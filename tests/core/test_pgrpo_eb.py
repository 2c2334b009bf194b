"""P-GRPO with an empirical-Bayes baseline: by hand, its limits, and its optimality."""

import pickle

import numpy as np
import pytest
from batches import PAST, batch, estimator, random_batch

from openrlhf_pgrpo.core.estimator import RewardBatch

pytestmark = pytest.mark.core


def with_components(mean, sig2, tau2, **options):
    """pgrpo_eb that has seen a million prompt groups of 2 samples with exactly these components."""
    k = 1e6
    eb = estimator("pgrpo_eb", update="after", eps=0, **options)
    columns = dict(seen=2 * k, count=k, mean=mean, m2=k * (tau2 + sig2 / 2), within_ss=k * sig2, within_df=k)
    columns = {name: np.array([value], float) for name, value in {**columns, "inverse_n": k / 2}.items()}
    eb.history.rows(["a"])
    eb.load_state_dict({"history": {**eb.state_dict()["history"], **columns}})
    return eb


def test_pgrpo_eb_by_hand():
    eb = with_components(mean=3, sig2=2, tau2=3)
    # n = 2: lam = 3/(3+2) = 0.6, variance 2 + 0.36*2 + 0.16*3 = 3.2
    # n = 3: lam = 6/(6+2) = 3/4, variance 2 + 9/16*2/2 + 1/16*3 = 2.75
    advantages = eb(batch([[0, 2], [4, 6, 11]], "aa"))
    baselines = [3 + 0.6 * (2 - 3), 3 + 0.6 * (0 - 3), 3 + 0.75 * (8.5 - 3), 3 + 0.75 * (7.5 - 3), 3 + 0.75 * (5 - 3)]
    scales = np.sqrt([3.2, 3.2, 2.75, 2.75, 2.75])
    np.testing.assert_allclose(advantages, (np.array([0, 2, 4, 6, 11]) - baselines) / scales, rtol=1e-9)


def test_pgrpo_eb_by_hand_from_the_first_batch():
    eb = estimator("pgrpo_eb", min_count=4, eps=0.5)
    advantages = eb(batch([[0, 2], [4, 6]], "aa"))
    # prompt means 1, 5: mean 3, variance 4; within SS 2 + 2 on 2 df: sig2 = 2; tau2 = 4 - 2/2 = 3; as above
    np.testing.assert_allclose(advantages, np.array([-2.4, 0.8, -0.8, 2.4]) / (np.sqrt(3.2) + 0.5), rtol=1e-13)


def test_pgrpo_eb_center_prompt_leaves_the_history_only_the_scale():
    eb = with_components(mean=3, sig2=2, tau2=3, center="prompt")
    # lam = 1: R minus the mean of the others, over sqrt(sig2 n/(n-1)) = 2 for n = 2 and sqrt(3) for n = 3
    expected = [-2 / 2, 2 / 2, -4.5 / np.sqrt(3), -1.5 / np.sqrt(3), 6 / np.sqrt(3)]
    np.testing.assert_allclose(eb(batch([[0, 2], [4, 6, 11]], "aa")), expected, rtol=1e-9)


@pytest.mark.parametrize("center", ["history", "prompt"])
@pytest.mark.parametrize("n", [1, 2])
def test_pgrpo_eb_is_not_thrown_by_an_offset(center, n):
    eb = with_components(mean=1e8, sig2=2, tau2=3, center=center)
    near = with_components(mean=0, sig2=2, tau2=3, center=center)
    rewards = np.array([[0.0, 2.0][:n]])
    np.testing.assert_allclose(eb(batch(1e8 + rewards, "a")), near(batch(rewards, "a")), atol=1e-6)


def test_pgrpo_eb_without_differences_between_prompts_is_pgrpo_on_sig():
    eb = with_components(mean=3, sig2=4, tau2=0)
    np.testing.assert_allclose(eb(batch([[7, 1], [3, 4, 5]], "aa")), [2, -1, 0, 0.5, 1], atol=1e-9)  # (R - 3) / 2


def test_pgrpo_eb_with_huge_differences_between_prompts_is_leave_one_out():
    eb = with_components(mean=3, sig2=4, tau2=4e12)
    new = batch([[7, 1], [0, 3, 6]], "aa")
    # R - mean of the others: 6 -6, -4.5 0 4.5;  over sqrt(4 * 2/1) and sqrt(4 * 3/2)
    expected = np.array([6, -6, 0, 0, 0]) / np.sqrt(8) + np.array([0, 0, -4.5, 0, 4.5]) / np.sqrt(6)
    np.testing.assert_allclose(eb(new), expected, atol=1e-5)


@pytest.mark.parametrize("update", ["before", "after"])
@pytest.mark.parametrize("half_life", [None, 20])
def test_pgrpo_eb_on_single_samples_is_pgrpo(update, half_life):
    options = dict(update=update, half_life=half_life)
    eb, pgrpo = (estimator(name, **options) for name in ("pgrpo_eb", "pgrpo"))
    for seed in range(4):
        new = random_batch(seed, "aabbbc" * 8, n=1)
        np.testing.assert_allclose(eb(new), pgrpo(new), rtol=1e-10, atol=1e-12)


def test_the_denominator_of_pgrpo_eb_is_the_standard_deviation_of_its_numerator():
    # fresh draws of the model: advantages have mean 0 and variance 1, whatever n
    rng, k = np.random.default_rng(0), 20_000
    for n in (1, 2, 5):
        rewards = 3 + np.sqrt(3) * rng.standard_normal((k, 1)) + np.sqrt(2) * rng.standard_normal((k, n))
        advantages = with_components(mean=3, sig2=2, tau2=3)(batch(rewards, "a" * k)).reshape(k, n)
        for moment, truth in ((advantages, 0), (advantages**2, 1)):
            per_prompt = moment.mean(1)  # prompts are independent, samples of one prompt are not
            assert abs(per_prompt.mean() - truth) < 4 * per_prompt.std() / np.sqrt(k)


def test_the_baseline_of_pgrpo_eb_is_the_best_linear_one():
    # no other weight of the others' mean leaves a smaller residual
    rng, k, n = np.random.default_rng(0), 20_000, 4
    deviations = np.sqrt(3) * rng.standard_normal((k, 1)) + np.sqrt(2) * rng.standard_normal((k, n))
    own, others = deviations[:, 0], deviations[:, 1:].mean(1)
    lam = 3 * 3 / (3 * 3 + 2)
    assert lam == pytest.approx(np.polyfit(others, own, 1)[0], abs=0.03)
    advantages = with_components(mean=0, sig2=2, tau2=3)(batch(deviations, "a" * k)).reshape(k, n)[:, 0]
    assert abs(np.corrcoef(advantages, others)[0, 1]) < 4 / np.sqrt(k)  # so nothing of it is left in the advantage


@pytest.mark.parametrize("scale, eps", [(1, 0), (2**-30, 0), (2**45, 1e-6)])
def test_answers_that_differ_by_rounding_alone_are_no_scale_even_around_0(scale, eps):
    """The mean of three times .1 is not .1. Prompts that lie around 0 leave nothing of that size in their own mean."""
    rounded = batch(scale * np.repeat([[0.1], [-0.1], [0.7], [-0.7], [0.3], [-0.3]], 3, 1), "a" * 6)
    for update in ("before", "after"):
        eb, in_batch = (estimator(name, eps=eps, update=update) for name in ("pgrpo_eb", "pref_group_norm"))
        for _ in range(2):
            np.testing.assert_allclose(eb(rounded), in_batch(rounded), rtol=1e-9)  # the fallback
            assert eb.history.sig2()[0] > eps**2


def test_a_refused_batch_leaves_pgrpo_eb_as_it_was():
    eb = estimator("pgrpo_eb")
    eb(PAST)
    before = pickle.dumps(eb.state_dict())
    with pytest.raises(ValueError, match="one preference group"):
        eb(RewardBatch([1, 2], [0, 0], ["a", "new"], [None] * 2, [None] * 2))
    assert pickle.dumps(eb.state_dict()) == before
