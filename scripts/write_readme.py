"""Puts what the commands print into the README, so that its figures are never typed by hand.

    make demo && python scripts/write_readme.py
    python scripts/write_readme.py --explain       # only the output of `explain`, which needs no run

The tables come from the run record that `make demo` left in out/demo. That record is kept as docs/demo.json, and its
receipt beside it, so that a test can hold README to them. A record of another clone is refused.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import regauge as rg
from regauge.artifact.folder import read_receipt
from regauge.artifact.receipt import Receipt
from regauge.report import figures, words
from regauge.report.view import Table
from regauge.search.record import Run, read

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RUN = ROOT / "out" / "demo"
RECORD = ROOT / "docs" / "demo.json"
RECEIPT = ROOT / "docs" / "demo-receipt.json"


def marked(name: str, body: str, text: str) -> str:
    """`text` with everything between the marks of `name` replaced by `body`."""
    block = f"<!-- {name} -->\n\n{body.strip()}\n\n<!-- end -->"
    found = re.compile(rf"<!-- {re.escape(name)} -->\n.*?<!-- end -->", re.DOTALL)
    if not found.search(text):
        raise SystemExit(f"README.md has no marks <!-- {name} --> … <!-- end -->")
    return found.sub(lambda _: block, text, count=1)


def markdown(table: Table) -> list[str]:
    """A table as it stands on the page and the terminal, with its sentence below."""
    rows = ["| " + " | ".join(row) + " |" for row in (table.header, *table.rows)]
    return [rows[0], "|" + "---|" * len(table.header), *rows[1:], "", table.caption if table.rows else table.empty, ""]


def printed(run: Run) -> str:
    """What `fit` printed last."""
    return "\n".join([line for table in figures.tables(run) for line in markdown(table)] + [figures.made(run)])


def words_of(run: Run, receipt: Receipt) -> str:
    """Its last words, paths as from the clone."""
    said = words.of_run(run, receipt, "out/demo")
    return "\n".join(["```text", *(f"{one.about:<13}{one.said}".rstrip() for one in said), "```"])


def main(arguments: list[str]) -> int:
    text = README.read_text(encoding="utf-8")
    explained = "```text\n$ regauge explain gptq-w4g128\n" + rg.explain("gptq-w4g128").rstrip() + "\n```"
    text = marked("explain: regauge explain gptq-w4g128", explained, text)
    if "--explain" not in arguments:
        run = read(RUN)
        if Path(run.source).parent.parent != ROOT:
            raise SystemExit(f"out/demo was made of {run.source}, which is not of this clone: make demo")
        record = run.model_dump_json(exclude={"samples", "sites"})
        RECORD.write_text(
            record.replace(f"{ROOT}/", "") + "\n", encoding="utf-8"
        )  # paths of the clone, wherever it lay
        receipt = read_receipt(RUN)
        RECEIPT.write_text(receipt.model_dump_json(exclude={"sites", "moves"}) + "\n", encoding="utf-8")
        run = read(RECORD)
        text = marked("words: the last that `make demo` printed", words_of(run, receipt), text)
        text = marked("table: what `make demo` printed", printed(run), text)
    README.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
