"""Models whose queries, keys, values, probabilities or residuals are read otherwise (`anatomy/inner.py`).

An attention module with such readings attends by `attention`, which writes its softmax out; a block whose residual is
read so gives it rounded. Importing this registers nothing; the function is registered when the first such model is
made, under a name that looks like none of transformers' own. transformers computes such models: the native step does
not round inside attention.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from regauge.anatomy.inner import RESIDUAL, block_of, inner_taps, word_of
from regauge.artifact.codec.base import Layout
from regauge.artifact.codec.taps import inner_readings
from regauge.attention.reads import attended, read
from regauge.errors import ArtifactError, ModelError
from regauge.formats.readings import Reading
from regauge.hosts.transformers.skeleton import block_paths

NAME = "regauge_inside"
READS = "regauge_reads"
BESIDE = ("softcap", "s_aux", "position_bias")
"""What a family hands its attention function beside the mask, and is not computed here."""


@dataclass(eq=False)
class Reads:
    """How what is inside a block is read: the last word of a tap → its reading. One for a block and its attention."""

    readings: dict[str, Reading] = field(default_factory=dict)


def read_inside(model: Any, layout: Layout) -> None:
    """Gives the blocks of a model, in place, the readings that its layout says.

    Raises:
        ModelError: modules of its family cannot be read so.
    """
    taps = [tap for tap in inner_taps(layout.anatomy) if tap in layout.inputs]
    if not taps:
        return
    if layout.attention:
        raise ModelError(
            "blocks that take another's attention map, or whose heads see a window, are not read otherwise inside; "
            f"leave 'attention' or {taps[0]!r} out of the recipe"
        )
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    paths = block_paths(model)
    for block in sorted({block_of(tap) for tap in taps}):
        words = {word_of(tap) for tap in taps if block_of(tap) == block}
        layer = model.get_submodule(paths[block])
        setattr(layer, READS, Reads())
        if RESIDUAL in words:
            layer.register_forward_hook(_left)
        if words - {RESIDUAL}:
            _attend(model, layout, block, layer)
    fill(model, layout, inner_readings(layout))
    model.regauge_forms = "what attention or the residual reads is rounded inside blocks"


def fill(model: Any, layout: Layout, found: Mapping[str, Reading]) -> None:
    """Gives blocks readings that are known by now."""
    paths = block_paths(model)
    for tap, reading in found.items():
        _reads(model.get_submodule(paths[block_of(tap)]))[word_of(tap)] = reading


def check_whole(model: Any, layout: Layout) -> None:
    """Every reading is there, once all is read.

    Raises:
        ArtifactError: one is not.
    """
    paths = block_paths(model)
    for tap in inner_taps(layout.anatomy).keys() & layout.inputs.keys():
        if word_of(tap) not in _reads(model.get_submodule(paths[block_of(tap)])):
            raise ArtifactError(f"the artifact lacks the static step of {tap}; build or fetch it again.")


def _attend(model: Any, layout: Layout, block: int, layer: Any) -> None:
    """Lets the attention module of a block attend by `attention`."""
    path = next(site.module for site in layout.anatomy.in_block(block) if site.kind == "q").rpartition(".")[0]
    module = model.get_submodule(path)
    if not hasattr(module, "config") or not model._supports_attention_backend:
        raise ModelError(
            f"{path} of a {model.config.model_type} has an attention of its own, which shows nobody its queries, keys, "
            f"values and probabilities: leave the taps inside block {block} full"
        )
    module.config = copy.copy(module.config)
    module.config._attn_implementation = NAME
    setattr(module, READS, getattr(layer, READS))
    module.regauge_causal = layout.anatomy.causal


def _reads(module: Any) -> dict[str, Reading]:
    found: Reads = getattr(module, READS)
    return found.readings


def _left(layer: Any, _: Any, output: Any) -> Any:
    """What a block gives, its residual read as told."""
    reading = _reads(layer).get(RESIDUAL)
    if reading is None:
        return output
    if isinstance(output, tuple):
        return (read(output[0], reading), *output[1:])
    return read(output, reading)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """What transformers asks of an attention function: query (B, H, Q, D), key and value (B, K, T, ·)."""
    for name in BESIDE:
        if rest.get(name) is not None:
            raise ModelError(
                f"this family's attention has {name} beside its softmax, which readings of queries, keys, values or "
                "probabilities do not compute: leave those taps full"
            )
    mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]
    if mask is None and not module.regauge_causal:
        mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attended((query, key, value), mask, scale, _reads(module)).contiguous(), None
