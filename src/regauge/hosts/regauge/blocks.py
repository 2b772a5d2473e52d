"""The layers of VAR's transformer (arXiv 2404.02905): a class modulates what each of them reads and adds.

Legend: B batch, L tokens, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from regauge.hosts.regauge.configuration_var import VarConfig
from regauge.hosts.regauge.pasts import Past
from regauge.tokens.maps import Passed, plain

LOUDEST = math.log(100)  # of the learnt scale of attention's scores


class Modulation(nn.Linear):
    """What a class makes of all blocks: (B, 1, 6, C)."""

    def forward(self, cond_BC: Tensor) -> Tensor:
        return super().forward(cond_BC).view(len(cond_BC), 1, 6, -1)


class Attention(nn.Module):
    """Attention over the scales so far."""

    def __init__(self, config: VarConfig, index: int) -> None:
        super().__init__()
        self.index, self.heads = index, config.num_attention_heads
        self.scale = 1.0 if config.attn_l2_norm else 0.25 / math.sqrt(config.hidden_size // self.heads)
        if config.attn_l2_norm:
            self.scale_mul_1H11 = nn.Parameter(like((1, self.heads, 1, 1)).fill_(math.log(4)))
        self.normed = config.attn_l2_norm
        self.mat_qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_BLC: Tensor, mask_LL: Tensor | None, past: Past | None) -> Tensor:
        made = self.mat_qkv(x_BLC)
        q, k, v = made.view(*made.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.normed:
            q = functional.normalize(q, dim=-1) * self.scale_mul_1H11.clamp(max=LOUDEST).exp()
            k = functional.normalize(k, dim=-1)
        if past is not None:
            read = past.append(self.index, q, k, v)
            k, v = read.keys_BHTD, read.values_BHTD
            mask_LL = None if read.held_BHT is None else read.held_BHT.unsqueeze(2)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask_LL, scale=self.scale)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """Two layers."""

    def __init__(self, config: VarConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_BLC: Tensor) -> Tensor:
        out: Tensor = self.fc2(functional.gelu(self.fc1(x_BLC), approximate="tanh"))
        return out


class Block(nn.Module):
    """A layer; its norms have no numbers of their own, the class gives them."""

    def __init__(self, config: VarConfig, index: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(config), _norm(config)
        self.attn, self.ffn = Attention(config, index), FeedForward(config)
        self.shared = config.shared_aln
        if self.shared:
            self.ada_gss = nn.Parameter(like((1, 1, 6, config.hidden_size)).normal_(std=config.hidden_size**-0.5))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 6 * config.hidden_size))

    def modulation(self, cond: Tensor) -> Tensor:
        """(B, 1, 6, C) of a class (B, C), or of what all blocks share."""
        if self.shared:
            added: Tensor = self.ada_gss + cond
            return added
        made: Tensor = self.ada_lin(cond).view(len(cond), 1, 6, -1)
        return made

    def forward(
        self,
        x_BLC: Tensor,
        cond: Tensor,
        mask_LL: Tensor | None = None,
        past: Past | None = None,
        modulation: Tensor | None = None,
        passed: Passed | None = None,
    ) -> Tensor:
        """Args:
        modulation: where the caller has made it already, which it may once an image.
        passed: which tokens are passed by; None: no block passes any by.
        """
        made = self.modulation(cond) if modulation is None else modulation
        gamma1, gamma2, scale1, scale2, shift1, shift2 = made.unbind(2)
        run = plain if passed is None else passed.run

        def attend(some_BKC: Tensor) -> Tensor:
            out: Tensor = self.attn(self.norm1(some_BKC) * (scale1 + 1) + shift1, mask_LL, past)
            return out

        def feed(some_BKC: Tensor) -> Tensor:
            out: Tensor = self.ffn(self.norm2(some_BKC) * (scale2 + 1) + shift2)
            return out

        x_BLC = x_BLC + gamma1 * run(self.attn.index, "attn", x_BLC, attend)
        return x_BLC + gamma2 * run(self.attn.index, "ffn", x_BLC, feed)


class HeadNorm(nn.Module):
    """The norm before the head, which the class modulates too."""

    def __init__(self, config: VarConfig) -> None:
        super().__init__()
        self.norm = _norm(config)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 2 * config.hidden_size))

    def forward(self, x_BLC: Tensor, cond_BC: Tensor) -> Tensor:
        scale, shift = self.ada_lin(cond_BC).view(len(cond_BC), 1, 2, -1).unbind(2)
        made: Tensor = self.norm(x_BLC) * (scale + 1) + shift
        return made


def like(shape: tuple[int, ...]) -> Tensor:
    """Numbers yet to be set, where modules that are being built put theirs."""
    return torch.empty(shape, dtype=torch.get_default_dtype(), device=torch.get_default_device())


def _norm(config: VarConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)
