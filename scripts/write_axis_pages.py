"""Writes docs/axes/: one page an axis, read off the table of parts and the parts' own docstrings, and one of places.

    python scripts/write_axis_pages.py            # write them
    python scripts/write_axis_pages.py --check    # exit 1 where they are stale

A test holds the pages against the code, so a new part brings its own page.
"""

from __future__ import annotations

import sys
from pathlib import Path

from regauge.parts import PLACES, TABLE, Axis, empty
from regauge.report.explanation import facts

TARGET = Path(__file__).resolve().parents[1] / "docs" / "axes"
LEADS = {
    "grid": "Which numbers exist. Every grid is idempotent and monotone, and encodes to its packed bits.",
    "grain": "Which weights share a step. Cutting and joining again gives the matrix back.",
    "ranger": "How big the step is. What is fitted is the step as it will be stored.",
    "scale": "How the step itself is stored.",
    "transform": "What an activation is multiplied by before it is rounded, and its weights by the inverse.",
    "rounder": "Which code each weight takes. Each takes the nearest codes of its steps where XᵀX is the identity.",
    "compensator": "What is added back for the error.",
    "unit": "Pruning: what is taken out as one.",
    "score": "Pruning: which units matter. Higher is kept.",
    "allocation": "Pruning: how many units stay where.",
    "schedule": "Pruning: in how many steps units go.",
    "repair": "Pruning: what is done to the weights that read the units that stay.",
    "arithmetic": "How products are taken while `measure --arithmetic` evaluates a model; nothing is run so.",
    "rewrite": "Moves that keep the function and make it easier to compress. Each carries a certificate.",
}


PLACES_LEAD = """A rule of a recipe is about a *place*, and its coordinates stand on the axes of that place. One section
a place; a selector before each rule says which of them it takes, and the last that matches wins."""
FORMATS = "a grid and a grain in one word, `int2-asym/time:32`"


def places() -> str:
    """Markdown of every place with its axes."""
    lines = ["# Places", "", PLACES_LEAD, ""]
    for place in PLACES.values():
        refused = "such a recipe is read, resolved and then refused."
        alone = f" They act in models that draw images scale by scale alone; of others {refused}"
        acts = "" if place.acts else alone if place.scales else f" Nothing acts on them yet: {refused}"
        lines += [f"## `{place.name}`", "", f"Of {place.of[1]}, such as `{place.like}`.{acts}", ""]
        lines += ["| axis | decides | where nothing is said | parts |", "|---|---|---|---|"]
        for axis in place.axes:
            said = "must be said" if axis.required else f"`{axis.default}`" if axis.default else "nothing"
            lines.append(f"| {axis.name} | {axis.what} | {said} | {_parts(place.name, axis)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _parts(place: str, axis: Axis) -> str:
    if axis.parts not in TABLE:
        return "none yet" if empty(axis.parts, place) else FORMATS
    names = [f"`{name}`" for name, part in TABLE[axis.parts].items() if place in part.places]
    return f"[{len(names)}]({axis.parts}.md): {', '.join(names)}" if names else "none yet"


def lead(axis: str) -> str:
    """What an axis decides: in our words, or in those of its declaration."""
    declared = (one.what for place in PLACES.values() for one in place.axes if one.parts == axis)
    return LEADS.get(axis) or f"{' / '.join(dict.fromkeys(declared)).capitalize()}."


def page(axis: str) -> str:
    """Markdown of one axis."""
    lines = [f"# {axis}", "", lead(axis), ""]
    for name in TABLE[axis]:
        found = next(fact for fact in facts(name) if fact["kind"] == axis)
        lines += [f"## `{name}`", "", str(found["text"]) or str(found["what"]), ""]
        options, cites, used = found["options"], found["cite"], found["used"]
        told = [f"For {', '.join(str(place) for place in TABLE[axis][name].places)}."]
        told += [f"Cost: {found['cost']}."] if found["cost"] else []
        lines += [" ".join(told), ""]
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
    pages = {TARGET / f"{axis}.md": page(axis) for axis in TABLE} | {TARGET / "places.md": places()}
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
