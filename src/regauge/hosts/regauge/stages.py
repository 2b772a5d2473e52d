"""Which layers run at each scale of an image, and what they keep of the scales before.

A subnet is named for each scale: `("full",) * 6 + ("depth=8",) * 4` runs the whole model on six scales and eight layers
on the last four, the layers ⌊i (D−1)/(d−1)⌋ (VARiant, arXiv 2511.16546: first and last are always among them).
Legend: B batch, H heads, T tokens, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regauge.errors import SettingError

Layers = tuple[tuple[int, ...], ...]
"""For each scale, the layers that run on it, in their order."""
Subnet = str | int | tuple[int, ...]
"""What runs on a scale: `full`, `depth=8` or 8, `depth=0/1/4/7` or these numbers."""
Stages = str | int | Sequence[Subnet] | None
"""A subnet for all scales, or one for each."""


def equidistant(depth: int, kept: int) -> tuple[int, ...]:
    """So many of the layers, evenly: ⌊i (D−1)/(d−1)⌋; of one, the first."""
    return (0,) if kept == 1 else tuple(i * (depth - 1) // (kept - 1) for i in range(kept))


def layers_of(stages: Stages, depth: int, scales: int) -> Layers:
    """The layers of each scale.

    Raises:
        SettingError: a subnet is no legal one, or there are not as many as scales.
    """
    if stages is None or isinstance(stages, str | int):
        return (_layers(stages, depth),) * scales
    if len(stages) != scales:
        raise SettingError(f"subnet names {len(stages)} scales, and the model has {scales}; name one for each, or one")
    return tuple(_layers(one, depth) for one in stages)


def late(depth: int, scales: int, kept: int, early: int) -> Layers:
    """The full depth on the first scales, so many layers on the others."""
    return layers_of(("full",) * early + (kept,) * (scales - early), depth, scales)


def _layers(subnet: Subnet | None, depth: int) -> tuple[int, ...]:
    said = _said(subnet)
    if said in ("", "full"):
        return tuple(range(depth))
    name, _, value = said.partition("=")
    parts = value.removesuffix("/").split("/")
    if name != "depth" or not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        raise SettingError(f"{said[:60]!r} names no layers of a scale; write full, depth=8, or depth=0/1/4/7")
    numbers = [int(part) for part in parts]
    if "/" not in value:
        kept = numbers[0]
        if not 1 <= kept <= depth:
            near = min(max(kept, 1), depth)
            raise SettingError(f"the model has {depth} layers, so {said} cannot run; the nearest is depth={near}")
        return equidistant(depth, kept)
    if sorted(set(numbers)) != numbers or numbers[-1] >= depth:
        raise SettingError(f"{said[:60]} must name layers from 0 to {depth - 1}, each once and in order")
    return tuple(numbers)


def _said(subnet: Subnet | None) -> str:
    if subnet is None or isinstance(subnet, str):
        return subnet or "full"
    return f"depth={subnet}" if isinstance(subnet, int) else _listed(subnet)


def _listed(layers: tuple[int, ...]) -> str:
    """A set of layers in words; one alone needs a list of its own."""
    return "depth=" + "/".join(map(str, layers)) + "/" * (len(layers) == 1)


class Past:
    """Keys and values of the scales so far, for each layer that a scale to come still runs.

    Args:
        layers: of each scale.
    """

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self.most = 0

    def begin(self, scale: int) -> None:
        """Frees what no scale from this one on reads."""
        wanted = {layer for some in self.layers[scale:] for layer in some}
        for layer in [layer for layer in self._held if layer not in wanted]:
            del self._held[layer]

    def append(self, layer: int, keys_BHTD: Tensor, values_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, with those of a new scale behind them."""
        held = self._held.get(layer)
        new = (keys_BHTD, values_BHTD)
        if held is not None:
            new = (torch.cat([held[0], keys_BHTD], 2), torch.cat([held[1], values_BHTD], 2))
        self._held[layer] = new
        self.most = max(self.most, self.bytes)
        return new

    @property
    def bytes(self) -> int:
        """Of what is held now."""
        return sum(tensor.numel() * tensor.element_size() for pair in self._held.values() for tensor in pair)


def mask_of(areas: Sequence[int], device: torch.device) -> Tensor:
    """Who reads whom while all scales are taught at once: (T, T), each token its own scale and those before."""
    scale_T = torch.arange(len(areas), dtype=torch.int64, device=device).repeat_interleave(
        torch.tensor(areas, dtype=torch.int64, device=device)
    )
    return scale_T[:, None] >= scale_T[None, :]
