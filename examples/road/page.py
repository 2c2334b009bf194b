"""The page that tells the story of a road: every command with what it said, and the figures they made."""

import html
import json
from pathlib import Path

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 54em; margin: 2em auto; padding: 0 1em }
pre { overflow-x: auto; padding: .8em; border: 1px solid #8886; border-radius: 6px; font-size: 13px }
pre.command { border-left: 4px solid #0072b2 } td, th { padding: .2em 1em .2em 0; text-align: left }
figure { margin: 1em 0 } img { max-width: 100%; background: white }
"""
PAGES = {"evaluation.html": "all figures of the evaluation", "training.html": "all figures of the training"}


def write_page(folder: Path, told: list[dict], served: dict[str, float]) -> Path:
    """Writes road.html. `told`: title, sentence, command and output of each station; `served`: mean ratings."""
    parts = []
    for number, station in enumerate(told, 1):
        parts.append(f"<h2>{number}. {html.escape(station['title'])}</h2><p>{html.escape(station['sentence'])}</p>")
        parts.append(f'<pre class="command">$ {html.escape(station["command"])}</pre>')
        if station["output"].strip():
            said = f"<pre>{html.escape(station['output'])}</pre>"
            parts.append(f"<details><summary>what it said</summary>{said}</details>")
        for page, name in PAGES.items():
            if page in station["command"]:
                parts.append(f'<p><a href="{page}">{name}</a></p>')
        if "--curve" in station["command"]:
            parts.append(f"<figure>{(folder / 'curve.svg').read_text().split('?>')[-1]}</figure>")
    rows = [(name, f"{rating:+.2f}") for name, rating in served.items()]
    evaluation = json.loads((folder / "evaluation.json").read_text())
    comparison = json.loads((folder / "comparison" / "result.json").read_text())
    lead = [
        "<h1>From ratings to a stranger who is served</h1>",
        table(("new people: answers", "accuracy"), learned(evaluation)),
        table(("preference group", "trained policy wins", "95 % interval"), won(comparison)),
        table(("the stranger's own rating of what was put first", "mean"), rows),
    ]
    page = folder / "road.html"
    text = f'<!doctype html><meta charset="utf-8"><title>The road</title><style>{STYLE}</style>{"".join(lead + parts)}'
    page.write_text(text, encoding="utf-8")
    return page


def learned(evaluation: dict) -> list[tuple[str, str]]:
    """Accuracy on new people by the number of their answers, ± standard error over people."""
    found = []
    for at in evaluation["new"]["after"]:
        if "by information" in at:
            accuracy = at["by information"]["all"]["accuracy"]
            found.append((str(at["answers"]), f"{accuracy['value']:.3f} ± {accuracy['error']:.3f}"))
    return found


def won(comparison: dict) -> list[tuple[str, str, str]]:
    rates = {"all": comparison["all"], **comparison["pref_groups"]}
    return [
        (name, f"{of['win_rate']:.1%}", "-" if of["low"] is None else f"{of['low']:.1%} to {of['high']:.1%}")
        for name, of in rates.items()
    ]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def line(cells, tag):
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
