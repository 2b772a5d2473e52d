"""Writes docs/axes/: one page an axis, read off the table of parts and the parts' own docstrings.

    python scripts/write_axis_pages.py            # write them
    python scripts/write_axis_pages.py --check    # exit 1 where they are stale

A test holds the pages against the code, so a new part brings its own page.
"""

from __future__ import annotations

import sys
from pathlib import Path

from regauge.parts import TABLE
from regauge.report.explanation import facts

TARGET = Path(__file__).resolve().parents[1] / "docs" / "axes"
LEADS = {
    "grid": "Which numbers exist. Every grid is idempotent and monotone, and encodes to its packed bits.",
    "grain": "Which weights share a step. Cutting and joining again gives the matrix back.",
    "ranger": "How big the step is. What is fitted is the step as it will be stored.",
    "scale": "How the step itself is stored.",
    "transform": "What an activation is multiplied by before it is rounded, and its weights by the inverse.",
    "rounder": "Which code each weight takes. Each equals nearest rounding where XᵀX is the identity.",
    "compensator": "What is added back for the error.",
    "unit": "Pruning: what is taken out as one.",
    "score": "Pruning: which units matter. Higher is kept.",
    "allocation": "Pruning: how many units stay where.",
    "schedule": "Pruning: in how many steps units go.",
    "repair": "Pruning: what is done to the weights that read the units that stay.",
    "rewrite": "Moves that keep the function and make it easier to compress. Each carries a certificate.",
}


def page(axis: str) -> str:
    """Markdown of one axis."""
    lines = [f"# {axis}", "", LEADS.get(axis, ""), ""]
    for name in TABLE[axis]:
        found = next(fact for fact in facts(name) if fact["kind"] == axis)
        lines += [f"## `{name}`", "", str(found["text"]) or str(found["what"]), ""]
        options, cites, used = found["options"], found["cite"], found["used"]
        assert isinstance(options, dict)
        assert isinstance(cites, list)
        assert isinstance(used, list)
        if options:
            told = ", ".join(f"`{key}`" if value is None else f"`{key}: {value}`" for key, value in options.items())
            lines += [f"Options: {told}.", ""]
        if cites:
            lines += [f"Source: {', '.join(f'arXiv:{cite}' if cite[:1].isdigit() else cite for cite in cites)}.", ""]
        if used:
            lines += [f"Used by {', '.join(f'`{preset}`' for preset in used)}{', …' if len(used) == 12 else ''}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str]) -> int:
    pages = {TARGET / f"{axis}.md": page(axis) for axis in TABLE}
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        for path in stale:
            print(f"stale: docs/axes/{path.name}; run python scripts/write_axis_pages.py", file=sys.stderr)
        return 1 if stale else 0
    TARGET.mkdir(parents=True, exist_ok=True)
    for path in stale:
        path.write_text(pages[path], encoding="utf-8")
    print(f"{len(pages)} pages, {len(stale)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
