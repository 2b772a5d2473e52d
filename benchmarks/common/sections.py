"""A page of the docs whose sections a benchmark writes: one under the same heading is replaced, another is added."""

from __future__ import annotations

import re
from pathlib import Path


def put(page: Path, heading: str, text: str) -> None:
    """Writes the section `## heading`, which ends where the next of its kind begins."""
    whole = page.read_text(encoding="utf-8").rstrip("\n") + "\n"
    section = f"## {heading}\n\n{text.strip()}\n"
    found = re.search(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", whole, re.MULTILINE | re.DOTALL)
    if found is None:
        whole += "\n" + section
    else:
        after = whole[found.end() :]
        whole = whole[: found.start()] + section + ("\n" + after if after else "")
    page.write_text(whole, encoding="utf-8")
