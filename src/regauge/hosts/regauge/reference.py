"""The reference's checkpoints of VAR (arXiv 2404.02905), as ours and back: keys, and the config that shapes tell.

The reference has two files, one of the transformer and one of the tokenizer, with the same names as ours but for: the
tokenizer's lie under `vae.`; the biases of queries and values, with zeros for keys between them, are one vector, as
the matrix is one. What is computed from the config is left out: `lvl_1L`, `attn_bias_for_masking`, `zero_k_bias`,
`vae.quantize.ema_vocab_hit_SV`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regauge.errors import ModelError
from regauge.hosts.regauge.configuration_var import VarConfig
from regauge.hosts.regauge.stages import mask_of

COMPUTED = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")
BIAS = re.compile(r"(blocks\.\d+\.attn)\.(q_bias|v_bias)$")
NESTED = ("trainer", "var_wo_ddp")
"""Where a checkpoint of the reference's trainer keeps the transformer."""


def unnested(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The transformer's tensors, also of a checkpoint that its trainer wrote."""
    for name in NESTED:
        if name in state:
            state = state[name]
    return state


def from_reference(transformer: Mapping[str, Tensor], tokenizer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference's two state dicts → ours.

    Raises:
        ModelError: a bias has no other half.
    """
    made: dict[str, Tensor] = {}
    for key, tensor in unnested(transformer).items():
        if key.endswith(COMPUTED):
            continue
        found = BIAS.match(key)
        if found is None:
            made[key] = tensor
        elif found[2] == "q_bias":
            other = transformer.get(f"{found[1]}.v_bias")
            if other is None:
                raise ModelError(f"the checkpoint has {key} and no {found[1]}.v_bias; fetch it again")
            made[f"{found[1]}.mat_qkv.bias"] = torch.cat([tensor, torch.zeros_like(tensor), other])
    return made | {f"vae.{key}": tensor for key, tensor in tokenizer.items() if not key.endswith(COMPUTED)}


def to_reference(config: VarConfig, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Ours → the reference's state dicts of transformer and tokenizer, with what it computes from the config.

    Raises:
        ModelError: keys have a bias, which the reference's have not.
    """
    transformer: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.startswith("vae."):
            continue
        if key.endswith(".mat_qkv.bias"):
            at = key.removesuffix(".mat_qkv.bias")
            queries, keys, values = tensor.chunk(3)
            if keys.any():
                raise ModelError(f"the keys of {at} have a bias, which the reference's checkpoints cannot say")
            transformer |= {f"{at}.q_bias": queries, f"{at}.zero_k_bias": keys, f"{at}.v_bias": values}
        else:
            transformer[key] = tensor
    device = state["pos_1LC"].device
    mask = mask_of(config.areas, device)
    transformer["lvl_1L"] = torch.tensor(
        [[scale for scale, area in enumerate(config.areas) for _ in range(area)]], dtype=torch.int64, device=device
    )
    nothing = torch.zeros(mask.shape, dtype=torch.float32, device=device)
    transformer["attn_bias_for_masking"] = nothing.masked_fill(~mask, -torch.inf)[None, None]
    tokenizer = {key.removeprefix("vae."): tensor for key, tensor in state.items() if key.startswith("vae.")}
    tokenizer["quantize.ema_vocab_hit_SV"] = torch.zeros(
        (len(config.areas), config.vocab_size), dtype=torch.float32, device=device
    )
    return transformer, tokenizer


def config_of(
    transformer: Mapping[str, Tensor], tokenizer: Mapping[str, Tensor], heads: int | None = None, groups: int = 32
) -> VarConfig:
    """The config that the reference's tensors have by their shapes.

    Args:
        heads: of attention, where no learnt scale of it tells; None: as many as layers, as the released ones have.
        groups: of the norms of the tokenizer, which no shape tells.

    Raises:
        ModelError: the tensors are none of VAR's.
    """
    transformer = unnested(transformer)
    try:
        layers = 1 + max(int(key.split(".")[1]) for key in transformer if key.startswith("blocks."))
        scale = transformer.get("blocks.0.attn.scale_mul_1H11")
        levels = transformer["lvl_1L"].flatten().bincount().tolist()
        width = tokenizer["encoder.conv_in.weight"].shape[0]
        sizes = sorted({int(key.split(".")[2]) for key in tokenizer if key.startswith("encoder.down.")})
        times = [tokenizer[f"encoder.down.{n}.block.0.conv1.weight"].shape[0] // width for n in sizes]
        phi = sum(key.startswith("quantize.quant_resi.") and key.endswith(".weight") for key in tokenizer)
        apart = "quantize.quant_resi.0.weight" in tokenizer
        return VarConfig(
            hidden_size=transformer["pos_1LC"].shape[-1],
            num_hidden_layers=layers,
            num_attention_heads=heads or (layers if scale is None else scale.numel()),
            intermediate_size=transformer["blocks.0.ffn.fc1.weight"].shape[0],
            num_classes=transformer["class_emb.weight"].shape[0] - 1,
            shared_aln="blocks.0.ada_gss" in transformer,
            attn_l2_norm=scale is not None,
            patch_nums=tuple(round(area**0.5) for area in levels),
            vocab_size=tokenizer["quantize.embedding.weight"].shape[0],
            latent_channels=tokenizer["quantize.embedding.weight"].shape[1],
            image_size=round(levels[-1] ** 0.5) << (len(times) - 1),
            num_channels=tokenizer["encoder.conv_in.weight"].shape[1],
            codec_width=width,
            codec_multipliers=tuple(times),
            codec_depth=1 + max(int(k.split(".")[4]) for k in tokenizer if k.startswith("encoder.down.0.block.")),
            codec_groups=groups,
            phi_count=0 if apart else phi,
        )
    except (KeyError, IndexError, ValueError) as error:
        raise ModelError(f"these are no checkpoints of VAR: {type(error).__name__}: {error}") from error
