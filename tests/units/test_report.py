"""The report page: what it says, and that nothing in a model's names can break out of it."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import plotly.graph_objects as go
import pytest

from regauge.artifact.receipt import MoveReceipt, Receipt, SiteReceipt
from regauge.errors import OutputError
from regauge.report import charts
from regauge.report.page import render, write
from regauge.report.view import Point, Sample, View, of_receipt

NASTY = "</script><script>alert(1)</script>"


def a_site(name: str, kind: str, bits: float, error: float | None = 0.01, **more: object) -> SiteReceipt:
    return SiteReceipt(
        name=name,
        kind=kind,
        shape=(8, 16),
        choice={"grid": "int4"},
        bits=bits,
        bytes_before=256,
        bytes_after=int(bits * 16),
        error=error,
        **more,
    )


def a_receipt(**more: object) -> Receipt:
    sites = (
        a_site("embed", "embed", 8.0, None),
        a_site("blocks.0.attn.q", "q", 4.25),
        a_site("blocks.10.attn.q", "q", 4.25),
        a_site("blocks.2.attn.q", "q", 3.25, kept="the plan does not name it"),
        a_site("blocks.0.mlp.down", "down", 5.0, 0.5, fallback="channel: group 128 does not divide 172"),
    )
    fields: dict[str, object] = {
        "regauge": "0.1.0",
        "plan": "gptq-w4g128",
        "plan_hash": "a" * 64,
        "source": "models/" + NASTY,
        "source_hash": "b" * 64,
        "family": "llama",
        "wire": "regauge",
        "sites": sites,
        "moves": (
            MoveReceipt(
                rewrite="rotate",
                block=0,
                streams=("residual",),
                exact=3.2e-15,
                stored=1.5e-3,
                tolerance=1e-10,
                tolerance_stored=2e-2,
            ),
        ),
        "bytes_bf16": 4000,
        "bytes_after": 1200,
        "ratio": 0.3,
        "command": "regauge apply gptq-w4g128 x -o y",
    }
    return Receipt(**(fields | more))


POINTS = (
    Point("0", "searched", 1_000_000, predicted=0.2, measured=0.25, interval=(0.2, 0.3)),
    Point("1", "searched", 2_000_000, predicted=0.05, measured=0.04, interval=(0.03, 0.05)),
    Point("1", "built", 2_000_100, measured=0.045, interval=(0.03, 0.05), chosen=True),
    Point("2", "searched", 3_000_000, predicted=0.01),
    Point("gptq-w4g128", "uniform", 2_100_000, measured=0.08, interval=(0.07, 0.09)),
)


def cells(figure: go.Figure) -> list[list[float | None]]:
    return [list(row) for row in figure.data[0].z]


class Resources(HTMLParser):
    """Everything that the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for key, value in attrs if key in {"src", "href"} and value != "data:,"]


def test_the_page_fetches_nothing() -> None:
    parser = Resources()
    parser.feed(render(of_receipt(a_receipt())))
    assert parser.found == []


def test_names_cannot_break_out_of_the_page() -> None:
    view = View(
        title=NASTY,
        subtitle=NASTY,
        cards=(("size", NASTY, NASTY),),
        points=(Point(NASTY, "searched", 1, 0.1, 0.1, chosen=True),),
        sites=(a_site(NASTY, NASTY, 4.0),),
        tables=(),
        samples=(Sample(NASTY, NASTY, NASTY),),
        notes=(NASTY,),
        command=NASTY,
        facts=((NASTY, NASTY),),
    )
    assert NASTY not in render(view)


def test_names_cannot_change_how_a_script_is_read() -> None:
    """`<!--<script>` in a script element makes a browser look for two ends of it."""
    point = Point("<!--<script>", "searched", 1, 0.1, 0.1)
    text = render(replace(of_receipt(a_receipt()), points=(point,)))
    assert "<!--<script>" not in text
    assert "\\u0026lt;!--\\u0026lt;script" in text


def test_everything_that_was_not_done_is_on_the_page() -> None:
    page = render(of_receipt(a_receipt(notes=("blocks.3.moe.1: 4 tokens only",), refusals=("nf4 is unknown",))))
    for said in (
        "group 128 does not divide 172",
        "the plan does not name it",
        "4 tokens only",
        "nf4 is unknown",
    ):
        assert said in page
    assert "3.2e-15" in page
    assert "regauge apply gptq-w4g128 x -o y" in page


def test_heat_puts_blocks_in_number_order_and_means_over_size() -> None:
    figure = charts.heat(a_receipt().sites, "bits")
    assert figure.data[0].x == ("outside", "0", "2", "10")
    assert figure.data[0].y == ("embed", "q", "down")
    assert cells(figure) == [[8.0, None, None, None], [None, 4.25, 3.25, 4.25], [None, 5.0, None, None]]


def test_experts_share_a_cell_weighted_by_size() -> None:
    small = a_site("blocks.0.moe.0.up", "up", 2.0)
    large = small.model_copy(update={"name": "blocks.0.moe.1.up", "bits": 5.0, "shape": (16, 16)})
    assert cells(charts.heat((small, large), "bits")) == [[4.0]]


def test_frontier_never_mixes_predicted_and_measured() -> None:
    traces = {trace.name: trace for trace in charts.frontier(POINTS).data}
    assert list(traces["predicted"].y) == [0.2, 0.05, 0.01]
    assert list(traces["measured in memory"].y) == [0.25, 0.04]
    assert list(traces["measured in memory"].error_y.arrayminus) == pytest.approx([0.05, 0.01])
    assert list(traces["built"].y) == [0.045]
    assert list(traces["uniform presets"].x) == [2.1]


def test_a_directory_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    with pytest.raises(OutputError, match="could not be written"):
        write(of_receipt(a_receipt()), blocked / "report.html")
    assert blocked.read_text() == "not a directory"
    assert list(tmp_path.iterdir()) == [blocked]


def test_the_page_is_written_whole(tmp_path: Path) -> None:
    path = write(of_receipt(a_receipt()), tmp_path / "deep" / "report.html")
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    assert re.search(r"0\.300×", path.read_text(encoding="utf-8"))
