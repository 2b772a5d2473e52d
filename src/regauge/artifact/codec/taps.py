"""Readings of sites, one by one → readings of taps: for formats that say beside each weight how its input is read."""

from __future__ import annotations

from collections.abc import Mapping

from regauge.anatomy.model import Anatomy
from regauge.parts import Point


def by_tap(anatomy: Anatomy, readings: Mapping[str, Point | None]) -> tuple[dict[str, Point], dict[str, Point | None]]:
    """Tap → point, and the sites that read their tap otherwise than it says.

    Args:
        readings: site → how it reads its input; absent or None: as it is.
    """
    readers: dict[str, list[str]] = {}
    for site in anatomy.sites:
        if site.tap is not None:
            readers.setdefault(site.tap, []).append(site.name)
    inputs: dict[str, Point] = {}
    apart: dict[str, Point | None] = {}
    for tap, names in readers.items():
        found = [readings.get(name) for name in names]
        first = next((point for point in found if point is not None), None)
        if first is not None:
            inputs[tap] = first
            apart |= {name: point for name, point in zip(names, found, strict=True) if point != first}
    return inputs, apart
