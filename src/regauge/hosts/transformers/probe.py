"""What a model reads, and small fixed inputs to prove moves on.

Legend: B batch, T tokens, C channels, F frames, S samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regauge.documents import read_json
from regauge.errors import ModelError
from regauge.hosts.base import Inputs
from regauge.hosts.transformers.settings import lookup, own_config, why_together
from regauge.hosts.transformers.source import Source
from regauge.hosts.transformers.tables import table_for

TOKENS = 24  # of a probe: enough for heads to mix and for experts to differ


MEDIA = {"pixel_values": "images", "input_values": "sound"}
"""What the first input of a model is, where it is no text."""
HALF = 0.5
"""Mean and spread of pixels where no file beside the model says them."""
RATE = 16_000
"""Samples a second where no file beside the model says it: what all released ones of these families read."""


def medium(source: Source) -> str:
    """`text`, `images` or `sound`: what the model's first input is."""
    return MEDIA.get(reads(source)[0], "text")


def reads(source: Source) -> list[str]:
    """Names of what the model's forward is given."""
    return table_for(source.config).reads or [str(source.model.main_input_name)]


def why_not_fed(source: Source) -> str:
    """Why calibration data cannot be read through the model, block by block; "" where it can."""
    names, table = reads(source), table_for(source.config)
    if names not in (["input_ids"], ["input_ids", "decoder_input_ids"], *([name] for name in MEDIA)):
        return f"a {source.config.model_type} reads {' and '.join(names)}, which regauge does not gather from files yet"
    return why_together(table, source.config)


def context(source: Source) -> int | None:
    """The most tokens that the model reads at once, where its config says so."""
    return longest(source.config) if medium(source) == "text" else None


def longest(config: Any) -> int | None:
    """The most tokens that a config says its model reads at once."""
    table = table_for(config)
    own, names = own_config(table, config), table.config
    found = lookup(own, names.context, None)
    apart = 0 if names.unreached is None else int(lookup(own, names.unreached, -1)) + 1
    return int(found) - apart if found else None


def image_shape(source: Source) -> tuple[int, int]:
    """(channels, side) of the images a vision model reads."""
    return shape_of(source.config)


def shape_of(config: Any) -> tuple[int, int]:
    """The same by a config."""
    config = getattr(config, "vision_config", None) or config
    side = config.image_size
    return int(config.num_channels), int(side if isinstance(side, int) else side[0])


def image_scale(source: Source) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and spread of each channel that pixels from 0 to 1 are normalised by: what the processor beside the model
    says, else 0.5 each.

    Raises:
        ModelError: it says no such numbers.
    """
    return scale_of(source.path, image_shape(source)[0])


def scale_of(folder: Path, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The same by a model's folder."""
    path = folder / "preprocessor_config.json"
    said = read_json(path, ModelError) if path.exists() else {}
    found = []
    for name in ("image_mean", "image_std"):
        some = said.get(name, [HALF] * channels)
        numbers = isinstance(some, list) and all(type(one) in (int, float) for one in some)
        if not numbers or len(some) != channels or not all(abs(one) < 1e3 for one in some):
            raise ModelError(f"{path} says {name} is {str(some)[:40]}, and {channels} numbers are needed.")
        found.append(tuple(map(float, some)))
    if min(found[1]) <= 0:
        raise ModelError(f"{path} says image_std is {list(found[1])}, and spreads lie above 0.")
    return found[0], found[1]


def sound_shape(source: Source, frames: int) -> tuple[int, int, int]:
    """Samples of sound that the convolutions in front of a model make so many frames of; samples between two frames;
    samples a second."""
    found, between = frames, 1
    for kernel, stride in zip(reversed(source.config.conv_kernel), reversed(source.config.conv_stride), strict=True):
        found, between = (found - 1) * int(stride) + int(kernel), between * int(stride)
    path = source.path / "preprocessor_config.json"
    said = read_json(path, ModelError).get("sampling_rate", RATE) if path.exists() else RATE
    if type(said) is not int or not 0 < said < 1 << 20:
        raise ModelError(f"{path} says sampling_rate is {str(said)[:40]!r}, which is no rate; fetch it again.")
    return found, between, said


def probe(source: Source, seed: int = 0) -> Inputs:
    """One batch of random ids (1, T), pixels (1, C, side, side), features of sound (1, C, F) or its samples (1, S), or
    of several of them by name, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def made(name: str) -> Tensor:
        if name == "pixel_values":
            channels, side = image_shape(source)
            return torch.randn(1, channels, side, side, generator=generator, dtype=torch.float32, device="cpu")
        if name == "input_features":
            shape = (1, int(source.config.num_mel_bins), 2 * int(source.config.max_source_positions))
            return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        if name == "input_values":
            return torch.randn(
                1, sound_shape(source, TOKENS)[0], generator=generator, dtype=torch.float32, device="cpu"
            )
        vocabulary, length = source.anatomy.site("embed").shape[0], min(TOKENS, context(source) or TOKENS)
        return torch.randint(0, vocabulary, (1, length), generator=generator, dtype=torch.int64, device="cpu")

    names = reads(source)
    return [made(names[0])] if len(names) == 1 else [{name: made(name) for name in names}]
