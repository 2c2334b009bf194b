"""The columns of a dataset: read at once, and those that name preference groups and users checked row by row.

`source` is where the data come from, in words for messages. Rows are counted from 0.
"""

import inspect
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import wrapt

from openrlhf_pgrpo.core.names import alike, alike_listed, name_of, printed_missing
from openrlhf_pgrpo.models.tables import check_csv, check_folder


def install(module) -> None:
    """Makes the host's `blending_datasets` say what is wrong with a file that is empty or broken, and read names in
    CSV as they are written, as our commands do: pandas makes one user of 7 and 007."""
    from datasets.exceptions import DatasetsError

    def read(wrapped, _instance, args, kwargs):
        call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        files, data = call["datasets"], getattr(getattr(call.get("strategy"), "args", None), "data", None)
        for path in (Path(name.split("@")[0].strip()) for name in files.split(",")):
            if path.suffix == ".csv" and path.is_file() and path.stat().st_size:
                check_csv(path)
        keys = [key for key in (getattr(data, name, None) for name in ("user_key", "pref_group_key")) if key]
        try:
            with _names_as_written(module, keys) as folders:
                dataset = wrapped(*args, **kwargs)
        except StopIteration as error:  # `datasets` says no more than this about a file without rows
            raise ValueError(f"a dataset needs at least one row, got an empty file {files!r}") from error
        except (DatasetsError, ValueError) as error:
            cause = str(error.__cause__ or error).strip()[:300]
            raise ValueError(f"a dataset needs rows that can be read, got {cause} in {files!r}: correct it") from error
        for path, found in folders if keys else []:
            check_folder(path, found)
        return dataset

    wrapt.wrap_function_wrapper(module, "blending_datasets", read)


@contextmanager
def _names_as_written(module, keys: Sequence[str]):
    """Within it, the host reads the columns `keys` of CSV as texts; gives the folders that it reads, with what they
    hold."""
    load, folders = module.load_dataset, []

    def load_as_written(kind, *args, **kwargs):
        if kind == "csv":
            names = dict.fromkeys(keys, str)
            kwargs = {"converters": names, "keep_default_na": False, "na_values": [""], **kwargs}
        found = load(kind, *args, **kwargs)
        if "data_files" not in kwargs and Path(kind).is_dir():
            folders.append((Path(kind), found))
        return found

    module.load_dataset = load_as_written
    try:
        yield folders
    finally:
        module.load_dataset = load


def values(dataset, key: str | None, label_key: str | None = None) -> list | None:
    """Values (rows,) of a column, or of that key in struct labels; None if there is no such thing."""
    if key is None:
        return None
    if key in dataset.column_names:
        return dataset[key][:]  # at once: row by row it takes 80 times as long
    if label_key not in dataset.column_names:
        return None
    labels = dataset[label_key][:]
    if not any(isinstance(label, dict) and key in label for label in labels):
        return None
    return [label.get(key) if isinstance(label, dict) else None for label in labels]


def need(dataset, flag: str, key: str, source: str) -> None:
    """Raises ValueError unless there is a column `key`, which `flag` names."""
    if key not in dataset.column_names:
        _refuse(dataset, flag, key, source)


def column(dataset, flag: str, key: str, source: str) -> list:
    """Values (rows,) of the column `key` that `flag` names.

    Raises:
        ValueError: there is no such column.
    """
    need(dataset, flag, key, source)
    return dataset[key][:]


def names(dataset, flag: str, key: str, source: str, label_key: str | None = None) -> list[str]:
    """The name (rows,) in each row of a column, or of that key in struct labels.

    Raises:
        ValueError: there is no such column, or a row without a name.
    """
    found = values(dataset, key, label_key)
    if found is None:
        _refuse(dataset, flag, key, source, "" if label_key is None else " or a key of its struct label")
    checked, wrong = [], {}
    for row, value in enumerate(found):
        try:
            checked.append(name_of(value))
        except ValueError as error:
            wrong[row] = error
    if wrong:
        first, error = next(iter(wrong.items()))
        struct = isinstance(found[first], dict)
        do = "put the name into a column of its own" if struct else "fill it in or drop the row"
        raise ValueError(f"every row needs a name in {key!r} ({flag}), got {error} in {at([*wrong], source)}: {do}")
    return checked


def at(rows: Sequence[int], source: str) -> str:
    """Where rows are, by number; there may be many, so only the first few are named."""
    more = f" (and {len(rows) - 1} more: row {', '.join(map(str, rows[1:5]))}{', ...' * (len(rows) > 5)})"
    return f"row {rows[0]} of {source}{more * (len(rows) > 1)}"


def printed(found: Sequence, flag: str, source: str) -> list[str]:
    """A sentence of warning if some texts (rows,) of a column are what other programs write for a missing value."""
    if not (rows := printed_missing(found)):
        return []
    return [
        f"warning: {found[rows[0]]!r} ({flag}) in {at(rows, source)} is a text like any other, though programs write "
        "it where a value is missing: if it is, drop these rows"
    ]


def spellings(found: Sequence[str], flag: str, source: str) -> list[str]:
    """Sentences of warning if some of the names that were found differ only in what `names.alike` ignores, or may
    stand for a missing value."""
    said = printed(found, flag, source)
    if not (same := alike(found)):
        return said
    count = f"warning: names in {source} ({flag}) count as different that {alike_listed(same)}"
    return [*said, f"{count}; write them alike if they are the same"]


def _refuse(dataset, flag: str, key: str, source: str, or_else: str = "") -> NoReturn:
    raise ValueError(
        f"{flag} needs a column of {source}{or_else}, got {key!r}; columns are {sorted(dataset.column_names)}: "
        "correct the flag or add the column"
    )
