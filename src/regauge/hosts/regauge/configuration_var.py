"""The config of VAR: sizes of the transformer and of the tokenizer in front of it, which one checkpoint holds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

MOST = {"patch_nums": 32, "side": 256, "image_size": 4096, "tokens": 1 << 16, "width": 1 << 16, "classes": 1 << 20}
"""Bounds of what a config may say, so that a broken one is refused before memory is asked for."""


@strict
class VarConfig(PreTrainedConfig):  # type: ignore[misc]
    """VAR, a transformer that predicts the next scale of an image at once (arXiv 2404.02905).

    Attributes:
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: of the transformer.
        num_classes: images may be asked for by class; one class more stands for none.
        shared_aln: one matrix makes the modulation of all blocks, to which each adds numbers of its own; else each
            block has a matrix.
        attn_l2_norm: queries and keys have length 1, and a learnt number a head scales them.
        cond_drop_rate: share of training images whose class is hidden, which guidance needs.
        patch_nums: side of the token map of each scale, coarsest first.
        vocab_size, latent_channels: of the tokenizer's codebook.
        image_size, num_channels: of the images.
        codec_width, codec_multipliers, codec_depth, codec_groups: of encoder and decoder: channels at the full size,
            what they are multiplied by at each halving of it, residual blocks at each, groups of a norm.
        phi_count: convolutions that smooth what a scale adds: 1 for all scales, 0 for one each, else so many.
        phi_share: share of the convolution in what it gives.
        commitment: weight of the encoder's part of the codebook loss.
    """

    model_type = "regauge_var"

    hidden_size: int = 1024
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    num_classes: int = 1000
    shared_aln: bool = False
    attn_l2_norm: bool = True
    cond_drop_rate: float | int = 0.1
    patch_nums: list[int] | tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    vocab_size: int = 4096
    latent_channels: int = 32
    image_size: int = 256
    num_channels: int = 3
    codec_width: int = 160
    codec_multipliers: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    codec_depth: int = 2
    codec_groups: int = 32
    phi_count: int = 4
    phi_share: float | int = 0.5
    commitment: float | int = 0.25
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.patch_nums = tuple(self.patch_nums)
        self.codec_multipliers = tuple(self.codec_multipliers)
        for why in _wrong(self):
            raise ValueError(why)
        super().__post_init__(**kwargs)

    @property
    def areas(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(side * side for side in self.patch_nums)

    @property
    def tokens(self) -> int:
        """Tokens of an image, all scales together."""
        return sum(self.areas)


def _wrong(config: VarConfig) -> list[str]:
    """What contradicts itself or is out of bounds, a sentence each."""
    sides, times, halvings = config.patch_nums, config.codec_multipliers, len(config.codec_multipliers) - 1
    groups, channels = config.codec_groups, [config.codec_width * one for one in times]
    found = [
        (not 2 <= len(sides) <= MOST["patch_nums"], f"patch_nums has {len(sides)} scales, and 2 to 32 make sense"),
        (
            not _rising(sides) or sides[-1] > MOST["side"],
            f"patch_nums must rise from 1 or more to at most 256: {sides}",
        ),
        (config.tokens > MOST["tokens"], f"patch_nums make {config.tokens} tokens an image, and 65,536 are the most"),
        (not times or min(times) < 1 or halvings > 10, f"codec_multipliers must be 1 to 11 numbers from 1: {times}"),
        (not 1 <= config.image_size <= MOST["image_size"], f"image_size is {config.image_size}: 1 to 4096"),
        (not 1 <= config.num_channels <= 64, f"num_channels is {config.num_channels}: 1 to 64"),
        (not 1 <= config.codec_depth <= 64, f"codec_depth is {config.codec_depth}: 1 to 64"),
        (not 0 <= config.phi_count <= MOST["patch_nums"], f"phi_count is {config.phi_count}: 0 to 32"),
        (not 0 <= config.phi_share <= 1, f"phi_share is {config.phi_share}: 0 to 1"),
        (not 1 <= config.num_classes <= MOST["classes"], f"num_classes is {config.num_classes}: 1 to 1,048,576"),
        (
            config.hidden_act != "gelu_pytorch_tanh",
            f"hidden_act is {config.hidden_act!r}, and VAR has gelu_pytorch_tanh",
        ),
    ]
    for name in ("hidden_size", "intermediate_size", "vocab_size", "latent_channels", "codec_width", "codec_groups"):
        size = getattr(config, name)
        found.append((not 1 <= size <= MOST["width"], f"{name} is {size}: 1 to 65,536"))
    for broken, why in found:
        if broken:
            return [why]
    heads = config.num_attention_heads
    if heads < 1 or config.hidden_size % heads:
        return [f"hidden_size {config.hidden_size} does not split into {heads} heads"]
    if any(one % groups for one in channels):
        return [
            f"codec_width and codec_multipliers make {channels} channels, which codec_groups {groups} do not divide"
        ]
    if config.image_size != sides[-1] << halvings:
        return [
            f"images of {config.image_size} pixels, halved {halvings} times, are no maps of {sides[-1]}: image_size "
            f"must be {sides[-1] << halvings}"
        ]
    return []


def _rising(sides: Sequence[int]) -> bool:
    return sides[0] >= 1 and all(a < b for a, b in itertools.pairwise(sides))


CONFIG = VarConfig
