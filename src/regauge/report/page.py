"""One self-contained HTML page: no network, no second file, tens of kB. Charts are SVG of our own (`charts`): see
docs/decisions/011."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2

from regauge.artifact.disk import TEMPORARY
from regauge.errors import OutputError
from regauge.report import charts
from regauge.report.glossary import WORDS
from regauge.report.view import View


@dataclass(frozen=True)
class Chart:
    """A picture with its place on the page; `svg` is markup that `charts` escaped."""

    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Note:
    """A note, and others that differ from it in figures alone."""

    said: str
    alike: tuple[str, ...]


def _frontier(view: View) -> Chart | None:
    svg = charts.frontier(view.points)
    if not svg:
        return None
    caption = (
        "Each dot is an allocation that the search found, as a variant in memory; lower and further left is better. "
        "Lines through dots are 95 % intervals over documents, the dotted line is what the search predicted."
    )
    if view.dots:
        return Chart("sizes", "Quality against size", view.dots, svg)
    return Chart("frontier", "Quality against size", caption, svg)


def _heats(view: View) -> list[Chart]:
    found = []
    if view.sites:
        caption = "Where the bytes went, block by block."
        found.append(Chart("bits", "Bits a weight", caption, charts.heat(view.sites, "bits")))
    if any(site.error is not None for site in view.sites):
        caption = "Relative error of each site's output on the calibration text."
        found.append(Chart("error", "Error a site", caption, charts.heat(view.sites, "error")))
    return found


def _curve(view: View) -> Chart | None:
    caption = (
        "The line is the error on text never trained on, by which the best was kept; dotted, in a range of its "
        "own, is the loss of each step, of whichever members it drew."
    )
    return Chart("losses", "Training", caption, view.curve) if view.curve else None


def notes(said: tuple[str, ...]) -> tuple[Note, ...]:
    """One note for one thing: those that differ only in figures (a block, a count) stand behind the first of them."""
    grouped: dict[str, list[str]] = {}
    for note in said:
        grouped.setdefault(re.sub(r"[0-9]+", "0", note), []).append(note)
    return tuple(Note(some[0], tuple(some[1:])) for some in grouped.values())


def render(view: View) -> str:
    """The page as text."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string((files("regauge.report") / "page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        view=view,
        frontier=_frontier(view),
        curve=_curve(view),
        heats=_heats(view),
        notes=notes(view.notes),
        glossary=WORDS,
    )


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
