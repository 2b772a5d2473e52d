"""Achieved against attainable efficiency, as functions of a result.

After "On the Efficiency of Convolutional Neural Networks" (arXiv 2404.03617): work is drawn by its operations a byte;
the waterline is the intensity at which this machine turns from bound by memory to bound by arithmetic. What lies under
it can reach `intensity / waterline` of the peak and no more; the gap from there down to what was achieved is what the
program lost. Here bytes are those of the weights as stored, bandwidth is the probe's of the same rounds, and the peak
is that of square products in the same run, in int8 or bf16, as the row multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass
from xml.sax.saxutils import escape

import plotly.graph_objects as go

from common.records import Peaks, Result, Row, spread

INK, SOFT, LINE, WATER = "#1f2430", "#5b6270", "#e3e6ea", "#dbe8f6"
COLOURS = {
    "regauge": "#2563a8",
    "llama.cpp": "#d9730d",
    "transformers": "#8a8f98",
    "torch": "#2e8b57",
    "torchao": "#8d4fb0",
    "onnxruntime": "#b8860b",
    "openvino": "#a33b5c",
}


@dataclass(frozen=True)
class Point:
    """A row against this machine.

    Attributes:
        intensity: operations a byte of weights.
        attainable: operations a second that memory and arithmetic allow at this intensity.
        achieved: operations a second that were measured.
        peak: operations a second of the kind of products it uses.
    """

    name: str
    runner: str
    intensity: float
    attainable: float
    achieved: float
    peak: float

    @property
    def efficiency(self) -> float:
        """Of what is attainable."""
        return self.achieved / self.attainable


def points(rows: list[Row], peaks: Peaks) -> list[Point]:
    """Rows that ran, as points."""
    found = []
    for row in rows:
        if not row.seconds or not row.bytes:
            continue
        peak = peaks.int8 if row.kind == "int8" else peaks.bf16
        intensity = row.intensity()
        attainable = min(peak, intensity * spread(row.probes).median * 1e9)
        achieved = row.operations / spread(row.seconds).median
        found.append(Point(row.name, row.runner, intensity, attainable, achieved, peak))
    return found


def colour(runner: str) -> str:
    """By the first word of the runner's name."""
    return COLOURS.get(runner.split(" ")[0], INK)


def gaps(result: Result, model: str, batch: int = 1) -> go.Figure:
    """Operations a second against operations a byte: the roof, and under it each row with its gap."""
    if result.peaks is None:
        raise ValueError("this result holds no peaks to draw the roof from")
    rows = [row for row in result.rows if row.model == model and row.batch == batch]
    found = points(rows, result.peaks)
    probe = spread([value for row in rows for value in row.probes]).median * 1e9
    figure = go.Figure(
        layout=go.Layout(
            title=f"{model}: achieved and attainable",
            height=520,
            font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
            plot_bgcolor="#ffffff",
        )
    )
    low = min(point.intensity for point in found) / 2
    for name, peak in (("int8", result.peaks.int8), ("bf16", result.peaks.bf16)):
        ridge = peak / probe
        end = 4 * max(ridge, *(point.intensity for point in found))
        figure.add_scatter(
            x=[low, ridge, end],
            y=[low * probe, peak, peak],
            mode="lines",
            name=f"attainable, {name}",
            line={"color": SOFT, "dash": "solid" if name == "int8" else "dot"},
        )
    for point in found:
        figure.add_scatter(
            x=[point.intensity] * 2,
            y=[point.achieved, point.attainable],
            mode="lines+markers",
            name=point.name,
            marker={"color": colour(point.runner), "size": [10, 5], "symbol": ["circle", "line-ew-open"]},
            line={"color": colour(point.runner), "width": 1},
            hovertemplate=f"{escape(point.name)}<br>%{{x:.2f}} operations a byte<br>%{{y:.3s}} a second<br>"
            f"{100 * point.efficiency:.0f} % of attainable<extra></extra>",
        )
    figure.update_xaxes(type="log", title="operations a byte of weights", gridcolor=LINE)
    figure.update_yaxes(type="log", title="operations a second", gridcolor=LINE, exponentformat="SI")
    return figure


WIDTH, ROW, LEFT, TOP, RIGHT = 910, 22, 270, 78, 200


def waterline(result: Result, model: str, batch: int = 1) -> str:
    """Bars of efficiency under the waterline, as SVG: the level is what each row can attain, at its own intensity."""
    if result.peaks is None:
        raise ValueError("this result holds no peaks to hold rows against")
    found = points([row for row in result.rows if row.model == model and row.batch == batch], result.peaks)
    found.sort(key=lambda point: -point.efficiency)
    height, span = TOP + ROW * len(found) + 28, WIDTH - LEFT - RIGHT
    title = f"{result.bench}, {model}{f', batch {batch}' if result.bench == 'linear' else ''}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(20, 28, f"{title}: efficiency under the waterline", size=16, weight=600),
        _text(20, 48, "bar: achieved; water: attainable at this intensity, by bandwidth or by arithmetic", SOFT),
        f'<rect x="{LEFT}" y="{TOP - 8}" width="{span}" height="{ROW * len(found) + 8}" fill="{WATER}"/>',
    ]
    for tenth in range(0, 11, 2):
        x = LEFT + span * tenth / 10
        parts.append(f'<line x1="{x:.1f}" y1="{TOP - 8}" x2="{x:.1f}" y2="{height - 28}" stroke="#ffffff"/>')
        parts.append(_text(x, height - 12, f"{10 * tenth} %", SOFT, anchor="middle"))
    for number, point in enumerate(found):
        y = TOP + ROW * number
        long = span * min(point.efficiency, 1.0)
        bound = "memory" if point.attainable < point.peak else "arithmetic"
        parts.append(_text(LEFT - 8, y + 12, point.name, anchor="end"))
        fill = colour(point.runner)
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{long:.1f}" height="{ROW - 7}" fill="{fill}"/>')
        parts.append(
            _text(LEFT + span + 8, y + 12, f"{100 * point.efficiency:.0f} %, {point.intensity:.1f} op/B, {bound}", SOFT)
        )
    edge = LEFT + span
    parts.append(f'<line x1="{edge}" y1="{TOP - 14}" x2="{edge}" y2="{height - 28}" stroke="{INK}" stroke-width="2"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(
    x: float, y: float, words: str, fill: str = INK, anchor: str = "start", size: int = 12, weight: int = 400
) -> str:
    style = f'text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" fill="{fill}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'
