"""What others wrote (names, paths, notes, commands) is text wherever it is shown: on the page and in the terminal.

Records are filled by their own types, so that a field that comes later is walked too.
"""

from __future__ import annotations

import dataclasses
import io
import re
import sys
import types
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from pydantic import BaseModel

from regauge.artifact.receipt import Receipt
from regauge.cli import bars, models, rows, show, tell, tell_training
from regauge.cli.main import main
from regauge.engine.estimate import DryRun
from regauge.engine.watchdog import Progress
from regauge.measure.compare import Comparison
from regauge.report import page
from regauge.report.inspection import Inspection
from regauge.report.methods import PRESET, Method
from regauge.report.run import of_run
from regauge.report.view import of_receipt
from regauge.search.record import Run
from regauge.search.sense import Sensitivity

MARKUP = (
    "{0}<!--<script>{0}</script>{0}--><img src=x onerror={0}>{0}\" ' onload={0}&lt;{0}&amp;{0}\u2028\u2029]]>"
    "</title></style></td>{0}<b>{0}</b><br><a href=javascript:{0}>%{{x}}{{{{{0}}}}}"
)
MARKED_UP = "{0}[red]{0}[/] [/nothing] [link=file:{0}]:smile:{0}\x1b[2J\x1b]0;{0}\x07{0}\x9b31m\b\r{0}\u202e{0}"
CUT = ("hash", "sha256")  # the page shows the first of their characters


class Fill:
    """Builds a record of any type with every field set, each string one of its own."""

    def __init__(self, text: str, fixed: dict[str, object]) -> None:
        self.text, self.fixed = text, fixed
        self.made: dict[str, str] = {}  # mark → field

    def say(self, field: str) -> str:
        mark = f"({len(self.made)})"
        self.made[mark] = field
        return self.text.format(mark)

    def of(self, kind: Any, field: str = "") -> Any:
        if field in self.fixed:
            return self.fixed[field]
        origin, args = get_origin(kind), get_args(kind)
        if kind is str or kind is object or kind is Any:
            return self.say(field)
        if kind in (int, float, bool):
            return kind(1)
        if origin in (Union, types.UnionType):
            return self.of(next(arg for arg in args if arg is not type(None)), field)
        if origin is Literal:  # takes nothing else
            return args[0]
        if origin is tuple:
            return tuple(self.of(arg, f"{field}[]") for arg in (args[:1] * 2 if args[-1] is Ellipsis else args))
        if origin in (dict, Mapping):
            return {self.of(args[0], f"{field} key"): self.of(args[1], f"{field} value")}
        hints = get_type_hints(kind)
        names = kind.model_fields if issubclass(kind, BaseModel) else [one.name for one in dataclasses.fields(kind)]
        found = {name: self.of(hints[name], f"{kind.__name__}.{name}") for name in names}
        return kind.model_validate(found) if issubclass(kind, BaseModel) else kind(**found)


PAGES: dict[str, tuple[type, dict[str, object]]] = {
    "receipt": (Receipt, {}),
    "run": (Run, {}),
    "run, searched points": (Run, {"Point.kind": "searched"}),
    "run, uniform points": (Run, {"Point.kind": "uniform"}),
    "run, costs": (Run, {"Run.costs key": "original"}),
}


def filled(name: str, text: str) -> tuple[str, dict[str, str]]:
    """A page and the marks of the fields that it was made from."""
    kind, fixed = PAGES[name]
    fill = Fill(text, fixed)
    receipt: Receipt = fill.of(Receipt)
    view = of_receipt(receipt) if kind is Receipt else of_run(fill.of(Run), receipt)
    return page.render(view), fill.made


class Markup(HTMLParser):
    """Everything that is not text, in order; the text; and what stands in script elements."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[object] = []
        self.text, self.scripts, self.inside = "", "", ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, attrs))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.found.append(tag)
        self.inside = ""

    def handle_comment(self, data: str) -> None:
        self.found.append(("comment", data))

    def handle_decl(self, decl: str) -> None:
        self.found.append(("decl", decl))

    def unknown_decl(self, data: str) -> None:
        self.found.append(("unknown", data))

    def handle_pi(self, data: str) -> None:
        self.found.append(("pi", data))

    def handle_data(self, data: str) -> None:
        if self.inside in ("script", "style"):
            self.scripts += data
        else:
            self.text += data


@pytest.mark.parametrize("name", PAGES)
def test_no_field_of_a_record_is_markup_on_the_page(name: str) -> None:
    """Every string of it says markup; the page has the same elements as where they say nothing of the kind."""
    as_long = re.sub("[^\0]", "-", MARKUP.format("\0")).replace("\0", "{0}")  # so that charts are drawn as large
    (hostile, made), (harmless, _) = filled(name, MARKUP), filled(name, as_long)
    seen, plain = Markup(hostile), Markup(harmless)
    assert seen.found == plain.found
    shown = [mark for mark in made if mark in plain.text]
    assert len(shown) > 20
    for mark in shown:
        if not made[mark].endswith(CUT):
            said = MARKUP.format(mark)
            assert (said if made[mark] != "Run.source" else said.rpartition("/")[2]) in seen.text, made[mark]
    assert seen.scripts == plain.scripts  # nothing of a record stands in a script or style


TOLD: dict[str, tuple[type, Callable[[Any], None]]] = {
    "apply": (Receipt, lambda found: tell.receipt(found, Path("out"))),
    "dry run": (DryRun, tell.dry_run),
    "fit": (Run, lambda found: tell.run(found, Path("out"))),
    "measure": (Comparison, tell.measurement),
    "inspect": (Inspection, models.inspection),
    "sensitivity": (Sensitivity, models.sensitivity),
    "train": (Receipt, lambda found: tell_training.trained(found, Path("out"))),
    "methods": (Method, lambda found: rows.methods([found, dataclasses.replace(found, kind=PRESET)])),
}


@pytest.mark.parametrize("command", TOLD)
def test_no_field_of_a_record_acts_on_the_terminal(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither rich's own markup nor what a terminal takes for a command; each text is shown whole."""
    monkeypatch.setattr(show, "WIDE", 100_000)
    kind, say = TOLD[command]
    said = []
    for text in (MARKED_UP, "{0}"):
        fill = Fill(text, {})
        say(fill.of(kind))
        said.append(capsys.readouterr().out)
    hostile, harmless = said
    assert all(one == "\n" or one.isprintable() for one in hostile)
    shown = [mark for mark in fill.made if mark in harmless]
    assert shown
    for mark in shown:
        if not fill.made[mark].endswith(CUT):
            assert ascii(MARKED_UP.format(mark))[1:-1] in hostile, fill.made[mark]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_and_errors_show_markup_as_it_is_written(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(bars, "PATIENCE", -1.0)
    with bars.progress() as watch:
        watch(Progress("text", message="[red]one[/] [/nothing]\x1b]0;x\x07"))
        watch(Progress("[red]two[/] [/nothing]\x1b]0;x\x07", 1, 2))
    assert main(["[red]three[/]\x1b]0;x\x07"]) == 2

    def fails(*_: object) -> None:
        raise OSError(5, "no", "four\x1b]0;x\x07")

    monkeypatch.setattr("regauge.report.build.write", fails)
    assert main(["report", "run"]) == 1
    said = stderr.getvalue()
    for shown in (
        "[red]one[/] [/nothing]\\x1b]0;x\\x07",
        "[red]two[/] [/nothing]\\x1b]0;x\\x07",
        "[red]three[/]",
        "four\\x1b]0;x\\x07",
    ):
        assert shown in said
    assert "\x1b]0" not in said
