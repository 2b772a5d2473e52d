"""A page of the docs whose sections a benchmark writes: one under the same heading is replaced, another is added."""

from __future__ import annotations

import re
from pathlib import Path

PATTERN = r"^## {}\n.*?(?=^## |\Z)"


def section(page: Path, heading: str) -> str:
    """What is under `## heading`; nothing where it is not there."""
    found = re.search(PATTERN.format(re.escape(heading)), page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return found[0].partition("\n")[2] if found else ""


def merged(before: str, rows: list[str], key: int) -> list[str]:
    """Rows of the table in a section, of which those with the same first `key` cells are replaced by `rows`; new ones
    come after them."""
    old = [line for line in before.splitlines() if line.startswith("| ") and not line.startswith("| |")]
    found = {tuple(row.split(" | ")[:key]): row for row in [*old, *rows]}
    return list(found.values())


def put(page: Path, heading: str, text: str) -> None:
    """Writes the section `## heading`, which ends where the next of its kind begins."""
    whole = page.read_text(encoding="utf-8").rstrip("\n") + "\n"
    new = f"## {heading}\n\n{text.strip()}\n"
    found = re.search(PATTERN.format(re.escape(heading)), whole, re.MULTILINE | re.DOTALL)
    if found is None:
        whole += "\n" + new
    else:
        after = whole[found.end() :]
        whole = whole[: found.start()] + new + ("\n" + after if after else "")
    page.write_text(whole, encoding="utf-8")
