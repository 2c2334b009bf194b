"""`openrlhf-pgrpo rerank` and `groups`: columns of the data that they would overwrite."""

import json

import numpy as np
import pytest

from openrlhf_pgrpo.models.folder import write

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    made = tmp_path_factory.mktemp("rerank") / "model"
    rng = np.random.default_rng(0)
    write(made, tiny / "model", rng.normal(size=(2, 64)), rng.normal(size=(4, 2)), ["ann", "bob", "cy", "di"])
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


@pytest.mark.parametrize("taken", ["pref_group", "pref_group_probability"])
def test_a16_columns_of_preference_groups_are_not_overwritten(run, folder, jsonl, tmp_path, taken):
    data = jsonl("d.jsonl", [{"user": "ann", taken: "mine"}])
    code, _ = run("groups", "--model", folder, "--groups", 2, "--data", data, "--output", "o.jsonl")
    assert f"needs a new column for the preference group, got {taken!r}, which it has" in code
    assert not (tmp_path / "o.jsonl").exists()
