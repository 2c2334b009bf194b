"""Distinct names, such as preference groups or users, their row numbers, and columns of numbers with a row per name.

Axes: N names asked about, G distinct names.
"""

import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

PRINTED_MISSING = frozenset(("nan", "NaN", "None", "null", "NULL", "<NA>", "NaT"))
# Blanks that Unicode counts as letters, marks or symbols: fillers of Hangul, an empty cell of Braille, a joiner of
# graphemes, vowels of Khmer that are not written, and selectors of variants.
UNSEEN = frozenset("\u115f\u1160\u3164\uffa0\u2800\u034f\u17b4\u17b5") | {
    chr(code)
    for first, last in ((0x180B, 0x180D), (0xFE00, 0xFE0F), (0xE0100, 0xE01EF))
    for code in range(first, last + 1)
}


class _Rows(dict):
    """Name -> row number; a new name gets the next row."""

    def __missing__(self, name: str) -> int:
        self[name] = len(self)
        return self[name]


class Names(Sequence[str]):
    """Distinct strings and their row numbers, 0 ... G-1 in the order of first appearance."""

    def __init__(self, names: Iterable[str] = ()):
        self._rows = _Rows()
        self._in_order: list[str] = []  # a copy of the names, made for look-ups by row
        for name in names:
            self._rows[name]

    def rows(self, names: Sequence[str]) -> np.ndarray:
        """The row numbers (N,) int64 of `names` (N,). A new name gets the next row."""
        return np.fromiter(map(self._rows.__getitem__, names), np.int64, len(names))

    def find(self, names: Sequence[str | None]) -> np.ndarray:
        """The row numbers (N,) int64 of `names` (N,); -1 for a name that is not there. Adds none."""
        return np.fromiter((self._rows.get(name, -1) for name in names), np.int64, len(names))

    def __getitem__(self, row):
        if len(self._in_order) < len(self._rows):
            self._in_order = list(self._rows)
        return self._in_order[row]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __repr__(self) -> str:
        return f"Names([{listed(self)}])"

    def pack(self) -> dict[str, Any]:
        """The state to save: one UTF-8 text of all names, and the number of characters of each (G,) int32.

        Saving millions of single strings would take most of the time of a checkpoint. A lone surrogate, which JSON
        allows, is kept.
        """
        text = "".join(self).encode("utf-8", "surrogatepass")
        return {"names": text, "name_lengths": np.fromiter(map(len, self), np.int32, len(self))}

    @classmethod
    def unpack(cls, state: dict[str, Any]) -> "Names":
        """The names that `pack` gave.

        Raises:
            ValueError: the lengths do not add up to the text, or a name appears twice.
        """
        text, lengths = state["names"].decode("utf-8", "surrogatepass"), np.asarray(state["name_lengths"])
        ends = [0, *np.cumsum(lengths).tolist()]
        if len(text) != ends[-1]:
            raise ValueError(f"names need the {ends[-1]} characters that their lengths add up to, got {len(text)}")
        names = cls(text[start:end] for start, end in zip(ends, ends[1:]))
        if len(names) != len(lengths):
            raise ValueError(f"saved names need to be distinct, got {len(names)} distinct ones of {len(lengths)}")
        return names


class NamedColumns:
    """float64 columns (G,), each an attribute, with one row per name in `names`.

    A subclass lists its columns, and the value of each for a new name.
    """

    columns: dict[str, float] = {}

    def __init__(self) -> None:
        self.names = Names()
        for column in self.columns:
            setattr(self, column, np.zeros(0))

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, names: Sequence[str]) -> np.ndarray:
        """The row numbers (N,) int64 of `names` (N,). A new name gets a row with the columns' first values."""
        before = len(self.names)
        rows = self.names.rows(names)
        new = len(self.names) - before
        if new:
            for column, value in self.columns.items():
                setattr(self, column, np.append(getattr(self, column), np.full(new, value)))
        return rows

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything, exact to the bit after `load_state_dict`."""
        return {**self.names.pack(), **{column: getattr(self, column).copy() for column in self.columns}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces the content by `state`.

        Raises:
            ValueError: this is no state of this class. Nothing is changed.
        """
        self._replace(*self._read(state))

    def _read(self, state: dict[str, Any]) -> tuple[Names, dict[str, np.ndarray]]:
        """The names and columns of a state."""
        need_keys(self, state, {"names", "name_lengths", *self.columns})
        names = Names.unpack(state)
        columns = {column: np.array(state[column], np.float64) for column in self.columns}
        shapes = {column: values.shape for column, values in columns.items()}
        if {*shapes.values()} != {(len(names),)}:
            raise ValueError(
                f"{type(self).__name__} state needs one row for each of {len(names)} names, got shapes {shapes}"
            )
        return names, columns

    def _replace(self, names: Names, columns: dict[str, np.ndarray]) -> None:
        self.names = names
        for column, values in columns.items():
            setattr(self, column, values)


def name_of(value: Any) -> str:
    """The name of a preference group or user in a row of data: a text, or a number as text.

    A whole number has one name, however a file's format writes it: 7 and 7.0 are '7'.

    Raises:
        ValueError: the value is missing (null, not a number, an empty or blank text) or no name (a struct, a list).
            The message says in a few words what the value is.
    """
    if isinstance(value, str) and not is_blank(value):
        return value
    if isinstance(value, (bool, int, np.bool_, np.integer)):
        return str(value)
    if isinstance(value, (float, np.floating)) and np.isfinite(value):
        return str(int(value)) if value == int(value) and abs(float(value)) < 2**53 else str(value)
    raise ValueError(in_words(value))


def user_in(row: dict[str, Any], column: str, place: str, who: str = "user") -> str:
    """The name of the user in a row, which may be a number in the data; `place` is its line and file, in words, and
    `who` is whose name it is, if not a user's.

    Raises:
        ValueError: the row has no such column, or nobody's name there.
    """
    if column not in row:
        raise ValueError(f"{place} needs the column {column!r}, got {listed(row) or 'none'}")
    try:
        name = name_of(row[column])
        name.encode("utf-8")
        return name
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place} needs a {who} in {column!r} of whole characters, got half of one in {name[:80]!r}: correct it "
            "or drop the row"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{place} needs a {who} in {column!r}, a text or a number, got {error}: fill it in or drop the row"
        ) from error


def in_words(value: Any) -> str:
    """What a value of a row is, in a few words for an error message."""
    if value is None:
        return "null"
    if isinstance(value, str):
        if not value:
            return "an empty text"
        return f"{'a blank text, ' * is_blank(value)}{value[:80]!r}"
    if isinstance(value, dict):
        return f"a struct with the keys {listed(value)}" if value else "an empty struct"
    if isinstance(value, (list, tuple)):
        messages = value and all(isinstance(turn, dict) for turn in value)
        return "a list of messages" if messages else f"a list, {str(value[:8])[:80]}"
    return f"{type(value).__name__} {str(value)[:80]}"


def is_blank(text: str) -> bool:
    """Whether nothing in a text can be seen: it is empty, or all white space, controls and signs without a form."""
    if "!" <= text[:1] <= "~":  # most texts: there may be a million
        return False
    return all(sign.isspace() or _is_unseen(sign) for sign in text)


def _is_unseen(sign: str) -> bool:
    # Cc and Cf: controls, and formats such as a zero-width space or a byte order mark.
    return unicodedata.category(sign) in ("Cc", "Cf") or sign in UNSEEN


def printed_missing(values: Iterable[Any]) -> list[int]:
    """The rows with a text that other programs write for a missing value; for a warning, because it may be meant."""
    return [row for row, value in enumerate(values) if isinstance(value, str) and value in PRINTED_MISSING]


def alike(names: Iterable[str]) -> list[list[str]]:
    """Names that differ only in case, in white space, in signs that nobody sees or in how Unicode writes a letter,
    together; for a warning about typing errors."""
    same: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        seen = name
        if not name.isascii():
            written = unicodedata.normalize("NFKC", name)
            seen = "".join(sign for sign in written if sign.isspace() or not _is_unseen(sign))
        seen = " ".join(seen.casefold().split())
        if seen.endswith(".0") and seen[:-2].isdecimal():  # as pandas writes 7 in a column with a gap
            seen = seen[:-2]
        same.setdefault(seen, []).append(name)
    return [written for written in same.values() if len(written) > 1]


def alike_listed(same: list[list[str]]) -> str:
    """What `alike` found, for a sentence that begins with whose names they are. Only the first few are shown."""
    more = f" and {len(same) - 3} more" if len(same) > 3 else ""
    pairs = "; ".join(listed(written) for written in same[:3])
    return f"differ only in case, white space or characters without a width: {pairs}{more}"


def need_keys(owner: object, state: dict[str, Any], needs: set[str]) -> None:
    """Raises ValueError unless the saved state of `owner` has these keys and no others."""
    if set(state) != needs:
        raise ValueError(f"{type(owner).__name__} state needs keys {sorted(needs)}, got {sorted(state)}")


def listed(names: Collection[str], most: int = 8) -> str:
    """Names for an error message. There may be a million, so only the first few are shown."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, islice(names, most))) + more
