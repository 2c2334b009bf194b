"""What all figures and tables of a page share: which preference groups are drawn, their colours, and the points.

Axes: K runs, D drawn preference groups, G preference groups of a run, B bins of its steps.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice, zip_longest

import numpy as np

from openrlhf_pgrpo.report.numbers import Summary, bin_steps, summarise
from openrlhf_pgrpo.report.runs import Run

DRAWN = 12  # preference groups with their own colour; more colours could not be told apart
WORST = 4  # of the drawn, if there are more groups: those that gained least; the others are the largest
LISTED = 50  # rows of a table
POINTS = 1000  # of a curve, divided among the runs
BAND_POINTS = 60  # of the band of all others; few, so that each has enough samples of every group
# Twelve hues of about the same lightness, so that each is visible on white and on black.
COLOURS = (
    "#2b7ad6",
    "#df6c32",
    "#20a04e",
    "#c3518d",
    "#ad9907",
    "#8459c3",
    "#10a6ad",
    "#b93d46",
    "#628202",
    "#7d8df9",
    "#ab7306",
    "#c972ce",
)
RUN_COLOURS = ("#5f82b4", "#b0645c", "#4f9163", "#9070ab", "#92803c", "#378f97")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


@dataclass(frozen=True)
class RunView:
    """How one run is drawn.

    groups: (D,) rows of `run.pref_groups`, -1 for a preference group that the run lacks. others: (G,) true for groups
    that are not drawn. bin_of (S,), x (B,): bins of steps. window: the width of running means, in bins.
    """

    run: Run
    summary: Summary
    groups: np.ndarray
    others: np.ndarray
    bin_of: np.ndarray
    x: np.ndarray
    window: int
    colour: str
    dash: str
    opacity: float

    @property
    def worst(self) -> str | None:
        """The preference group that gained least. None unless at least two can be compared."""
        return None if self.summary.worst is None else self.run.pref_groups[self.summary.worst]


@dataclass(frozen=True)
class View:
    runs: list[RunView]
    drawn: list[str]  # D names
    listed: list[str]  # names in tables, which include the drawn ones; least gain first if some are not drawn
    total: int  # preference groups in all runs together
    by_gain: list[str]  # the drawn ones, ordered by the least gain in any run

    def colour(self, name: str) -> str:
        return COLOURS[self.drawn.index(name)]

    @property
    def several(self) -> bool:
        return len(self.runs) > 1

    @property
    def worst(self) -> set[str]:
        """The preference groups that gained least in some run."""
        return {run.worst for run in self.runs if run.worst is not None}


def make_view(runs: list[Run]) -> View:
    summaries = [summarise(run) for run in runs]
    share, gain = {}, {}  # the largest share and the least gain of a preference group in any run
    for run, summary in zip(runs, summaries):
        for name, part, gained in zip(run.pref_groups, summary.share.tolist(), summary.gain.tolist()):
            share[name] = max(share.get(name, 0.0), part)
            gain[name] = min(gain.get(name, math.inf), math.inf if math.isnan(gained) else gained)
    ranks = [[run.pref_groups[row] for row in summary.worst_first()] for run, summary in zip(runs, summaries)]
    worst = [name for rank in zip_longest(*ranks) for name in rank if name is not None]
    largest = sorted(share, key=share.get, reverse=True)
    drawn = _first(DRAWN, largest if len(share) <= DRAWN else [*_first(WORST, worst), *largest])
    listed = _first(LISTED, [*drawn, *largest])
    limit = max(POINTS // len(runs), POINTS // 5)
    pairs = enumerate(zip(runs, summaries))
    return View(
        runs=[_run_view(run, summary, number, drawn, limit) for number, (run, summary) in pairs],
        drawn=drawn,
        listed=listed if len(share) <= DRAWN else sorted(listed, key=gain.get),
        total=len(share),
        by_gain=sorted(drawn, key=gain.get),
    )


def _first(count: int, names: Iterable[str]) -> list[str]:
    """The first `count` different names, in alphabetical order."""
    return sorted(islice(dict.fromkeys(names), count))


def _run_view(run: Run, summary: Summary, number: int, drawn: list[str], limit: int) -> RunView:
    row_of = {name: row for row, name in enumerate(run.pref_groups)}
    groups = np.array([row_of.get(name, -1) for name in drawn], np.int64)
    others = np.ones(len(run.pref_groups), bool)
    others[groups[groups >= 0]] = False
    bin_of, x = bin_steps(run.steps, limit)
    window = max(7, len(x) // 10) | 1
    cycle = number // len(DASHES)
    return RunView(
        run=run,
        summary=summary,
        groups=groups,
        others=others,
        bin_of=bin_of,
        x=x,
        window=window,
        colour=RUN_COLOURS[number % len(RUN_COLOURS)],
        dash=DASHES[number % len(DASHES)],
        opacity=1 / (1 + 0.5 * cycle),
    )
