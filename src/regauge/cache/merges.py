"""Merges across layers: two layers keep one direction a token, and each its own length.

Legend: B sequences, H KV heads, T tokens, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

ANTIPODAL = 1e-3
"""sin Ω below which interpolation on the sphere is one on the line, or, where the two point apart, none."""


@dataclass(frozen=True, eq=False)
class Merged:
    """What two layers keep of their keys, or of their values.

    Attributes:
        directions_BHTD: float32; over all heads of a token together, of length one.
        shallow_BT, deep_BT: float32, the length of each layer's token.
        spread_BT: where in the range of distances each token lies: 0 the nearest, 1 the most distant, 2 points apart.
        retained_BT: bool, tokens that each layer keeps as they are: their directions are too far apart.
    """

    directions_BHTD: Tensor
    shallow_BT: Tensor
    deep_BT: Tensor
    spread_BT: Tensor
    retained_BT: Tensor

    def restored(self) -> tuple[Tensor, Tensor]:
        """(shallow, deep), (B, H, T, D) float32, from what is shared; that of retained tokens is for nobody."""
        lengths = self.shallow_BT[:, None, :, None], self.deep_BT[:, None, :, None]
        return self.directions_BHTD * lengths[0], self.directions_BHTD * lengths[1]


@runtime_checkable
class AcrossLayer(Protocol):
    """What two layers keep in common."""

    def pairs(self, layers: int) -> list[tuple[int, int]]:
        """(shallower, deeper) layer of each pair."""

    def __call__(self, shallow_BHTD: Tensor, deep_BHTD: Tensor, real_BT: Tensor | None = None) -> Merged:
        """Merges the keys, or the values, of the same tokens. `real_BT`: which are no padding."""


@dataclass(frozen=True)
class AcrossLayers:
    """MiniCache (2405.14366): from mid-depth on, every two adjacent layers.

    A token's vector over all heads, u in the shallower layer and v in the deeper, both made unit, at the angle Ω:
    e = (sin((1-t)Ω) u + sin(tΩ) v) / sin Ω (eq. 3 there), restored as each layer's length times e. A token is retained
    whose distance d = Ω/π lies in the upper part `keep` of the range: d > d_max - keep · (d_max - d_min), a threshold
    on the range, so that how many they are differs from layer to layer. Where sin Ω is about zero, u and v are one
    (on the line between) or point apart, and are retained.

    Args:
        t: how far from the shallower layer's direction to the deeper's, 0 to 1; the paper's is 0.6.
        keep: γ, the upper part of the range of distances that is retained, 0 to 1; the paper's is 0.05.
        start: the depth at which pairs begin, as a share of the layers; the paper's is 0.5.
    """

    t: float = 0.6
    keep: float = 0.05
    start: float = 0.5

    def __post_init__(self) -> None:
        for name in ("t", "keep", "start"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, 0 to 1; you wrote {getattr(self, name):g}")

    def pairs(self, layers: int) -> list[tuple[int, int]]:
        first = int(self.start * layers)
        return [(number, number + 1) for number in range(first, layers - 1, 2)]

    def __call__(self, shallow_BHTD: Tensor, deep_BHTD: Tensor, real_BT: Tensor | None = None) -> Merged:
        (u, shallow_BT), (v, deep_BT) = _unit(shallow_BHTD), _unit(deep_BHTD)
        cos_BT = (u.double() * v.double()).sum((1, 3)).clamp(-1, 1)
        omega_BT = cos_BT.acos()
        sin_BT = omega_BT.sin()
        flat_BT = sin_BT < ANTIPODAL
        safe_BT = torch.where(flat_BT, 1.0, sin_BT)
        a_BT = torch.where(flat_BT, 1 - self.t, ((1 - self.t) * omega_BT).sin() / safe_BT).float()
        b_BT = torch.where(flat_BT, self.t, (self.t * omega_BT).sin() / safe_BT).float()
        directions = a_BT[:, None, :, None] * u + b_BT[:, None, :, None] * v
        spread_BT = spread(omega_BT, real_BT)
        retained_BT = ((spread_BT > 1 - self.keep) & (omega_BT > ANTIPODAL)) | (spread_BT > 1)
        return Merged(directions, shallow_BT, deep_BT, spread_BT, retained_BT)


def spread(omega_BT: Tensor, real_BT: Tensor | None = None) -> Tensor:
    """Where each angle lies in the range of its sequence's own tokens; 0 for padding."""
    real_BT = torch.ones_like(omega_BT, dtype=torch.bool) if real_BT is None else real_BT
    least_B1 = omega_BT.masked_fill(~real_BT, torch.inf).amin(1, keepdim=True)
    most_B1 = omega_BT.masked_fill(~real_BT, -torch.inf).amax(1, keepdim=True)
    found_BT = (omega_BT - least_B1) / (most_B1 - least_B1).clamp_min(1e-12)
    return torch.where(omega_BT > torch.pi - ANTIPODAL, 2.0, found_BT).masked_fill(~real_BT, 0)


def _unit(x_BHTD: Tensor) -> tuple[Tensor, Tensor]:
    x_BHTD = x_BHTD.float()
    length_BT = x_BHTD.square().sum((1, 3)).sqrt()
    return x_BHTD / length_BT.clamp_min(1e-30)[:, None, :, None], length_BT


def in_blocks(spread_BT: Tensor, retained_BT: Tensor, block: int, padding_BT: Tensor) -> Tensor:
    """Retained tokens rounded up to whole blocks, by the most distant of the others, in each sequence.

    Padding is merged before it fills a block of retained ones: `padding_BT` counts as the nearest.
    """
    rank_BT: Tensor = torch.argsort(
        spread_BT.masked_fill(padding_BT, -1), dim=-1, descending=True, stable=True
    ).argsort(-1)
    blocks_B1 = (retained_BT.sum(-1, keepdim=True) + block - 1) // block
    return rank_BT < blocks_B1 * block
