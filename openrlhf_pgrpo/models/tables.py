"""Rows of people's data, as people have them: JSON lines, JSON, CSV, Parquet, arrow, a folder that `datasets` saved,
or a data set on the hub. All but JSON lines go through `datasets`, as in the host.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date, time
from pathlib import Path
from typing import Any, NamedTuple

from openrlhf_pgrpo.core.names import in_words, listed
from openrlhf_pgrpo.files import check_row, read_rows, reading
from openrlhf_pgrpo.progress import progress

FORMATS = {".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
ON_THE_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


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
    source: str | Path, columns: Mapping[str, type], split: str | None = None, texts: Sequence[str] = ()
) -> Table:
    """The rows of `source`.

    Args:
        columns: as `files.read_rows`: what every row must have. split: of a data set with several; None is "train".
        texts: columns that are texts if they are there; all of `columns` are.

    Raises:
        ValueError: no such data, split or column, no rows, or something that cannot be read; names it.
        OSError: a file cannot be read.
    """
    path = Path(source)
    if path.exists() and not path.is_dir() and path.suffix not in FORMATS:  # a pipe, too
        if split is not None:
            raise ValueError(f"--split needs a data set with splits, got {source}, a file of rows: leave it out")
        numbers, rows = zip(*read_rows(path, dict(columns)))
        return Table(str(source), list(rows), list(numbers), "line")
    with progress(f"reading {source}"):
        dataset = _loaded(source, split, [*columns, *texts])
        with reading(str(source)):
            rows = [{column: _as_given(value) for column, value in row.items()} for row in dataset.to_list()]
            table = Table(str(source), rows, list(range(len(rows))), "row")
    if not table.rows:
        raise ValueError(f"{source} needs at least one row, got none")
    for number, row in enumerate(table.rows):
        check_row(row, table.place(number), columns)
    return table


def _as_given(value: Any) -> Any:
    """Messages without the keys that arrow adds, as null, because other messages of the column have them."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        return value
    return [{key: of for key, of in turn.items() if of is not None or key == "content"} for turn in value]


def _loaded(source: str | Path, split: str | None, texts: Sequence[str]) -> Any:
    """One split of a data set, through `datasets`."""
    import datasets

    path, cells = Path(source), dict[str, Any]()
    # The hub would be asked for minutes about a name that is mistyped.
    a_file = path.suffix in (".jsonl", *FORMATS) or ("/" not in str(source) and path.suffix)
    if not path.exists() and (a_file or not ON_THE_HUB.fullmatch(str(source))):
        raise ValueError(f"the data need to be a file, a folder or a data set on the hub, got {source}: correct it")
    if path.is_dir() and not any(path.iterdir()):
        raise ValueError(f"the data need rows, got the empty folder {source}: correct it")
    if path.suffix == ".csv":
        # Cells as they are written. Else the answer 007 would become 7, and None would become null.
        cells = {"converters": dict.fromkeys(texts, str), "keep_default_na": False, "na_values": [""]}
    with reading(str(source)):
        if path.is_dir() and any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(str(path))
        elif path.is_file():
            found = datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), **cells)
        else:
            found = datasets.load_dataset(str(source))
    if isinstance(found, datasets.Dataset):
        if split not in (None, "train"):
            raise ValueError(f"--split needs a split of {source}, got {split!r}; it has no splits: leave it out")
        return found
    if (split or "train") not in found:
        raise ValueError(f"--split needs a split of {source}, {listed(sorted(found))}, got {split or 'train'!r}")
    return found[split or "train"]
