"""The rows of a run's data, through the host's own reader, whose cache the run uses again."""

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from openrlhf_pgrpo.host import columns, flags, here, script


def rows(
    args, flag: str, split_flag: str, check: Callable, probabilities=None, training: bool = True, remote: bool = False
) -> tuple[int | None, list[str]]:
    """How many rows the data have that `flag` names, and what there is to say of them; None if they are not here."""
    files, split = flags.value(args, flag), flags.value(args, split_flag)
    if not files:
        raise ValueError(f"--{flag} needs data, got none: name a file, a folder or a data set on the hub")
    parts = [name.strip() for name in files.split(",")]
    absent = [said for name in parts if (said := here.file(flag, name, remote))]
    if absent:
        return None, absent
    _refuse_metrics(args, parts, flag)
    _check_probabilities(probabilities, parts, flag)
    # The host's trainers on pairs evaluate on all rows.
    most = args.data.max_samples if training or hasattr(args, "rollout") else sys.maxsize
    dataset = _read(args, files, split, f"--{flag}", f"--{split_flag}", probabilities, most)
    if probabilities is None:
        _refuse_unreached(parts, split, most, flag)
    return len(dataset), check(dataset, args, repr(files), training=training)


def _refuse_metrics(args, parts: list[str], flag: str) -> None:
    """Refuses to write metrics over data."""
    metrics = Path(flags.metrics_path(args))
    for data in (Path(name.split("@")[0].strip()) for name in parts):
        if metrics.exists() and data.exists() and (metrics.samefile(data) or metrics.parent.samefile(data)):
            raise ValueError(
                f"--{flags.METRICS_PATH} needs a file of its own, got {metrics}, which holds data of --{flag}: name "
                "another"
            )


def _check_probabilities(given: str | None, parts: list[str], flag: str) -> None:
    if given is None:
        return
    try:
        numbers = [float(number) for number in given.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(parts) or not all(number >= 0 for number in numbers) or abs(sum(numbers) - 1) > 1e-6:
        raise ValueError(
            f"--{flag} with {len(parts)} parts needs as many probabilities, which add up to 1, got {given!r}: "
            "correct them"
        )


def _refuse_unreached(parts: list[str], split: str, most: int, flag: str) -> None:
    """Refuses a part of the data that was read just now, of which the host would take no row: it puts parts behind one
    another, and keeps the first rows."""
    before = 0
    for name, data in zip(parts, _reader().loaded, strict=True):
        rows = len(data[split] if isinstance(data, dict) else data)
        if rows and before >= most:
            raise ValueError(
                f"--{flag} needs a row of every part, got none of {name!r}, because --data.max_samples is {most} and "
                f"the parts before it have {before}: raise it, leave the part out, or mix parts by probabilities"
            )
        before += rows


def _read(args, files: str, split: str, flag: str, split_flag: str, probabilities: str | None, most: int):
    """At most so many rows, through the host's own reader; both flags are for messages.

    Raises:
        ValueError: the data cannot be read, or do not have that split.
    """
    reader = _reader()
    quiet = SimpleNamespace(args=args, print=lambda *words: None, is_rank_0=lambda: False)
    reader.loaded.clear()
    try:
        dataset = reader.blending_datasets(
            files, probabilities, quiet, args.train.seed, max_count=most, dataset_split=split
        )
    except AttributeError as error:  # the host goes on with all splits if there is none of that name
        if not (reader.loaded and isinstance(reader.loaded[-1], dict) and split not in reader.loaded[-1]):
            raise
        raise ValueError(
            f"{split_flag} needs a split of {files!r} ({flag}), got {split!r}; splits are "
            f"{sorted(reader.loaded[-1])}: correct it"
        ) from error
    return dataset.select(range(min(most, len(dataset))))


@cache
def _reader():
    """The host's file with `blending_datasets`, under a name of its own: the package around it imports for a minute.

    `loaded` keeps what was read, because the host does not say which splits there are.
    """
    path = script.path_of("openrlhf.datasets.utils")
    spec = importlib.util.spec_from_file_location("openrlhf_pgrpo reader of the host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    columns.install(module)
    module.loaded = []
    for name in ("load_dataset", "load_from_disk"):
        setattr(module, name, _kept(getattr(module, name), module.loaded))
    return module


def _kept(function: Callable, results: list) -> Callable:
    def call(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    return call
