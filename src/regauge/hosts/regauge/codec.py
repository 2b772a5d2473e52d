"""Encoder and decoder of VAR's tokenizer: residual convolutions, attention at the smallest size.

Names of modules are those of the reference's checkpoints (arXiv 2404.02905; the networks are VQGAN's, 2012.09841).
Legend: B batch, C channels, h w sides.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

EPS = 1e-6


class Residual(nn.Module):
    """Two normed convolutions, added to what comes in."""

    def __init__(self, inner: int, outer: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inner, eps=EPS)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outer, eps=EPS)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.nin_shortcut = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        made = self.conv1(functional.silu(self.norm1(x_BChw)))
        made = self.conv2(functional.silu(self.norm2(made)))
        out: Tensor = self.nin_shortcut(x_BChw) + made
        return out


class Attention(nn.Module):
    """One head of attention between all places of a map."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x_BChw)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        mixed = functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        out: Tensor = x_BChw + self.proj_out(mixed.transpose(1, 2).reshape(x_BChw.shape))
        return out


class Down(nn.Module):
    """Halves a map; the pixels missing at its far edges are 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BChw: Tensor) -> Tensor:
        made: Tensor = self.conv(functional.pad(x_BChw, (0, 1, 0, 1)))
        return made


class Up(nn.Module):
    """Doubles a map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        made: Tensor = self.conv(functional.interpolate(x_BChw, scale_factor=2, mode="nearest"))
        return made


class Level(nn.Module):
    """The blocks of one size; the smallest has attention behind each."""

    downsample: Down
    upsample: Up

    def __init__(self, channels: Sequence[int], groups: int, attends: bool) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(channels))
        self.block = nn.ModuleList(Residual(inner, outer, groups) for inner, outer in pairs)
        self.attn = nn.ModuleList(Attention(outer, groups) for _, outer in pairs if attends)

    def forward(self, x_BChw: Tensor) -> Tensor:
        for number, block in enumerate(self.block):
            x_BChw = block(x_BChw)
            if self.attn:
                x_BChw = self.attn[number](x_BChw)
        return x_BChw


class Middle(nn.Module):
    """Between encoder's and decoder's sizes."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = Residual(channels, channels, groups)
        self.attn_1 = Attention(channels, groups)
        self.block_2 = Residual(channels, channels, groups)

    def forward(self, x_BChw: Tensor) -> Tensor:
        made: Tensor = self.block_2(self.attn_1(self.block_1(x_BChw)))
        return made


class Encoder(nn.Module):
    """Pixels (B, channels, H, W) → a map (B, latent, h, w).

    Args:
        widths: channels at each size, largest size first.
        depth: residual blocks at each.
    """

    def __init__(self, pixels: int, latent: int, widths: Sequence[int], depth: int, groups: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(pixels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for number, width in enumerate(widths):
            last = number == len(widths) - 1
            level = Level([widths[max(0, number - 1)]] + depth * [width], groups, attends=last)
            if not last:
                level.downsample = Down(width)
            self.down.append(level)
        self.mid = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], latent, 3, padding=1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        made = self.conv_in(x_BChw)
        for level in self.down:
            assert isinstance(level, Level)
            made = level(made)
            if hasattr(level, "downsample"):
                made = level.downsample(made)
        out: Tensor = self.conv_out(functional.silu(self.norm_out(self.mid(made))))
        return out


class Decoder(nn.Module):
    """A map (B, latent, h, w) → pixels (B, channels, H, W); arguments as the encoder's."""

    def __init__(self, pixels: int, latent: int, widths: Sequence[int], depth: int, groups: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList()
        for number, width in enumerate(widths):
            before = widths[min(number + 1, len(widths) - 1)]
            level = Level([before] + (depth + 1) * [width], groups, attends=number == len(widths) - 1)
            if number:
                level.upsample = Up(width)
            self.up.append(level)
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=EPS)
        self.conv_out = nn.Conv2d(widths[0], pixels, 3, padding=1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        made = self.mid(self.conv_in(x_BChw))
        for level in reversed(list(self.up)):
            assert isinstance(level, Level)
            made = level(made)
            if hasattr(level, "upsample"):
                made = level.upsample(made)
        out: Tensor = self.conv_out(functional.silu(self.norm_out(made)))
        return out
