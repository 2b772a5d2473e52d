"""One self-contained HTML page: no network, no second file. About 5 MB, nearly all of it the plot library."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from regauge.artifact.disk import TEMPORARY
from regauge.errors import OutputError
from regauge.report import charts
from regauge.report.view import View


@dataclass(frozen=True)
class Chart:
    """A figure with its place on the page."""

    name: str
    title: str
    caption: str
    figure: go.Figure


def _charts(view: View) -> list[Chart]:
    found = []
    if view.points:
        found.append(
            Chart(
                "frontier",
                "Frontier",
                "Each point is an allocation that the search found; lower and further left is better. Measured points "
                "carry a 95 % interval over documents; the dotted line is what the search predicted.",
                charts.frontier(view.points),
            )
        )
    if view.sites:
        found.append(
            Chart(
                "bits",
                "Bits a weight",
                "Where the bytes went, block by block.",
                charts.heat(view.sites, "bits"),
            )
        )
        if any(site.error is not None for site in view.sites):
            found.append(
                Chart(
                    "error",
                    "Error a site",
                    "Relative error of each site's output on the calibration text.",
                    charts.heat(view.sites, "error"),
                )
            )
    return found


def render(view: View) -> str:
    """The page as text."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string((files("regauge.report") / "page.html.j2").read_text(encoding="utf-8"))
    found = _charts(view)
    figures = {chart.name: json.loads(chart.figure.to_json()) for chart in found}
    return template.render(view=view, charts=found, figures=script_json(figures), plotly=get_plotlyjs())


def script_json(value: object) -> str:
    """JSON that may stand in a script element. A `<` there could end it or change how the rest is read; `&` and `>`
    are read otherwise in XHTML; json writes the line breaks U+2028 and U+2029, as all that is not ASCII, as escapes."""
    text = json.dumps(value, ensure_ascii=True)
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def write(view: View, path: Path) -> Path:
    """Write the page through a temporary name, so that a full disk leaves no half of it."""
    text = render(view)
    staged = path.with_name(TEMPORARY + path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            staged.write_text(text, encoding="utf-8")
            os.replace(staged, path)
        finally:
            staged.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"the report could not be written to {path}: {error.strerror or error}") from error
    return path
