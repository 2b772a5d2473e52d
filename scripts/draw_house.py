"""Draws docs/house.svg: the packages of regauge in their layers, and which imports which, read off the imports.

Layers are those that import-linter holds the packages to (pyproject.toml); lines are what the source files import,
behind TYPE_CHECKING too, without those that follow from others. Run it after adding a package or an import:

    python scripts/draw_house.py
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "regauge"
WHAT = {
    "api": "the commands, in Python",
    "cli": "parse, call, print",
    "report": "the page, explain, inspect",
    "search": "options, losses, allocation",
    "ranking": "methods side by side",
    "export": "one file a target",
    "engine": "apply, block by block",
    "hosts": "base: what is asked; transformers: who answers",
    "runtime": "what runs: products, step, store, window",
    "artifact": "what bytes on disk mean",
    "measure": "quality, cost, the machine",
    "text": "corpora, windows of tokens",
    "plan": "recipes",
    "learn": "the one training loop",
    "parts": "axes and the table of parts",
    "rewrites": "moves that keep the function",
    "rounding": "codes, and what is added back",
    "prune": "units, scores, repair",
    "cache": "what is kept of the past",
    "attention": "shared maps, what heads see",
    "tokens": "which tokens go on",
    "elastic": "what may be left out",
    "anatomy": "sites, taps, streams, moves",
    "formats": "grids, grains, steps, terms",
    "kernels": "torch, C++, Triton",
    "amounts": "sizes as people read them",
    "documents": "files that others wrote",
    "errors": "the exception tree",
    "version": "the number",
}
WIDTH, ROW, HIGH, GAP, TOP = 1180, 84, 50, 22, 84
INK, SOFT, LINE, FILL = "#1f2430", "#5b6270", "#b9c0ca", "#f4f6f8"


def packages() -> frozenset[str]:
    """The packages and modules right under src/regauge."""
    found = {path.name for path in SOURCE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    return frozenset(
        found | {path.stem for path in SOURCE.glob("*.py") if not path.stem.startswith("__")} - {"presets"}
    )


def layers() -> list[list[str]]:
    """The layers of pyproject.toml, from the top, of packages that are there."""
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    declared = next(contract for contract in linter["contracts"] if contract["type"] == "layers")["layers"]
    names = [[one.strip(" ()").removeprefix("regauge.") for one in layer.split("|")] for layer in declared]
    there = packages()
    return [kept for layer in names if (kept := [name for name in layer if name in there])]


def imports() -> dict[str, frozenset[str]]:
    """Package → the packages that its files import, wherever the import stands."""
    there = packages()
    found: dict[str, set[str]] = {name: set() for name in there}
    for path in sorted(SOURCE.rglob("*.py")):
        own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if own in there:
            found[own] |= {name for name in _named(ast.parse(path.read_text(encoding="utf-8"))) if name in there}
    return {name: frozenset(some - {name}) for name, some in found.items()}


def _named(tree: ast.Module) -> Iterator[str]:
    """The packages of regauge that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                if one.name.startswith("regauge."):
                    yield one.name.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "regauge":
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("regauge."):
            yield node.module.split(".")[1]


def reduced(edges: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """Without the edges that follow from others."""

    def below(name: str) -> frozenset[str]:
        found = set(edges[name])
        for one in edges[name]:
            found |= below(one)
        return frozenset(found)

    return {
        name: frozenset(one for one in some if not any(one in below(other) for other in some if other != one))
        for name, some in edges.items()
    }


def draw() -> str:
    rows = layers()
    height = TOP + ROW * len(rows) + 10
    places: dict[str, tuple[float, float, float]] = {}
    for number, row in enumerate(rows):
        widths = [max(96.0, 7.2 * max(len(WHAT.get(name, "")), len(name)) + 20) for name in row]
        x = (WIDTH - sum(widths) - GAP * (len(row) - 1)) / 2
        for name, width in zip(row, widths, strict=True):
            places[name] = (x, TOP + ROW * number, width)
            x += width + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="36" y="34" font-size="17" font-weight="600" fill="{INK}">The house: imports only go down</text>',
        f'<text x="36" y="56" fill="{SOFT}">A line: the upper package imports the lower one. '
        "What follows from other lines is left out.</text>",
    ]
    for name, some in sorted(reduced(imports()).items()):
        for other in sorted(some):
            (x, y, width), (to_x, to_y, to_width) = places[name], places[other]
            start, end = (x + width / 2, y + HIGH), (to_x + to_width / 2, to_y)
            bend = (end[1] - start[1]) / 2
            parts.append(
                f'<path d="M{start[0]:.0f} {start[1]:.0f} C{start[0]:.0f} {start[1] + bend:.0f} {end[0]:.0f} '
                f'{end[1] - bend:.0f} {end[0]:.0f} {end[1]:.0f}" fill="none" stroke="{LINE}" stroke-width="1.4"/>'
            )
    for name, (x, y, width) in places.items():
        middle = x + width / 2
        parts.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{HIGH}" rx="6" fill="{FILL}" stroke="{LINE}"/>'
            f'<text x="{middle:.0f}" y="{y + 20:.0f}" text-anchor="middle" font-weight="600" fill="{INK}">{name}</text>'
            f'<text x="{middle:.0f}" y="{y + 38:.0f}" text-anchor="middle" font-size="12" fill="{SOFT}">'
            f"{escape(WHAT[name])}</text>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "house.svg").write_text(draw(), encoding="utf-8")
