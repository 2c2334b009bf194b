"""Rows of people's data, as people have them: JSON lines, JSON, CSV, Parquet, arrow, a folder that `datasets` saved,
or a data set on the hub. The first three are read as they are written, the others through `datasets`, as in the host.
"""

import codecs
import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from openrlhf_pgrpo.core.names import in_words, listed
from openrlhf_pgrpo.files import check_row, read_rows, reading, with_keys_once
from openrlhf_pgrpo.progress import progress

OF_ARROW = {".parquet": "parquet", ".arrow": "arrow"}
FORMATS = (".json", ".jsonl", ".csv", *OF_ARROW)
ON_THE_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # what `huggingface_hub` takes for a name


class Columns(NamedTuple):
    """Column names of people's data. Without `preference` it is 1: the chosen answer was preferred."""

    user: str = "user"
    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    preference: str = "preference"
    response: str = "response"
    rating: str = "rating"


COLUMNS = Columns()


class Table(NamedTuple):
    """The rows of a data set, and where each of them stands.

    Attributes:
        name: file, folder or hub name. rows: (N,). numbers: (N,) of rows. unit: what is numbered, "line" or "row".
    """

    name: str
    rows: list[dict]
    numbers: list[int]
    unit: str

    @property
    def columns(self) -> set[str]:
        """All that some row has."""
        return {column for row in self.rows for column in row}

    def place(self, row: int) -> str:
        """Where a row stands, for a message."""
        return f"{self.unit} {self.numbers[row]} of {self.name}"

    def places(self, rows: Sequence[int]) -> str:
        """Where rows stand; there may be many, so only the first few."""
        if len(rows) == 1:
            return self.place(rows[0])
        shown = ", ".join(str(self.numbers[row]) for row in rows[:5]) + ", ..." * (len(rows) > 5)
        return f"{len(rows)} {self.unit}s ({shown}) of {self.name}"

    def as_json(self) -> "Table":
        """The rows for a command that writes them again; each value as `as_json` has it."""
        rows = []
        for number, row in enumerate(self.rows):
            rows.append({column: as_json(value, column, self.place(number)) for column, value in row.items()})
        return self._replace(rows=rows)


def as_json(value: Any, column: str, place: str) -> Any:
    """A value as JSON holds it; dates and times become texts (ISO 8601).

    Raises:
        ValueError: it has no form in JSON, such as bytes or a number that is not finite; with its column and place.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=_iso))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{place} needs a value in {column!r} that can be written as JSON, got {in_words(value)}: make it a text, "
            "or leave the column out"
        ) from error


def _iso(value: Any) -> str:
    if isinstance(value, (date, time)):
        return value.isoformat()
    raise TypeError(f"no JSON for {type(value).__name__}")


def read_table(
    source: str | Path, columns: Mapping[str, type], split: str | None = None, numbers: Sequence[str] = ()
) -> Table:
    """The rows of `source`.

    Args:
        columns: as `files.read_rows`: what every row must have. split: of a data set with several; None is "train".
        numbers: columns that become numbers if they are there in CSV, where all else is a text.

    Raises:
        ValueError: no such data, split or column, no rows, or something that cannot be read; names it.
        OSError: a file cannot be read.
    """
    path, name = Path(source), str(source)
    with progress(f"reading {source}"):
        if not path.exists() or path.is_dir() or _kind(path) in OF_ARROW:
            table = _in_order(name, _through_datasets(source, split))
        elif split not in (None, "train"):
            raise ValueError(f"--split needs a data set with splits, got {source}, a file of rows: leave it out")
        elif _kind(path) == ".csv":
            table = _in_order(name, _of_csv(path, numbers))
        elif _kind(path) == ".json" and (read := _reader_of_json(path)) is not None:
            table = _in_order(name, _objects(path, read))
        else:  # JSON lines, whatever the file is called; or a pipe
            lines, rows = zip(*read_rows(path, {}))
            table = Table(name, list(rows), list(lines), "line")
    if not table.rows:
        raise ValueError(f"{source} needs at least one row, got none")
    for number, row in enumerate(table.rows):
        check_row(row, table.place(number), columns)
    return table


def _kind(path: Path) -> str:
    return path.suffix.lower()


def _in_order(name: str, rows: list[dict]) -> Table:
    return Table(name, rows, list(range(len(rows))), "row")


# ---- files that are read as they are written ----


def _of_csv(path: Path, numbers: Sequence[str]) -> list[dict]:
    """Every field is the text in the file, and None where there is none. A reader that guesses at numbers makes one
    person of 7 and 007, and one label of 1.1 and 1.10.

    Raises:
        ValueError: a column twice, rows with more or fewer fields than the header, or what is no CSV; with lines.
    """
    records = _records(path)
    first, names = next(records, (1, []))
    header = [column or f"Unnamed: {number}" for number, column in enumerate(names)]
    if twice := [column for number, column in enumerate(header) if column in header[:number]]:
        raise ValueError(
            f"line {first} of {path} needs names of columns that differ, got {twice[0]!r} twice: rename one of them"
        )
    rows: list[dict] = []
    wrong = []
    for line, fields in records:
        if len(fields) == len(header):
            rows.append(dict(zip(header, [field or None for field in fields])))
        else:
            wrong.append((line, len(fields)))
    if wrong:
        lines = Table(str(path), [], [line for line, _ in wrong], "line").places(range(len(wrong)))
        raise ValueError(
            f"every row needs {len(header)} fields, as the header has, got {wrong[0][1]} in {lines}: put texts that "
            "hold a comma or a line break in double quotes"
        )
    for column in {*numbers} & {*header}:
        for row in rows:
            row[column] = _number(row[column])
    return rows


def check_csv(path: Path) -> None:
    """Raises ValueError for a file of CSV that `read_table` would refuse, before somebody else reads it."""
    _of_csv(path, ())


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The line, from 1, where each record of a CSV file begins, and its fields. Empty lines are left out."""
    csv.field_size_limit(sys.maxsize)  # 131,072 characters are not enough for every text
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)  # else a quote that is never closed takes in all rows that follow
        fields: list[str] | None = []
        while fields is not None:
            line = reader.line_num + 1
            try:
                fields = next(reader, None)
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{path} cannot be read from line {line} on, {error}: write it again") from error
            if fields and (len(fields) > 1 or fields[0].strip()):
                yield line, fields


def _number(field: str | None) -> str | float | None:
    try:
        return field if field is None or "_" in field else float(field)  # 1_000 is a number to Python alone
    except ValueError:  # left to whoever knows what the number is for
        return field


def _reader_of_json(path: Path) -> Callable[[str], list] | None:
    """How the text of a file becomes rows: it is one list, or has objects over several lines each, as `jq` writes
    them; None if every line is a row."""
    with open(path, "rb") as file:
        begin = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if begin.startswith(b"["):
        return partial(json.loads, object_pairs_hook=with_keys_once)
    return _one_after_the_other if re.match(rb"\{[ \r]*\n", begin) else None


def _one_after_the_other(text: str) -> list:
    decoder, rows, place = json.JSONDecoder(object_pairs_hook=with_keys_once), [], 0
    while place < len(text):
        if text[place].isspace():
            place += 1
        else:
            row, place = decoder.raw_decode(text, place)
            rows.append(row)
    return rows


def _objects(path: Path, read: Callable[[str], list]) -> list[dict]:
    with reading(str(path)):
        rows = read(path.read_text(encoding="utf-8-sig"))
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} of {path} needs a JSON object, got {in_words(row)}: correct it or drop it")
    return rows


# ---- what goes through `datasets` ----


def _through_datasets(source: str | Path, split: str | None) -> list[dict]:
    """The rows of one split. Of files here no copy stays behind: people's answers are theirs, and a later version of a
    file may be of the same size and second."""
    with TemporaryDirectory() as cache:
        dataset = _loaded(source, split, cache)
        with reading(str(source)):
            return [{column: as_given(value) for column, value in row.items()} for row in dataset.to_list()]


def as_given(value: Any, listed: bool = False) -> Any:
    """Messages, and what they hold, without the keys that arrow adds, as null, because others of the column have them.

    Args:
        listed: whether the value is in a list. A null in a column of its own says something.
    """
    if isinstance(value, list):
        return [as_given(one, True) for one in value] if value and isinstance(value[0], (list, dict)) else value
    if not listed or not isinstance(value, dict):
        return value
    return {
        key: as_given(of, True)
        for key, of in value.items()
        if of is not None or (key == "content" and value.get("role") is not None)
    }


def check_folder(path: Path, found: Any) -> None:
    """Raises ValueError if `found`, the splits that `datasets` made of a folder, are of CSV, as it reads that."""
    splits = found.values() if isinstance(found, dict) else [found]
    if any(split.info.builder_name == "csv" for split in splits):
        raise ValueError(
            f"the data need fields that are read as they are written, got CSV in the folder {path}, where `datasets` "
            "makes one user of 7 and 007: name the file in it"
        )


def _loaded(source: str | Path, split: str | None, cache: str) -> Any:
    """One split of a data set, through `datasets`. What it makes of files here lies in `cache`."""
    import datasets

    path = Path(source)
    # The hub would be asked for minutes about a name that is mistyped.
    a_file = _kind(path) in FORMATS or ("/" not in str(source) and path.suffix)
    if not path.exists() and (a_file or not ON_THE_HUB.fullmatch(str(source))):
        raise ValueError(f"the data need to be a file, a folder or a data set on the hub, got {source}: correct it")
    if path.is_dir() and not any(path.iterdir()):
        raise ValueError(f"the data need rows, got the empty folder {source}: correct it")
    saved = path.is_dir() and any((path / file).is_file() for file in ("state.json", "dataset_dict.json"))
    with reading(str(source)):
        if saved:
            found = datasets.load_from_disk(str(path))
        elif path.is_file():
            found = datasets.load_dataset(OF_ARROW[_kind(path)], data_files=str(path), cache_dir=cache)
        else:
            found = datasets.load_dataset(str(source), cache_dir=cache if path.exists() else None)
    if path.is_dir() and not saved:
        check_folder(path, found)
    if isinstance(found, datasets.Dataset):
        if split not in (None, "train"):
            raise ValueError(f"--split needs a split of {source}, got {split!r}; it has no splits: leave it out")
        return found
    if (split or "train") not in found:
        raise ValueError(f"--split needs a split of {source}, {listed(sorted(found))}, got {split or 'train'!r}")
    return found[split or "train"]
