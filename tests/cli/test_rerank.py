"""`openrlhf-pgrpo rerank` and `groups`: the forms of data that they read, and columns that they would overwrite."""

import datetime
import json

import datasets
import numpy as np
import pytest
from common import rows_in

from openrlhf_pgrpo.models.folder import write

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    made = tmp_path_factory.mktemp("rerank") / "model"
    rng = np.random.default_rng(0)
    write(made, tiny / "model", rng.normal(size=(2, 64)), rng.normal(size=(4, 2)), ["ann", "bob", "7", "di"])
    return made


@pytest.mark.parametrize("taken", ["rewards", "order", "best", "responses"])
def test_a16_columns_of_the_ranking_are_not_overwritten(run, folder, jsonl, tmp_path, taken):
    """With --generate, `responses` too; it is refused before vLLM is imported."""
    generates = taken == "responses"
    row = {"prompt": "p", taken: ["mine"]} if generates else {"prompt": "p", "responses": ["x", "y"], taken: "mine"}
    data = jsonl("c.jsonl", [row])
    more = ("--generate", "nobody/policy") if generates else ()
    code, _ = run("rerank", "--model", folder, "--user", "ann", "--candidates", data, "--output", "o.jsonl", *more)
    assert f"line 1 of {data} needs new columns for the ranking, got {taken!r}, which it has" in code
    assert not (tmp_path / "o.jsonl").exists() and json.loads(data.read_text()) == row


@pytest.mark.parametrize(
    "flag, value, need",
    [
        ("--n", 0, "at least 1"),
        ("--n", -2, "at least 1"),
        ("--temperature", "nan", "a number from 0 to 2"),
        ("--max_tokens", -5, "at least 1"),
    ],
)
def test_sampling_that_cannot_be_is_refused_and_the_output_stays(run, folder, jsonl, tmp_path, flag, value, need):
    """Hours of responses were replaced by empty lists."""
    data, kept = jsonl("c.jsonl", [{"prompt": "p"}]), tmp_path / "o.jsonl"
    kept.write_text("responses of hours")
    words = ("--candidates", data, "--output", kept, "--generate", "nobody/policy", flag, value)
    code, _ = run("rerank", "--model", folder, "--user", "ann", *words)
    assert f"{flag} needs {need}, got {value}: correct it" in code
    assert kept.read_text() == "responses of hours"


@pytest.mark.parametrize("taken", ["pref_group", "pref_group_probability"])
def test_a16_columns_of_preference_groups_are_not_overwritten(run, folder, jsonl, tmp_path, taken):
    data = jsonl("d.jsonl", [{"user": "ann", taken: "mine"}])
    code, _ = run("groups", "--model", folder, "--groups", 2, "--data", data, "--output", "o.jsonl")
    assert f"needs a new column for the preference group, got {taken!r}, which it has" in code
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize("form", ["csv", "parquet", "splits"])
def test_groups_of_rows_in_any_form_with_users_that_are_numbers(run, folder, tmp_path, form):
    rows = [{"who": 7, "prompt": "p", "day": datetime.date(2026, 5, 1)}, {"who": 7, "prompt": "q", "day": None}]
    data, path, split = datasets.Dataset.from_list(rows), tmp_path / f"data.{form}", ()
    if form == "splits":
        datasets.DatasetDict(test=data).save_to_disk(path)
        split = ("--split", "test")
    else:
        getattr(data, f"to_{form}")(path)
    words = ("groups", "--model", folder, "--groups", 2, "--data", path, "--user_key", "who", "--output", "o.jsonl")
    code, _ = run(*words, *split)
    assert code == 0
    made = rows_in(tmp_path / "o.jsonl")
    assert [{name: row[name] for name in rows[0]} for row in made] == [
        {"who": "7", "prompt": "p", "day": "2026-05-01"},
        {"who": "7", "prompt": "q", "day": None},
    ]
    code, _ = run(*words, *split, "--user_key", "prompt")
    assert f"row 0 of {path} needs one of the 4 users of {folder} and its profiles, got 'p'" in code


def test_rerank_reads_other_columns_of_parquet_and_keeps_their_names(run, folder, tmp_path):
    path = tmp_path / "c.parquet"
    datasets.Dataset.from_list([{"question": "p", "drafts": ["x", "yy"], "id": 3}]).to_parquet(path)
    words = ("rerank", "--model", folder, "--user", "ann", "--candidates", path, "--output", "o.jsonl")
    code, _ = run(*words, "--prompt_key", "question", "--responses_key", "drafts")
    assert code == 0
    (row,) = rows_in(tmp_path / "o.jsonl")
    assert [*row] == ["question", "drafts", "id", "rewards", "order", "best"]
    assert row["drafts"] == ["x", "yy"] and row["best"] == row["drafts"][row["order"][0]]
    code, _ = run(*words)
    assert f"row 0 of {path} needs the column 'prompt', got 'question', 'drafts', 'id'" in code
    code, _ = run(*words, "--prompt_key", "question", "--responses_key", "best")
    assert "--responses_key needs another column than 'rewards', 'order', 'best', got 'best'" in code


def test_candidates_that_a_file_cannot_hold_are_refused_before_anything_is_written(run, folder, tmp_path):
    (tmp_path / "c.csv").write_text("""prompt,responses\np,"['x', 'y']"\n""")
    whole = {"prompt": "p", "responses": ["x"]}
    datasets.Dataset.from_list([{**whole, "score": float("nan")}]).to_parquet(tmp_path / "nan.parquet")
    datasets.Dataset.from_list([{**whole, "photo": b"png"}]).to_parquet(tmp_path / "bytes.parquet")
    for name, said in (
        ("c.csv", "needs a list of at least one text as 'responses', got \"['x', 'y']\"; CSV has no lists, JSONL and"),
        (
            "nan.parquet",
            "needs a value in 'score' that can be written as JSON, got float nan: make it a text, or leave",
        ),
        ("bytes.parquet", "needs a value in 'photo' that can be written as JSON, got bytes b'png': make it a text"),
    ):
        path = tmp_path / name
        code, _ = run("rerank", "--model", folder, "--user", "ann", "--candidates", path, "--output", "o.jsonl")
        assert f"row 0 of {path} {said}" in code and not (tmp_path / "o.jsonl").exists()


def test_an_output_inside_the_data_is_refused(run, folder, tmp_path):
    datasets.DatasetDict(train=datasets.Dataset.from_list([{"user": "ann"}])).save_to_disk(tmp_path / "data")
    file = tmp_path / "data" / "train" / "state.json"
    before = file.read_bytes()
    code, _ = run("groups", "--model", folder, "--data", tmp_path / "data", "--output", file)
    assert f"--output needs a file of its own, got {file}, which --data" in code and file.read_bytes() == before
