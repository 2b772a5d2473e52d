"""Draws docs/axes.svg: every axis as a column of its parts, and a few published methods as lines through them.

Drawn from the table of parts and from the presets, so the picture is what the code is. Run it after adding a part:

    python scripts/draw_axes.py
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

from regauge.parts import AXES, REWRITES, TABLE, WEIGHTS
from regauge.plan import Plan, load

COLUMNS = ("rewrite", *AXES[WEIGHTS])
PLACES = {WEIGHTS, REWRITES}
METHODS = (
    ("gptq-w4g128", "#2563a8"),
    ("quarot-gptq-w4g128", "#d9730d"),
    ("nvfp4", "#2e8b57"),
    ("smoothquant-plus", "#8d4fb0"),
)
WIDTH, COLUMN, ROW, TOP, LEFT = 1180, 164, 34, 96, 36
INK, SOFT, LINE = "#1f2430", "#5b6270", "#e3e6ea"
FOLDED = {"grid": ("int2 … int8", "int2-asym … int8-asym")}


def shown(axis: str) -> list[str]:
    """Names of a column: the integer grids share two lines, and every axis has its identity."""
    names = [name for name, part in TABLE[axis].items() if not name.startswith("int") and PLACES & set(part.places)]
    folded = list(FOLDED.get(axis, ()))
    return folded + names + (["–"] if axis in {"rewrite", "compensator"} else [])


def row_of(axis: str, name: str) -> int:
    names = shown(axis)
    if name.startswith("int"):
        name = FOLDED["grid"][name.endswith("-asym")]
    return names.index(name)


def coordinates(plan: Plan) -> dict[str, list[str]]:
    """The parts that a plan names on each axis; its first rule speaks for it."""
    point = plan.rules[0].point
    assert point is not None
    found = {axis: [point.name(axis) or "–"] for axis in COLUMNS[1:]}
    found["rewrite"] = [spec.part for spec in plan.rewrites] or ["–"]
    # A fallback grain is drawn at its first choice.
    found["grain"] = [found["grain"][0].split(" else ")[0].split(":")[0]]
    return found


def draw() -> str:
    height = TOP + ROW * max(len(shown(axis)) for axis in COLUMNS) + 70
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="34" font-size="17" font-weight="600" fill="{INK}">A method is a line through the axes'
        "</text>",
    ]
    place = {
        (axis, name): (LEFT + COLUMN * column, TOP + ROW * row)
        for column, axis in enumerate(COLUMNS)
        for row, name in enumerate(shown(axis))
    }
    for offset, (name, colour) in enumerate(METHODS):
        found, points = coordinates(load(name)), []
        for column, axis in enumerate(COLUMNS):
            x = LEFT + COLUMN * column
            ys = [TOP + ROW * row_of(axis, part) + 5 + 2.5 * offset for part in found[axis]]
            points += [(x, ys[-1]), (x + COLUMN - 36, ys[-1])]
            for y in ys[:-1]:  # several rewrites: all underlined, the line leaves from the last
                parts.append(f'<path d="M{x},{y} h{COLUMN - 36}" stroke="{colour}" stroke-width="2"/>')
        path = " ".join(f"{'M' if i == 0 else 'L'}{x:.0f},{y:.1f}" for i, (x, y) in enumerate(points))
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"/>')
        x = LEFT + 240 * offset
        parts.append(f'<rect x="{x}" y="{height - 34}" width="18" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 26}" y="{height - 28}" fill="{INK}">{escape(name)}</text>')
    for axis in COLUMNS:
        x = place[axis, shown(axis)[0]][0]
        parts.append(f'<text x="{x}" y="{TOP - 30}" font-weight="600" fill="{INK}">{axis}</text>')
        parts.append(f'<line x1="{x}" x2="{x + COLUMN - 26}" y1="{TOP - 22}" y2="{TOP - 22}" stroke="{LINE}"/>')
    for (_, name), (x, y) in place.items():
        parts.append(
            f'<text x="{x + 2}" y="{y}" fill="{SOFT}" stroke="#ffffff" stroke-width="4" paint-order="stroke">'
            f"{escape(name)}</text>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    target = Path(__file__).resolve().parents[1] / "docs" / "axes.svg"
    target.write_text(draw(), encoding="utf-8")
    print(f"wrote {target.name}")
