"""Grouped queries as latent attention: keys and values of all heads read as one narrow vector a token (2502.07864).

The G key heads of a block, side by side, are a latent that every query head reads one slot of: repeating heads is a
product with a matrix of zeros and ones, W_rep = W_up W_down. Rotary positions turn channel pairs, each pair at its
frequency; so a mix A of the G heads that is the same for both halves of a frequency commutes with the turn, and queries
that take A⁻ᵀ give the same scores, exactly. What follows is not exact: only some of the mixed slots keep their turn and
go to the cache turned (`rotary`), the others lose it and are compressed together with the values.

Legend: D hidden, H query heads, G key heads, d channels of a head, e of a value, F = d/2 frequencies, n slots that lost
their turn, R channels that keep it, r numbers of the latent. All in float64; an affine map is a matrix with its bias as
one more column, (O, D + 1), and `moment` is E[x xᵀ] of inputs with a 1 behind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMP = 0.01
"""Of the mean of the diagonal, added to it before principal components are taken."""


@dataclass(frozen=True, eq=False)
class Grouped:
    """Attention of grouped queries in one block, its maps with the bias as last column.

    Attributes:
        q, k, v: (H·d, D + 1), (G·d, D + 1), (G·e, D + 1).
        first, second: the two channels of a head that turn together, one pair a frequency, (F,) each.
        rates: radians a token, (F,).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    groups: int
    first: Tensor
    second: Tensor
    rates: Tensor

    @property
    def dim(self) -> int:
        """Channels of a head."""
        return self.k.shape[0] // self.groups

    def halves(self, w_OD: Tensor) -> Tensor:
        """Rows by head, frequency and half: (heads, F, 2, D + 1)."""
        heads_NdD = w_OD.view(-1, self.dim, w_OD.shape[1])
        return torch.stack([heads_NdD[:, self.first], heads_NdD[:, self.second]], 2)


@dataclass(frozen=True, eq=False)
class Mixed:
    """The mix of key heads, frequency by frequency.

    Attributes:
        keys: (G, F, 2, D + 1) maps of the mixed slots, those of most weight first.
        back: (F, G, G): key of head g = Σ_s back[f, g, s] slot s.
        energy: (F, G), E of a slot's square as the scores weigh it; falls along G.
    """

    keys: Tensor
    back: Tensor
    energy: Tensor


@dataclass(frozen=True, eq=False)
class Latent:
    """Latent attention in one block: what a token leaves behind is `turned(rotary x)` and `down x`.

    Attributes:
        q_rotary: (H, R, D + 1), first halves of all pairs, then the second ones; rotary: (R, D + 1), likewise.
        q_free: (H, N, D + 1), queries of keys that are not turned; up_keys: (H, N, r); up_values: (G, e, r).
        down: (r, D + 1).
        rates: (R/2,).
    """

    q_rotary: Tensor
    q_free: Tensor
    rotary: Tensor
    down: Tensor
    up_keys: Tensor
    up_values: Tensor
    rates: Tensor


def mixed(block: Grouped, moment_DD: Tensor, orthogonal: bool = True) -> Mixed:
    """Principal slots of the key heads at each frequency (RoRoPE, equation 13 of 2502.07864).

    Args:
        orthogonal: the published mix, of keys alone; else keys count by how strongly the queries of their head ask,
            which no longer is orthogonal and is as exact.
    """
    k_GFcD = block.halves(block.k)
    covariance_FGG = torch.einsum("gfcd,de,hfce->fgh", k_GFcD, moment_DD, k_GFcD)
    weight_FG = torch.ones_like(covariance_FGG[..., 0])
    if not orthogonal:
        q_HFcD = block.halves(block.q)
        asked_HF = torch.einsum("hfcd,de,hfce->hf", q_HFcD, moment_DD, q_HFcD)
        asked_GF = asked_HF.view(block.groups, -1, asked_HF.shape[1]).sum(1)
        weight_FG = asked_GF.T.clamp(min=1e-6 * float(asked_GF.mean()) + 1e-30).sqrt()
    weighted_FGG = weight_FG[:, :, None] * covariance_FGG * weight_FG[:, None, :]
    energy_FG, basis_FGG = torch.linalg.eigh(weighted_FGG)
    energy_FG, basis_FGG = energy_FG.flip(-1), basis_FGG.flip(-1)
    there_FGG = basis_FGG.transpose(1, 2) * weight_FG[:, None, :]
    return Mixed(
        keys=torch.einsum("fsg,gfcd->sfcd", there_FGG, k_GFcD),
        back=basis_FGG / weight_FG[:, :, None],
        energy=energy_FG.clamp(min=0),
    )


def mean_turn(rates_F: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """The mean of cos and of sin of the angle between tokens 0 to `reach` apart: what is left of a turn that is not
    made. At low frequencies nearly (1, 0), at high ones nearly nothing."""
    apart_T = torch.arange(reach + 1, dtype=torch.float64, device=rates_F.device)
    angle_FT = rates_F[:, None].double() * apart_T
    return angle_FT.cos().mean(1), angle_FT.sin().mean(1)


def loss(mix: Mixed, rates_F: Tensor, reach: int) -> Tensor:
    """(F, G): what the scores lose where a slot is not turned, higher = keep it turned."""
    cosine_F, sine_F = mean_turn(rates_F, reach)
    return mix.energy * (1 - cosine_F.square() - sine_F.square()).clamp(min=0)[:, None]


def kept(losses: list[Tensor], pairs: int) -> Tensor:
    """(F,): how many slots of each frequency keep their turn, in every block alike: those whose loss is greatest."""
    total_FG = torch.stack([one / one.sum().clamp(min=1e-300) for one in losses]).sum(0)
    total_FG = total_FG + 1e-12 * (total_FG.max() + 1e-12) * torch.arange(
        total_FG.shape[1], 0, -1, dtype=torch.float64, device=total_FG.device
    )  # the first slots of a frequency go first where losses are equal
    chosen = total_FG.flatten().argsort(descending=True, stable=True)[:pairs]
    return torch.bincount(chosen // total_FG.shape[1], minlength=total_FG.shape[0])


def latent(block: Grouped, mix: Mixed, moment_DD: Tensor, turned_F: Tensor, rank: int, reach: int) -> Latent:
    """A block with its keys and values in a latent of `rank` numbers and `2·turned_F.sum()` turned channels.

    Keys without a turn are scaled so that their mean channel is as large as the values', and both are compressed by the
    principal components of what calibration text makes of them (equation 17); `DAMP` of the mean is added to the
    diagonal. With every slot turned and rank G·e it is exact.
    """
    groups = block.groups
    cosine_F, sine_F = mean_turn(block.rates, reach)
    left_F = (cosine_F.square() + sine_F.square()).sqrt()
    places = [(slot, f) for f in range(len(turned_F)) for slot in range(groups)]
    turned = [(s, f) for s, f in places if s < int(turned_F[f])]
    free = [(s, f) for s, f in places if s >= int(turned_F[f])]
    used = sorted({f for _, f in free})
    of_head = torch.arange(block.heads, dtype=torch.int64, device="cpu") // (block.heads // groups)
    q_HFcD = block.halves(block.q)

    def asking(slot: int, f: int) -> Tensor:
        return mix.back[f, of_head, slot][:, None, None] * q_HFcD[:, f]

    width = block.q.shape[1]
    empty = block.q.new_zeros(block.heads, 2, 0, width)
    q_turned = torch.stack([asking(s, f) for s, f in turned], 2) if turned else empty
    k_turned = [mix.keys[s, f] for s, f in turned]
    turn_FDD = torch.stack([torch.stack([cosine_F, -sine_F], 1), torch.stack([sine_F, cosine_F], 1)], 1)
    turn_FDD = turn_FDD / left_F.clamp(min=1e-12)[:, None, None]
    q_free = torch.einsum("fab,hfbd->hfad", turn_FDD, q_HFcD)[:, used]
    k_free = [mix.keys[s, f] * left_F[f] for s, f in free]  # (2, D + 1) each
    keys_nD = torch.cat(k_free) if free else block.k.new_zeros(0, width)
    down, up = _principal(keys_nD, block.v, moment_DD, rank)
    up_keys = block.q.new_zeros(block.heads, max(len(used), 1), 2, rank)
    for index, (s, f) in enumerate(free):
        rows = up[2 * index : 2 * index + 2]
        up_keys[:, used.index(f)] += mix.back[f, of_head, s][:, None, None] * rows
    if not used:
        q_free = block.q.new_zeros(block.heads, 1, 2, width)
    return Latent(
        q_rotary=q_turned.flatten(1, 2),
        q_free=q_free.flatten(1, 2),
        rotary=torch.stack(k_turned, 1).flatten(0, 1) if turned else block.k.new_zeros(0, width),
        down=down,
        up_keys=up_keys.flatten(1, 2),
        up_values=up[len(keys_nD) :].view(groups, -1, rank),
        rates=block.rates[[f for _, f in turned]],
    )


def _principal(keys_nD: Tensor, values_mD: Tensor, moment_DD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(down (r, D + 1), up (n + m, r)) of keys and values together, keys brought to the values' size first."""
    balance = 1.0
    if len(keys_nD):
        sizes = [torch.einsum("nd,de,ne->n", w, moment_DD, w).clamp(min=0).sqrt().mean() for w in (keys_nD, values_mD)]
        balance = float(sizes[1] / sizes[0].clamp(min=1e-30))
    both_ND = torch.cat([balance * keys_nD, values_mD])
    spread_NN = both_ND @ moment_DD @ both_ND.T
    spread_NN.diagonal().add_(DAMP * spread_NN.diagonal().mean())
    basis_Nr = torch.linalg.eigh(spread_NN).eigenvectors.flip(-1)[:, :rank]
    up = basis_Nr.clone()
    up[: len(keys_nD)] /= balance
    return basis_Nr.T @ both_ND, up
