"""The charts of the page, as SVG with no script. Colours come from the page's style sheet, so that both themes hold,
and no reader must see red from green. What is drawn (`curves`, `cells`) stands apart from how."""

from __future__ import annotations

import html
import math
import re
from dataclasses import dataclass

from regauge.amounts import told
from regauge.artifact.receipt import SiteReceipt
from regauge.report.view import Point

ORDER = ("embed", "position", "type", "patch", "q", "k", "v", "o", "router", "gate", "up", "down", "head")
WIDTH, HEIGHT = 720, 400  # of the frontier, in its own units
LEFT, RIGHT, TOP, BOTTOM = 76, 20, 16, 50
CELL, ROW, OUTSIDE = 36, 24, 62  # pixels: a block's width, a kind's height, the width of what lies in no block
LETTER = 7.4  # pixels that a letter takes at most, in a label


@dataclass(frozen=True)
class Dot:
    """One point of a chart. `x` in MB, `y` and its interval in nats a token; `told` is read beside it."""

    label: str
    x: float
    y: float
    told: str
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Curves:
    """What the frontier draws: a line of predictions, and dots of what was measured, each kind by itself."""

    predicted: tuple[Dot, ...]
    measured: tuple[Dot, ...]
    uniform: tuple[Dot, ...]
    built: tuple[Dot, ...]

    @property
    def all(self) -> tuple[Dot, ...]:
        return (*self.predicted, *self.measured, *self.uniform, *self.built)


@dataclass(frozen=True)
class Cells:
    """Kinds down, blocks across: a figure and its hover text, or None where there is no such site."""

    kinds: tuple[str, ...]
    blocks: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    told: tuple[tuple[str, ...], ...]


def curves(points: tuple[Point, ...]) -> Curves:
    """KL against bytes: predicted, measured in memory with its interval, uniform presets, and what was built."""
    searched = sorted((p for p in points if p.kind == "searched"), key=lambda p: p.bytes)
    return Curves(
        predicted=tuple(
            _dot(p, p.predicted, "predicted") for p in searched if p.predicted is not None and p.predicted > 0
        ),
        measured=_measured(searched, "measured in memory"),
        uniform=_measured([p for p in points if p.kind == "uniform"], "in memory"),
        built=_measured([p for p in points if p.chosen], "of the artifact"),
    )


def _measured(points: list[Point], how: str) -> tuple[Dot, ...]:
    return tuple(_dot(p, p.measured, how, p.interval) for p in points if p.measured is not None and p.measured > 0)


def _dot(point: Point, kl: float, how: str, interval: tuple[float, float] | None = None) -> Dot:
    return Dot(point.label, point.bytes / 1e6, kl, f"{point.label}: {told(point.bytes)}, KL {kl:.5f} {how}", interval)


def frontier(points: tuple[Point, ...]) -> str:
    """The frontier as SVG; empty where there is nothing to draw."""
    found = curves(points)
    if not found.all:
        return ""
    across = _range([dot.x for dot in found.all])
    lows = [math.log10(max(low, dot.y / 10)) for dot in found.all for low in (dot.interval or (dot.y,))]
    down = _range(lows)

    def x(value: float) -> float:
        return LEFT + (value - across[0]) / (across[1] - across[0]) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        part = (math.log10(value) - down[0]) / (down[1] - down[0])
        return HEIGHT - BOTTOM - min(1.0, max(0.0, part)) * (HEIGHT - TOP - BOTTOM)

    drawn = [*_grid(across, down)]
    for name, dots in (("predicted", found.predicted), ("measured", found.measured)):
        if dots:
            path = " ".join(f"{x(dot.x):.1f},{y(dot.y):.1f}" for dot in dots)
            drawn.append(f'<polyline class="{name}" points="{path}"/>')
    for name, dots in (("measured", found.measured), ("uniform", found.uniform), ("built", found.built)):
        for dot in dots:
            inside = f"<title>{_text(dot.told)}</title>"
            if dot.interval is not None and name != "built":
                high, low = (y(max(one, 1e-12)) for one in dot.interval[::-1])
                inside += f'<line x1="{x(dot.x):.1f}" x2="{x(dot.x):.1f}" y1="{high:.1f}" y2="{low:.1f}"/>'
            inside += _mark(name, x(dot.x), y(dot.y))
            drawn.append(f'<g class="dot {name}">{inside}</g>')
    drawn += _labels([(x(dot.x), y(dot.y), dot.label) for dot in (*found.measured, *found.uniform)])
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(drawn)}</svg>'


def _mark(name: str, x: float, y: float) -> str:
    if name == "uniform":
        return f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{10 if name == "built" else 5}"/>'


def _labels(places: list[tuple[float, float, str]]) -> list[str]:
    """Short names beside their dots, where there is room; the rest is told on hover and in the table."""
    taken: list[tuple[float, float, float]] = []
    found = []
    for x, y, label in places:
        start, end, line = x + 12, x + 12 + LETTER * len(label), y - 9
        inside = end < WIDTH and line > 14
        if inside and all(end < left or start > right or abs(line - other) > 18 for left, right, other in taken):
            taken.append((start, end, line))
            found.append(f'<text class="name" x="{start:.1f}" y="{line:.1f}">{_text(label)}</text>')
    return found


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _grid(across: tuple[float, float], down: tuple[float, float]) -> list[str]:
    """Lines, their figures and the names of both axes."""
    found = []
    for value in ticks(*across):
        at = LEFT + (value - across[0]) / (across[1] - across[0]) * (WIDTH - LEFT - RIGHT)
        found.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        found.append(f'<text class="tick" x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}">{value:g}</text>')
    for value in decades(*down):
        at = HEIGHT - BOTTOM - (math.log10(value) - down[0]) / (down[1] - down[0]) * (HEIGHT - TOP - BOTTOM)
        found.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        found.append(f'<text class="side" x="{LEFT - 8}" y="{at + 4:.1f}">{value:g}</text>')
    middle = (HEIGHT - BOTTOM + TOP) / 2
    found.append(f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}">bytes stored, MB</text>')
    turned = f'transform="rotate(-90 14 {middle})"'
    found.append(f'<text class="axis" x="14" y="{middle}" {turned}>KL, nats a token</text>')
    return found


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round figures between two."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= max(times for times in (1, 2, 5) if times * step <= (high - low) / 4)
    return [round(index * step, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Round figures between two powers of ten, given by their logarithms: 1, and where there is room 2 and 5."""
    times = (1, 2, 5) if high - low < 2.5 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    every = max(1, len(powers) // 8)
    return [t * 10.0**p for p in powers[::every] for t in times if low <= math.log10(t) + p <= high]


def cells(sites: tuple[SiteReceipt, ...], quantity: str) -> Cells:
    """Blocks across, kinds down. `quantity` is `bits` (bits a weight) or `error` (relative output error).

    The experts of a block share a cell: the mean weighted by their size.
    """
    kinds = sorted(
        {site.kind for site in sites},
        key=lambda kind: (ORDER.index(kind) if kind in ORDER else len(ORDER), kind),
    )
    blocks = sorted(
        {_block(site) for site in sites},
        key=lambda name: (name != "outside", int(name) if name.isdigit() else 0),
    )
    groups: dict[tuple[str, str], list[SiteReceipt]] = {}
    for site in sites:
        groups.setdefault((site.kind, _block(site)), []).append(site)
    rows = [[groups.get((kind, block), []) for block in blocks] for kind in kinds]
    return Cells(
        tuple(kinds),
        tuple(blocks),
        tuple(tuple(_mean(group, quantity) for group in row) for row in rows),
        tuple(tuple("\n".join(_hover(site) for site in group[:4]) for group in row) for row in rows),
    )


def _block(site: SiteReceipt) -> str:
    found = re.match(r"blocks\.([0-9]+)\.", site.name)
    return found.group(1) if found else "outside"


def _mean(group: list[SiteReceipt], quantity: str) -> float | None:
    pairs = [
        (site.bits if quantity == "bits" else site.error, site.shape[0] * site.shape[1])
        for site in group
        if quantity == "bits" or site.error is not None
    ]
    weight = sum(size for _, size in pairs)
    return sum((value or 0.0) * size for value, size in pairs) / weight if weight else None


def _hover(site: SiteReceipt) -> str:
    error = "not measured" if site.error is None else f"{site.error:.4f}"
    return (
        f"{site.name} {site.shape[0]}×{site.shape[1]}: {site.bits:.2f} bits a weight, "
        f"{told(site.bytes_after)}, output error {error}"
    )


def heat(sites: tuple[SiteReceipt, ...], quantity: str) -> str:
    """The cells as SVG at their own size, with their figures in them."""
    found = cells(sites, quantity)
    present = [value for row in found.values for value in row if value is not None]
    low, high = (0.0 if quantity == "error" else min(present)), max(present)
    left = 12 + LETTER * max(len(kind) for kind in found.kinds)
    edges = [left]
    for block in found.blocks:
        edges.append(edges[-1] + (OUTSIDE if block == "outside" else CELL))
    drawn = [
        f'<text class="tick" x="{(here + there) / 2:.1f}" y="16">{_text(block)}</text>'
        for block, here, there in zip(found.blocks, edges, edges[1:], strict=False)
    ]
    for row, (kind, values, hovers) in enumerate(zip(found.kinds, found.values, found.told, strict=True)):
        top = 24 + ROW * row
        drawn.append(f'<text class="side" x="{left - 8:.1f}" y="{top + 16}">{_text(kind)}</text>')
        for value, hover, here, there in zip(values, hovers, edges, edges[1:], strict=False):
            if value is not None:
                part = (value - low) / (high - low) if high > low else 0.5
                box = f'x="{here + 1:.1f}" y="{top + 1}" width="{there - here - 2:.1f}" height="{ROW - 2}"'
                inside = f'<rect {box} fill-opacity="{0.08 + 0.5 * part:.2f}"/>'
                figure = f"{value:.2f}" if value < 100 else f"{value:.0f}"
                inside += f'<text class="cell" x="{(here + there) / 2:.1f}" y="{top + 16}">{figure}</text>'
                drawn.append(f'<g class="{quantity}"><title>{_text(hover)}</title>{inside}</g>')
    wide, high_px = edges[-1] + 4, 30 + ROW * len(found.kinds)
    size = f'width="{wide:.0f}" height="{high_px}" viewBox="0 0 {wide:.0f} {high_px}"'
    return f'<svg class="own" {size} role="img">{"".join(drawn)}</svg>'


def _text(name: str) -> str:
    return html.escape(name, quote=True)
