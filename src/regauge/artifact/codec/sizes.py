"""Bytes of tensors in an artifact, by their formats: what its files hold, without reading them."""

from __future__ import annotations

from regauge import parts
from regauge.anatomy.model import Site
from regauge.artifact.codec.base import Layout, decoder
from regauge.parts import Point, Spec


def tensor_bytes(layout: Layout) -> int:
    """Of all sites and norms."""
    total = sum(site_bytes(layout, site) for site in layout.anatomy.sites)
    return total + sum(norm.size * layout.dtype.itemsize * len(norm.slots) for norm in layout.anatomy.norms)


def site_bytes(layout: Layout, site: Site) -> int:
    """Of a site's matrix, what is added to it, and its bias; a tied head is the embedding's."""
    if site.name == "head" and layout.anatomy.tied:
        return 0
    bias = site.shape[0] * layout.dtype.itemsize if site.bias is not None else 0
    point = layout.quantised.get(site.name)
    if point is None:
        return bias + site.shape[0] * site.shape[1] * layout.dtype.itemsize
    return bias + parts.bytes_of(_known(point), site.shape)


def _known(point: Point) -> Point:
    """The point without what takes no bytes, and without a compensator of another package, which is never imported.

    Raises:
        ArtifactError: grid, grain or scale is a part of another package.
    """
    decoder(point)
    spec = point["compensator"]
    known = point.but(ranger=Spec("minmax"))
    return known.but(compensator=None) if spec is not None and parts.foreign(spec.part) else known
