"""The charts of the page, as plotly figures. Colours hold for readers who do not see red from green."""

from __future__ import annotations

import html
import re

import plotly.graph_objects as go

from regauge.amounts import told
from regauge.artifact.receipt import SiteReceipt
from regauge.report.view import Point

INK, BLUE, ORANGE, GREY = "#1f2430", "#2563a8", "#d9730d", "#8a8f98"
ORDER = ("embed", "position", "type", "patch", "q", "k", "v", "o", "router", "gate", "up", "down", "head")


def _layout(height: int, **more: object) -> go.Layout:
    return go.Layout(
        height=height,
        margin={"l": 64, "r": 24, "t": 32, "b": 56},
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="#ffffff",
        hoverlabel={"align": "left"},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#c3c7cd", "activecolor": INK},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        **more,
    )


def _text(name: str) -> str:
    """A name as a label can hold it: plotly reads tags and entities in labels, ticks and hover texts."""
    return html.escape(name, quote=False)


def frontier(points: tuple[Point, ...]) -> go.Figure:
    """KL against bytes: predicted, measured in memory with its interval, uniform presets, and what was built."""
    figure = go.Figure(layout=_layout(440))
    searched = sorted((p for p in points if p.kind == "searched"), key=lambda p: p.bytes)
    predicted = [p for p in searched if p.predicted is not None]
    if predicted:
        figure.add_scatter(
            x=[p.bytes / 1e6 for p in predicted],
            y=[p.predicted for p in predicted],
            text=[_text(p.label) for p in predicted],
            name="predicted",
            mode="lines",
            line={"color": GREY, "dash": "dot"},
            hovertemplate="point %{text}<br>%{x:.3f} MB<br>predicted KL %{y:.5f}<extra></extra>",
        )
    _measured(figure, searched, "measured in memory", BLUE, "circle", "lines+markers")
    _measured(figure, [p for p in points if p.kind == "uniform"], "uniform presets", ORANGE, "diamond", "markers")
    chosen = [p for p in points if p.chosen and (p.measured or p.predicted) is not None]
    if chosen:
        figure.add_scatter(
            x=[p.bytes / 1e6 for p in chosen],
            y=[p.measured if p.measured is not None else p.predicted for p in chosen],
            text=[_text(p.label) for p in chosen],
            name="built",
            mode="markers",
            marker={"symbol": "circle-open", "size": 20, "color": INK, "line": {"width": 3}},
            hovertemplate="built: point %{text}<br>%{x:.3f} MB<br>KL %{y:.5f}<extra></extra>",
        )
    figure.update_xaxes(title="bytes stored, MB", gridcolor="#e6e8eb", zeroline=False)
    figure.update_yaxes(
        title="KL to the original, nats a token", type="log", gridcolor="#e6e8eb", exponentformat="power"
    )
    return figure


def _measured(figure: go.Figure, points: list[Point], name: str, colour: str, symbol: str, mode: str) -> None:
    shown = [p for p in points if p.measured is not None and p.measured > 0]
    if not shown:
        return
    bars = [p.interval or (p.measured or 0.0, p.measured or 0.0) for p in shown]
    figure.add_scatter(
        x=[p.bytes / 1e6 for p in shown],
        y=[p.measured for p in shown],
        text=[_text(p.label) for p in shown],
        name=name,
        mode=mode,
        marker={"color": colour, "size": 9, "symbol": symbol},
        line={"color": colour},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [max(0.0, high - (p.measured or 0.0)) for p, (_, high) in zip(shown, bars, strict=True)],
            "arrayminus": [max(0.0, (p.measured or 0.0) - low) for p, (low, _) in zip(shown, bars, strict=True)],
            "color": colour,
            "thickness": 1,
        },
        hovertemplate=name + " %{text}<br>%{x:.3f} MB<br>measured KL %{y:.5f}<extra></extra>",
    )


def _row(site: SiteReceipt) -> str:
    return "up" if site.kind == "up" else site.kind


def _cell(site: SiteReceipt) -> str:
    found = re.match(r"blocks\.(\d+)\.", site.name)
    return found.group(1) if found else "outside"


def heat(sites: tuple[SiteReceipt, ...], quantity: str) -> go.Figure:
    """Blocks across, kinds down. `quantity` is `bits` (bits a weight) or `error` (relative output error).

    The experts of a block share a cell: the mean weighted by their size.
    """
    kinds = sorted(
        {_row(site) for site in sites},
        key=lambda kind: (ORDER.index(kind) if kind in ORDER else len(ORDER), kind),
    )
    columns = sorted(
        {_cell(site) for site in sites},
        key=lambda name: (name != "outside", int(name) if name.isdigit() else 0),
    )
    cells: dict[tuple[str, str], list[SiteReceipt]] = {}
    for site in sites:
        cells.setdefault((_row(site), _cell(site)), []).append(site)
    values, hovers = [], []
    for kind in kinds:
        inside = [cells.get((kind, column), []) for column in columns]
        values.append([_mean(group, quantity) for group in inside])
        hovers.append(["<br>".join(_hover(site) for site in group[:4]) for group in inside])
    bits = quantity == "bits"
    figure = go.Figure(layout=_layout(90 + 30 * len(kinds), showlegend=False))
    figure.add_heatmap(
        z=values,
        x=columns,
        y=[_text(kind) for kind in kinds],
        customdata=hovers,
        colorscale="Blues" if bits else "Oranges",
        zmin=0 if not bits else None,
        colorbar={"title": "bits" if bits else "error", "thickness": 12},
        hovertemplate="%{customdata}<extra></extra>",
        xgap=2,
        ygap=2,
        hoverongaps=False,
    )
    figure.update_xaxes(title="block", type="category", showgrid=False)
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    return figure


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
        f"<b>{_text(site.name)}</b> {site.shape[0]}×{site.shape[1]}<br>{site.bits:.2f} bits a weight, "
        f"{told(site.bytes_after)}<br>output error {error}"
    )
