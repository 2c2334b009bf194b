"""JSONL files that people write by hand: every row checked, and its line named where it is wrong."""

import json
from pathlib import Path

from openrlhf_pgrpo.core.files import write_whole

KINDS = {str: "a text", list: "a list of texts"}


def read_rows(path: Path, columns: dict[str, type]) -> list[tuple[int, dict]]:
    """Line number, from 1, and content of each row; empty lines are left out.

    Args:
        columns: what every row must have, `str` for a text and `list` for texts; it may have more.

    Raises:
        ValueError: no rows, or one that is not whole.
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
    """Whether this is a text that can be shown: JSON also allows half a surrogate pair."""
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
