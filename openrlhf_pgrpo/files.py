"""Files that are written whole or not at all, locks between writers, what is wrong with a file in one form, and JSONL
files of rows, checked line by line.
"""

import errno
import fcntl
import json
import os
import secrets
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any, BinaryIO

KINDS: dict[type, str] = {str: "a text", list: "a list of texts"}


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write to. At the end it replaces `path`, and is on the disk.

    If writing fails, `path` keeps its old content. A new file has the mode that the umask gives; a file that was there
    keeps its mode, so that what somebody made private stays private. A link at `path` is replaced by the file, and
    what it points to stays as it is.

    Raises:
        ValueError: `path` is a folder, a device or a pipe.
        OSError: it cannot be written.
    """
    path = Path(path)
    _check_kind(path)
    # A name that nobody can foresee, made here and now: no two writers share it, no link that waits there is followed.
    temporary = path.with_name(f".new-{secrets.token_hex(8)}")
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        descriptor, named = _new_file(temporary)
        try:
            with open(descriptor, "wb") as file:
                yield file
                file.flush()
                _keep_mode(path, descriptor)
                os.fsync(descriptor)
                if not named:
                    os.link(f"/proc/self/fd/{descriptor}", temporary.name, dst_dir_fd=folder)
                    named = True
            os.replace(temporary, path)
        except BaseException:
            if named:
                temporary.unlink(missing_ok=True)
            raise
        os.fsync(folder)  # so that the new name is on the disk too
    finally:
        os.close(folder)


def _new_file(temporary: Path) -> tuple[int, bool]:
    """A new file, and whether it has its name already. Where the file system can, it has none until it is whole, so a
    writer that is killed leaves nothing."""
    if hasattr(os, "O_TMPFILE"):  # on Linux
        try:
            return os.open(temporary.parent, os.O_WRONLY | os.O_TMPFILE, 0o666), False
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
                raise
    return os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), True


def _check_kind(path: Path, name: str = "a file that is to be written") -> None:
    """Raises ValueError if `path` is something that a file must not replace."""
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise ValueError(f"{name} needs the name of a file, got {path}, {kind}: name another")


def _keep_mode(path: Path, descriptor: int) -> None:
    """Gives a file the mode of the one that it will replace, if there is one."""
    try:
        old = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISREG(old):
        os.fchmod(descriptor, stat.S_IMODE(old))


@contextmanager
def locked(path: Path, needed: bool = True, refusal: str | None = None) -> Iterator[None]:
    """Waits until nobody else holds this lock, in any process or thread, and holds it for the block.

        with locked(path):
            content = change(path.read_text())
            write_whole(path, content)

    It is for a file that several writers read, change and write again. `path` itself need not exist; the lock is a
    file beside it, `.NAME.lock`, which is removed at the end. A process that dies gives its lock back.

    Args:
        needed: False goes on where the file system has no locks. refusal: what to say instead of waiting.

    Raises:
        ValueError: somebody else holds the lock, and there is a `refusal`.
        OSError: the lock's file cannot be made, or is a link; or there are no locks, and one is needed.
    """
    lock = path.with_name(f".{path.name}.lock")
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
            except BlockingIOError:
                raise ValueError(refusal) from None
            except OSError:
                if needed:
                    raise
            if _is_at(lock, descriptor):  # else another holder has removed it while we waited
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)  # while it is held, so that nobody else can hold it
                return
        finally:
            os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def check_folder(path: Path, flag: str, inputs: Mapping[str, str | Path | None] | None = None) -> None:
    """Looks before the work begins whether a file can be written.

    Args:
        flag: names the file in messages. inputs: as `check_apart`.

    Raises:
        ValueError: its folder does not exist or cannot be written; `path` is a folder, a device or a pipe; or as
            `check_apart`.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{flag} needs a folder that exists, got {path.parent}: make it")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} needs a folder that can be written, got {path.parent}: name another")
    _check_kind(path, flag)
    check_apart(path, flag, inputs or {})


def check_apart(path: Path, flag: str, inputs: Mapping[str, str | Path | None]) -> None:
    """Checks that what is written is not read, now or by the next command.

    Args:
        inputs: flag -> a file or folder that the command reads, or a name on the hub; None is none.

    Raises:
        ValueError: `path` is one of the inputs, by whatever name or link, or lies in one.
    """
    for name, given in inputs.items():
        if given is None or not Path(given).exists():
            continue
        if Path(given).is_dir() and path.resolve().is_relative_to(Path(given).resolve()):
            raise ValueError(
                f"{flag} needs a place outside of the folder {given}, which {name} reads, got {path}: name another"
            )
        if path.exists() and path.samefile(given):
            raise ValueError(f"{flag} needs a file of its own, got {path}, which {name} reads: name another")


def check_distinct(files: dict[str, Path | None]) -> None:
    """Checks that no two flags name one file, by whatever name or link, even where there is none yet.

    Raises:
        ValueError: two do.
    """
    for (one, first), (other, second) in combinations(files.items(), 2):
        if first is None or second is None:
            continue
        both = first.exists() and second.exists()
        if os.path.realpath(first) == os.path.realpath(second) or (both and first.samefile(second)):
            raise ValueError(f"{one} and {other} need a file each, got {second} for both: name another")


def held_in(folder: str | Path, flag: str) -> dict[str, Path]:
    """The files in a folder that `flag` names, as inputs for `check_folder`; none for a name on the hub."""
    return {f"{flag} {file}": file for file in Path(folder).rglob("*") if file.is_file()}


def data_in(source: str | Path, flag: str) -> dict[str, Path]:
    """As `held_in`, and the file or folder itself: all that lies in a folder of data is read as data."""
    return held_in(source, flag) | {flag: Path(source)}


def to_disk(path: Path) -> None:
    """The content of a file, or the names in a folder, are on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Writes `text` in UTF-8 to a file, whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns any error of a library that reads a broken file into a ValueError that begins with `what`, a file.

    Such libraries raise TypeError, KeyError, AttributeError, ZeroDivisionError, errors of their own and more. An
    OSError passes: it names its file.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # `datasets` says there which line is wrong
            cause = cause.__cause__
        said = str(cause).strip().splitlines() or ["nothing more"]
        raise ValueError(f"{what} cannot be read, {type(cause).__name__}: {said[0][:300]}: write it again") from error


def read_rows(path: Path, columns: dict[str, type]) -> list[tuple[int, dict]]:
    """Line number, from 1, and content of each row. Empty lines are left out.

    Args:
        columns: name and type of the columns that every row must have: `str` for a text, `list` for a list of texts,
            `object` for anything.

    Raises:
        ValueError: no rows, or a row without one of these columns; with its line.
        OSError: the file cannot be read.
    """
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                place = f"line {number} of {path}"
                rows.append((number, json_object(line, place)))
                check_row(rows[-1][1], place, columns)
    if not rows:
        having = f" with {', '.join(columns)}" if columns else ""
        raise ValueError(f"{path} needs at least one row{having}, got an empty file")
    return rows


def json_object(text: bytes, what: str) -> dict:
    """The object that a text is. Raises ValueError, which begins with `what`, if it is none."""
    try:
        found = json.loads(text, object_pairs_hook=with_keys_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} needs a JSON object, got {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} needs a JSON object, got {type(found).__name__}")
    return found


def with_keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError if it has a key twice, of which Python silently takes the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} twice")
    return found


def check_row(row: dict, place: str, columns: Mapping[str, type]) -> None:
    """Raises ValueError unless a row has these columns, of these types, as `read_rows` has them."""
    for name, kind in columns.items():
        if name not in row:
            raise ValueError(f"{place} needs the column {name!r}, got {', '.join(map(repr, row)) or 'none'}")
        value = row[name]
        if kind is object:
            continue
        texts = value if kind is list and isinstance(value, list) else [value]
        if not isinstance(value, kind) or not all(map(is_text, texts)):
            raise ValueError(f"{place} needs {KINDS[kind]} as {name!r}, got {str(value)[:80]!r}")


def is_text(value) -> bool:
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
