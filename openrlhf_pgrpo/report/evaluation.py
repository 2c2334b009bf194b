"""Draws the result of `openrlhf-pgrpo evaluate` as one page that opens offline."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openrlhf_pgrpo.files import whole_file
from openrlhf_pgrpo.report.figures import GREY, label, new_figure, plus_minus
from openrlhf_pgrpo.report.page import fill
from openrlhf_pgrpo.report.sections import Plot, Section
from openrlhf_pgrpo.report.selection import COLOURS

DRAWN = 40  # preference groups
COLUMNS = {"accuracy": "accuracy", "auc": "AUC", "log_loss": "log loss", "calibration_error": "calibration error"}
OWN, SHARED = "own coefficients", "one reward for all"  # keys of the result


def write_page(result: dict, tables: Sequence[Any], output: Path) -> None:
    """Writes the page, whole or not at all.

    Args:
        result: as `people.evaluate.evaluate` gives it. tables: (title, sentence, rows) of it, each row (label, people,
            answers, measures).
    """
    known, new = result["known"], result["new"]
    plots = {
        "People the model knows": [calibration(known)] if known else [],
        "Person by person": [people(known)] if known else [],
        "Preference groups": [groups(known)] if known and "groups" in known[OWN] else [],
        "People the model does not know": [asked(new, name) for name in ("accuracy", "log_loss")] if new else [],
    }
    sections = [(Section(title, sentence, plots.get(title, [])), rows) for title, sentence, rows in tables]
    settings = {"model": result["model"]["name"], "fingerprint": result["model"]["fingerprint"]}
    settings |= {"data": result["data"], **result["settings"]}
    page = fill(
        "evaluation.html",
        title=f"{Path(result['model']['name']).name} on {Path(result['data']).name}",
        facts=result["counts"],
        notices=result["notes"],
        sections=sections,
        columns=COLUMNS,
        pair=pair,
        settings=settings,
    )
    with whole_file(output) as file:
        file.write(page.encode("utf-8", "replace"))  # a lone surrogate in the data has no UTF-8


def pair(measure: dict | None) -> tuple[float, float]:
    """A value with its error, as the page's filters take them."""
    found = (None, None) if measure is None else (measure["value"], measure["error"])
    return tuple(math.nan if number is None else number for number in found)


def calibration(known: dict) -> Plot:
    figure = new_figure(height=380)
    figure.add_scatter(x=[0.5, 1], y=[0.5, 1], mode="lines", line=dict(color=GREY, dash="dot"), showlegend=False)
    for (name, curve), colour in zip(known["reliability"].items(), COLOURS):
        expected, observed, count = zip(*curve)
        figure.add_scatter(
            x=expected,
            y=observed,
            customdata=count,
            name=name,
            mode="lines+markers",
            line=dict(color=colour),
            hovertemplate="expected %{x:.3f}, was %{y:.3f}<br>%{customdata} answers<extra>%{fullData.name}</extra>",
        )
    figure.update_xaxes(title="chance of the answer that is expected")
    sentence = "Ten bins of equal count. On the dotted line, expected answers are as frequent as they are said to be."
    return Plot(figure.update_yaxes(title="share that gave it"), "Calibration", sentence)


def people(known: dict) -> Plot:
    accuracies = [its["accuracy"] for its in known["each"].values() if its["accuracy"] is not None]
    figure = new_figure(height=260, legend=False)
    bins = dict(start=0, end=1.05, size=0.05)
    figure.add_histogram(x=accuracies, xbins=bins, marker=dict(color=COLOURS[0]), hovertemplate="%{x}: %{y}")
    figure.update_xaxes(title="accuracy of a person's own coefficients", range=[0, 1.05])
    return Plot(figure.update_yaxes(title="people"), "How many people are how well predicted")


def groups(known: dict) -> Plot:
    of = {name: known[name]["groups"] for name in (OWN, SHARED)}
    accuracy = {name: pair(its["accuracy"])[0] for name, its in of[OWN].items()}
    ranked = sorted(accuracy, key=lambda name: (math.isnan(accuracy[name]), accuracy[name]))[:DRAWN]
    figure = new_figure(height=110 + 30 * len(ranked))
    for shift, (who, colour) in enumerate(zip(of, COLOURS)):
        value, error = zip(*(pair(of[who][name]["accuracy"]) for name in ranked))
        figure.add_scatter(
            x=value,
            y=[place + (shift - 0.5) * 0.3 for place in range(len(ranked))],
            error_x=dict(array=error, color=GREY, thickness=1.2, width=0),
            mode="markers",
            marker=dict(color=colour, size=9),
            name=who,
            text=[label(name) for name in ranked],
            customdata=plus_minus(error, ".3f"),
            hovertemplate="%{x:.3f}%{customdata}<extra>%{text}</extra>",
        )
    figure.update_xaxes(title="accuracy")
    ticks = dict(tickvals=list(range(len(ranked))), ticktext=[label(name, 20) for name in ranked])
    figure.update_yaxes(**ticks, range=[len(ranked) - 0.4, -0.6], showgrid=False, automargin="left")
    return Plot(figure, "Accuracy in each preference group", "Bars are standard errors over people.")


def asked(new: dict, measure: str) -> Plot:
    figure = new_figure(height=320)
    start = [at for at in new["after"] if not at["answers"]]
    for how, colour in zip(("by information", "at random"), COLOURS):
        shown = [at for at in new["after"] if how in at]
        shown = shown if how in start[0] else [*start, *shown]
        value, error = zip(*(pair(at.get(how, at["by information"])["all"][measure]) for at in shown))
        figure.add_scatter(
            x=[at["answers"] for at in shown],
            y=value,
            error_y=dict(array=error, thickness=1.2, width=0),
            text=plus_minus(error, ".3f"),
            customdata=[at["people"] for at in shown],
            name=how,
            mode="lines+markers",
            line=dict(color=colour),
            hovertemplate="%{y:.3f}%{text}<br>%{customdata} people<extra>%{fullData.name}</extra>",
        )
    figure.update_xaxes(title="answers")
    title = COLUMNS[measure]
    return Plot(figure.update_yaxes(title=title), f"{title.capitalize()} after so many answers")
