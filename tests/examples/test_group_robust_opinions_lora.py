"""What five made-up countries say, learned by a tiny model through the real train_dpo door."""

import gzip
import json

import pytest

import group_robust_opinions_lora as lora

opinions = lora.opinions
COUNTRIES = ("Aland", "Borduria", "Carpania", "Dinotopia", "Elbonia")


@pytest.fixture
def data(tmp_path):
    """25 questions with three options; each country has answered all of them."""
    with gzip.open(tmp_path / opinions.FILE, "wt") as file:
        for question in range(25):
            for at, country in enumerate(COUNTRIES):
                row = {"question": f"Question {question}?", "options": ["Good", "Bad", "DK/Refused", "Neither"]}
                shares = [0.1, 0.1, 0.5, 0.1]
                shares[(0, 1, 3)[(question + at) % 3]] = 0.3
                file.write(json.dumps({**row, "group": country, "dist": shares}) + "\n")
    return tmp_path


@pytest.mark.core
def test_a_cell_is_one_pair_and_no_question_is_in_both_files(data, tmp_path):
    cells = opinions.read(data / opinions.FILE)
    assert lora.write_pairs(cells, tmp_path, 0) == [100, 25]  # 20 and 5 questions of five countries
    train, test = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in ("train", "test"))
    asked = [{pair["prompt"].split("\n")[0] for pair in pairs} for pairs in (train, test)]
    assert [len(questions) for questions in asked] == [20, 5] and not asked[0] & asked[1]
    best = {(cell.question, cell.country): cell.options[max(range(3), key=cell.shares.__getitem__)] for cell in cells}
    for pair in train + test:
        question, end = pair["prompt"].split("\n")
        assert end == f"Most people in {pair['country']} answer:"
        assert pair["chosen"] == f" {best[question, pair['country']]}" != pair["rejected"]
        assert pair["rejected"] in (" Good", " Bad", " Neither")
    assert {pair["rejected"] for pair in train} == {" Good", " Bad", " Neither"}


@pytest.mark.e2e
def test_a_method_is_trained_once_and_reported_by_country(data, tiny, tmp_path, capsys):
    argv = [tmp_path / "run", "--data", data, "--policy", tiny / "model", "--methods", "GR-IPO", "--epochs", 1]
    lora.main([*map(str, argv)])
    (row,) = lora.evaluations(tmp_path / "run" / "GR-IPO")
    assert row["step"] == 100 // lora.BATCH and row["estimator"] == "GR-IPO"
    first = capsys.readouterr().out
    for key in ("eval_loss", "eval_accuracy"):
        line = first.split(f"{key} after epoch 1\n")[1].splitlines()
        assert line[0].split() == [*COUNTRIES, "worst", "average", "gap"]
        values = [row["pref_groups"][country][key] for country in COUNTRIES]
        worst = max(values) if key == "eval_loss" else min(values)
        summary = (worst, sum(values) / 5, max(values) - min(values))
        assert line[1].split() == ["GR-IPO", *(f"{value:.3f}" for value in (*values, *summary))]
    assert "'Aland': 5" in first

    lora.main([*map(str, argv)])
    again = capsys.readouterr().out
    assert "GR-IPO: train ..." in first and "train ..." not in again
    assert again.split("after epoch")[1:] == first.split("after epoch")[1:]
    with pytest.raises(SystemExit, match=r'needs a folder with results of \{.*"seed": 1'):
        lora.main([*map(str, argv), "--seed", "1"])


@pytest.mark.core
def test_without_the_data_it_says_what_is_missing(tmp_path, capsys):
    lora.main([str(tmp_path / "run"), "--data", str(tmp_path)])
    assert capsys.readouterr().out.startswith(f"skipped: needs {opinions.FILE}, got none in {tmp_path}")
