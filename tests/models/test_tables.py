"""Rows of people's data, in every form that the host reads."""

import json

import datasets
import pytest

from openrlhf_pgrpo.models.tables import read_table

ROWS = [
    {"user": "007", "prompt": "why?", "chosen": "None", "rejected": "12", "preference": 1.0},
    {"user": "ana", "prompt": 'so, "what"?\nyes', "chosen": "ä,b", "rejected": "NA", "preference": 0.5},
]
COLUMNS = dict.fromkeys(("user", "prompt", "chosen", "rejected"), str)


@pytest.fixture(params=["jsonl", "json", "csv", "parquet", "arrow", "saved", "splits", "folder"])
def source(request, tmp_path):
    """The same rows, as a file or folder of each kind."""
    rows, path = datasets.Dataset.from_list(ROWS), tmp_path / f"rows.{request.param}"
    if request.param == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    elif request.param == "json":
        path.write_text(json.dumps(ROWS))
    elif request.param == "arrow":
        rows.save_to_disk(tmp_path / "saved")
        (path,) = (tmp_path / "saved").glob("*.arrow")
    elif request.param in ("csv", "parquet"):
        getattr(rows, f"to_{request.param}")(path)
    elif request.param == "folder":
        path.mkdir()
        rows.to_parquet(path / "train.parquet")
    else:
        (rows if request.param == "saved" else datasets.DatasetDict(train=rows)).save_to_disk(path)
    return path


def test_the_same_rows_in_every_form(source):
    table = read_table(source, COLUMNS)
    assert table.rows == ROWS
    if source.suffix == ".jsonl":
        assert table.place(1) == f"line 3 of {source}" and table.places([0, 1]) == f"2 lines (1, 3) of {source}"
    else:
        assert table.place(1) == f"row 1 of {source}" and table.places([1]) == f"row 1 of {source}"


def test_a_column_that_is_missing_or_no_text_is_named_with_its_row(source):
    with pytest.raises(ValueError, match=f"(line 1|row 0) of {source} needs the column 'answer', got 'user', "):
        read_table(source, {"answer": str})
    with pytest.raises(ValueError, match=f"(line 1|row 0) of {source} needs a list of texts as 'user'"):
        read_table(source, {"user": list})


def test_a_split_is_named_or_refused(source, tmp_path):
    with pytest.raises(ValueError, match="--split needs a (split of .*, got 'test'|data set with splits, got)"):
        read_table(source, COLUMNS, "test")
    both = datasets.DatasetDict(a=datasets.Dataset.from_list(ROWS), b=datasets.Dataset.from_list(ROWS[1:]))
    both.save_to_disk(tmp_path / "both")
    assert read_table(tmp_path / "both", COLUMNS, "b").rows == ROWS[1:]
    with pytest.raises(ValueError, match="--split needs a split of .*, 'a', 'b', got 'train'"):
        read_table(tmp_path / "both", COLUMNS)


def test_what_is_not_there_or_broken_is_named(tmp_path):
    with pytest.raises(ValueError, match="need to be a file, a folder or a data set on the hub, got .*/nothing.csv"):
        read_table(tmp_path / "nothing.csv", COLUMNS)
    with pytest.raises(ValueError, match="need to be a file, a folder or a data set on the hub, got no/where.jsonl"):
        read_table("no/where.jsonl", COLUMNS)
    for name, content in (
        ("a.csv", ""),
        ("a.json", "[{]"),
        ("a.parquet", "PAR1"),
        ("a.jsonl", ""),
        ("b.csv", "user\n"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{tmp_path / name} (cannot be read|needs at least one row)"):
            read_table(tmp_path / name, COLUMNS)


def test_messages_come_through(tmp_path):
    prompt = [{"role": "user", "content": "why?"}]
    datasets.Dataset.from_list([{"prompt": prompt}]).to_parquet(tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet", {"prompt": object}).rows == [{"prompt": prompt}]


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    """Not only that "an error occurred while generating the dataset"."""
    path = tmp_path / "rows.csv"
    path.write_text("user,prompt\na,b\nc,d,e\n")
    with pytest.raises(ValueError, match="rows.csv cannot be read, ParserError: .*Expected 2 fields in line 3, saw 3"):
        read_table(path, {})


def test_a_mistyped_file_and_an_empty_folder_are_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match="need to be a file, a folder or a data set on the hub, got lost.txt: correct"
    ):
        read_table("lost.txt", {})
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="the data need rows, got the empty folder void: correct it"):
        read_table("void", {})


def test_messages_are_the_same_in_every_format(tmp_path):
    """Arrow gives every message of a column the keys of all: the hash of a pair, which profiles keep, was another."""
    rows = [
        {"prompt": [{"role": "user", "content": "hi"}]},
        {"prompt": [{"role": "user", "content": "hi", "name": "ann"}, {"role": "assistant", "content": "so"}]},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert read_table(tmp_path / "rows.parquet", {"prompt": object}).rows == rows
