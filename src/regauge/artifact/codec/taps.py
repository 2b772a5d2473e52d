"""Readings of taps: from those of sites, one by one, where a format says beside each weight how its input is read; and
to and from the tensors that an artifact keeps of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from regauge import parts
from regauge.anatomy.inner import inner_taps
from regauge.anatomy.model import Anatomy
from regauge.artifact.codec.base import Layout
from regauge.errors import ArtifactError
from regauge.formats.readings import Reading, dynamic, load
from regauge.parts import Point

EMBED, HEAD = "embed", "head"


def of_tied_head(layout: Layout) -> str:
    """How the names of the tensors begin that are kept of how a tied head reads its input; "" where nothing is. The
    table that it shares is read before they are, so whoever loads it looks for them first."""
    site = next((site for site in layout.anatomy.sites if site.name == HEAD), None)
    tied = site is not None and layout.anatomy.tied and EMBED in layout.quantised
    return f"{site.tap}." if tied and site is not None and site.tap in layout.inputs else ""


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


def written(taps: Mapping[str, Reading]) -> dict[str, Tensor]:
    """What an artifact keeps of readings: `{tap}.{name}`."""
    return {
        f"{tap}.{name}": tensor.contiguous()
        for tap, reading in taps.items()
        for name, tensor in reading.tensors.items()
    }


def readings(layout: Layout, names: Collection[str], full: dict[str, Tensor]) -> dict[str, Reading]:
    """Site → how it reads its tap, of some sites; takes what was kept of the taps' readings from `full`. A tied head is
    one of them where the embedding is.

    Raises:
        ArtifactError: a tensor is missing, of another shape, or belongs to nothing.
    """
    made: dict[str, Reading] = {}
    found: dict[str, Reading] = {}
    for site in layout.anatomy.sites:
        point = layout.reading(site)
        holder = EMBED if site.name == HEAD and layout.anatomy.tied else site.name
        if holder not in names or point is None or site.tap is None:
            continue
        if site.name in layout.apart:
            found[site.name] = dynamic(parts.format_of(point))
            continue
        if site.tap not in made:
            made[site.tap] = _loaded(site.tap, point, site.shape[1], full)
        found[site.name] = made[site.tap]
    return found


def inner_readings(layout: Layout, full: dict[str, Tensor] | None = None) -> dict[str, Reading]:
    """Tap → reading, of taps that no matrix reads; takes what was kept of them from `full`. Without it, of those that
    keep nothing; with it, of those alone of which it holds something.

    Raises:
        ArtifactError: as `readings`.
    """
    found = {}
    for tap, channels in inner_taps(layout.anatomy).items():
        point = layout.inputs.get(tap)
        if point is None:
            continue
        static = bool(parts.format_of(point).ranger.needs)
        if not static and full is None:
            found[tap] = dynamic(parts.format_of(point))
        if static and full is not None and any(key.startswith(f"{tap}.") for key in full):
            found[tap] = _loaded(tap, point, channels or 1, full)
    return found


def _loaded(tap: str, point: Point, channels: int, full: dict[str, Tensor]) -> Reading:
    """The reading of a tap from its tensors, which are taken from `full`."""
    own = [key for key in full if key.startswith(f"{tap}.")]
    tensors = {key.removeprefix(f"{tap}."): full.pop(key) for key in own}
    try:
        return load(parts.format_of(point), parts.maker_of(point), channels, tensors)
    except (ValueError, RuntimeError) as error:
        raise ArtifactError(f"the tensors of {tap} do not fit how it is read: {error}.") from error
