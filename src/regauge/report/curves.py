"""The curve of a training as SVG: the loss of its steps, and the error on text held out at every look."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 260, 64, 16, 16, 40
TICKS = 5


def losses(steps: int, seen: Sequence[float], looks: Sequence[Sequence[float]]) -> str:
    """Two lines over the steps, each in its own range: losses are of whichever members a step drew.

    Args:
        seen: losses, evenly spread over the steps.
        looks: (step, error on text held out).
    """
    if not seen or steps < 1:
        return ""
    spread = [((index + 0.5) * steps / len(seen), value) for index, value in enumerate(seen)]
    drawn = [_line("predicted", steps, spread), _line("measured", steps, looks)]
    low, high = min(error for _, error in looks), max(error for _, error in looks)
    for index in range(TICKS):
        at, value = index / (TICKS - 1), low + (high - low) * index / (TICKS - 1)
        x, y = _x(at * steps, steps), HEIGHT - BOTTOM - at * (HEIGHT - TOP - BOTTOM)
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text class="side" x="{LEFT - 8}" y="{y + 4:.1f}">{value:.3g}</text>')
        drawn.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}">{at * steps:.0f}</text>')
    drawn.append(f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}">steps</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(drawn)}</svg>'


def _x(step: float, steps: int) -> float:
    return LEFT + step / steps * (WIDTH - LEFT - RIGHT)


def _line(name: str, steps: int, points: Sequence[Sequence[float]]) -> str:
    low, high = min(value for _, value in points), max(value for _, value in points)
    scale = (HEIGHT - TOP - BOTTOM) / ((high - low) or 1.0)
    path = " ".join(f"{_x(at, steps):.1f},{HEIGHT - BOTTOM - (value - low) * scale:.1f}" for at, value in points)
    return f'<polyline class="{name}" points="{path}"/>'
