"""Puts the figures, tables and texts of runs into one HTML page that loads nothing from outside."""

import base64
import hashlib
from datetime import UTC, datetime
from itertools import count

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from openrlhf_pgrpo import __version__
from openrlhf_pgrpo.report import numbers, tables
from openrlhf_pgrpo.report.runs import Run
from openrlhf_pgrpo.report.sections import sections
from openrlhf_pgrpo.report.selection import DASHES, make_view

DASH_ARRAYS = dict(zip(DASHES, ("none", "8 5", "2 3", "8 3 2 3", "13 4", "13 3 2 3")))  # as SVG writes them


def render(runs: list[Run], notices: list[str]) -> str:
    """The page.

    Args:
        runs: at least one, with distinct names. The others are compared with the first.
        notices: sentences for the top of the page.
    """
    view = make_view(runs)
    return fill(
        "page.html",
        view=view,
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        facts=tables.facts(view),
        notices=[*notices, *tables.remarks(view), *tables.cuts(view)],
        sections=sections(view),
        rows=[tables.summary_rows(view, number) for number in range(len(runs))],
        comparison=tables.comparison_rows(view),
        samples=tables.samples(view),
        settings=tables.settings(runs),
        resumes=tables.resumes(runs),
        differing=tables.differing(runs),
        min_samples=numbers.MIN_SAMPLES,
        dashes=DASH_ARRAYS,
    )


def fill(template: str, **content) -> str:
    """A page from one of the templates that extend base.html, with its style, its figures and the code for them."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("openrlhf_pgrpo.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({name: getattr(tables, name) for name in ("moment", "estimate", "signed", "given")})
    ids = count(1)
    data = []

    def plot(figure: go.Figure) -> str:
        """The id of a figure. Its data go to the end of the page."""
        data.append((f"figure-{next(ids)}", Markup(figure.to_json(engine="json"))))
        return data[-1][0]

    code = (get_plotlyjs(), environment.loader.get_source(environment, "page.js")[0])
    return environment.get_template(template).render(
        **content,
        version=__version__,
        plot=plot,
        data=data,
        code=[Markup(script) for script in code],
        hashes=[base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in code],
        now=datetime.now(UTC).timestamp(),
    )
