"""Pools and other files that people write by hand: what is read, and what is refused by its line."""

from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from common import CHAT, scored

from openrlhf_pgrpo.models.form import Form
from openrlhf_pgrpo.models.tables import Columns
from openrlhf_pgrpo.people import pool
from openrlhf_pgrpo.people.pool import (
    Pair,
    base_rewards,
    read_pool,
    read_scores,
    readable,
    shown,
    tell_apart,
    write_scores,
)

pytestmark = pytest.mark.core

GOOD = {"prompt": "p", "a": "x", "b": "y"}


def test_a_pool_is_read_in_order_whatever_else_it_holds(jsonl):
    path = jsonl("pool.jsonl", [GOOD, "", {**GOOD, "b": "<b>\u00e9\u2028</b>", "source": 7}])
    loud = Pair("p", "x", "<b>\u00e9\u2028</b>")
    assert read_pool(path) == [(f"line 1 of {path}", Pair("p", "x", "y")), (f"line 3 of {path}", loud)]


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"prompt": "p", "a": "x"', "line 3 of .* needs a JSON object, got Expecting"),
        ("[1]", "line 3 of .* needs a JSON object, got list"),
        ("[" * 100_000, "line 3 of .* needs a JSON object"),
        ({"prompt": "p", "a": "x"}, "line 3 of .* needs the column 'b', got 'prompt', 'a'"),
        ({}, "needs the column 'prompt', got none"),
        ({**GOOD, "b": 3}, "line 3 of .* needs a text in 'b', got int 3"),
        ({**GOOD, "b": None}, "needs a text in 'b', got null"),
        ({**GOOD, "b": ""}, "line 3 of .* in 'b', got an empty text: correct it or drop the row"),  # case B5
        ({**GOOD, "a": " "}, "line 3 of .* in 'a', got a blank text, ' '"),
        ({**GOOD, "prompt": []}, "line 3 of .* in 'prompt', got a list, "),
        ({**GOOD, "prompt": [{"role": "user"}]}, "line 3 of .* in 'prompt', got a struct .* as message 0"),
        ({**GOOD, "b": "\ud800"}, "line 3 of .* needs a text in 'b'"),
    ],
)
def test_a_bad_row_is_refused_by_its_line(jsonl, row, message):
    with pytest.raises(ValueError, match=message):
        read_pool(jsonl("pool.jsonl", [GOOD, {**GOOD, "prompt": "q"}, row]))


def test_d15_equal_and_repeated_pairs_are_left_out_with_their_number(jsonl, capsys):
    other = {**GOOD, "prompt": "q"}
    turned = {**GOOD, "a": GOOD["b"], "b": GOOD["a"]}
    rows = [GOOD, other, {**GOOD, "b": GOOD["a"]}, {**GOOD, "b": f" {GOOD['a']}\n"}, GOOD, turned]
    assert [pair._asdict() for _, pair in read_pool(jsonl("pool.jsonl", rows))] == [GOOD, other]
    assert "2 of 6 pairs of " in (said := capsys.readouterr().out) and "2 of equal answers, 2 repeated" in said
    with pytest.raises(ValueError, match="needs a pair of two different answers, got none in 1 rows"):
        read_pool(jsonl("equal.jsonl", rows[2:3]))


# --- pools out of other data -----------------------------------------------------------------------------------------

CHOICE = {"prompt": "p", "chosen": "x", "rejected": "y"}
CHOICES = [  # of several people: one pair three times, one of equal answers
    {**CHOICE, "user": "ana"},
    {**CHOICE, "user": "ben", "preference": 0.5},
    {"user": "ben", "prompt": "p", "chosen": "y", "rejected": "x"},
    {"user": "ana", "prompt": "p", "chosen": "x", "rejected": "x"},
    {"user": "ana", "prompt": "q", "chosen": "007", "rejected": "None"},
]
ASKED = [Pair("p", "x", "y"), Pair("q", "007", "None")]


def pairs_in(*args, **kwargs):
    return [pair for _, pair in read_pool(*args, **kwargs)]


def test_a_pool_is_made_of_pairs_whoever_preferred_what(jsonl, capsys):
    path = jsonl("pairs.jsonl", CHOICES)
    assert pairs_in(path) == ASKED
    left_out = "left out: 1 of equal answers, 2 repeated"
    assert capsys.readouterr().out == f"2 of 5 pairs of {path} are used; {left_out}\n"
    assert pairs_in(jsonl("nobody.jsonl", [CHOICE, {**CHOICE, "user": None, "preference": "?"}])) == ASKED[:1]


@pytest.mark.parametrize("kind", ["csv", "json", "parquet", "saved"])
def test_a_pool_has_any_format(jsonl, tmp_path, kind):
    rows = datasets.Dataset.from_list([{key: row[key] for key in ("user", *CHOICE)} for row in CHOICES])
    path = tmp_path / f"pairs.{kind}"
    {"csv": rows.to_csv, "json": rows.to_json, "parquet": rows.to_parquet, "saved": rows.save_to_disk}[kind](path)
    found = read_pool(path)
    place = "line 5" if kind == "json" else "row 4"  # `datasets` writes JSON as lines
    assert [pair for _, pair in found] == ASKED and found[1][0] == f"{place} of {path}"


def test_columns_of_a_pool_are_named_by_flags(jsonl):
    named = Columns(prompt="q", chosen="good", rejected="bad")
    path = jsonl("pairs.jsonl", [{"q": "p", "good": "x", "bad": "y", "a": "1", "b": "2"}])
    assert pairs_in(path, named) == ASKED[:1]
    assert pairs_in(path, Columns(prompt="q")) == [Pair("p", "1", "2")]  # a pool stays one, whatever else it holds
    with pytest.raises(
        ValueError, match="needs the columns 'a' and 'b', or 'chosen' and 'rejected', or .*, got 'bad'"
    ):
        read_pool(jsonl("odd.jsonl", [{"q": "p", "good": "x", "bad": "y"}]))
    with pytest.raises(ValueError, match="line 2 of .* needs the column 'rejected', got 'prompt', 'chosen'"):
        read_pool(jsonl("half.jsonl", [CHOICE, {"prompt": "p", "chosen": "x"}]))
    with pytest.raises(ValueError, match="--split needs a data set with splits, got .*: leave it out"):
        read_pool(path, named, "test")
    with pytest.raises(ValueError, match="--pairs draws pairs of ratings, got .* whose rows are pairs already"):
        read_pool(path, named, pairs_per_user=3)


def test_conversations_and_ratings_make_a_pool(jsonl):
    whole = [[*QUESTION, {"role": "assistant", "content": text}] for text in ("so", "thus")]
    (pair,) = pairs_in(jsonl("chats.jsonl", [{"chosen": whole[0], "rejected": whole[1]}]))
    assert pair == Pair(QUESTION, whole[0][2:], whole[1][2:])
    rated = [{"user": user, "prompt": "p", "response": r, "rating": r > "x"} for user in "ab" for r in "xyz"]
    path = jsonl("ratings.jsonl", [{**row, "rating": int(row["rating"])} for row in rated])
    found = pairs_in(path)
    assert {frozenset(pair[1:]) for pair in found} == {*map(frozenset, ("xy", "xz", "yz"))} and len(found) == 3
    assert len(pairs_in(path, pairs_per_user=1, seed=1)) <= 2


def test_a4_pairs_that_the_model_cannot_tell_apart_are_not_asked(capsys):
    pairs = [Pair("p", "x", "y"), Pair("q", "x", "y")]
    a, b = np.array([[1.0, 2.0], [1.0, 2.0]]), np.array([[1.0, 2.0], [1.0, 2.5]])
    left, of_a, of_b = tell_apart(pairs, a, b)
    assert left == pairs[1:] and of_a.tolist() == [[1.0, 2.0]] and of_b.tolist() == [[1.0, 2.5]]
    assert capsys.readouterr().out == "1 of 2 pairs are the same to the model and are left out\n"
    with pytest.raises(ValueError, match="tells apart, got none in 2 pairs"):
        tell_apart(pairs, a, a)


def test_an_empty_or_missing_or_binary_file_is_refused(jsonl, tmp_path):
    with pytest.raises(ValueError, match="at least one row, got an empty file"):
        read_pool(jsonl("pool.jsonl", ["", " "]))
    with pytest.raises(ValueError, match="need to be a file, a folder or a data set on the hub, got .*nowhere.jsonl"):
        read_pool(tmp_path / "nowhere.jsonl")
    (tmp_path / "binary").write_bytes(b"\x80\x81\n")
    with pytest.raises(ValueError, match="line 1 of .*binary needs a JSON object"):
        read_pool(tmp_path / "binary")


def test_the_name_of_a_pair_is_that_of_its_texts():
    name = Pair("p", "x", "y").name
    assert name == Pair("p", "y", "x").name and len(name) == 32
    others = [Pair("p", "x", "z"), Pair("q", "x", "y"), Pair("p x", "y", ""), Pair("", "px", "y")]
    assert len({name, *(pair.name for pair in others)}) == 5


def test_every_text_is_scored_once_and_lands_on_its_side(monkeypatch):
    pairs = [Pair("p", "a!", "bb"), Pair("p", "bb", "cccc!!"), Pair("q", "bb", "a!")]
    asked = []

    def of_written(prompts, responses, batch_size):
        asked.extend(zip(prompts, responses))
        return np.array([[text.count("!"), len(text)] for text in responses], np.float64)

    monkeypatch.setattr(pool, "load", lambda name, chat_template: SimpleNamespace(of_written=of_written))
    a, b = base_rewards(SimpleNamespace(name="rm"), pairs)
    assert asked == [("p", "a!"), ("p", "bb"), ("p", "cccc!!"), ("q", "bb"), ("q", "a!")]
    assert a.tolist() == [[1, 2], [0, 2], [0, 2]] and b.tolist() == [[0, 2], [2, 6], [1, 2]]


def test_scores_come_back_for_the_same_model_and_pool_alone(model, pairs, tmp_path):
    path, rewards = tmp_path / "pool.scores", scored(model, pairs)
    write_scores(path, *rewards, pairs, "f00d")
    for found, given in zip(read_scores(path, pairs, "f00d"), rewards, strict=True):
        assert found.tobytes() == given.tobytes() and found.dtype == given.dtype
    with pytest.raises(ValueError, match="for the model beef, got one for f00d: name another file"):
        read_scores(path, pairs, "beef")
    for others in (pairs[1:], [pairs[1], pairs[0], *pairs[2:]], [Pair(pairs[0].prompt, *pairs[0][:0:-1]), *pairs[1:]]):
        with pytest.raises(ValueError, match="for the pool [0-9a-f]{64}, got one for [0-9a-f]{64}"):
            read_scores(path, others, "f00d")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="needs to hold the base rewards of a pool, got .*: name another file"):
        read_scores(path, pairs, "f00d")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="needs to hold the base rewards"):
        read_scores(path, pairs, "f00d")


@pytest.mark.parametrize(
    "a, b, message",
    [
        (np.ones((1, 2)), np.ones((1, 3)), "base rewards of 1 pairs in float64, got float64 of shape"),
        (np.ones((2, 2)), np.ones((2, 2)), "base rewards of 1 pairs in float64, got float64 of shape"),
        (np.ones(1), np.ones(1), "base rewards of 1 pairs in float64, got float64 of shape"),
        (np.ones((1, 2), np.int64), np.ones((1, 2)), "got int64 of shape"),
        (np.ones((1, 2)), np.array([[1.0, np.nan]]), "needs finite base rewards, got nan or inf: delete it"),
    ],
)
def test_e5_scores_are_checked_when_they_are_read(tmp_path, a, b, message):
    """Numbers that nothing finite follows from are refused before the first question."""
    pairs = [Pair("p", "x", "y")]
    write_scores(tmp_path / "scores", a, b, pairs, "f00d")
    with pytest.raises(ValueError, match=message):
        read_scores(tmp_path / "scores", pairs, "f00d")


# --- prompts and answers that are messages ---------------------------------------------------------------------------

QUESTION = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "why?"}]
ANSWER = [{"role": "assistant", "content": "so"}]


def test_messages_are_read_named_and_shown(jsonl):
    pair = Pair(QUESTION, ANSWER, "no")
    assert [found for _, found in read_pool(jsonl("pool.jsonl", [pair._asdict()]))] == [pair]
    turned = Pair([dict(reversed(turn.items())) for turn in QUESTION], "no", ANSWER)
    assert pair.name == turned.name != Pair("why?", ANSWER, "no").name
    assert shown(QUESTION) == "system: be kind\n\nuser: why?" and shown("why?") == "why?"
    parts = [{"type": "text", "text": "look"}, {"type": "image", "url": "x"}]
    assert shown([{"role": "user", "content": parts}]) == "user: look\n(image)"
    assert shown([{"role": "assistant", "content": None, "tool_calls": ["é"]}]) == 'assistant: ["é"]'


def test_messages_are_scored_in_the_form_of_the_model(reader_of):
    placed = [("line 4 of pool.jsonl", Pair(QUESTION, ANSWER, "no")), ("line 9", Pair("why?", "so", "no"))]
    pairs, written = readable(reader_of(Form(CHAT)), placed, Path("pool.jsonl"))
    assert pairs == [pair for _, pair in placed]
    assert written == [Pair("<system>be kind<user>why?<a>", "so", "no"), Pair("<user>why?<a>", "so", "no")]
    with pytest.raises(
        ValueError, match="line 4 of pool.jsonl: a prompt needs to be a text, .*got a list of messages"
    ):
        readable(reader_of(), placed, Path("pool.jsonl"))


def test_a3_answers_that_are_nothing_but_their_end_are_refused_with_their_line(reader_of):
    placed = [("line 1", Pair("p", "x", "y")), ("line 5 of pool.jsonl", Pair("p", "x", " <eos>\n"))]
    with pytest.raises(
        ValueError, match="line 5 of pool.jsonl needs answers with words, .* its end, in 1 of 2 pairs: "
    ):
        readable(reader_of(), placed, Path("pool.jsonl"))


@pytest.mark.parametrize("at_once", [1024, 3])
def test_d15_answers_that_are_too_long_are_left_out_all_at_once(reader_of, capsys, monkeypatch, at_once):
    """They were refused one after the other, each after the whole pool had been scored. The tokens of a large pool are
    not held at once."""
    monkeypatch.setattr("openrlhf_pgrpo.people.pool.AT_ONCE", at_once)
    long = "seven.."
    both = Pair("p", long, long + "!")
    placed = [("line 1", Pair("p", "x", long)), ("line 2", Pair("a long prompt", "x", "y")), ("line 3", both)]
    pairs, written = readable(reader_of(longest=6), placed, Path("pool.jsonl"))
    assert pairs == written == [placed[1][1]]
    said = "2 of 3 pairs are left out: they have an answer of more than the 6 tokens that the model reads\n"
    assert capsys.readouterr().out == said
    with pytest.raises(
        ValueError, match="pool.jsonl needs a pair of answers within the 6 tokens .*, got none in 1 pairs"
    ):
        readable(reader_of(longest=6), placed[:1], Path("pool.jsonl"))
