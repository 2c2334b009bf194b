"""The tables of an evaluation, for the screen and for the page."""

from typing import NamedTuple

import numpy as np

from openrlhf_pgrpo.people.evaluate import CHOSEN, MAJORITY, OWN, RANDOM, SHARED, UNKNOWN
from openrlhf_pgrpo.people.terminal import on_one_line

LISTED = 20  # preference groups in a table


class Table(NamedTuple):
    """rows: (label, people, answers, measures), where a measure is a value with its error."""

    title: str
    sentence: str
    rows: list[tuple[str, int | str, int | str, dict]]


def tables(result: dict) -> list[Table]:
    """The tables of a result. Only the preference groups with the lowest accuracy are listed if there are many."""
    known, new, found = result["known"], result["new"], []
    if known is not None:
        better = estimate(known["better off than with one reward for all"])
        sentence = f"A better log loss by their own coefficients than by one reward for all: {better} of the people."
        names = (OWN, SHARED, MAJORITY)
        found.append(Table("People the model knows", sentence, [_row(name, known[name]["all"]) for name in names]))
        sentence = "Quantiles over people of each measure of their own answers, by their own coefficients."
        quantiles = known["quantiles"].items()
        rows = [(f"{float(share):.0%} of people below", "", "", measures) for share, measures in quantiles]
        found.append(Table("Person by person", sentence, rows))
        if "groups" in known[OWN]:
            sentence = "By own coefficients, lowest accuracy first; the last row is the worst with one reward for all."
            rows = _groups(known[OWN])
            if worst := known[SHARED]["worst group"]:
                rows.append(_row(f"{worst}, {SHARED}", known[SHARED]["groups"][worst]))
            found.append(Table("Preference groups", sentence, rows))
    if new is not None:
        sentence = (
            "After so many answers, to questions chosen by expected information or at random; measured on others."
        )
        rows, last = [], None
        for at in new["after"]:
            count = f"{at['answers']} answers" if at["answers"] != 1 else "1 answer"
            for how in (CHOSEN, RANDOM):
                if how in at:
                    rows.append(_row(f"{count}, {how}" if at["answers"] else f"no answer: {SHARED}", at[how]["all"]))
                    last = at if how == CHOSEN else last
        rows.append(_row(MAJORITY, new[MAJORITY]["all"]))
        found.append(Table("People the model does not know", sentence, rows))
        if "groups" in new[MAJORITY] and last:
            title = f"Preference groups of new people, after {last['answers']} answers"
            found.append(Table(title, f"Chosen {CHOSEN}, lowest accuracy first.", _groups(last[CHOSEN])))
    return found


def _row(label: str, measures: dict) -> tuple[str, int, int, dict]:
    return label, measures["people"], measures["answers"], measures


def _groups(part: dict) -> list[tuple[str, int | str, int | str, dict]]:
    def accuracy(name: str) -> float:
        value = part["groups"][name]["accuracy"]["value"]
        return np.inf if value is None else value

    return [_row(name, part["groups"][name]) for name in sorted(part["groups"], key=accuracy)[:LISTED]]


HEADINGS = {"accuracy": "accuracy", "change": "gain", "auc": "AUC", "log_loss": "log loss"}
HEADINGS |= {"calibration_error": "calibration"}


def lines(table: Table) -> list[str]:
    """A table as lines of text."""
    labels = [on_one_line(label) for label, *_ in table.rows]
    width = max(24, *map(len, labels))
    head = f"{'':{width}} {'people':>7} {'answers':>8}" + "".join(f" {name:>14}" for name in HEADINGS.values())
    made = [table.title, *([table.sentence] if table.sentence else []), head]
    for label, (_, people, answers, measures) in zip(labels, table.rows):
        cells = "".join(f" {estimate(cell(measures, key)):>14}" for key in HEADINGS)
        made.append(f"{label:{width}} {people:>7} {answers:>8}{cells}".rstrip())
    return [*made, ""]


def cell(measures: dict, key: str) -> dict:
    """The value and error of a column; `change` is that of accuracy."""
    if key == "change":
        return measures["accuracy"].get("change", UNKNOWN)
    return measures.get(key, UNKNOWN)


def estimate(number: dict) -> str:
    value, error = number["value"], number["error"]
    return "-" if value is None else f"{value:.3f}" if error is None else f"{value:.3f} ±{error:.3f}"
