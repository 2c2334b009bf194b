"""The figures of a report. The page sets the colours of text, grid and paper, because it knows whether it is dark.

Names come from users' data, and Plotly reads some HTML tags in any text, so every shown name goes through `label`.

Axes: B bins of steps, N rows (step and preference group), D drawn preference groups.
"""

import html
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import plotly.graph_objects as go

from openrlhf_pgrpo.core.history import Moments
from openrlhf_pgrpo.report.numbers import (
    bin_groups,
    bin_means,
    bin_steps,
    gains,
    quantile_band,
    running,
    running_sum,
    weight_of,
)
from openrlhf_pgrpo.report.selection import BAND_POINTS, RunView, View

GREY = "#8b919b"
PARTS = {  # of a step's time, in their order
    "timing/generation": "generation",
    "timing/make_experience": "experience",
    "timing/ppo_train": "training",
    "timing/broadcast": "weights to vLLM",
}
PART_COLOURS = ("#4c86c6", "#d08a3c", "#5aa469", "#a07cc0")
Curves = Callable[[RunView], np.ndarray]


def label(text: str, length: int = 26) -> str:
    """A name that Plotly shows letter for letter. The middle of a long name is left out."""
    text = " ".join(text.split()) or repr(text)
    if len(text) > length:
        text = f"{text[: length - 9]}…{text[-8:]}"
    # Plotly reads $...$ as a formula and %{x} as a value to fill in.
    return html.escape(text, quote=False).replace("$", "&#36;").replace("%", "&#37;")


def plus_minus(errors: Iterable[float], form: str) -> list[str]:
    """What a pointer shows behind each value: its error, or nothing if it has none."""
    return [f" ± {error:{form}}" if math.isfinite(error) else "" for error in errors]


def gain_over_steps(view: View) -> go.Figure:
    def values(run):
        return gains(run.run, run.summary)

    figure = _overlay(view, lambda run: _smooth(run, values(run)), values)
    return figure.update_yaxes(title="own standard deviations", zeroline=True)


def metric(view: View, key: str) -> go.Figure:
    """The running mean of a metric that is an average over samples, for each preference group."""

    def weight(run):
        return weight_of(run.run, key)

    def values(run):
        return run.run.value(key)

    return _overlay(view, lambda run: _smooth(run, values(run), weight(run)), values, weight)


def state(view: View, key: str) -> go.Figure:
    """A metric of the estimator's own state, such as a history, as recorded in the steps that have it."""

    def curves(run):
        moments = bin_groups(run.run, run.run.value(key), None, run.groups, run.bin_of)
        return np.where(moments.count > 0, moments.mean, np.nan)

    return _overlay(view, curves, lambda run: run.run.value(key))


def share(view: View) -> go.Figure:
    def curves(run):
        """(D + 1, B): the last row is all other preference groups together."""
        count = np.nan_to_num(run.run.value("samples"))
        drawn = bin_groups(run.run, count, None, run.groups, run.bin_of).count
        total = np.bincount(run.bin_of[run.run.row_step], count, len(run.x))
        counts = running_sum(np.vstack([drawn, total - drawn.sum(0)]), run.window)
        totals = counts.sum(0)
        known = np.append(run.groups >= 0, True)[:, None] & (totals > 0)
        return np.where(known, 100 * counts / np.maximum(totals, 1), np.nan)

    figure = _overlay(view, lambda run: curves(run)[:-1])
    for run in view.runs:
        if run.others.any():
            figure.add_trace(_line(view, run, curves(run)[-1], GREY, 1.5, "all others together"))
    return figure.update_yaxes(ticksuffix=" %", rangemode="tozero")


def reward_panel(view: View, name: str) -> go.Figure:
    """Rewards of one preference group on its own scale: a running mean and, for a single run, dots and spread."""
    figure, row, colour = new_figure(height=210, legend=False), view.drawn.index(name), view.colour(name)
    for run in view.runs:
        reward, spread = run.run.value("reward_mean"), run.run.value("reward_std")
        moments = bin_groups(run.run, reward, spread, run.groups[row : row + 1], run.bin_of)
        if not moments.count.any():
            continue
        mean, std = (values[0] for values in running(moments, run.window))
        count = moments.count[0]
        if not view.several:
            for trace in _band(run.x, mean - std, mean + std, colour):
                figure.add_trace(trace)
            seen, many = count > 0, len(run.x) > 200
            size = (1.5 if many else 2.5) + (2.5 if many else 4) * np.sqrt(count / count.max())
            figure.add_scatter(
                x=run.x[seen],
                y=_float(moments.mean[0][seen]),
                customdata=_float(count[seen]),
                mode="markers",
                marker=dict(color=colour, opacity=0.2 if many else 0.4, line_width=0, size=_float(size[seen])),
                hovertemplate="step %{x}<br>mean %{y:.4g} of %{customdata} samples<extra></extra>",
            )
        figure.add_trace(_line(view, run, mean, colour, 2, name))
    return _marks(figure, view)


def others_panel(view: View) -> go.Figure:
    figure = new_figure(height=210, legend=False)
    for run in view.runs:
        for trace in _others(view, run, run.run.value("reward_mean")):
            figure.add_trace(trace)
    return _marks(figure, view)


def gain_from_first_to_last(view: View) -> go.Figure:
    """One dot per preference group and run, with its standard error. The least gain is at the top."""
    names, count = view.by_gain, len(view.runs)
    figure = new_figure(height=90 + len(names) * (18 + 9 * min(count, 6)), legend=False)
    for number, run in enumerate(view.runs):
        rows = run.groups[[view.drawn.index(name) for name in names]]
        gain, error = (np.append(values, np.nan)[rows] for values in (run.summary.gain, run.summary.gain_error))
        colours = [view.colour(name) for name in names]
        figure.add_scatter(
            x=_float(gain),
            y=_float(np.arange(len(names)) + (number - (count - 1) / 2) * 0.7 / count),
            error_x=dict(array=_float(error), color=GREY, thickness=1.2, width=0),
            mode="markers",
            marker=dict(color=run.colour if view.several else colours, size=9, opacity=run.opacity),
            name=label(run.run.name),
            text=[label(name) for name in names],
            customdata=plus_minus(error, ".2f"),
            hovertemplate="%{x:+.2f}%{customdata}<extra>%{text}</extra>",
        )
    title = "last quarter − first quarter, in own standard deviations"
    figure.update_xaxes(title=title, zeroline=True, rangemode="tozero")
    shown = [f"<b>{label(name, 20)}</b>" if name in view.worst else label(name, 20) for name in names]
    ticks = dict(tickvals=list(range(len(names))), ticktext=shown)
    return figure.update_yaxes(**ticks, range=[len(names) - 0.4, -0.6], showgrid=False, automargin="left")


def train_panel(view: View, key: str) -> go.Figure:
    """A number that the host logged for the whole batch: faint as recorded, and its running mean."""
    figure = new_figure(height=190, legend=False)
    for run in view.runs:
        values = bin_means(run.run.train.get(key, np.full(len(run.run.steps), np.nan)), run.bin_of)
        known = np.isfinite(values)
        if known.any():
            smooth, _ = running(Moments(1.0 * known, np.nan_to_num(values), 0.0 * known), run.window)
            recorded = _line(view, run, values, run.colour, 1, run.run.name)
            figure.add_trace(recorded.update(opacity=0.4 * run.opacity))
            figure.add_trace(_line(view, run, smooth, run.colour, 2, run.run.name))
    return _marks(figure, view)


def timing_over_steps(view: View) -> go.Figure:
    """For a single run: the time of each part of a step, stacked."""
    (run,) = view.runs
    figure = new_figure(height=300).update_xaxes(title="step")
    for (key, part), colour in zip(PARTS.items(), PART_COLOURS):
        if key in run.run.train:
            figure.add_scatter(
                x=run.x,
                y=_float(np.nan_to_num(bin_means(run.run.train[key], run.bin_of))),
                name=part,
                stackgroup="step",
                mode="lines",
                line=dict(width=0.5, color=colour),
                fillcolor=_transparent(colour, 0.75),
                hovertemplate="step %{x}<br>%{y:.3g} s<extra>%{fullData.name}</extra>",
            )
    return _marks(figure.update_yaxes(title="seconds", rangemode="tozero"), view)


def timing_by_run(view: View) -> go.Figure:
    """For several runs: the mean step of each."""
    figure = new_figure(height=110 + 34 * len(view.runs))
    for (key, part), colour in zip(PARTS.items(), PART_COLOURS):
        timed = [run.run for run in view.runs if np.isfinite(run.run.train.get(key, np.nan)).any()]
        figure.add_bar(
            x=[float(np.nanmean(run.train[key])) for run in timed],
            y=[label(run.name) for run in timed],
            orientation="h",
            name=part,
            marker=dict(color=colour, line_width=0),
            hovertemplate="%{x:.3g} s<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(barmode="stack", bargap=0.35)
    figure.update_yaxes(autorange="reversed", showgrid=False, automargin="left")
    return figure.update_xaxes(title="seconds a step")


def _overlay(view: View, curves: Curves, others: Curves | None = None, weight: Curves | None = None) -> go.Figure:
    """A line per drawn preference group and run from `curves` (D, B), and a band for the rest from `others` (N,),
    weighted by `weight` (N,) or by samples."""
    figure = new_figure(height=380).update_xaxes(title="step")
    shown = set()
    for run in view.runs:
        if others is not None:
            for trace in _others(view, run, others(run), weight and weight(run)):
                figure.add_trace(trace)
        for name, curve in zip(view.drawn, curves(run)):
            if np.isfinite(curve).any():
                worst = name == run.worst
                line = _line(view, run, curve, view.colour(name), 3.2 if worst else 1.7, name)
                line.name += " · gained least" if worst and not view.several else ""
                figure.add_trace(line.update(legendgroup=name, showlegend=name not in shown))
                shown.add(name)
    return _marks(figure, view)


def _others(view: View, run: RunView, values: np.ndarray, weight=None) -> Iterator[go.Scatter]:
    if not run.others.any():
        return
    bin_of, x = bin_steps(run.run.steps, BAND_POINTS)
    low, middle, high = quantile_band(run.run, values, run.others, bin_of, weight)
    if not np.isfinite(middle).any():
        return
    if not view.several:
        yield from _band(x, low, high, GREY)
    yield _line(view, run, middle, GREY, 1.5, f"{run.others.sum():,} others").update(x=x)


def _band(x: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str) -> tuple[go.Scatter, go.Scatter]:
    known = np.isfinite(low)
    edge = dict(x=x[known], mode="lines", line=dict(width=0), hoverinfo="skip", showlegend=False)
    fill = dict(fill="tonexty", fillcolor=_transparent(colour, 0.13))
    return go.Scatter(y=_float(low[known]), **edge), go.Scatter(y=_float(high[known]), **edge, **fill)


def _smooth(run: RunView, values: np.ndarray, weight=None) -> np.ndarray:
    return running(bin_groups(run.run, values, None, run.groups, run.bin_of, weight), run.window)[0]


def _line(view: View, run: RunView, curve: np.ndarray, colour: str, width: float, name: str) -> go.Scatter:
    of_run = "<br>%{meta}" if view.several else ""
    return go.Scatter(
        x=run.x,
        y=_float(curve),
        mode="lines" if np.isfinite(curve).sum() > 1 else "markers",  # one point makes no line
        name=label(name),
        line=dict(color=colour, width=width, dash=run.dash),
        marker=dict(color=colour, size=8),
        opacity=run.opacity,
        connectgaps=True,
        meta=label(run.run.name, 60),
        hovertemplate=f"step %{{x}}<br>%{{y:.4g}}<extra>%{{fullData.name}}{of_run}</extra>",
    )


def _marks(figure: go.Figure, view: View) -> go.Figure:
    """A dotted line where a single run was resumed. The x axis is always steps."""
    if not view.several:
        for step, _ in view.runs[0].run.resumes:
            figure.add_vline(x=step, line=dict(color=GREY, width=1, dash="dot"))
    return figure


def new_figure(height: int, legend: bool = True) -> go.Figure:
    # Fixed margins align the figures; the bottom one has room for a title.
    margin = dict(l=62, r=8, t=8, b=46 if height > 220 else 26)
    return go.Figure(layout=dict(template=None, height=height, showlegend=legend, margin=margin, hovermode="closest"))


def _float(values: np.ndarray) -> np.ndarray:
    """Half the bytes. Seven digits are more than a screen shows."""
    return np.asarray(values, np.float32)


def _transparent(colour: str, alpha: float) -> str:
    red, green, blue = bytes.fromhex(colour[1:])
    return f"rgba({red},{green},{blue},{alpha})"
