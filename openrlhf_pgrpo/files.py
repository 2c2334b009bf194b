"""Files that are written whole or not at all, and JSONL files of rows, checked line by line."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

KINDS: dict[type, str] = {str: "a text", list: "a list of texts"}


@contextmanager
def whole_file(path: Path):
    """A binary file to write to. At the end it replaces `path`, and is on the disk.

    If writing fails, `path` keeps its old content.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # so that the new name is on the disk too
    finally:
        os.close(folder)


def check_folder(path: Path, flag: str) -> None:
    """Raises ValueError if the folder of a file that is to be written does not exist; `flag` names the file."""
    if not path.parent.is_dir():
        raise ValueError(f"{flag} needs a folder that exists, got {path.parent}: make it")


def write_whole(path: Path, text: str) -> None:
    """Writes `text` in UTF-8 to a file, whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


def read_rows(path: Path, columns: dict[str, type]) -> list[tuple[int, dict]]:
    """Line number, from 1, and content of each row. Empty lines are left out.

    Args:
        columns: name and type of the columns that every row must have: `str` for a text, `list` for a list of texts.

    Raises:
        ValueError: no rows, or a row without one of these columns; with its line.
        OSError: the file cannot be read.
    """
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                rows.append((number, _row(line, f"line {number} of {path}", columns)))
    if not rows:
        raise ValueError(f"{path} needs at least one row with {', '.join(columns)}, got an empty file")
    return rows


def _row(line: bytes, place: str, columns: dict[str, type]) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} needs a JSON object, got {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} needs a JSON object, got {type(row).__name__}")
    for name, kind in columns.items():
        if name not in row:
            raise ValueError(f"{place} needs the column {name!r}, got {', '.join(map(repr, row)) or 'none'}")
        value = row[name]
        texts = value if kind is list and isinstance(value, list) else [value]
        if not isinstance(value, kind) or not all(map(_is_text, texts)):
            raise ValueError(f"{place} needs {KINDS[kind]} as {name!r}, got {str(value)[:80]!r}")
    return row


def _is_text(value) -> bool:
    """Whether this is a text that UTF-8 can hold. JSON also allows half a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def write_rows(path: Path, rows: list[dict]) -> None:
    """Writes a JSONL file, whole or not at all."""
    write_whole(Path(path), "".join(json.dumps(row) + "\n" for row in rows))
