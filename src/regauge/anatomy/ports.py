"""Ports of sites and norms: the small change of `streams.py` and `heads.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from regauge.anatomy.model import Norm, Port, Site

FIXED_BIAS = ("router",)
"""Kinds of sites whose module cannot be given a bias (the router's code multiplies by a bare parameter)."""


def may_have_bias(site: Site) -> bool:
    """Whether a site has a bias or its module can be given one: a linear layer can, an expert stack cannot."""
    return site.bias is not None or (site.weight.index is None and site.kind not in FIXED_BIAS)


def ports(site: Site, axis: int, start: int = 0, width: int = 1) -> list[Port]:
    """A site's weight, and its bias where the site writes (axis 0 of its weight)."""
    found = [Port(f"{site.name}.weight", axis, start, width)]
    if axis == 0 and site.bias is not None:
        found.append(Port(f"{site.name}.bias", 0, start, width))
    return found


def norm_ports(norm: Norm, start: int = 0, width: int = 1) -> list[Port]:
    """A norm's gain and bias, where it has them."""
    return [Port(f"{norm.name}.{word}", 0, start, width) for word in norm.slots if word in ("gain", "bias")]


def statistics_ports(norm: Norm) -> list[Port]:
    """A batch norm's mean and variance."""
    return [Port(f"{norm.name}.{word}", 0) for word in norm.slots if word in ("mean", "var")]


def flat(lists: Iterable[Sequence[Port]]) -> tuple[Port, ...]:
    """One tuple of many lists of ports."""
    return tuple(port for some in lists for port in some)
