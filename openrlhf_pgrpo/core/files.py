"""Files that are never half-written."""

import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path):
    """A binary file to write to; its content takes the place of `path` at the end, and is on the disk then.

    Where writing fails, `path` keeps what it held.
    """
    beside = path.with_name(path.name + ".new")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too
    finally:
        os.close(folder)


def write_whole(path: Path, text: str) -> None:
    """Makes `text`, in UTF-8, the content of a file, whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))
