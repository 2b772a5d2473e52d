"""The report page: what it says, and that nothing in a model's names can break out of it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from regauge.artifact.receipt import MoveReceipt, Receipt, SiteReceipt
from regauge.errors import OutputError
from regauge.report import charts
from regauge.report.glossary import WORDS
from regauge.report.page import notes, render, write
from regauge.report.view import Point, Sample, View, exceptions, of_receipt
from regauge.report.words import Words

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
        words=(Words(NASTY, NASTY), Words("", f"{NASTY}   # {NASTY}", NASTY)),
        points=(Point(NASTY, "searched", 1, 0.1, 0.1, chosen=True),),
        sites=(a_site(NASTY, NASTY, 4.0),),
        first=(),
        tables=(),
        samples=(Sample(NASTY, NASTY, NASTY),),
        notes=(NASTY,),
        command=NASTY,
        facts=((NASTY, NASTY),),
    )
    assert NASTY not in render(view)


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
    found = charts.cells(a_receipt().sites, "bits")
    assert found.blocks == ("outside", "0", "2", "10")
    assert found.kinds == ("embed", "q", "down")
    assert found.values == ((8.0, None, None, None), (None, 4.25, 3.25, 4.25), (None, 5.0, None, None))
    drawn = charts.heat(a_receipt().sites, "bits")
    assert re.findall(r'class="cell"[^>]*>([^<]*)<', drawn) == ["8.00", "4.25", "3.25", "4.25", "5.00"]
    assert "blocks.0.mlp.down 8×16: 5.00 bits a weight, 80 B, output error 0.5000" in drawn


def test_experts_share_a_cell_weighted_by_size() -> None:
    small = a_site("blocks.0.moe.0.up", "up", 2.0)
    large = small.model_copy(update={"name": "blocks.0.moe.1.up", "bits": 5.0, "shape": (16, 16)})
    assert charts.cells((small, large), "bits").values == ((4.0,),)


def test_frontier_never_mixes_predicted_and_measured() -> None:
    found = charts.curves(POINTS)
    assert [dot.y for dot in found.predicted] == [0.2, 0.05, 0.01]
    assert [dot.y for dot in found.measured] == [0.25, 0.04]
    assert [dot.interval for dot in found.measured] == [(0.2, 0.3), (0.03, 0.05)]
    assert [dot.y for dot in found.built] == [0.045]
    assert [dot.x for dot in found.uniform] == [2.1]


def test_the_frontier_draws_each_point_where_it_is() -> None:
    """A fewer bytes stand further left, a smaller KL lower; the axes have round figures."""
    drawn = charts.frontier(POINTS)
    circles = re.findall(r'<circle cx="([0-9.]+)" cy="([0-9.]+)" r="5"', drawn)
    (left, high), (right, low) = [(float(x), float(y)) for x, y in circles]
    assert left < right
    assert high < low  # y grows downwards
    for figure in ("1.5", "2.5", "0.01", "0.2"):
        assert f">{figure}</text>" in drawn
    assert charts.ticks(0.94, 2.06) == [1.0, 1.2, 1.4, 1.6, 1.8, 2.0]
    assert charts.decades(-2.1, -0.9) == [0.01, 0.02, 0.05, 0.1]


def test_one_point_or_none_is_drawn_too() -> None:
    assert charts.frontier(()) == ""
    assert "<circle" in charts.frontier((Point("0", "searched", 5, 0.1, 0.1),))


def test_one_note_for_one_thing() -> None:
    found = notes(("blocks.3: 4 tokens only", "no text", "blocks.11: 9 tokens only"))
    assert [(note.said, note.alike) for note in found] == [
        ("blocks.3: 4 tokens only", ("blocks.11: 9 tokens only",)),
        ("no text", ()),
    ]
    alike = tuple(a_site(f"blocks.{block}.mlp.down", "down", 16.0, kept="too wide") for block in range(3))
    assert exceptions(a_receipt(sites=alike)).rows == (("blocks.*.mlp.down", "3", "8×16", "too wide"),)


def test_the_page_leads_with_the_last_words_and_what_loads_it() -> None:
    page = render(of_receipt(a_receipt(wire="compressed-tensors"), "my-out"))
    assert page.index("3.3 times smaller") < page.index("What loads it") < page.index("What was spent where")
    for line in ("vllm serve my-out", "regauge serve my-out", "AutoModelForCausalLM.from_pretrained"):
        assert f'<code class="copy">{line}' in page.replace("transformers.Auto", "Auto")
    closed = render(of_receipt(a_receipt(refusals=("it has no nf4 weights",))))
    assert "no: it has no nf4 weights" in closed
    assert "not compressed-tensors" not in closed  # said once


def test_the_glossary_is_that_of_the_documents() -> None:
    text = (Path(__file__).parents[2] / "docs" / "glossary.md").read_text(encoding="utf-8")
    known = dict(re.findall(r"- \*\*([^*]+)\*\*: (.*)", re.sub(r"\n  ", " ", text)))
    assert {word: known.get(word) for word, _ in WORDS} == dict(WORDS)


def test_the_page_is_small_and_has_both_themes() -> None:
    page = render(of_receipt(a_receipt()))
    assert len(page) < 100_000
    assert "prefers-color-scheme: dark" in page
    assert '[data-theme="dark"]' in page


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
    assert re.search(r"\(0\.300x\)", path.read_text(encoding="utf-8"))
