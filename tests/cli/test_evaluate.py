"""`openrlhf-pgrpo evaluate` on a real reward model: table, JSON, page, and what is refused."""

import json

import datasets
import numpy as np
import pytest

from openrlhf_pgrpo.cli.main import main
from openrlhf_pgrpo.models.factorize import factorize
from openrlhf_pgrpo.models.folder import Folder

pytestmark = pytest.mark.core

EVIL = "</script><script>alert(1)</script> %{x} $x$"


@pytest.fixture(scope="module")
def folder(annotations, tiny, tmp_path_factory):
    made = tmp_path_factory.mktemp("evaluated") / "rm"
    factorize(annotations, tiny / "model", made, 1, 1.0, "mean", say=lambda line: None)
    return made


@pytest.fixture(scope="module")
def rows():
    """Pairs that the model has not seen: u0 to u3 like it loud, u4 to u7 calm, and so do the new n0 and n1."""
    rng, made = np.random.default_rng(1), []
    for pair in range(16):
        loud, calm = (f"{rng.integers(1000)}{'!' * count}" for count in (rng.integers(6, 12), rng.integers(0, 4)))
        for user in ("u0", "u1", "u2", "u5", "n0", "n1"):
            of = {"group": EVIL if user in ("u0", "u1", "u2", "n0") else "calm", "user": user, "prompt": f"{pair}: "}
            loves = of["group"] == EVIL
            made.append(of | {"chosen": loud if loves else calm, "rejected": calm if loves else loud})
    return made


@pytest.fixture
def command(folder, rows, jsonl):
    return "evaluate", "--model", folder, "--data", jsonl("heldout.jsonl", rows)


def test_table_json_and_scores(run, command, folder, rows, tmp_path):
    flags = ("--pref_group_key", "group", "--output", "out.json", "--scores", "kept")
    code, shown = run(*command, *flags)
    assert code == 0 and "People the model knows" in shown and shown.splitlines()[-1] == "out.json"
    assert "no standard error for a preference group of one person: " in shown
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["finished"] and result["model"]["fingerprint"] == Folder(folder).fingerprint
    assert result["counts"] == {"answers": 96, "ties": 0, "pairs": 16, "people": 6, "people the model knows": 4}
    own = result["known"]["own coefficients"]
    assert own["all"]["accuracy"]["value"] > 0.95 > result["known"]["one reward for all"]["all"]["accuracy"]["value"]
    assert own["groups"]["calm"]["people"] == 1 and own["groups"]["calm"]["accuracy"]["error"] is None
    assert result["new"]["after"][4]["too few"] == 0 and result["new"]["after"][5]["too few"] == 2
    assert result["new"]["after"][3]["by information"]["all"]["accuracy"]["value"] > 0.9

    code, again = run(*command, *flags)  # this time nothing is scored
    assert code == 0 and "scoring" in shown and "scoring" not in again
    assert json.loads((tmp_path / "out.json").read_text()) == result


def test_neither_the_order_of_rows_nor_that_of_answers_matters(run, command, rows, jsonl, tmp_path):
    rows = [*rows, *({**row, "group": "both"} for row in rows if row["user"] == "n0")]  # who gives an answer twice
    flags = ("--pref_group_key", "group", "--output")
    assert run(*command[:-1], jsonl("straight.jsonl", rows), *flags, "a.json")[0] == 0
    turned = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"], "preference": 0} if number % 3 else
        {**row, "preference": 1}
        for number, row in enumerate(rows)
    ]  # fmt: skip
    assert run(*command[:-1], jsonl("turned.jsonl", turned[::-1]), *flags, "b.json")[0] == 0
    one, other = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert one["known"] == other["known"] and one["new"] == other["new"]


@pytest.mark.parametrize("width, dark", [(1200, False), (380, True)])
def test_the_page_opens_without_a_network_on_any_screen(visit, run, command, tmp_path, width, dark):
    code, shown = run(*command, "--pref_group_key", "group", "--page", "page.html")
    assert code == 0 and shown.splitlines()[-1] == "page.html"
    with visit(tmp_path / "page.html", width=width, dark=dark) as seen:
        for plot in seen.page.locator(".plot").all():
            plot.scroll_into_view_if_needed()
        seen.page.wait_for_function("document.querySelectorAll('.plot:not(.js-plotly-plot)').length === 0")
        assert seen.page.locator(".plot").count() == 5
        assert seen.page.evaluate("document.documentElement.scrollWidth") == width
        assert len(seen.requests) == 1 and seen.complaints == seen.dialogs == []
        assert seen.page.locator("#preference-groups tbody th").first.text_content().strip() in (EVIL, "calm")


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--user_key", "who"), "heldout.jsonl, 'chosen', 'group', 'prompt', 'rejected', 'user', got 'who': correct"),
        (("--pref_group_key", "taste"), "needs the column 'taste', got 'group', 'user'"),
        (("--output", "no/out.json"), "--output needs a folder that exists"),
        (("--page", "no/page.html"), "--page needs a folder that exists"),
        (("--page", "heldout.jsonl"), "--data and --page need a file each"),
        (("--output", "one", "--scores", "one"), "--output and --scores need a file each"),
        (("--chat_template", "plain"), "--chat_template needs a model without a record of its texts"),
    ],
)
def test_wrong_flags_and_missing_columns_are_refused(run, command, flags, message):
    code, _ = run(*command, *flags)
    assert code.startswith("openrlhf-pgrpo evaluate: ") and message in code


@pytest.mark.parametrize("flag", ["--output", "--page", "--scores"])
def test_no_file_of_the_data_is_written_over(run, command, rows, tmp_path, flag):
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    state = tmp_path / "saved" / "state.json"
    before = state.read_bytes()
    code, _ = run(*command[:-1], tmp_path / "saved", flag, state)
    assert f"{flag} needs a file of its own, got {state}, which --data " in code and state.read_bytes() == before


def test_a_row_without_its_preference_group_is_named(run, command, rows, jsonl):
    data = jsonl("some.jsonl", [rows[0], {**rows[1], "group": None}])
    code, _ = run(*command[:-1], data, "--pref_group_key", "group")
    assert f"line 2 of {data} needs a preference group in 'group', a text or a number, got null" in code


def test_a_model_that_is_none_is_refused(run, command, tiny):
    code, _ = run("evaluate", "--model", tiny / "model", *command[3:])
    assert "needs to be a factorized reward model" in code
    code, _ = run("evaluate", "--model", "heldout.jsonl", *command[3:])
    assert "a model needs to be a folder or a name on the hub, got heldout.jsonl, a file: name the folder" in code


def test_names_of_preference_groups_cannot_change_the_terminal(run, command, rows, jsonl):
    data = jsonl("some.jsonl", [{**row, "group": f"\x1b[31m{row['group']}\nx"} for row in rows])
    _, shown = run(*command[:-1], data, "--pref_group_key", "group")
    assert "\x1b" not in shown and "\ufffd[31mcalm x " in shown


def test_ctrl_c_leaves_a_sentence(command, monkeypatch, tmp_path, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("openrlhf_pgrpo.people.evaluate.Predictions.new_people", stop)
    with pytest.raises(SystemExit) as ended:
        main([*map(str, command), "--output", "out.json"])
    said = "openrlhf-pgrpo evaluate: stopped; on the disk: out.json"
    assert ended.value.code == 130 and said in capsys.readouterr().err.splitlines()
    kept = json.loads((tmp_path / "out.json").read_text())
    assert not kept["finished"] and kept["known"]["own coefficients"]
