"""Puts what the commands print into the README, so that its figures are never typed by hand.

    make demo && python scripts/write_readme.py
    python scripts/write_readme.py --explain       # only the output of `explain`, which needs no run

The tables come from the run record that `make demo` left in out/demo. That record is kept as docs/demo.json, so that a
test can hold README to it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import regauge as rg
from regauge.report import figures
from regauge.report.view import Table
from regauge.search.record import Run, read

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RUN = ROOT / "out" / "demo"
RECORD = ROOT / "docs" / "demo.json"


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


def main(arguments: list[str]) -> int:
    text = README.read_text(encoding="utf-8")
    explained = "```text\n$ regauge explain gptq-w4g128\n" + rg.explain("gptq-w4g128").rstrip() + "\n```"
    text = marked("explain: regauge explain gptq-w4g128", explained, text)
    if "--explain" not in arguments:
        run = read(RUN)
        record = run.model_dump_json(exclude={"samples", "sites"})
        RECORD.write_text(
            record.replace(f"{ROOT}/", "") + "\n", encoding="utf-8"
        )  # paths of the clone, wherever it lay
        text = marked("table: what `make demo` printed", printed(run), text)
    README.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
