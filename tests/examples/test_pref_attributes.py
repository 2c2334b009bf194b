"""The Attributes experiment: scores of texts, the judge and the split by hand, and the whole on made-up texts."""

import gzip
import json

import numpy as np
import pytest

import pref_attributes as example
import pref_jester as jester

pytestmark = pytest.mark.core


def texts(size, seed=0):
    rng = np.random.default_rng(seed)
    words = "the river amazing you please could don't funny enormous thanks maybe perhaps love great your".split()
    marks = [".", "!", "?"]
    return [" ".join(rng.choice(words, rng.integers(3, 40))) + rng.choice(marks) for _ in range(size)]


@pytest.fixture(scope="module")
def judge():
    return example.Judge(example.tastes() @ example.scores(texts(400)).T)


@pytest.fixture
def small(monkeypatch):
    sizes = {"SEEN": 60, "RATERS": 20, "PAIRS": 90, "POOL": 30, "TEST": 60, "TRAINED": 50, "VALIDATED": 10}
    for name, size in {**sizes, "FACTORS": 2, "SWEEP": (1, 2, 8)}.items():
        monkeypatch.setattr(example, name, size)
    monkeypatch.setattr(jester.Released.__init__, "__defaults__", (20,))
    monkeypatch.setattr(jester.lore, "__defaults__", (20, 0.1))
    monkeypatch.setattr(jester, "PENALTIES", (0.3, 3.0))


OWNERS = np.repeat(np.arange(80), 5)


def test_the_users_are_the_papers_84():
    tastes = example.tastes()
    assert tastes.shape == (84, 7) and len({tuple(row) for row in tastes}) == 84  # C(14, 2) - 7
    assert (np.abs(tastes).sum(1) == 2).all() and (tastes.sum(0) == 0).all()


@pytest.mark.parametrize(
    "attribute, more, less",
    [
        ("length", "One two three four.", "One two three."),
        ("formality", "Institutions acknowledge considerable responsibility.", "Banks know what they owe."),
        ("formality", "They do not know of it.", "They don't know of it."),
        ("humour", "A funny joke about a cat.", "A true story about a cat."),
        ("engagement", "What would you do?", "They would do that."),
        ("politeness", "Thank you, and please come.", "Hear me, and now come."),
        ("enthusiasm", "This is a great day!", "This is a long day."),
        ("enthusiasm", "So it is a long day!", "So it is a long day."),
        ("confidence", "It is so.", "It may be so."),
    ],
)
def test_attributes_order_texts(attribute, more, less):
    place = example.ATTRIBUTES.index(attribute)
    assert example.attributes(more)[place] > example.attributes(less)[place]


def test_attributes_by_hand():
    # 8 words, 36 letters and the apostrophe; informal: don't, stuff. A curly apostrophe is one, and case is nothing
    found = example.attributes("Please, DON’T say funny stuff: you might laugh!")
    expected = [8, 37 / 8 - 20 * 2 / 8, 2 / 8, 1 / 8, 1 / 8, 1 / 8, -1 / 8]
    np.testing.assert_allclose(found, expected)
    assert example.attributes("") == [0, 0, 0, 0, 0, 0, 0]


def test_scores_are_standard_normal_by_rank():
    found = example.scores(texts(400))
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(found.std(0), 1)
    raw = np.array([example.attributes(text) for text in texts(400)])
    for column in range(7):
        order = np.argsort(raw[:, column], kind="stable")
        steps, rises = np.diff(found[order, column]), np.diff(raw[order, column]) > 0
        assert (steps[rises] > 0).all() and (steps[~rises] == 0).all()


def test_empty_and_repeated_answers_are_left_out(tmp_path):
    with gzip.open(tmp_path / example.FILE, "wt") as file:
        for answers in (["a", "b", "a", " ", "c"], ["d", "e", "f", "g", "h"]):
            file.write(json.dumps({"query": "?", "responses": dict(zip("vwxyz", answers))}) + "\n")
    found, owners = example.read(tmp_path / example.FILE)
    assert found == ["a", "b", "c", "d", "e", "f", "g", "h"] and owners.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


def test_the_judge_is_asked_twice():
    judge = example.Judge(np.array([[0.0, 0.5, 50.0], [0.0, 0.0, 0.0]]))
    pairs = np.array([[2, 0], [1, 0], [0, 2]])
    answers = np.stack([
        judge.ask(np.array([1, 0]), pairs, np.random.default_rng(seed)).preference for seed in range(4000)
    ])  # fmt: skip
    assert (answers[:, 1, 0] == 1).all() and (answers[:, 1, 2] == 0).all()
    share = [np.mean(answers[:, 1, 1] == reply) for reply in (0, 0.5, 1)]
    p = 1 / (1 + np.exp(-1.0))  # 2 u = 1: (1 - p)^2, 2 p (1 - p), p^2; four standard deviations
    np.testing.assert_allclose(share, [(1 - p) ** 2, 2 * p * (1 - p), p**2], atol=0.032)
    share = [np.mean(answers[:, 0] == reply) for reply in (0, 0.5, 1)]
    np.testing.assert_allclose(share, [0.25, 0.5, 0.25], atol=0.02)


def test_pairs_are_all_of_one_instruction(judge):
    part = OWNERS < 3
    pairs = example.pairs_of(OWNERS, part, np.random.default_rng(0))
    assert len(pairs) == 30 == len({frozenset(pair) for pair in pairs.tolist()})
    assert (OWNERS[pairs[:, 0]] == OWNERS[pairs[:, 1]]).all() and OWNERS[pairs].max() == 2
    assert 0 < (pairs[:, 0] < pairs[:, 1]).mean() < 1


def test_instructions_and_users_are_split(judge, small):
    drawn = example.Draw.of(judge, OWNERS, 0)
    world, (test,) = drawn.world, drawn.world.tests
    groups = [world.distinct, world.pool.first, drawn.validation.first, test.first]
    trained, asked, validated, tested = (set(OWNERS[np.unique(part)]) for part in groups)
    assert len(trained) <= 50 and asked <= set(range(80)) - validated - tested
    assert not trained & validated and not trained & tested and not validated & tested
    pairs = {frozenset(pair) for pair in world.distinct.T.tolist()}
    pool = {frozenset(pair) for pair in zip(world.pool.first[0], world.pool.second[0])}
    assert len(pairs) == 90 and len(pool) == 30 and not pairs & pool
    assert len(world.annotations) == 90 * 20 and (np.bincount(world.annotations.pair) == 20).all()
    assert world.pool.preference.shape == (24, 30) and test.preference.shape == (24, 60)
    assert set(test.preference[~np.isnan(test.preference)]) == {0, 1} and 0.8 < drawn.truth < 1
    other = example.Draw.of(judge, OWNERS, 1)
    assert (other.world.distinct != world.distinct).any()


def test_the_command_prints_the_tables_and_writes_the_figure(small, tmp_path, monkeypatch, capsys):
    made_up = texts(400)
    with gzip.open(tmp_path / example.FILE, "wt") as file:
        for row in range(80):
            answers = {str(k): f"{made_up[5 * row + k]} secret {k}" for k in range(5)}
            file.write(json.dumps({"query": "?", "responses": answers}) + "\n")
    embeddings = np.random.default_rng(0).normal(size=(400, 12))
    monkeypatch.setattr(example, "embeddings_of", lambda own, cache: embeddings[: len(own)])
    figure = tmp_path / "attributes.png"
    example.main(["--data", str(tmp_path), "--seeds", "2", "--out", str(figure)])
    out = capsys.readouterr().out
    assert "secret" not in out and "nan" not in out and "\ntruth: ." in out
    assert out.count("AUC of new users by the number of answers") == 2 and out.count("\nours, random") == 3
    lines = {line[:23].strip(): line[23:].split() for line in out.splitlines()}
    assert len(lines["attributes"]) == 2 and len(lines["embeddings"]) == 3  # 8 base rewards of 7 attributes: none
    assert max(map(len, out.splitlines()[:-1])) <= 119
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_without_the_data_it_says_so_and_ends_well(tmp_path, capsys):
    example.main(["--data", str(tmp_path)])
    assert capsys.readouterr().out == (
        f"skipped: needs {example.FILE}, got none in {tmp_path}; name its folder by --data or $DSP_DATA\n"
    )


def test_the_real_file_has_3254_texts():
    path = example.DATA / example.FILE
    if not path.is_file():
        pytest.skip(f"needs {example.FILE}, got none in {example.DATA}; name its folder by $DSP_DATA")
    found, owners = example.read(path)
    assert len(found) == 3254 and owners.max() == 660 and np.bincount(owners).max() == 5
