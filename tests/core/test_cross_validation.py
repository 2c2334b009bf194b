"""The number of base rewards by cross-validation: the curve, the choice, and how annotations are dealt to folds."""

import numpy as np
import pytest
from worlds import names, one_hot, world, world_of_texts

from openrlhf_pgrpo.core import cross_validation
from openrlhf_pgrpo.core.annotations import Annotations
from openrlhf_pgrpo.core.cross_validation import Choice, choose_factors
from openrlhf_pgrpo.core.differences import Differences
from openrlhf_pgrpo.core.factorization import start
from openrlhf_pgrpo.core.optimum import Problem, minimum

pytestmark = pytest.mark.core


def test_the_number_of_base_rewards_is_found_by_cross_validation():
    X, known, _ = world(users=120, pairs=150, dimensions=12, rewards=3, share=0.4)
    choice = choose_factors(X, known, factors=(1, 2, 3, 4, 5), l2=(1.0, 3.0), folds=3)
    assert choice.recommended == 3 and choice.l2 in (1.0, 3.0)
    assert choice.loss.argmin() in (2, 3, 4) and choice.loss[0] > choice.loss[1] > choice.loss[2]
    within = choice.loss <= choice.loss.min() + choice.error[choice.loss.argmin()]
    assert choice.factors[within][0] == 3
    again = choose_factors(X, known, factors=(3,), l2=(choice.l2,), folds=3)
    assert again.loss[0] == pytest.approx(choice.loss[2], abs=1e-6) and again.recommended == 3
    other = choose_factors(X, known, factors=(3,), l2=(choice.l2,), folds=3, seed=1)
    assert other.loss[0] != choice.loss[2]


def test_texts_give_the_curve_of_their_pairs():
    texts, known, first, second = world_of_texts()
    X = Differences.between(texts, first, second)
    curves = [choose_factors(pairs, known, (1, 2), (1.0, 3.0), folds=3) for pairs in (X, texts[first] - texts[second])]
    np.testing.assert_allclose(curves[0].loss, curves[1].loss, rtol=0, atol=1e-6)
    assert curves[0].recommended == curves[1].recommended and curves[0].l2 == curves[1].l2


def test_held_out_losses_by_hand(monkeypatch):
    """A fit that predicts logits of 0 has the loss log 2. A fit that predicts 1 has log(1 + e) - preference."""
    X, known, _ = world()

    def made_up(problem, head, coefficients, l2):
        assert len(problem.user) < len(known)
        z = {1: 0.0, 2: 1.0}[len(head)] if l2 == 1 else 5.0
        return np.zeros((1, problem.X.shape[1])), np.full((40, 1), z)

    monkeypatch.setattr(cross_validation, "minimum", made_up)
    monkeypatch.setattr(cross_validation, "logits", lambda features, coefficients, pair, user: coefficients[user, 0])
    choice = choose_factors(X, known, factors=(1, 2), l2=(1.0, 2.0), folds=4)
    assert choice.loss[0] == pytest.approx(np.log(2)) and choice.error[0] == pytest.approx(0)
    assert choice.loss[1] == pytest.approx(np.log(1 + np.e) - known.preference.mean(), abs=0.01)
    assert choice.l2s.tolist() == [1, 1] and choice.recommended == 1


def nothing(problem, head, coefficients, l2):
    """A fit without any effect."""
    return np.zeros_like(head), np.zeros_like(coefficients)


def test_a_fold_may_lack_users_and_the_fits_go_along(monkeypatch):
    """Ann has two pairs, which are in two of the three folds."""
    known = Annotations.of(["ann"] * 2 + ["bob"] * 6, np.r_[0, 1, 0:6], np.ones(8))
    monkeypatch.setattr(cross_validation, "minimum", nothing)
    fits = []
    choice = choose_factors(np.eye(6), known, (1, 2), (1.0,), folds=3, along=lambda some: fits.extend(some) or some)
    assert choice.loss == pytest.approx(np.log(2)) and len(fits) == len({*fits}) == 3 * 2 * 1


def test_the_fewest_within_one_standard_error_are_recommended(monkeypatch):
    """More base rewards lower the loss from 1.00 to 0.90 (4) with an error of 0.02: folds of 0.88, 0.88, 0.94 have a
    standard deviation of 0.0346 and an error of 0.0346 / sqrt(3). 3 with 0.91 are within it, 2 with 0.93 are not."""
    X, known, _ = world()
    losses = {1: [1.0, 1.0, 1.0], 2: [0.93, 0.93, 0.93], 3: [0.9, 0.9, 0.93], 4: [0.88, 0.88, 0.94]}
    fits = iter(losses[count][k] for count in (4, 3, 2, 1) for k in range(3))
    monkeypatch.setattr(cross_validation, "minimum", nothing)
    monkeypatch.setattr(cross_validation, "cross_entropy", lambda z, preference: next(fits) * len(z))
    choice = choose_factors(X, known, factors=(4, 1, 3, 2), l2=(1.0,), folds=3)
    np.testing.assert_allclose(choice.loss, [0.9, 1.0, 0.91, 0.93])
    np.testing.assert_allclose(choice.error, [0.02, 0, 0.01, 0], atol=1e-12)
    assert choice.recommended == 3


def test_the_curve_is_that_of_fits_that_know_nothing_of_each_other():
    X, known, _ = world(users=60, pairs=80, rewards=3, share=0.4)
    factors, penalties = (1, 3, 4), (0.3, 1.0, 3.0)  # with 2, fits alone end in a local minimum of two folds
    choice = choose_factors(X, known, factors, penalties, folds=3)
    fold = cross_validation.deal(known, 3, np.random.default_rng(0))
    losses = np.empty((3, 3, 3))
    for i, j, k in np.ndindex(losses.shape):
        part, held_out = known.select(fold != k), fold == k
        problem = Problem.of(X, known).of_others(part)
        head, coefficients = minimum(problem, *start(problem, part, factors[i]), penalties[j])
        z = ((problem.X @ head.T)[known.pair] * coefficients[known.user]).sum(1)[held_out]
        losses[i, j, k] = (np.logaddexp(0, z) - known.preference[held_out] * z).mean()
    best = losses.mean(2).argmin(1)
    np.testing.assert_allclose(choice.loss, losses.mean(2).min(1), rtol=0, atol=1e-6)
    assert choice.l2s.tolist() == [penalties[j] for j in best] and len({*choice.l2s}) > 1


def test_penalties_are_lowered_until_the_loss_rises(monkeypatch):
    """By more than the standard error of the difference: folds of -0.01, 0.01 and 0.03 have a mean of 0.01 and an
    error of 0.0115. Of two penalties that leave nothing, the lower one is no worse."""
    X, known, _ = world()
    losses = {30: [0.6931471805, 0.6931471805, 0.6931471805], 10: [0.6931471806, 0.6931471806, 0.6931471806],
              3: [0.6, 0.6, 0.6], 1: [0.59, 0.61, 0.63], 0.3: [0.61, 0.63, 0.65], 0.1: [0.1, 0.1, 0.1]}  # fmt: skip
    tried = []
    monkeypatch.setattr(cross_validation, "minimum", lambda *given: tried.append(given[-1]) or nothing(*given))
    monkeypatch.setattr(
        cross_validation, "cross_entropy", lambda z, preference: losses[tried[-1]][(len(tried) - 1) % 3] * len(z)
    )
    choice = choose_factors(X, known, (1,), (10, 0.1, 3, 30, 1, 0.3), folds=3)
    assert tried == [*np.repeat([30, 10, 3, 1, 0.3], 3)] and choice.l2 == 3 and choice.loss == pytest.approx(0.6)


def test_annotations_are_dealt_evenly_by_user_and_pair():
    user = np.r_[np.zeros(10, int), np.ones(10, int), 2, np.zeros(3, int)]
    pair = np.r_[np.arange(10), np.arange(10), 5, 0, 1, 2]  # the first user answered three pairs twice
    known = Annotations(user, pair, np.ones(len(user)), names(3))
    for seed in range(5):
        fold = cross_validation.deal(known, 5, np.random.default_rng(seed))
        for one in (0, 1):
            assert np.bincount(fold[10 * one : 10 * one + 10]).tolist() == [2] * 5
        assert fold[20] == -1 and fold[21:].tolist() == fold[:3].tolist()
    assert (fold != cross_validation.deal(known, 5, np.random.default_rng(0))).any()
    pairs = Annotations(np.repeat(np.arange(500), 2), np.tile([0, 1], 500), np.ones(1000), names(500))
    counts = np.bincount(cross_validation.deal(pairs, 5, np.random.default_rng(0)))
    assert len(counts) == 5 and np.ptp(counts) < 80  # 200 each, with a standard deviation of about 15


def test_what_belongs_together_is_held_out_together():
    pair = np.r_[np.arange(20), np.arange(20), 3, 2]  # the last user has two pairs of one prompt
    known = Annotations(np.r_[np.zeros(20, int), np.ones(20, int), 2, 2], pair, np.ones(42), names(3))
    prompt = np.repeat([f"p{i}" for i in range(10)], 2)
    for seed in range(5):
        fold = cross_validation.deal_together(known, prompt, 5, np.random.default_rng(seed))[:, 0]
        assert (fold[0:40:2] == fold[1:40:2]).all() and (fold[:20] == fold[20:40]).all()
        assert np.bincount(fold[:20]).tolist() == [4] * 5  # two prompts each
        assert fold[40:].tolist() == [-1, -1]
    assert (fold != cross_validation.deal_together(known, prompt, 5, np.random.default_rng(0))[:, 0]).any()


def test_no_text_is_held_out_and_trained_on():
    """Pairs with one of each are neither. Cyd has too few pairs to leave any out."""
    first, second = np.triu_indices(20, 1)
    pair = np.r_[np.arange(190), np.arange(190), 7]
    known = Annotations(np.r_[np.zeros(190, int), np.ones(190, int), 2], pair, np.ones(381), ["ann", "bob", "cyd"])
    texts = np.stack([first, second], 1)
    training, held_out = cross_validation.parted(known, 5, 0, texts)
    assert training[:, -1].all() and not held_out[:, -1].any()
    for trains, holds in zip(training[:, :-1], held_out[:, :-1]):
        used, unseen = texts[pair[:-1][trains]], texts[pair[:-1][holds]]
        assert not np.isin(used, unseen).any() and len(np.unique(used)) == 16 and len(np.unique(unseen)) == 4
        assert trains.sum() == 2 * 16 * 15 / 2 and holds.sum() == 2 * 4 * 3 / 2
    assert held_out.sum(0).max() == 1
    again, other = (cross_validation.parted(known, 5, seed, texts)[1] for seed in (0, 1))
    assert (again == held_out).all() and (other != held_out).any()


@pytest.mark.parametrize("together", [None, np.repeat(np.arange(20), 3)])
def test_folds_are_those_of_before_where_pairs_share_no_text(together):
    _, known, _ = world()
    training, held_out = cross_validation.parted(known, 5, 0, together)
    rng = np.random.default_rng(0)
    fold = before(known, together, 5, rng) if together is not None else cross_validation.deal(known, 5, rng)
    for k in range(5):
        assert (training[k] == (fold != k)).all() and (held_out[k] == (fold == k)).all()


def before(annotations, together, folds, rng):
    """How prompts were dealt before pairs could have two values."""
    value = np.unique(together, return_inverse=True)[1]
    fold = (rng.permutation(value.max() + 1) % folds)[value][annotations.pair]
    counts = np.zeros((len(annotations.users), folds))
    np.add.at(counts, (annotations.user, fold), 1)
    return np.where((counts.max(1) == counts.sum(1))[annotations.user], -1, fold)


def test_noise_in_ratings_is_predicted_like_a_coin():
    """Of ratings of one prompt, pairs alone share their texts, and a held-out one follows from the others."""
    rng = np.random.default_rng(0)
    first, second = np.triu_indices(16, 1)
    ratings = rng.integers(1, 6, (16, 16))
    user, pair = np.indices((16, len(first))).reshape(2, -1)
    preference = (1 + np.sign(ratings[user, first[pair]] - ratings[user, second[pair]])) / 2
    known, X = Annotations(user, pair, preference, names(16)), Differences.between(np.eye(16), first, second)
    X = X.times(rng.normal(size=(16, 64)))
    texts = np.stack([first, second], 1)
    leaky, clean = (choose_factors(X, known, (1, 2, 3), (1.0, 3.0), together=one) for one in (None, texts))
    assert leaky.loss.min() < 0.6
    assert clean.loss.min() + 2 * clean.error[clean.loss.argmin()] > np.log(2)


def test_whether_folds_hold_out_anything_can_be_asked_beforehand():
    first, second = np.triu_indices(6, 1)
    X, texts = one_hot([*zip(first, second)], 6), np.stack([first, second], 1)
    known = Annotations(np.repeat([0, 1], 15), np.tile(np.arange(15), 2), np.ones(30), names(2))
    assert cross_validation.least_held_out(known, texts, folds=2) == 6 and not cross_validation.least_held_out(
        known, texts
    )
    with pytest.raises(ValueError, match="in 5 folds needs something to hold out in each"):
        choose_factors(X, known, (1,), together=texts)


def test_texts_that_training_has_seen_lower_the_held_out_loss():
    """Labels are noise of the prompt. A fit that has seen the prompt knows them, and no other can."""
    rng = np.random.default_rng(0)
    prompt, user = np.repeat(np.arange(60), 4), np.tile(np.arange(4), 60)
    X = np.eye(60)[prompt]
    known = Annotations(user, np.arange(240), rng.integers(2, size=60)[prompt].astype(float), names(4))
    leaky = choose_factors(X, known, factors=(1,), l2=(0.3,), folds=3)
    clean = choose_factors(X, known, factors=(1,), l2=(0.3,), folds=3, together=prompt)
    assert leaky.loss[0] < 0.5 < np.log(2) == pytest.approx(clean.loss[0])


def test_a_choice_prints_its_curve():
    columns = np.array([1, 2]), np.array([0.65, 0.6]), np.array([0.01, 0.02]), np.array([3.0, 10.0])
    assert str(Choice(*columns, 2, 10.0)).splitlines() == [
        "base rewards held-out log loss     l2",
        "           1    0.6500 ±0.0100      3",
        "           2    0.6000 ±0.0200     10  <- recommended: the fewest within one standard error of the best",
    ]


def test_users_with_too_few_pairs_to_hold_out():
    known = Annotations(np.arange(3), np.zeros(3, int), np.array([1, 0, 1.0]), names(3))
    with pytest.raises(ValueError, match="in 5 folds needs something to hold out in each, got too few pairs"):
        choose_factors(np.ones((1, 2)), known)


def test_what_cannot_be_dealt_is_refused():
    X, known, _ = world()
    with pytest.raises(ValueError, match="at least 2 folds, got 1"):
        choose_factors(X, known, folds=1)
    apart = Annotations(np.array([0, 1, 2, 2]), np.arange(4), np.array([1, 0, 1, 1.0]), names(3))
    with pytest.raises(ValueError, match="2 sets of users"):
        choose_factors(one_hot([(0, 1), (1, 2), (3, 4), (4, 5)], 6), apart, factors=(1,), folds=2)
