"""The words and tables of a page, besides its figures: facts, remarks, answers, settings; and how numbers look."""

import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial

import numpy as np

from openrlhf_pgrpo.core.history import Moments
from openrlhf_pgrpo.report import numbers
from openrlhf_pgrpo.report.figures import GREY
from openrlhf_pgrpo.report.runs import Run
from openrlhf_pgrpo.report.samples import before_after
from openrlhf_pgrpo.report.selection import BAND_POINTS, View

NONE = "–"
UNKNOWN = (math.nan, math.nan)


def facts(view: View) -> list[dict]:
    """The facts about each run at the top of the page."""
    return [
        {
            "view": run,
            "estimator": ", ".join(run.run.estimators) or "unknown estimator",
            "steps": len(run.run.steps),
            "last_step": int(run.run.steps[-1]),
            "samples": int(run.summary.samples.sum() or np.nansum(run.run.train.get("rollout/num_samples", 0))),
            "pref_groups": len(run.run.pref_groups),
            "device": last_record(run.run).get("device"),
            "started": last_record(run.run).get("started"),
            "written": float(run.run.times[-1]),
            "took": duration(run.run),
        }
        for run in view.runs
    ]


def remarks(view: View) -> Iterator[str]:
    """What a reader must know about how the files were read."""
    for run in (shown.run for shown in view.runs):
        prefix = f"{run.name}: " if view.several else ""
        if run.half_line:
            yield f"{prefix}the last line of the file is incomplete and left out: the run is alive or was killed."
        for step, record in run.resumes:
            mark = "" if view.several else "; a dotted line marks the step"
            yield f"{prefix}resumed at step {step}, {moment(record.get('started'))}{mark}."
        if run.replaced_steps:
            yield f"{prefix}{run.replaced_steps:,} steps were written again after a resume; the later ones are shown."
        if run.not_finite:
            yield f"{prefix}{run.not_finite:,} recorded numbers are not finite (NaN or infinity) and are left out."
        if not run.starts:
            yield f"{prefix}the file has no settings and versions: an older version wrote it."
        if not run.pref_groups:
            yield f"{prefix}no preference groups were recorded: the run had no --data.pref_group_key."


def cuts(view: View) -> Iterator[str]:
    """What is not drawn separately."""
    if view.total > len(view.drawn):
        least = "those that gained least and " if any(len(run.summary.worst_first()) for run in view.runs) else ""
        yield (
            f"{view.total:,} preference groups: {len(view.drawn)} are drawn, {least}the largest. "
            f"The others are a grey line, their median in {BAND_POINTS} bins of steps, and a band from 10 to 90 %. "
            f"Tables list {len(view.listed)}."
        )
    for run in view.runs:
        if len(run.x) < len(run.run.steps):
            prefix = f"{run.run.name}: " if view.several else ""
            yield f"{prefix}{len(run.run.steps):,} steps are drawn as {len(run.x):,} points, each a mean over samples."


def summary_rows(view: View, number: int) -> list[dict]:
    """The table of one run: a row per listed preference group that the run has."""
    run, summary = view.runs[number].run, view.runs[number].summary
    row_of = {name: row for row, name in enumerate(run.pref_groups)}
    return [
        {
            "name": name,
            "colour": view.colour(name) if name in view.drawn else GREY,
            "samples": int(summary.samples[row]),
            "share": f"{100 * summary.share[row]:.3g} %",
            "first": quarter(summary.first, row),
            "last": quarter(summary.last, row),
            "change": (float(summary.change[row]), float(summary.error[row])),
            "gain": (float(summary.gain[row]), float(summary.gain_error[row])),
            "worst": row == summary.worst,
            "lowest": row == summary.lowest,
        }
        for name, row in ((name, row_of[name]) for name in view.listed if name in row_of)
    ]


def comparison_rows(view: View) -> list[dict]:
    """Mean reward in the last quarter of each run, and its difference to the first run."""
    rows = []
    for name in view.listed:
        cells = []
        for run in view.runs:
            known, gain, (mean, error) = name in run.run.pref_groups, UNKNOWN, UNKNOWN
            if known:
                row = run.run.pref_groups.index(name)
                mean, error = quarter(run.summary.last, row)
                gain = (float(run.summary.gain[row]), float(run.summary.gain_error[row]))
            base = cells[0]["mean"] if cells else UNKNOWN
            over = (mean - base[0], math.hypot(error, base[1]))
            cell = {"known": known, "mean": (mean, error), "over": over, "gain": gain, "worst": name == run.worst}
            cells.append(cell)
        colour = view.colour(name) if name in view.drawn else GREY
        rows.append({"name": name, "colour": colour, "cells": cells})
    return rows


def quarter(moments: Moments, row: int) -> tuple[float, float]:
    """Mean reward and its standard error; NaN without samples."""
    error = float(numbers.standard_error(moments)[row])
    return (float(moments.mean[row]), error) if moments.count[row] else UNKNOWN


def samples(view: View) -> list[tuple[str, str, list]]:
    """(name, colour, [(run, pairs)]) of each drawn preference group with recorded answers. The least gain is first."""
    found = []
    for name in [*view.by_gain, None]:
        by_run = [(run, before_after(run.run, name)) for run in view.runs]
        if any(pairs for _, pairs in by_run):
            title, colour = ("no preference group", GREY) if name is None else (name, view.colour(name))
            found.append((title, colour, [(run, pairs) for run, pairs in by_run if pairs]))
    return found


def last_record(run: Run) -> dict:
    return run.starts[-1][1] if run.starts else {}


def record_table(record: dict) -> dict[str, object]:
    """The settings and versions that a process recorded, as a flat table; not its start time, which always differs."""
    flat = {}
    for key, value in record.items():
        if key in ("settings", "versions") and isinstance(value, dict):
            prefix = "version of " if key == "versions" else ""
            flat.update({f"{prefix}{inner}": item for inner, item in value.items()})
        elif key != "started":
            flat[key] = value
    return flat


def settings(runs: list[Run]) -> list[tuple[str, list]]:
    """(key, value in each run) of all settings and versions."""
    records = [record_table(last_record(run)) for run in runs]
    keys = sorted({key for record in records for key in record})
    return [(key, [record.get(key) for record in records]) for key in keys]


def differing(runs: list[Run]) -> list[tuple[str, list]]:
    """The part of `settings` that differs between runs."""
    return numbers.differing([record_table(last_record(run)) for run in runs])


def resumes(runs: list[Run]) -> list[tuple[Run, list]]:
    """The settings and versions of each run that changed between its processes."""
    return [(run, numbers.differing([record_table(record) for _, record in run.starts])) for run in runs]


def duration(run: Run) -> str:
    """The time from each start, or first step if the start is unknown, to the last step before the next start."""
    starts = run.starts
    if len(starts) == len(run.resumes):  # an older version wrote the first steps, without a record
        starts = [(int(run.steps[0]), {}), *starts]
    begins = np.searchsorted(run.steps, [step for step, _ in starts])
    ends = np.append(begins[1:], len(run.steps)) - 1
    started = [record.get("started") for _, record in starts]
    seconds = sum(
        float(run.times[end]) - (start if isinstance(start, (int, float)) else float(run.times[begin]))
        for start, begin, end in zip(started, begins, ends)
    )
    if not math.isfinite(seconds) or seconds < 0:
        return ""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def moment(seconds) -> str:
    """A time as text, in UTC."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (TypeError, ValueError, OverflowError, OSError):
        return "at an unknown time"


def estimate(pair: tuple[float, float], sign: str = "") -> str:
    """`mean ± error` with two digits of the error, or a dash if there is no mean."""
    mean, error = pair
    if not math.isfinite(mean):
        return NONE
    if not (math.isfinite(error) and error > 0):
        text = f"{mean:{sign}.4g}"
    elif not 1e-6 < error < 1e6:
        text = f"{mean:{sign}.3g} ± {error:.1g}"
    else:
        decimals = max(0, 1 - math.floor(math.log10(error)))
        text = f"{mean:{sign}.{decimals}f} ± {error:.{decimals}f}"
    return text.replace("-", "−")


signed = partial(estimate, sign="+")


def given(value) -> str:
    """A setting as it was given, or a dash if it was not."""
    if value is None:
        return NONE
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
