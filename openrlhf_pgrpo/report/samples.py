"""Recorded answers from early and late in a run, to the same prompt if possible."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from openrlhf_pgrpo.report.runs import Run

PAIRS = 2


@dataclass(frozen=True)
class Answer:
    step: int
    prompt: str
    response: str
    reward: float | None


def before_after(run: Run, owner: str | None) -> list[tuple[Answer | None, Answer | None]]:
    """Up to two pairs of an early and a late answer of a preference group (None: samples without one).

    A pair has the same prompt. Its early answer is from the first half of the steps, and its late one from the second.
    Without such a pair, the earliest and the latest answers are taken. A single answer has no partner.

    Raises:
        ValueError: the file has changed since it was read.
    """
    index = run.samples
    if owner not in index.owners:
        return []
    mine = np.flatnonzero(index.owner == index.owners.index(owner))
    chosen = list(islice(_same_prompt(run, mine), PAIRS)) or _ends(mine)
    return [tuple(None if place is None else _answer(run, place) for place in pair) for pair in chosen]


def _same_prompt(run: Run, mine: np.ndarray) -> Iterator[tuple[int, int]]:
    early = run.samples.step[mine] < len(run.steps) / 2
    last_of_prompt = dict(zip(run.samples.prompt[mine[~early]].tolist(), mine[~early].tolist()))
    for place in mine[early].tolist():
        late = last_of_prompt.pop(int(run.samples.prompt[place]), None)
        if late is not None:
            yield place, late


def _ends(mine: np.ndarray) -> list[tuple[int | None, int | None]]:
    if len(mine) == 1:
        return [(int(mine[0]), None)]
    pairs = min(PAIRS, len(mine) // 2)
    return list(zip(mine[:pairs].tolist(), mine[len(mine) - pairs :].tolist()))


def _answer(run: Run, place: int) -> Answer:
    step = run.samples.step[place]
    with open(run.path, "rb") as file:
        file.seek(run.offsets[step])
        try:
            row = json.loads(file.readline())
            sample = row["samples"][run.samples.position[place]]
        except (ValueError, KeyError, IndexError, TypeError):
            raise ValueError(f"{run.path} was replaced while it was read: a new run has begun; try again") from None
    reward = sample.get("reward")
    known = isinstance(reward, (int, float)) and np.isfinite(reward)
    return Answer(int(run.steps[step]), _text(sample, "prompt"), _text(sample, "response"), reward if known else None)


def _text(sample: dict, key: str) -> str:
    return "" if sample.get(key) is None else str(sample[key])
