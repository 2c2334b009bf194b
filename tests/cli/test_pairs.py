"""`openrlhf-pgrpo pairs`: what it writes, what it holds out, and what is refused."""

import json
from datetime import date
from types import SimpleNamespace

import pytest
from common import rows_in
from datasets import Dataset, load_dataset

from openrlhf_pgrpo.host.rows import check_pairs
from openrlhf_pgrpo.models.comparisons import read
from openrlhf_pgrpo.models.factorize import factorize
from openrlhf_pgrpo.models.folder import Folder

pytestmark = pytest.mark.core

PAIRS = SimpleNamespace(  # the flags --data. of a trainer
    prompt_key="prompt", chosen_key="chosen", rejected_key="rejected", apply_chat_template=True, input_template=None
)


@pytest.fixture
def ratings(jsonl):
    """Ten users rate eight responses to each of three prompts; u0 to u4 like long ones."""
    rows = [
        dict(
            user=f"u{user}", prompt=f"p{prompt} ", response=f"{'!' * size}{prompt}", rating=size if user < 5 else -size
        )
        | dict(group="loud" if user < 5 else "calm", at=[user, prompt, size])
        for user in range(10)
        for prompt in range(3)
        for size in range(1, 9)
    ]
    return jsonl("ratings.jsonl", rows)


def test_texts_are_written_as_messages_if_asked_for(run, tmp_path, jsonl, tiny):
    """Trainers on pairs need them with a chat template. The pairs are the same."""
    talk = [{"role": "user", "content": "hi"}]
    rows = [
        dict(user="u", prompt="p", chosen="a", rejected="b"),
        dict(user="u", prompt=talk, chosen="c", rejected="d"),
    ]
    data = jsonl("rows.jsonl", rows)
    code, shown = run("pairs", "--data", data, "--messages", "--output", "pairs.jsonl")
    assert code == 0, shown
    first, second = rows_in(tmp_path / "pairs.jsonl")
    assert first["prompt"] == [{"role": "user", "content": "p"}] and second["prompt"] == talk
    assert [first["chosen"], first["rejected"]] == [[{"role": "assistant", "content": text}] for text in "ab"]
    assert check_pairs(Dataset.from_list([first, second]), PAIRS, "x") == ([], [])


def test_ratings_become_pairs_that_others_read(run, ratings, tmp_path, tiny):
    code, shown = run("pairs", "--data", ratings, "--output", "pairs.jsonl", "--pairs", 20)
    assert code == 0 and shown.splitlines() == [
        "columns left out: 'at'; those with one value for each user are kept",
        "240 ratings make 200 pairs",
        "pairs.jsonl: 10 users, 3 prompts, 200 pairs, 0 ties",
    ]
    written = rows_in(tmp_path / "pairs.jsonl")
    assert [*written[0]] == ["user", "prompt", "chosen", "rejected", "preference", "group"]
    assert all((row["group"] == "loud") == (len(row["chosen"]) > len(row["rejected"])) for row in written)
    assert [(*row.values(),)[:5] for row in written] == read(ratings, pairs_per_user=20).rows

    made = []
    for data, count in ((tmp_path / "pairs.jsonl", None), (ratings, 20)):  # the same model either way
        made.append(tmp_path / f"rm{len(made)}")
        factorize(data, tiny / "model", made[-1], 1, 1.0, "mean", pairs_per_user=count, say=lambda line: None)
    assert Folder(made[0]).fingerprint == Folder(made[1]).fingerprint
    words = [
        "evaluate",
        "--model",
        made[0],
        "--data",
        ratings,
        "--pairs",
        20,
        "--seed",
        1,
        "--pref_group_key",
        "group",
    ]
    code, shown = run(*words, "--output", "numbers.json")
    assert code == 0 and "240 ratings make 200 pairs" in shown
    result = json.loads((tmp_path / "numbers.json").read_text())
    assert result["counts"]["answers"] == 200 and {*result["known"]["own coefficients"]["groups"]} == {"loud", "calm"}


@pytest.mark.host
def test_train_rm_reads_what_is_written(run, ratings, tmp_path):
    from openrlhf_pgrpo.host.rm.data import check

    assert run("pairs", "--data", ratings, "--output", "pairs.jsonl", "--pairs", 3)[0] == 0
    keys = dict(prompt_key="prompt", chosen_key="chosen", rejected_key="rejected", user_key="user")
    data = SimpleNamespace(**keys, preference_key=None, apply_chat_template=False, input_template=None)
    args = SimpleNamespace(data=data, reward=SimpleNamespace(factors=2))
    check(load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"))["train"], args, "the pairs")


def test_conversations_keep_their_other_columns(run, jsonl, tmp_path):
    def turns(*texts):
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    whole = dict(who=7, better=turns("why?", "so"), worse=turns("why?", "no"), user="a name", group="loud", score=3)
    flags = ("--user_key", "who", "--chosen_key", "better", "--rejected_key", "worse")
    code, shown = run("pairs", "--data", jsonl("a.jsonl", [whole]), "--output", "pairs.jsonl", *flags)
    assert code == 0 and shown.startswith("columns left out: 'user'; ")
    pair = dict(
        user="7", prompt=turns("why?"), chosen=turns("", "so")[1:], rejected=turns("", "no")[1:], preference=1.0
    )
    assert rows_in(tmp_path / "pairs.jsonl") == [pair | {"group": "loud", "score": 3}]
    assert run("pairs", "--data", "pairs.jsonl", "--output", "again.jsonl")[0] == 0
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "pairs.jsonl").read_text()


def test_other_columns_are_written_as_json_or_refused(run, tmp_path):
    row = dict(user="ana", prompt="p", chosen="x", rejected="y", day=date(2024, 5, 1))
    Dataset.from_list([row]).to_parquet(tmp_path / "a.parquet")
    assert run("pairs", "--data", "a.parquet", "--output", "pairs.jsonl")[0] == 0
    assert rows_in(tmp_path / "pairs.jsonl")[0]["day"] == "2024-05-01"
    Dataset.from_list([row | {"day": b"1"}]).to_parquet(tmp_path / "b.parquet")
    code, _ = run("pairs", "--data", "b.parquet", "--output", "none.jsonl")
    assert "row 0 of b.parquet needs a value in 'day' that can be written as JSON" in code
    assert not (tmp_path / "none.jsonl").exists()


# ---- held out ----


def parts(run, tmp_path, data, *flags):
    """The rows of both files, and what was printed."""
    code, shown = run("pairs", "--data", data, "--output", "train.jsonl", "--held_out", "test.jsonl", *flags)
    assert code == 0, code
    return rows_in(tmp_path / "train.jsonl"), rows_in(tmp_path / "test.jsonl"), shown


def values(rows, *columns):
    return {row[column] for row in rows for column in columns}


OF = {"users": ("user",), "prompts": ("prompt",), "responses": ("chosen", "rejected")}


@pytest.mark.parametrize("kind, share, count", [("users", 0.3, 3), ("prompts", 0.34, 1), ("responses", 0.5, 12)])
@pytest.mark.parametrize("of_pairs", [False, True])
def test_what_is_held_out_is_in_one_file_only(run, ratings, tmp_path, kind, share, count, of_pairs):
    data = ratings
    if of_pairs:
        data = tmp_path / "all.jsonl"
        run("pairs", "--data", ratings, "--output", data)
    training, held, shown = parts(run, tmp_path, data, "--hold_out", f"{kind}:{share}")
    ours, theirs = values(training, *OF[kind]), values(held, *OF[kind])
    assert not ours & theirs
    # Of the responses, one may be the only held-out one to its prompt.
    assert len(theirs) == count or (kind == "responses" and len(theirs) == count - 1)
    total = 10 * 3 * 28
    mixed = total - len(training) - len(held)
    assert (mixed > 0) == (kind == "responses")
    assert (f"{mixed} of 840 pairs are left out" in shown) == (of_pairs and kind == "responses")
    flags = ("--hold_out", f"{kind}:{share}", "--seed")
    assert any(parts(run, tmp_path, data, *flags, seed)[1] != held for seed in (1, 2, 3))


def test_pairs_and_ratings_are_parted_alike(run, ratings, tmp_path):
    run("pairs", "--data", ratings, "--output", "all.jsonl")
    flags = ("--hold_out", "users:0.3", "--hold_out", "responses:0.5")
    found = [parts(run, tmp_path, data, *flags)[:2] for data in (ratings, tmp_path / "all.jsonl")]
    key = json.dumps
    assert [sorted(map(key, rows)) for rows in found[0]] == [sorted(map(key, rows)) for rows in found[1]]


def test_kinds_together_hold_out_new_people_on_new_responses(run, ratings, tmp_path):
    users = parts(run, tmp_path, ratings, "--hold_out", "users:0.3")[1]
    flags = ("--hold_out", "users:0.3", "--hold_out", "responses:0.5", "--pairs", 5)
    training, held, shown = parts(run, tmp_path, ratings, *flags)
    for columns in OF["users"], OF["responses"]:
        assert not values(training, *columns) & values(held, *columns)
    assert values(held, "user") == values(users, "user")  # whatever else is held out
    assert len(training) == 7 * 5 and len(held) == 3 * 5
    # Seven users have half of their 24 ratings left, and so have three.
    assert shown.startswith("120 of 240 ratings are left out, because only a part of them is held out")


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--hold_out", "users:0.2"), "--hold_out and --held_out need each other"),
        (("--held_out", "test.jsonl"), "--hold_out and --held_out need each other"),
        (
            ("--held_out", "t", "--hold_out", "people:0.2"),
            "--hold_out needs 'users', 'prompts', 'responses' and a sha",
        ),
        (("--held_out", "t", "--hold_out", "users:1"), "a share between 0 and 1, such as users:0.2, got 'users:1'"),
        (("--held_out", "t", "--hold_out", "users:nan"), "got 'users:nan'"),
        (("--held_out", "t", "--hold_out", "users"), "got 'users'"),
        (("--held_out", "t", "--hold_out", "users:.1", "--hold_out", "users:.2"), "each kind once, got 'users' twice"),
        (
            ("--held_out", "t", "--hold_out", "users:.01"),
            "users on both sides, got 0 of 10 held out: change the share",
        ),
        (
            ("--held_out", "t", "--hold_out", "responses:.05"),
            "--hold_out leaves too little for t: ratings need a user",
        ),
        (
            ("--held_out", "out", "--hold_out", "users:.2"),
            "--output and --held_out need a file each, got out for both",
        ),
        (("--held_out", "ratings.jsonl", "--hold_out", "users:.2"), "--data and --held_out need a file each"),
        (("--held_out", "no/t", "--hold_out", "users:.2"), "--held_out needs a folder that exists"),
        (("--pairs", 0), "--pairs needs at least 1, got 0"),
        (("--rating_key", "stars"), "--rating_key needs a column of "),
    ],
)
def test_wrong_flags_are_refused_and_nothing_is_written(run, ratings, tmp_path, flags, message):
    code, _ = run("pairs", "--data", ratings, "--output", "out", *flags)
    assert code.startswith("openrlhf-pgrpo pairs: ") and message in code
    assert {path.name for path in tmp_path.iterdir()} == {"ratings.jsonl"}


def test_a_file_that_would_stay_empty_is_refused(run, jsonl, tmp_path):
    rows = [dict(user="ana", prompt=f"p{i}", chosen=f"a{i}", rejected="no") for i in range(2)]
    words = ("pairs", "--data", jsonl("a.jsonl", rows), "--output", "train.jsonl", "--held_out", "test.jsonl")
    code, _ = run(*words, "--hold_out", "responses:0.5")
    assert "needs rows for both files, got none for --" in code and not (tmp_path / "train.jsonl").exists()


def test_no_file_is_written_over_that_is_read(run, ratings):
    code, _ = run("pairs", "--data", ratings, "--output", ratings)
    assert "--data and --output need a file each" in code


@pytest.mark.parametrize(
    "words, flag",
    [
        (("pairs", "--data", "data"), "--output"),
        (("pairs", "--data", "data", "--output", "o.jsonl", "--hold_out", "users:0.5"), "--held_out"),
        (("factorize", "--data", "data", "--backbone", "none"), "--output"),
        (("factorize", "--data", "data", "--backbone", "none", "--output", "m"), "--curve"),
        (("refit", "--model", "none", "--profile", "none", "--pool", "data"), "--output"),
        (("elicit", "--model", "none", "--answers", "data"), "--profiles"),
        (("elicit", "--model", "none", "--pool", "data", "--user", "eve"), "--scores"),
        (("compare", "--data", "data", "--model", "none", "--policies", "none", "none"), "--output"),
    ],
)
def test_nothing_is_written_into_a_folder_of_data(run, ratings, tmp_path, words, flag):
    """The same command read it as data the next time."""
    (tmp_path / "data").mkdir()
    ratings.rename(tmp_path / "data" / "ratings.jsonl")
    code, _ = run(*words, flag, "data/new.svg")
    assert f"{flag} needs a place outside of the folder data, which {words[words.index('data') - 1]} reads" in code
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["ratings.jsonl"]


def test_a_session_goes_on_from_files_in_the_models_own_folder(run, ratings, tmp_path):
    """What it has written itself is no file that it would write over."""
    (tmp_path / "rm").mkdir()
    ratings.rename(tmp_path / "rm" / "ratings.jsonl")
    for name in ("eve.json", "kept.st"):
        (tmp_path / "rm" / name).touch()
    words = ("--pool", "rm/ratings.jsonl", "--user", "eve", "--profile", "rm/eve.json", "--scores", "rm/kept.st")
    code, _ = run("elicit", "--model", "rm", *words)
    assert "needs a file of its own" not in str(code) and "outside" not in str(code)
