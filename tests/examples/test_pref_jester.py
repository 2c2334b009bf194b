"""Reward factorization on ratings: pairs, interviews and the other methods by hand, on made-up ratings; and the
real file where there is one."""

import gzip
import json

import numpy as np
import pytest

import pref_jester as jester

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def ratings():
    """120 people, 40 jokes, two tastes; a third of the ratings is missing, and person 7 finds all alike."""
    rng = np.random.default_rng(0)
    found = rng.normal(size=(120, 2)) @ rng.normal(size=(2, 40)) + 0.1 * rng.normal(size=(120, 40))
    found[rng.random(found.shape) < 0.33] = np.nan
    found[7] = 1.0
    return found


@pytest.fixture
def small(monkeypatch):
    sizes = {"SEEN_PEOPLE": 70, "TRAINING": 60, "NEW": 20, "SEEN_JOKES": 28, "PAIRS": 20, "POOL": 25, "TEST": 30}
    for name, size in {**sizes, "FACTORS": 2, "SWEEP": (1, 2), "PENALTIES": (0.3, 3.0)}.items():
        monkeypatch.setattr(jester, name, size)
    monkeypatch.setattr(jester.Released.__init__, "__defaults__", (20,))
    monkeypatch.setattr(jester.lore, "__defaults__", (20, 0.1))


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_ratings_are_read_and_the_missing_ones_are_missing(tmp_path):
    with gzip.open(tmp_path / jester.FILES[0], "wt") as file:
        file.write("user,joke,rating\n0,0,-1.60\n2,1,2.04\n")
    np.testing.assert_array_equal(
        jester.read(tmp_path / jester.FILES[0]), [[-1.6, np.nan], [np.nan, np.nan], [np.nan, 2.04]]
    )


def test_pairs_are_of_jokes_that_were_rated_differently():
    ratings = np.array([[1.0, 3, 3, np.nan, 2], [5, 5, 5, 5, 5]])
    jokes = np.array([0, 1, 2, 3])
    sides = []
    for seed in range(20):
        pairs = jester.draw(ratings, jokes, 3, np.random.default_rng(seed))
        found = {frozenset(pair) for pair in zip(pairs.first[0, :2], pairs.second[0, :2])}
        assert found == {frozenset((0, 1)), frozenset((0, 2))}  # not (1, 2), which are equal, nor 4, not asked for
        assert np.isnan(pairs.preference[0, 2]) and np.isnan(pairs.preference[1]).all()
        np.testing.assert_array_equal(pairs.preference[0, :2], pairs.second[0, :2] == 0)  # joke 0 is liked less
        sides += list(pairs.preference[0, :2])
    assert 0 < np.mean(sides) < 1


def test_what_is_tested_was_neither_trained_nor_asked_about(ratings, small):
    pools = set()
    for seed in range(4):
        world = jester.World.draw(ratings, seed)
        unseen, same = world.tests
        assert len(world.annotations.users) >= 59 and len(world.annotations) > 59 * 19
        known = set(world.distinct.ravel())
        assert len(known) == 28 and set(world.pool.first.ravel()) | set(same.first.ravel()) <= known
        assert not known & set(unseen.first[~np.isnan(unseen.preference)])
        for row in range(len(world.pool.first)):
            asked = {frozenset(pair) for pair in zip(world.pool.first[row], world.pool.second[row])}
            tested = {frozenset(pair) for pair in zip(same.first[row], same.second[row])}
            assert len(asked) == 25 and not asked & tested
        assert not np.isnan(world.pool.preference).any() and 18 <= len(world.pool.preference) <= 20
        pools.add(tuple(world.pool.first[0]))
    assert len(pools) == 4


def test_no_new_user_of_any_seed_is_a_seen_user_of_another(small):
    """Who is seen likes jokes with low numbers, the others those with high ones."""
    ratings = np.tile(np.arange(40.0), (120, 1))
    ratings[np.random.default_rng(0).permutation(120)[:70]] *= -1
    for seed in range(4):
        world = jester.World.draw(ratings, seed)
        first, second = world.distinct[:, world.annotations.pair]
        np.testing.assert_array_equal(world.annotations.preference, first < second)
        for pairs in (world.pool, *world.tests):
            np.testing.assert_array_equal(pairs.preference, pairs.first > pairs.second)


def test_annotations_are_of_the_users_who_have_pairs():
    first, second = np.array([[0, 1], [0, 0], [2, 0]]), np.array([[1, 2], [0, 0], [1, 1]])
    pairs = jester.Pairs(first, second, np.array([[1, 0], [np.nan, np.nan], [1, 1]]))
    known, distinct = jester.annotate(pairs)
    np.testing.assert_array_equal(distinct, [[0, 1, 2], [1, 2, 1]])
    assert known.user.tolist() == [0, 0, 1, 1] and known.pair.tolist() == [0, 1, 2, 0]
    assert known.preference.tolist() == [1, 0, 1, 1] and known.users == ["0", "2"]
    items = np.array([[1.0, 0], [3, 1], [7, 5]])
    np.testing.assert_array_equal(jester.differences(items, distinct), [[-2, -1], [-4, -4], [4, 4]])
    np.testing.assert_array_equal(pairs.differences(items)[2], [[4, 4], [-2, -1]])
    coefficients = np.array([[1.0, 0], [0, 0], [0, 2]])
    np.testing.assert_array_equal(pairs.logits(items, coefficients), [[-2, -4], [0, 0], [8, -2]])


# --- new users -------------------------------------------------------------------------------------------------------


def test_auc_by_hand():
    logits = np.array([[0.1, 0.4, 0.35, 0.8], [1, 1, 2, 9], [3, 2, 1, 0], [1, 2, 3, 4]])
    preference = np.array([[0, 0, 1, 1], [0, 1, 1, np.nan], [1, 0, np.nan, np.nan], [1, 1, 1, np.nan]])
    # 3 of 4 pairs in order; (1, 1) tied counts half and (1, 2) is in order; in order; all alike
    np.testing.assert_array_equal(jester.auc(logits, preference), [0.75, 0.75, 1, np.nan])


@pytest.mark.parametrize("score", [None, jester.information, jester.released])
def test_no_question_comes_twice_and_each_brings_its_own_answer(score):
    rng = np.random.default_rng(0)
    features, answers = rng.normal(size=(5, 6, 2)), rng.integers(2, size=(5, 6)).astype(float)
    seen = []

    def estimate(rows, given):
        seen.append((rows, given))
        return np.zeros((5, 2)), np.tile(np.eye(2), (5, 1, 1))

    asking = jester.interview(features, answers, estimate, score, np.random.default_rng(1))
    for count in range(7):
        if count < 6:
            next(asking)
        rows, given = seen[min(count, 5)]
    for user in range(5):
        places = [int(np.flatnonzero((features[user] == row).all(1))[0]) for row in rows[user]]
        assert len(set(places)) == 5
        np.testing.assert_array_equal(given[user], answers[user, places])
        if score is jester.information:  # with mean 0 it rises with the length of v: the longest first
            lengths = np.linalg.norm(features[user], axis=1)
            assert places == list(np.argsort(-lengths)[:5])
    if score is jester.released:  # also with the length, but for the first, which is random
        longest = np.linalg.norm(features, axis=2).argmax(1)
        first = [int(np.flatnonzero((features[u] == rows[u, 0]).all(1))[0]) for u in range(5)]
        second = [int(np.flatnonzero((features[u] == rows[u, 1]).all(1))[0]) for u in range(5)]
        assert (first != longest).any() and all(s == m for f, s, m in zip(first, second, longest) if f != m)


def test_the_released_estimator_by_hand():
    features, answers = np.array([[[1.0, 2.0], [0.5, -1.0]]]), np.array([[1.0, 0.0]])
    start = np.random.default_rng(3).normal(size=(1, 2))
    found, covariance = jester.Released(np.random.default_rng(3), 1)(features, answers)
    p = 1 / (1 + np.exp(-features[0] @ start[0]))
    np.testing.assert_allclose(found[0], start[0] - 0.01 * ((p - answers[0]) @ features[0]) / 2)
    p = 1 / (1 + np.exp(-features[0] @ found[0]))
    M = 0.001 * np.eye(2) + sum(q * (1 - q) * np.outer(v, v) for q, v in zip(p, features[0]))
    np.testing.assert_allclose(covariance[0], np.linalg.inv(M))
    nothing, wide = jester.Released(np.random.default_rng(3), 1)(features[:, :0], answers[:, :0])
    np.testing.assert_array_equal(nothing, start)
    np.testing.assert_allclose(wide[0], 1000 * np.eye(2))


def test_simplex_coefficients_of_a_new_user_by_hand():
    features, answers = np.array([[[1.0, 0.0, 0.0]]]), np.array([[1.0]])
    equal, _ = jester.lore(features[:, :0], answers[:, :0])
    np.testing.assert_allclose(equal, [[1 / 3] * 3])
    # the first step of Adam is the rate in the direction of the sign; what is first gains, the others lose by it
    one, covariance = jester.lore(features, answers, steps=1)
    np.testing.assert_allclose(one, np.exp([[0.1, -0.1, -0.1]]) / np.exp([0.1, -0.1, -0.1]).sum(), rtol=1e-6)
    assert covariance is None
    many, _ = jester.lore(features, answers)
    np.testing.assert_allclose(many.sum(), 1)
    assert many[0, 0] > 0.95


def test_one_model_per_user_knows_nothing_before_the_first_answer():
    features = np.array([[[2.0, 0]], [[0, 2.0]]])
    nothing, _ = jester.alone(features[:, :0], np.zeros((2, 0)), l2=1.0)
    np.testing.assert_array_equal(nothing, np.zeros((2, 2)))
    found, _ = jester.alone(features, np.array([[1.0], [0.0]]), l2=1.0)
    # in units of length 2: t = sigmoid(-t), t = 0.40106; then divided by 2
    np.testing.assert_allclose(found, [[0.40106 / 2, 0], [0, -0.40106 / 2]], atol=1e-5)


def test_penalties_are_those_of_least_validation_loss(ratings, small, monkeypatch):
    monkeypatch.setattr(jester, "PENALTIES", (1.0, 1e5))
    # the two tastes cancel out on average, so that one reward for all is best penalised away
    assert jester.tune(np.eye(40), *jester.tuning_pairs(ratings, False), 2) == (1, 1, 1e5, 1)
    training, validation = jester.tuning_pairs(ratings, True)
    assert not set(training.first.ravel()) & set(validation.first[~np.isnan(validation.preference)])
    assert len(set(training.first.ravel())) == 20  # 5/7 of 28
    # one-hot numbers know nothing of new jokes, so a larger penalty only lowers the loss by chance
    noise = jester.Pairs(validation.first, validation.second, np.where(np.isnan(validation.preference), np.nan, 0.5))
    assert jester.tune(np.random.default_rng(0).normal(size=(40, 5)), training, noise, 2) == (1, 1e5, 1e5, 1e5)


def test_as_many_base_rewards_as_are_carried(ratings, small):
    world = jester.World.draw(ratings, 0)
    few = jester.factorize(world, np.eye(40), 6, 5.0)
    assert 1 <= len(few.head) < 6
    assert len(jester.factorize(world, np.eye(40), 2, 0.1).head) == 2


def test_our_method_beats_those_that_do_not_know_the_user(ratings, small):
    world = jester.World.draw(ratings, 0)
    found = jester.compare(world, np.eye(40), 2, jester.Penalties(0.3, 0.3, 0.3, 0.3), 0)
    users = len(world.pool.first)
    assert found.shape == (2, len(jester.METHODS), len(jester.ANSWERS), users)
    means = dict(zip(jester.METHODS, np.nanmean(found[1], -1)))
    assert means["ours"][4] > 0.85 > 0.7 > means["shared"][4]
    assert means["ours"][3] > means["per user"][3] + 0.05
    assert np.ptp(means["shared"]) == 0 and means["per user"][0] == 0.5
    curve = jester.sweep(world, np.eye(40), (1, 2), 0.3, 0, 10)
    np.testing.assert_array_equal(curve[:, 1], found[:, 0, jester.ANSWERS.index(10)])
    assert np.nanmean(curve[1, 0]) < np.nanmean(curve[1, 1]) - 0.03  # there are two tastes


def test_base_rewards_that_are_not_carried_change_nothing(ratings, small, monkeypatch):
    world, asked = jester.World.draw(ratings, 0), []
    inner = jester.factorize
    monkeypatch.setattr(jester, "factorize", lambda *args: asked.append(args[2]) or inner(*args))
    carried = len(inner(world, np.eye(40), 6, 5.0).head)
    curve = jester.sweep(world, np.eye(40), (1, 2, 3, 4, 5, 6), 5.0, 0, 3)
    assert asked == [1, 2, 3, 4, 5, 6][: carried + 1] and carried < 5
    for place in range(carried, 6):
        np.testing.assert_array_equal(curve[:, place], curve[:, carried])


# --- the command -----------------------------------------------------------------------------------------------------


def test_embeddings_are_means_over_tokens_and_made_once(tmp_path, monkeypatch):
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({chr(code): code for code in range(128)}, unk_token="~"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    config = LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = LlamaModel(config).eval()
    model.save_pretrained(tmp_path)
    found = jester.embed(["ab", "hello"], tmp_path)
    for row, text in zip(found, ("ab", "hello")):
        with torch.no_grad():
            hidden = model(torch.tensor([[ord(letter) for letter in text]])).last_hidden_state[0]
        np.testing.assert_allclose(row, hidden.mean(0).numpy(), atol=1e-5)
    asked = []
    monkeypatch.setattr(jester, "embedder", lambda: "folder")
    monkeypatch.setattr(jester, "embed", lambda texts, folder: asked.append(texts) or np.ones((2, 3), np.float32))
    for texts in (["a", "b"], ["a", "b"], ["a", "c"]):
        assert jester.embeddings_of(texts, tmp_path / "new").dtype == np.float64
    assert asked == [["a", "b"], ["a", "c"]] and len([*(tmp_path / "new").iterdir()]) == 2


def test_the_command_prints_the_tables_and_never_a_joke(ratings, small, tmp_path, monkeypatch, capsys):
    with gzip.open(tmp_path / jester.FILES[0], "wt") as file:
        file.write("user,joke,rating\n")
        file.writelines(f"{u},{j},{ratings[u, j]}\n" for u, j in zip(*np.nonzero(~np.isnan(ratings))))
    (tmp_path / jester.FILES[1]).write_text(json.dumps([f"a secret {j}" for j in range(40)]))
    embeddings = np.random.default_rng(0).normal(size=(40, 6))
    monkeypatch.setattr(jester, "embeddings_of", lambda texts, cache: embeddings)
    figure = tmp_path / "jester.png"
    jester.main(["--data", str(tmp_path), "--seeds", "2", "--out", str(figure)])
    out = capsys.readouterr().out
    assert "secret" not in out and "nan" not in out
    for block in jester.BLOCKS:
        assert f"{block}: AUC of new users by the number of answers" in out
    assert out.count("\nours, random") == 3 and out.count("\nours - released") == 3 and "<- recommended" in out
    assert max(map(len, out.splitlines()[:-1])) <= 119
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_means_and_errors_over_users_by_hand():
    results = [np.array([[0.4, 0.6, np.nan]]), np.array([[0.5, 0.5, 0.5]])]
    np.testing.assert_allclose(jester.by_seed(results), [[0.5], [0.5]])
    # users of seed 0: deviation .1414 and error .1; of seed 1: none
    np.testing.assert_allclose(jester.error_over_users(results), [0.05])


def test_without_the_data_it_says_so_and_ends_well(tmp_path, capsys):
    jester.main(["--data", str(tmp_path)])
    assert capsys.readouterr().out == (
        f"skipped: needs {jester.FILES[0]}, got none in {tmp_path}; name its folder by --data or $JESTER_DATA\n"
    )


def test_the_real_file_is_that_of_5000_people_and_100_jokes():
    path = jester.DATA / jester.FILES[0]
    if not path.is_file():
        pytest.skip(f"needs {path.name}, got none in {jester.DATA}; name its folder by $JESTER_DATA")
    ratings = jester.read(path)
    assert ratings.shape == (5000, 100) and (~np.isnan(ratings)).sum() == 363_209
    assert (ratings[0, 0], ratings[1, 0]) == (-1.6, 2.04)
