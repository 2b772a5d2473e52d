"""The config of a residual network for small images: what each of its blocks is, as lists with an entry a block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

BLOCKS, WIDTH, SIDE, KERNEL = 1024, 1 << 14, 1024, 15
"""Bounds of what a config may say, so that a broken one is refused before memory is asked for."""


@strict
class ResNetConfig(PreTrainedConfig):  # type: ignore[misc]
    """A residual network for small images (arXiv 1512.03385, section 4.2): two convolutions a block, shortcuts without
    parameters.

    Attributes:
        stem_width, stem_kernel: channels behind the first convolution, and its side.
        hidden_size: channels behind the last block, which the classifier reads.
        layer_widths: channels behind each block; layer_neurons: between its two convolutions.
        layer_strides: pixels that each block steps by: 2 halves the image.
        layer_kernels: side of its two convolutions, an odd number.
        image_size, num_channels: of the images.
        batch_norm_eps: under the root.
    """

    model_type = "regauge_resnet"

    stem_width: int = 16
    stem_kernel: int = 3
    hidden_size: int = 64
    num_hidden_layers: int = 9
    layer_widths: list[int] | tuple[int, ...] = (16, 16, 16, 32, 32, 32, 64, 64, 64)
    layer_neurons: list[int] | tuple[int, ...] = (16, 16, 16, 32, 32, 32, 64, 64, 64)
    layer_strides: list[int] | tuple[int, ...] = (1, 1, 1, 2, 1, 1, 2, 1, 1)
    layer_kernels: list[int] | tuple[int, ...] = (3, 3, 3, 3, 3, 3, 3, 3, 3)
    image_size: int = 32
    num_channels: int = 3
    batch_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs: Any) -> None:
        for name in LISTS:
            setattr(self, name, list(getattr(self, name)))
        for why in _wrong(self):
            raise ValueError(why)
        super().__post_init__(**kwargs)

    @property
    def resizing(self) -> tuple[int, ...]:
        """Blocks that give other numbers of channels or pixels than they read."""
        before = [self.stem_width, *self.layer_widths[:-1]]
        steps = zip(before, self.layer_widths, self.layer_strides, strict=True)
        return tuple(number for number, (was, now, stride) in enumerate(steps) if was != now or stride != 1)


LISTS = ("layer_widths", "layer_neurons", "layer_strides", "layer_kernels")


def deep(blocks: int, widths: Sequence[int] = (16, 32, 64), kernel: int = 3, **more: Any) -> ResNetConfig:
    """A network of stages of so many blocks each, the first block of all but the first stage of stride 2: ResNet-20 is
    `deep(3)`, ResNet-56 `deep(9)`."""
    each = [width for width in widths for _ in range(blocks)]
    strides = [2 if stage and not block else 1 for stage in range(len(widths)) for block in range(blocks)]
    return ResNetConfig(
        stem_width=widths[0],
        stem_kernel=3,
        hidden_size=widths[-1],
        num_hidden_layers=len(each),
        layer_widths=each,
        layer_neurons=each,
        layer_strides=strides,
        layer_kernels=[kernel] * len(each),
        **more,
    )


def _wrong(config: ResNetConfig) -> list[str]:
    """What contradicts itself or is out of bounds, a sentence each."""
    blocks, found = config.num_hidden_layers, list[str]()
    if not 1 <= blocks <= BLOCKS:
        return [f"num_hidden_layers is {blocks}: 1 to {BLOCKS:,}"]
    for name in LISTS:
        if len(getattr(config, name)) != blocks:
            found.append(f"{name} has {len(getattr(config, name))} entries for {blocks} blocks")
    widths = [*config.layer_widths, *config.layer_neurons, config.stem_width, config.hidden_size, config.num_channels]
    if min(widths) < 1 or max(widths) > WIDTH:
        found.append(f"numbers of channels lie from 1 to {WIDTH:,}, not {min(widths)} to {max(widths)}")
    if config.layer_widths and config.layer_widths[-1] != config.hidden_size:
        found.append(
            f"the last block gives {config.layer_widths[-1]} channels, and hidden_size is {config.hidden_size}"
        )
    before = config.stem_width
    for number, width in enumerate(config.layer_widths):
        if width < before:
            found.append(f"block {number} gives {width} channels and reads {before}: a shortcut drops none")
        before = width
    for side in {*config.layer_kernels, config.stem_kernel}:
        if side % 2 == 0 or not 1 <= side <= KERNEL:
            found.append(f"a kernel of side {side}: odd numbers from 1 to {KERNEL}")
    if any(stride not in (1, 2) for stride in config.layer_strides):
        found.append(f"layer_strides are 1 or 2 each, not {config.layer_strides}")
    if not 1 <= config.image_size <= SIDE:
        found.append(f"image_size is {config.image_size}: 1 to {SIDE}")
    return found


CONFIG = ResNetConfig
