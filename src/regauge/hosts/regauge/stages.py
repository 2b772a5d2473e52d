"""Which layers run at each scale of an image, and what they keep of the scales before.

Generation has a stage for each scale, and a stage has a subnet: `("full",) * 6 + ("depth=8",) * 4` runs the whole model
on six scales and eight layers on the last four, the layers ⌊i (D−1)/(d−1)⌋ (VARiant, arXiv 2511.16546: first and last
are always among them). `depth=0/1/4/7` names the layers themselves.
Legend: B batch, H heads, T tokens, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regauge.elastic.family import Family
from regauge.elastic.subnet import Subnet
from regauge.errors import SettingError

BRIDGE = 0.6
"""Of all scales, those on which the whole model runs beside a subnet that is trained."""
Layers = tuple[tuple[int, ...], ...]
"""For each scale, the layers that run on it, in their order."""
Stages = str | Subnet | Sequence[str | Subnet] | None
"""A subnet for all scales, or one for each; None: the whole model."""


def layers_of(stages: Stages, depth: int, scales: int) -> Layers:
    """The layers of each scale.

    Raises:
        SettingError: a subnet is no legal one, or there are not as many as scales.
    """
    if stages is None or isinstance(stages, str | Subnet):
        return (_layers(Subnet.parse(stages or ""), depth),) * scales
    if len(stages) != scales:
        raise SettingError(f"subnet names {len(stages)} scales, and the model has {scales}; name one for each, or one")
    return tuple(_layers(Subnet.parse(one), depth) for one in stages)


def late(scales: int, early: int, subnet: str | Subnet) -> tuple[str | Subnet, ...]:
    """The whole model on the first scales, a subnet on the others."""
    return ("full",) * early + (subnet,) * (scales - early)


def bridged(scales: int, subnet: str | Subnet) -> tuple[str | Subnet, ...]:
    """The whole model on the first scales, six of ten as VARiant has it, a subnet on the others."""
    return late(scales, round(BRIDGE * scales), subnet)


def _layers(subnet: Subnet, depth: int) -> tuple[int, ...]:
    """
    Raises:
        SettingError: it is no subnet of a model of so many layers; the sentence names the nearest that is.
    """
    other = [name for name, _ in subnet.said() if name != "depth"]
    if other:
        raise SettingError(f"the scales of an image differ in depth alone, not in {other[0]}: leave {other[0]} out")
    if isinstance(subnet.depth, tuple):
        if sorted(set(subnet.depth)) != list(subnet.depth) or subnet.depth[-1] >= depth:
            raise SettingError(f"{subnet} must name layers from 0 to {depth - 1}, each once and in order")
        return subnet.depth
    share = isinstance(subnet.depth, float)
    kept = depth if subnet.depth is None else max(1, round(subnet.depth * depth)) if share else int(subnet.depth)
    if not 1 <= kept <= depth:
        near = min(max(kept, 1), depth)
        raise SettingError(f"the model has {depth} layers, so {subnet} cannot run; the nearest is depth={near}")
    return Family().blocks(kept, depth)


def mask_of(areas: Sequence[int], device: torch.device) -> Tensor:
    """Who reads whom while all scales are taught at once: (T, T), each token its own scale and those before."""
    scale_T = torch.arange(len(areas), dtype=torch.int64, device=device).repeat_interleave(
        torch.tensor(areas, dtype=torch.int64, device=device)
    )
    return scale_T[:, None] >= scale_T[None, :]
