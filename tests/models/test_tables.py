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
    table = read_table(source, COLUMNS, numbers=["preference"])
    assert table.rows == ROWS
    if source.suffix == ".jsonl":
        assert table.place(1) == f"line 3 of {source}" and table.places([0, 1]) == f"2 lines (1, 3) of {source}"
    else:
        assert table.place(1) == f"row 1 of {source}" and table.places([1]) == f"row 1 of {source}"


def test_csv_in_a_folder_is_refused_because_people_would_be_merged(tmp_path):
    for ending, between in (("csv", ","), ("tsv", "\t")):
        folder = tmp_path / ending
        folder.mkdir()
        (folder / f"train.{ending}").write_text("user,prompt\n007,a\n7,b\n".replace(",", between))
        with pytest.raises(ValueError, match="got CSV in the folder .*makes one user of 7 and 007: name the file in"):
            read_table(folder, {})
    assert [row["user"] for row in read_table(tmp_path / "csv" / "train.csv", {}).rows] == ["007", "7"]


def test_csv_beside_the_data_of_a_folder_disturbs_nobody(tmp_path):
    data = datasets.Dataset.from_list([{"user": "ana"}])
    (tmp_path / "README.csv").write_text("a,b\n1,2\n")
    data.to_parquet(tmp_path / "train.parquet")
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "sizes.csv").write_text("a,b\n1,2\n")
    (tmp_path / "rows.txt").write_text("user\nana\n")
    datasets.Dataset.from_csv(str(tmp_path / "rows.txt")).save_to_disk(tmp_path / "once")
    for folder in (tmp_path, tmp_path / "saved", tmp_path / "once"):
        assert read_table(folder, {}).rows == [{"user": "ana"}]


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


@pytest.mark.parametrize(
    "content, message",
    [
        (
            "user,prompt\na,b\nc,d,e\n",
            "every row needs 2 fields, as the header has, got 3 in line 3 of .*rows.csv: put",
        ),
        ('user,prompt\n"a\nb",c\nd\n\ne\n', r"needs 2 fields, .* got 1 in 2 lines \(4, 6\) of .*rows.csv: put"),
        ('user,prompt\na,b\nc,"d\ne,f\n', "rows.csv cannot be read from line 3 on, unexpected end of data: write it"),
        ('user,prompt\n"a"b,c\n', "rows.csv cannot be read from line 2 on, ',' expected after '\"': write it again"),
        ("user,prompt,user\n", "line 1 of .*rows.csv needs names of columns that differ, got 'user' twice: rename"),
        (b"user,prompt\na,\xff\n", "rows.csv cannot be read from line .* on, 'utf-8' codec can't decode .*: write it"),
    ],
)
def test_what_is_wrong_with_csv_is_said_with_its_line(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_table(path, {})


def test_fields_of_csv_do_not_slip_into_the_next_column(tmp_path):
    """Where every row had a field more than the header, the first one became an index, and all others moved."""
    path = tmp_path / "rows.csv"
    path.write_text("user,prompt,response,rating,note\n" + "u0,Hello, world,r0,0,x\n" * 2)
    with pytest.raises(ValueError, match=r"needs 5 fields, as the header has, got 6 in 2 lines \(2, 3\) of "):
        read_table(path, {})


def test_csv_is_read_as_it_is_written(tmp_path):
    """Whole blocks of 10,000 rows lost their leading zeros, and a number with a point after them was refused."""
    path, rows = tmp_path / "rows.csv", [["x", "1"], *[["01", "2"]] * 10_100, ["1.10", "2.5"], ["", ""]]
    path.write_text("\ufeffuser,rating\n\n" + "".join(f"{','.join(row)}\n" for row in rows))
    found = read_table(path, {"user": object}, numbers=["rating", "not there"]).rows
    assert [row["user"] for row in found] == [user or None for user, _ in rows]
    assert [row["rating"] for row in found] == [float(rating) if rating else None for _, rating in rows]
    path.write_text("user,rating,\n007,3.10,1\n", "utf-8")
    assert read_table(path, {}).rows == [{"user": "007", "rating": "3.10", "Unnamed: 2": "1"}]
    text = "long, " * 30_000
    path.write_text(f'prompt,rating\n"{text}",good\n')
    assert read_table(path, {}, numbers=["rating"]).rows == [{"prompt": text, "rating": "good"}]


def test_json_is_read_as_it_is_written(tmp_path):
    """A text that looks like a day became a time of day."""
    path, rows = tmp_path / "rows.json", [{"day": "2001-01-01", "more": {"a": None}}, {"day": 7}]
    path.write_text("\n " + json.dumps(rows, indent=1))
    table = read_table(path, {})
    assert table.rows == rows and table.place(1) == f"row 1 of {path}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = read_table(path, {})
    assert table.rows == rows and table.place(1) == f"line 2 of {path}"
    path.write_text("[{}, [1]]")
    with pytest.raises(ValueError, match="row 1 of .*rows.json needs a JSON object, got a list, .1.: correct it"):
        read_table(path, {})


def test_objects_over_several_lines_are_rows(tmp_path):
    """As `jq` writes them."""
    path, rows = tmp_path / "rows.json", [{"day": "2001-01-01", "more": {"a": None}}, {"day": 7}]
    path.write_text("\ufeff" + "\n".join(json.dumps(row, indent=2) for row in rows) + "\n \n", encoding="utf-8")
    table = read_table(path, {})
    assert table.rows == rows and table.place(1) == f"row 1 of {path}"
    for more, message in (
        (b"[1]", "row 2 of .* needs a JSON object, got a list"),
        (b"{", "rows.json"),
        (b"\xff", "utf-8"),
    ):
        path.write_bytes("\n".join(json.dumps(row, indent=2) for row in rows).encode() + more)
        with pytest.raises(ValueError, match=message):
            read_table(path, {})


def test_no_copy_of_peoples_answers_stays_behind(source, tmp_path, monkeypatch):
    """Copies lay in the cache of `datasets`, and came back for a later file of the same size and time."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    assert len(read_table(source, COLUMNS).rows) == len(ROWS)
    assert not cache.exists() or not any(path.is_file() for path in cache.rglob("*"))


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.jsonl",
            '{"user": "a"}\n{"user": "a", "user": "b"}\n',
            "line 2 of .*a JSON object, got the key 'user' twice",
        ),
        ("a.json", '[{"user": "a", "user": "b"}]', "a.json cannot be read, .* the key 'user' twice"),
        ("a.json", '{\n"user": "a",\n"user": "b"\n}', "a.json cannot be read, .* the key 'user' twice"),
    ],
)
def test_a_key_that_a_row_has_twice_is_refused(tmp_path, name, content, message):
    """The last one counted, silently."""
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name, {})


def test_a_mistyped_file_and_an_empty_folder_are_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match="need to be a file, a folder or a data set on the hub, got lost.txt: correct"
    ):
        read_table("lost.txt", {})
    with pytest.raises(ValueError, match="need to be a file, a folder or a data set on the hub, got ./lost: correct"):
        read_table("./lost", {})
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="the data need rows, got the empty folder void: correct it"):
        read_table("void", {})


def test_messages_are_the_same_in_every_format(tmp_path):
    """Arrow gives every message of a column the keys of all: the hash of a pair, which profiles keep, was another.
    Responses, which are lists of messages, had other rewards by a template that asks for a key."""
    hi, parts = {"role": "user", "content": "hi"}, [{"type": "text", "text": "so"}, {"type": "image", "url": "x"}]
    call = {"role": "assistant", "content": None, "calls": [{"name": "f"}, {"name": "g", "of": "x"}]}
    rows = [
        {"prompt": [hi], "responses": [[hi]], "parts": [{"role": "user", "content": parts}], "of": {"a": None}},
        {
            "prompt": [{**hi, "name": "ann"}, {"role": "assistant", "content": "so"}],
            "responses": [[{**hi, "name": "ann"}], [call]],
            "parts": [{"role": "user", "content": parts[:1]}],
            "of": {"a": "b"},
        },
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert read_table(tmp_path / "rows.parquet", {"prompt": object}).rows == rows
