"""Packed layers of a model on a GPU: attention of a few new tokens reads the codes where they lie, by a Triton kernel.

Elsewhere (prompts, masks other than padding on the left, layouts that the kernel does not read, no triton) what the
layer holds is decoded, as before.

Legend: B sequences, Q new tokens, H query heads, K KV heads, T tokens of the text, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regauge.attention.maps import causal, first_seen, shown
from regauge.kernels.attention import Window
from regauge.runtime.capabilities import installed
from regauge.runtime.rows import TRITON
from regauge.runtime.store.sealing import turned

NEW = 16
"""New tokens of a sequence, at most."""


def may_read(cache: Any, plan: Any) -> None:
    """Lets the layers of a new cache give their codes to attention, where the kernel is there and reads them."""
    if not installed(TRITON):
        return
    for layer, block in zip(cache.layers, plan.blocks, strict=True):
        if block is not None and layer.chooser is None:
            layer.on_gpu = True


def reads(layer: Any, new: int) -> bool:
    """Whether attention of so many new tokens reads a layer's codes."""
    from regauge.kernels.triton.cached import reads  # late: triton is there where `may_read` said so

    if layer.shelf is None or new > NEW or layer.chosen:
        return False
    return all(reads(part.keys) and reads(part.values) for part in layer.parts())


def attended(layer: Any, query: Tensor, mask: Tensor | None, scaling: float, softcap: float) -> Tensor | None:
    """(B, Q, H, D) over a layer that holds the new tokens, nothing of which has been sealed since; None where the mask
    is not one of padding on the left, or there is none though several tokens are new.

    Args:
        query: (B, H, Q, D), rotated.
        mask: of the text, (B, 1, Q, T or more).
    """
    from regauge.kernels.triton.cached import attend

    batch, size, starts = query.shape[0], query.shape[3], _starts(mask, query, layer.length)
    if starts is None:
        return None
    keys, values = (memory[:, :, : layer.rows] for memory in layer.memory)
    window = Window(keys, values)
    if any(starts):
        first_B = torch.tensor([max(0, start - layer.origin) for start in starts], dtype=torch.int32, device="cpu")
        window = Window(keys, values, firsts_BK=first_B[:, None].expand(batch, keys.shape[1]))
    asked_BQHD = query.transpose(1, 2)
    if layer.hadamard[0]:
        asked_BQHD = turned(size)(asked_BQHD.contiguous())
    out_BQHD = attend(asked_BQHD.contiguous(), layer.parts(starts), window, scaling, softcap)
    return turned(out_BQHD.shape[-1])(out_BQHD) if layer.hadamard[1] else out_BQHD


def _starts(mask: Tensor | None, query: Tensor, tokens: int) -> list[int] | None:
    """The first token of each sequence that counts; None where a mask says something else."""
    batch, _, new, _ = query.shape
    if mask is None:
        return [0] * batch if new == 1 else None
    seen_BQT = shown(mask)[:, 0, :, :tokens].expand(batch, new, tokens)
    first_B = first_seen(mask[..., :tokens]).expand(batch)
    place_T = torch.arange(tokens, dtype=torch.int64, device=mask.device)
    plain_BQT = causal(new, tokens, mask.device) & (place_T >= first_B[:, None, None])
    return first_B.tolist() if bool((plain_BQT == seen_BQT).all()) else None
