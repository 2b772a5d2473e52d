"""The multi-scale residual quantiser of VAR's tokenizer (arXiv 2404.02905, algorithms 1 and 2).

A map f is written as a sum over scales k: what is left of it is averaged down to the side p_k, each place becomes the
nearest of V codes, and the codes, brought back to the full side by bicubic interpolation and smoothed by φ, are taken
from what is left. φ(h) = (1 − r) h + r conv(h); scales share a few φ, each taking the one nearest to it.
Legend: B batch, Z channels, V codes, L tokens, h w sides of the full map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Trained:
    """What the quantiser gives while it is trained.

    Attributes:
        map_BZhw: the quantised map; gradients pass to the encoder as if it were the map itself.
        loss: how far each sum of scales is from the map, for codes and for the encoder.
        hits_SV: how often each code was taken at each scale.
        rest_nZ: what the last scale had to write, whose rows may become codes that nobody takes.
    """

    map_BZhw: Tensor
    loss: Tensor
    hits_SV: Tensor
    rest_nZ: Tensor


class Phi(nn.Conv2d):
    """What smooths a scale's part."""

    def __init__(self, channels: int, share: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.share = share

    def forward(self, h_BZhw: Tensor) -> Tensor:
        return h_BZhw * (1 - self.share) + super().forward(h_BZhw) * self.share


class Shared(nn.Module):
    """One φ for all scales."""

    def __init__(self, channels: int, share: float) -> None:
        super().__init__()
        self.qresi = Phi(channels, share)

    def at(self, _: float) -> Phi:
        return self.qresi


class Partly(nn.Module):
    """Several φ, each for the scales that are nearest to it."""

    def __init__(self, channels: int, share: float, count: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(channels, share) for _ in range(count))

    def at(self, place: float) -> Phi:
        found = self.qresi_ls[nearest_tick(place, len(self.qresi_ls))]
        assert isinstance(found, Phi)
        return found


class Apart(nn.ModuleList):
    """A φ for each scale."""

    def __init__(self, channels: int, share: float, count: int) -> None:
        super().__init__(Phi(channels, share) for _ in range(count))

    def at(self, place: float) -> Phi:
        found = self[nearest_tick(place, len(self))]
        assert isinstance(found, Phi)
        return found


def nearest_tick(place: float, count: int) -> int:
    """Which of `count` places between 0 and 1 is the nearest, in the reference's own arithmetic: scales stand exactly
    between two of them, and their rounding decides.

    They stand evenly between a half step from both ends, of four a third of a step.
    """
    edge = 1 / 3 / count if count == 4 else 1 / 2 / count
    return int(np.abs(np.linspace(edge, 1 - edge, count) - place).argmin())


class Quantiser(nn.Module):
    """Codes, and the φ of the scales.

    Args:
        sides: of the scales, coarsest first.
        phi: how many φ there are (0: one a scale) and their share.
        commitment: weight of the encoder's part of the loss.
    """

    def __init__(
        self, sides: Sequence[int], codes: int, channels: int, phi: tuple[int, float], commitment: float
    ) -> None:
        super().__init__()
        self.sides, self.commitment = tuple(sides), commitment
        count, share = phi
        self.quant_resi: Shared | Partly | Apart
        if count == 1:
            self.quant_resi = Shared(channels, share)
        elif count == 0:
            self.quant_resi = Apart(channels, share, len(self.sides))
        else:
            self.quant_resi = Partly(channels, share, count)
        self.embedding = nn.Embedding(codes, channels)

    @property
    def side(self) -> int:
        """Of the full map."""
        return self.sides[-1]

    def part(self, scale: int, ids_BL: Tensor) -> Tensor:
        """What a scale's tokens (B, L) add to the full map (B, Z, h, w)."""
        side = self.sides[scale]
        h_BZhw = self.embedding(ids_BL).transpose(1, 2).reshape(len(ids_BL), -1, side, side)
        if scale < len(self.sides) - 1:
            h_BZhw = functional.interpolate(h_BZhw, size=(self.side, self.side), mode="bicubic")
        made: Tensor = self.quant_resi.at(scale / (len(self.sides) - 1))(h_BZhw)
        return made

    def down(self, map_BZhw: Tensor, scale: int) -> Tensor:
        """A full map, averaged to the places of a scale: (B, L, Z)."""
        side = self.sides[scale]
        if side != self.side:
            map_BZhw = functional.interpolate(map_BZhw, size=(side, side), mode="area")
        return map_BZhw.flatten(2).transpose(1, 2)

    def nearest(self, rows_nZ: Tensor) -> Tensor:
        """The nearest code to each row, by squared distance."""
        codes_VZ = self.embedding.weight.detach()
        far_nV = rows_nZ.square().sum(1, keepdim=True) + codes_VZ.square().sum(1)
        return torch.addmm(far_nV, rows_nZ, codes_VZ.T, alpha=-2).argmin(1)

    def _steps(self, map_BZhw: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each scale: its tokens (B, L), what they add to the map, and what they had to write (n, Z)."""
        rest_BZhw = map_BZhw.detach()
        for scale in range(len(self.sides)):
            rows_nZ = self.down(rest_BZhw, scale).flatten(0, 1)
            ids_BL = self.nearest(rows_nZ).view(len(map_BZhw), -1)
            part_BZhw = self.part(scale, ids_BL)
            rest_BZhw = rest_BZhw - part_BZhw.detach()
            yield ids_BL, part_BZhw, rows_nZ

    def encode(self, map_BZhw: Tensor) -> list[Tensor]:
        """The tokens (B, L) of each scale."""
        return [ids_BL for ids_BL, _, _ in self._steps(map_BZhw)]

    def decode(self, ids: Sequence[Tensor]) -> Tensor:
        """The full map of the tokens of some first scales."""
        return torch.stack([self.part(scale, ids_BL) for scale, ids_BL in enumerate(ids)]).sum(0)

    def inputs(self, ids: Sequence[Tensor]) -> Tensor:
        """What a transformer that is taught reads from the second scale on: (B, tokens, Z)."""
        made, total = [], None
        for scale, ids_BL in enumerate(ids[:-1]):
            part_BZhw = self.part(scale, ids_BL)
            total = part_BZhw if total is None else total + part_BZhw
            made.append(self.down(total, scale + 1))
        return torch.cat(made, 1)

    def trained(self, map_BZhw: Tensor) -> Trained:
        """The quantised map with its loss: β‖sg f̂ₖ − f‖² + ‖f̂ₖ − sg f‖², averaged over the sums f̂ₖ of k scales."""
        fixed_BZhw, total_BZhw, losses, hits = map_BZhw.detach(), torch.zeros_like(map_BZhw), [], []
        steps = list(self._steps(map_BZhw))
        for ids_BL, part_BZhw, _ in steps:
            total_BZhw = total_BZhw + part_BZhw
            losses.append(self.commitment * functional.mse_loss(map_BZhw, total_BZhw.detach()))
            losses.append(functional.mse_loss(total_BZhw, fixed_BZhw))
            hits.append(ids_BL.flatten().bincount(minlength=self.embedding.num_embeddings))
        through_BZhw = map_BZhw + (total_BZhw - map_BZhw).detach()
        return Trained(through_BZhw, torch.stack(losses).sum() / len(self.sides), torch.stack(hits), steps[-1][2])
