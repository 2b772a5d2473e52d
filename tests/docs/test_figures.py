"""Figures in documents come from commands: each table names the one that prints it, README is what the demo said."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from regauge.artifact.receipt import Receipt
from regauge.search.record import read
from tests.docs.test_generated import script

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "bundled" / "code-llama-5m" / "README.md"]
FIGURE = re.compile(r"\d+\.\d|\d ?(ms|%|GB|MB|GB/s|tokens/s|x|×)\b")
COMMAND = re.compile(r"python ((?:benchmarks|scripts|tests)/[\w/]+\.py)|make \w+|regauge \w+ ")
RECORD = ROOT / "docs" / "demo.json"


def sections(text: str) -> list[str]:
    return re.split(r"(?m)^(?=#+ )", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_table_of_figures_names_the_command_that_prints_it(page: Path) -> None:
    for section in sections(page.read_text(encoding="utf-8")):
        rows = [line for line in section.splitlines() if line.startswith("|") and FIGURE.search(line)]
        if rows:
            assert COMMAND.search(section), f"{page.name}: no command prints {rows[0]}"


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "docs" / "decisions").glob("*.md"))], ids=lambda p: p.name)
def test_every_script_that_a_document_names_is_there(page: Path) -> None:
    for path in {found[1] for found in COMMAND.finditer(page.read_text(encoding="utf-8")) if found[1]}:
        assert (ROOT / path).is_file(), f"{page.name} names {path}"


def test_what_a_table_without_a_command_looks_like() -> None:
    assert FIGURE.search("| int4 | 3.2 |")
    assert not COMMAND.search("| int4 | 3.2 |\n\nMeasured here.")


def test_readme_shows_the_record_of_the_demo() -> None:
    """Cell by cell: the block between the marks is what the record says, and nothing else."""
    if not RECORD.exists():
        pytest.skip("docs/demo.json is not there: make demo && python scripts/write_readme.py writes it")
    made = script("write_readme")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert made.marked("table: what `make demo` printed", made.printed(read(RECORD)), text) == text
    receipt = Receipt.model_validate_json(made.RECEIPT.read_text(encoding="utf-8"))
    assert made.marked("words: the last that `make demo` printed", made.words_of(read(RECORD), receipt), text) == text
