"""A VAR of toy size, with weights that make every part count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from regauge.hosts.regauge.configuration_var import VarConfig
from regauge.hosts.regauge.modeling_var import VarForImageGeneration

SIZES: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 3, "intermediate_size": 40, "num_classes": 4,
    "patch_nums": (1, 2, 3), "vocab_size": 16, "latent_channels": 4, "image_size": 6, "num_channels": 1,
    "codec_width": 4, "codec_multipliers": (1, 2), "codec_depth": 1, "codec_groups": 2,
}  # fmt: skip


def toy(seed: int = 0, **sizes: Any) -> VarForImageGeneration:
    """A model in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VarForImageGeneration(VarConfig(**SIZES | sizes)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name and "scale_mul" not in name:
                    spread = 0.3 if parameter.dim() < 2 else 1.5 * parameter[0].numel() ** -0.5
                    parameter.copy_(torch.randn(parameter.shape) * spread)
            for block in model.blocks:
                block.attn.mat_qkv.bias[24:48] = 0  # as the reference's have it
    return model


def saved(folder: Path, **sizes: Any) -> Path:
    """A checkpoint of a toy model."""
    toy(**sizes).save_pretrained(folder)
    return folder
