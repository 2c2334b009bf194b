"""Which words the command takes, and what it says if it cannot begin."""

import sys

import pytest

from openrlhf_pgrpo.cli.main import command_line, main

pytestmark = pytest.mark.core

GROUPS = ("groups", "--model", "m", "--data", "d", "--output", "o")
RERANK = ("rerank", "--model", "m", "--candidates", "c", "--output", "o")


@pytest.mark.parametrize(
    "words",
    [
        ("patch", "--che"),
        ("doctor", "--dev", "cpu"),
        ("report", "run", "--out", "page.html"),
        ("factorize", "--data", "d", "--backbone", "b", "--output", "o", "--fact", "2"),
        ("elicit", "--model", "m", "--pool", "p", "--user", "u", "--quest", "3"),
        (*RERANK, "--pop"),
        (*GROUPS, "--pref", "g"),
        ("export-user", "--model", "m", "--output", "o", "--use", "u"),
    ],
)
def test_abbreviated_flags_are_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line().parse_args(words)
    assert ended.value.code == 2 and "error: " in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "-1", "1.5", "x"])
@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "--model", "m", "--data", "d"),
        ("elicit", "--model", "m"),
        ("refit", "--model", "m", "--profile", "p", "--output", "o"),
        RERANK,
    ],
)
def test_texts_are_scored_at_least_one_at_once(words, size, capsys):
    """Zero was `min() arg is an empty sequence` once the model was loaded."""
    with pytest.raises(SystemExit) as ended:
        command_line().parse_args([*words, "--batch_size", size])
    said = f"--batch_size: it needs a whole number of at least 1, got '{size}'"
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert command_line().parse_args([*words, "--batch_size", "3"]).batch_size == 3


def test_the_column_of_preference_groups_has_the_name_that_the_trainers_use(capsys):
    assert command_line().parse_args([*GROUPS, "--pref_group_key", "g"]).pref_group_key == "g"
    with pytest.raises(SystemExit) as ended:
        command_line().parse_args([*GROUPS, "--group_key", "g"])
    assert ended.value.code == 2 and "--group_key" in capsys.readouterr().err


FACTORIZE = ("factorize", "--data", "d", "--backbone", "b", "--output", "o")


@pytest.mark.parametrize(
    "words, ours, missing",
    [(FACTORIZE, "models.factorize", "threadpoolctl"), (GROUPS, "people.groups", "sklearn.mixture")],
)
def test_a_missing_extra_is_a_sentence_and_a_fault_of_ours_is_none(run, monkeypatch, words, ours, missing):
    """The first was a traceback in most commands."""
    monkeypatch.delitem(sys.modules, f"openrlhf_pgrpo.{ours}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    said, _ = run(*words)
    assert said.startswith(f"openrlhf-pgrpo {words[0]}: ") and missing in said
    monkeypatch.setitem(sys.modules, f"openrlhf_pgrpo.{ours}", None)
    with pytest.raises(ModuleNotFoundError, match=f"openrlhf_pgrpo.{ours}"):
        main([*words])
