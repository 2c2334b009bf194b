"""Finds runs and reads their metrics files, line by line, into columns.

Axes: S steps, N rows (one per step and preference group in it), G preference groups, M recorded samples.
"""

import json
import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class SampleIndex:
    """Where the recorded samples are in the file. Their texts stay there, because only a few are shown.

    `step` (M,) counts steps from 0, `position` (M,) counts samples within the step, `owner` (M,) is a row of `owners`,
    the names of preference groups (None: a sample without one), and `prompt` (M,) is a hash of the prompt.
    """

    step: np.ndarray
    position: np.ndarray
    owner: np.ndarray
    prompt: np.ndarray
    owners: list[str | None]


@dataclass(frozen=True)
class Run:
    """One run. A number that was not recorded, or not finite, is NaN.

    steps, times, offsets: (S,) step numbers, unix seconds, and the byte at which each line begins.
    train: name -> (S,), the numbers that the host logged.
    pref_groups: G names; row_step, row_group: (N,) rows of `steps` and of `pref_groups`; values: name -> (N,).
    starts: (step, settings and versions of the process) for the start and for each resume.
    """

    name: str
    path: Path
    estimators: list[str]
    steps: np.ndarray
    times: np.ndarray
    offsets: np.ndarray
    train: dict[str, np.ndarray]
    pref_groups: list[str]
    row_step: np.ndarray
    row_group: np.ndarray
    values: dict[str, np.ndarray]
    starts: list[tuple[int, dict]]
    samples: SampleIndex
    half_line: bool
    replaced_steps: int
    not_finite: int

    def value(self, key: str) -> np.ndarray:
        """A metric of preference groups (N,). All NaN if no step has it."""
        return self.values.get(key, np.full(len(self.row_step), np.nan))

    @property
    def resumes(self) -> list[tuple[int, dict]]:
        """Those of `starts` that are not the start of the run, which an older version did not record."""
        return [(step, record) for step, record in self.starts if step > self.steps[0]]


class NoSteps(ValueError):
    """A metrics file without a whole step."""


def read_runs(given: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """All runs at or below the paths, and a sentence about each that has no step yet.

    Raises:
        ValueError: as `find` and `read`. A run without steps is an error only if there is no other run.
    """
    runs, empty = [], []
    for name, path in find(given):
        try:
            runs.append(read(path, name))
        except NoSteps as error:
            empty.append(error)
    if not runs:
        raise empty[0]
    return runs, [str(error) for error in empty]


def find(given: Sequence[Path]) -> list[tuple[str, Path]]:
    """The runs at or below the paths: a distinct name and the metrics file of each.

    Raises:
        ValueError: nothing was given, a path does not exist, or a folder has no metrics file in or below it.
    """
    if not given:
        raise ValueError("a report needs at least one run, got none: name a run folder or a metrics file")
    # places: metrics file -> the path that names the run. lengths: that path -> how many of its last parts are used.
    places, lengths = {}, {}
    for path in map(Path, given):
        for file, place, length in _below(path):
            places.setdefault(file, place)
            lengths.setdefault(place, length)
    while True:
        names = {place: "/".join(place.parts[-length:]) for place, length in lengths.items()}
        taken = Counter(names.values())
        if len(taken) == len(names):
            break
        lengths = {place: length + (taken[names[place]] > 1) for place, length in lengths.items()}
    seen, found = Counter(), []
    for file, place in places.items():  # a/metrics.jsonl and a.jsonl are both named by the path a
        seen[place] += 1
        found.append((names[place] if seen[place] == 1 else f"{names[place]} ({seen[place]})", file))
    return found


def _below(path: Path) -> Iterator[tuple[Path, Path, int]]:
    if not path.exists():
        raise ValueError(f"a report needs a metrics file, a run folder or a folder of runs, got {path}: no such path")
    whole = path.resolve()
    if whole.is_file():
        yield whole, whole.parent if whole.name == METRICS else whole.with_suffix(""), 1
        return
    files = sorted(file.resolve() for file in whole.rglob(METRICS) if file.is_file())
    if not files:
        raise ValueError(
            f"a report needs a {METRICS} in {path} or below it, found none: is it a run's folder, and has its "
            "first step ended?"
        )
    for file in files:
        alone = len(files) == 1 or file.parent == whole
        yield file, whole if alone else file.parent, 1 if alone else len(file.parent.parts) - len(whole.parts)


def read(path: Path, name: str) -> Run:
    """Reads one metrics file.

    An incomplete last line is left out: the run is still writing, or was killed. Where a step number goes back, a
    resumed run wrote steps again, and the later ones count.

    Raises:
        NoSteps: there is no whole step.
        ValueError: another line is not a step. The message names file and line.
    """
    reader = _Reader()
    half_line, begin, end = False, 0, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            begin, end = end, end + len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    half_line = True
                    break
                raise ValueError(
                    f"line {number} of {path} is not JSON ({error}): a metrics file needs one JSON object a line; "
                    "repair or remove the line"
                ) from None
            try:
                reader.add(row, begin)
            except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
                raise ValueError(
                    f'line {number} of {path} is not a training step: it needs a whole number "step", objects '
                    f'"train" and "pref_groups" and a list "samples" ({type(error).__name__}: {error}); is it another '
                    "kind of file?"
                ) from None
    if not len(reader.steps):
        raise NoSteps(f"{path} has no whole step yet: a report needs at least one; wait for the first step to end")
    return reader.run(name, path, half_line)


class _Table:
    """Columns of floats that grow row by row. A value that a row lacks is NaN."""

    def __init__(self):
        self.length = 0
        self.not_finite = 0
        self._columns: defaultdict[str, array] = defaultdict(lambda: array("d"))

    def append(self, row: dict) -> None:
        for key, value in row.items():
            if not isinstance(value, (int, float)):
                continue
            column = self._columns[key]
            if len(column) < self.length:
                column.extend([math.nan] * (self.length - len(column)))
            value = float(value)
            if not math.isfinite(value):
                self.not_finite += 1
                value = math.nan
            column.append(value)
        self.length += 1

    def columns(self, keep: np.ndarray) -> dict[str, np.ndarray]:
        arrays = {}
        for key, column in self._columns.items():
            column.extend([math.nan] * (self.length - len(column)))
            arrays[key] = np.frombuffer(column, np.float64)[keep]
        return arrays


class _Reader:
    """The part of a file that has been read so far."""

    def __init__(self):
        self.steps, self.times, self.offsets = array("q"), array("d"), array("q")
        self.train, self.groups = _Table(), _Table()
        self.row_step, self.row_group = array("q"), array("q")
        self.sample_step, self.sample_position = array("q"), array("q")
        self.sample_owner, self.sample_prompt = array("q"), array("q")
        self.names: dict[str, int] = {}
        self.owners: dict[str | None, int] = {}
        self.estimators: dict[str, None] = {}
        self.starts: list[tuple[int, dict]] = []

    def add(self, row: dict, offset: int) -> None:
        """Adds one step. If `row` is no step, raises one of the errors for a wrong type or key."""
        index = len(self.steps)
        for name, metrics in row.get("pref_groups", {}).items():
            self.groups.append(metrics)
            self.row_step.append(index)
            self.row_group.append(self.names.setdefault(name, len(self.names)))
        for position, sample in enumerate(row.get("samples") or []):
            owner = sample.get("pref_group")
            self.sample_step.append(index)
            self.sample_position.append(position)
            owner = None if owner is None else str(owner)
            self.sample_owner.append(self.owners.setdefault(owner, len(self.owners)))
            self.sample_prompt.append(hash(str(sample.get("prompt"))))
        self.train.append(row.get("train", {}))
        if row.get("estimator") is not None:
            self.estimators[str(row["estimator"])] = None
        if row.get("run"):
            self.starts.append((index, dict(row["run"])))
        time = row.get("time")
        self.times.append(time if isinstance(time, (int, float)) and math.isfinite(time) else math.nan)
        self.offsets.append(offset)
        self.steps.append(row["step"])

    def run(self, name: str, path: Path, half_line: bool) -> Run:
        steps = np.array(self.steps)
        earliest_after = np.minimum.accumulate(steps[::-1])[::-1]
        kept = np.append(steps[:-1] < earliest_after[1:], True)
        place = np.cumsum(kept) - 1
        row_step, sample_step = np.array(self.row_step, np.int64), np.array(self.sample_step, np.int64)
        rows, samples = kept[row_step], kept[sample_step]
        return Run(
            name=name,
            path=path,
            estimators=list(self.estimators),
            steps=steps[kept],
            times=np.array(self.times)[kept],
            offsets=np.array(self.offsets)[kept],
            train=self.train.columns(kept),
            pref_groups=list(self.names),
            row_step=place[row_step[rows]],
            row_group=np.array(self.row_group, np.int64)[rows],
            values=self.groups.columns(rows),
            starts=[(int(steps[index]), record) for index, record in self.starts if kept[index]],
            samples=SampleIndex(
                step=place[sample_step[samples]],
                position=np.array(self.sample_position, np.int64)[samples],
                owner=np.array(self.sample_owner, np.int64)[samples],
                prompt=np.array(self.sample_prompt, np.int64)[samples],
                owners=list(self.owners),
            ),
            half_line=half_line,
            replaced_steps=int((~kept).sum()),
            not_finite=self.groups.not_finite + self.train.not_finite,
        )
