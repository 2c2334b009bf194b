"""What a page says beside its figures: facts, remarks, tables, answers, settings; and how numbers are written."""

import json
import math
from datetime import datetime, timezone
from functools import partial
from typing import Iterator

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
    """What stands at the top about each run."""
    return [
        {
            "view": run,
            "estimator": ", ".join(run.run.estimators) or "unknown estimator",
            "steps": len(run.run.steps),
            "last_step": int(run.run.steps[-1]),
            "samples": int(run.summary.whole.count.sum() or np.nansum(run.run.train.get("rollout/num_samples", 0))),
            "pref_groups": len(run.run.pref_groups),
            "device": last_record(run.run).get("device"),
            "started": last_record(run.run).get("started"),
            "written": float(run.run.times[-1]),
            "took": duration(run.run),
        }
        for run in view.runs
    ]


def remarks(view: View) -> Iterator[str]:
    """What a reader has to know of how the files were read."""
    for run in (shown.run for shown in view.runs):
        who = f"{run.name}: " if view.several else ""
        if run.half_line:
            yield f"{who}the last line of the file is only half there and left out: the run is alive or was killed."
        for step, record in run.starts[1:]:
            mark = "" if view.several else "; a dotted line marks the place"
            yield f"{who}resumed at step {step}, {moment(record.get('started'))}{mark}."
        if run.replaced_steps:
            yield f"{who}{run.replaced_steps:,} steps were written again after a resume; the later ones are shown."
        if run.not_finite:
            yield f"{who}{run.not_finite:,} recorded numbers are not finite (NaN or infinity) and are left out."
        if not run.starts:
            yield f"{who}the file says nothing of settings and versions: it was written by an older version."
        if not run.pref_groups:
            yield f"{who}no preference groups were recorded: the run had no --pgrpo.group_key."


def cuts(view: View) -> Iterator[str]:
    """What is not drawn one by one."""
    if view.total > len(view.drawn):
        yield (
            f"{view.total:,} preference groups: {len(view.drawn)} are drawn, those that gained least and the largest; "
            f"the others are a grey line, their median in {BAND_POINTS} stretches of steps, and a band of 10 to 90 %. "
            f"Tables list {len(view.listed)}."
        )
    for run in view.runs:
        if len(run.x) < len(run.run.steps):
            who = f"{run.run.name}: " if view.several else ""
            yield f"{who}{len(run.run.steps):,} steps are drawn as {len(run.x):,} points, each a mean over samples."


def summary_rows(view: View, number: int) -> list[dict]:
    """The table of one run, one row per listed preference group that it has."""
    run, summary = view.runs[number].run, view.runs[number].summary
    row_of = {name: row for row, name in enumerate(run.pref_groups)}
    return [
        {
            "name": name,
            "colour": view.colour(name) if name in view.drawn else GREY,
            "samples": int(summary.whole.count[row]),
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
    """Mean reward in the last quarter of each run, and what it is above that of the first run."""
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
    """(name, colour, [(run, pairs)]) of each drawn preference group with recorded answers, the least gain first."""
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
    """What a process said of itself as one flat table; its start differs in any case and is left out."""
    flat = {}
    for key, value in record.items():
        if key in ("settings", "versions") and isinstance(value, dict):
            prefix = "version of " if key == "versions" else ""
            flat.update({f"{prefix}{inner}": item for inner, item in value.items()})
        elif key != "started":
            flat[key] = value
    return flat


def settings(runs: list[Run]) -> list[tuple[str, list]]:
    """(key, value in each run) of everything that runs say of themselves."""
    records = [record_table(last_record(run)) for run in runs]
    keys = sorted({key for record in records for key in record})
    return [(key, [record.get(key) for record in records]) for key in keys]


def differing(runs: list[Run]) -> list[tuple[str, list]]:
    """The part of `settings` that is not the same in all runs."""
    return numbers.differing([record_table(last_record(run)) for run in runs])


def resumes(runs: list[Run]) -> list[tuple[Run, list]]:
    """What each run says of itself that was not the same in all of its processes."""
    return [(run, numbers.differing([record_table(record) for _, record in run.starts])) for run in runs]


def duration(run: Run) -> str:
    """Time from the start of each process, or else its first step, to the last step before the next one."""
    begins = np.searchsorted(run.steps, [step for step, _ in run.starts] or run.steps[:1])
    ends = np.append(begins[1:], len(run.steps)) - 1
    started = [record.get("started") for _, record in run.starts] or [None]
    seconds = sum(
        float(run.times[end]) - (start if isinstance(start, (int, float)) else float(run.times[begin]))
        for start, begin, end in zip(started, begins, ends)
    )
    if not math.isfinite(seconds) or seconds < 0:
        return ""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def moment(seconds) -> str:
    """A point in time, in UTC."""
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except (TypeError, ValueError, OverflowError, OSError):
        return "at an unknown time"


def estimate(pair: tuple[float, float], sign: str = "") -> str:
    """`mean ± error` with two digits of the error, or a dash."""
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
    """A setting as it was given; a dash for one that was not."""
    if value is None:
        return NONE
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
