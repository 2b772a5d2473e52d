"""A residual network of toy size, with weights and statistics that make every part count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from regauge.hosts.regauge.configuration_resnet import ResNetConfig
from regauge.hosts.regauge.modeling_resnet import ResNetForImageClassification

SIZES: dict[str, Any] = {
    "stem_width": 5, "hidden_size": 11, "num_hidden_layers": 4, "layer_widths": (5, 5, 11, 11),
    "layer_neurons": (6, 7, 9, 13), "layer_strides": (1, 1, 2, 1), "layer_kernels": (3, 3, 3, 3), "image_size": 8,
    "num_labels": 3,
}  # fmt: skip


def toy(seed: int = 0, **sizes: Any) -> ResNetForImageClassification:
    """A network in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNetForImageClassification(ResNetConfig(**SIZES | sizes)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.copy_(torch.rand(parameter.shape) + 0.4)
                    if name.endswith(("mean", "bias")):
                        parameter.sub_(0.9)
    return model


def saved(folder: Path, **sizes: Any) -> Path:
    """A checkpoint of a toy network."""
    toy(**sizes).save_pretrained(folder)
    return folder


def pixels(count: int = 3, seed: int = 1, side: int = 8) -> torch.Tensor:
    """(count, 3, side, side), already normalised."""
    return torch.randn((count, 3, side, side), generator=torch.Generator().manual_seed(seed))


def images(path: Path, count: int = 48, side: int = 8, seed: int = 2) -> Path:
    """An .npz of random images and classes."""
    drawn = np.random.default_rng(seed)
    x = drawn.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    np.savez(path, x=x, y=drawn.integers(0, 3, count))
    return path
