"""What a model reads, and small fixed inputs to prove moves on. Legend: B batch, T tokens, C channels."""

from __future__ import annotations

import torch
from torch import Tensor

from regauge.hosts.transformers.source import Source

TOKENS = 24  # of a probe: enough for heads to mix and for experts to differ


def reads_images(source: Source) -> bool:
    """Whether the model's input is pixels rather than token ids."""
    return bool(source.model.main_input_name == "pixel_values")


def context(source: Source) -> int | None:
    """The most tokens that the model reads at once, where its config says so."""
    found = None if reads_images(source) else getattr(source.config, "max_position_embeddings", None)
    return int(found) if found else None


def image_shape(source: Source) -> tuple[int, int]:
    """(channels, side) of the images a vision model reads."""
    return int(source.config.num_channels), int(source.config.image_size)


def probe(source: Source, seed: int = 0) -> list[Tensor]:
    """One batch of random ids (1, T) or pixels (1, C, side, side), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    if reads_images(source):
        channels, side = image_shape(source)
        return [torch.randn(1, channels, side, side, generator=generator, dtype=torch.float32, device="cpu")]
    vocabulary = source.anatomy.site("embed").shape[0]
    length = min(TOKENS, context(source) or TOKENS)
    return [torch.randint(0, vocabulary, (1, length), generator=generator, dtype=torch.int64, device="cpu")]
