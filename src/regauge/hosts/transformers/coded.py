"""Sources that are stored in codes already, and are read by decoding: FP8 with a step a block, and MXFP4.

FP8 (`quant_method: fp8`, as DeepSeek and Qwen publish): beside a matrix of E4M3 numbers stands `NAME_scale_inv`, one
step a block of `weight_block_size` (128 × 128), or one for all; a weight is its number times its step. MXFP4
(`quant_method: mxfp4`, as GPT-OSS): `NAME_blocks` (E, O, G, 16) holds 32 E2M1 numbers in 16 bytes, the low half first,
and `NAME_scales` (E, O, G) the exponent of their step, with 127 added; the parameter is (E, I, O). OCP Microscaling
Formats v1.0. Decoded weights are bfloat16.
Legend: E experts, O outputs, I inputs, G groups of 32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regauge.errors import CorruptWeights
from regauge.hosts.transformers.checkpoint import Stored

METHODS = {"fp8": "FP8 with a step a block", "mxfp4": "MXFP4"}
"""`quant_method` → what it is."""
FP8 = ("F8_E4M3", "F8_E5M2")
STEPS, BLOCKS, SCALES = "_scale_inv", "_blocks", "_scales"
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
GROUP = 32


def method(quantisation: Any) -> str:
    """The `quant_method` of a config, where its weights are read by decoding; else ""."""
    found = quantisation.get("quant_method") if type(quantisation) is dict else None
    return found if found in METHODS else ""


def paired(stored: Mapping[str, Stored], what: str) -> dict[str, Stored]:
    """The tensors of a checkpoint with codes and their steps as one, under the name of the weight.

    Raises:
        CorruptWeights: steps without codes, codes without steps, or of shapes that do not fit together.
    """
    found = dict(stored)
    if not what:
        return found
    for key, steps in stored.items():
        if what == "fp8" and key.endswith(STEPS):
            name = key.removesuffix(STEPS)
            _there(stored, name, key)
            found.pop(key)
            if stored[name].dtype in FP8:
                found[name] = replace(stored[name], steps=steps)
                _check_blocks(found[name], steps)
        if what == "mxfp4" and key.endswith(SCALES):
            name = key.removesuffix(SCALES)
            _there(stored, f"{name}{BLOCKS}", key)
            codes = found.pop(f"{name}{BLOCKS}")
            found.pop(key)
            if codes.shape[:-1] != steps.shape or codes.shape[-1] != GROUP // 2 or len(codes.shape) != 4:
                raise CorruptWeights(
                    f"{codes.key} in {codes.file} has shape {list(codes.shape)}, which its steps of "
                    f"{list(steps.shape)} do not fit; download the model again"
                )
            experts, rows, groups, _ = codes.shape
            found[name] = replace(codes, shape=(experts, groups * GROUP, rows), steps=steps)
    lost = [one for one in found.values() if one.steps is None and (one.dtype in FP8 or one.key.endswith(BLOCKS))]
    if lost:
        where = f"{lost[0].key} in {lost[0].file}"
        raise CorruptWeights(f"{where} is stored as codes without steps; download the model again")
    return found


def notes(stored: Mapping[str, Stored]) -> list[str]:
    """What a receipt says of codes that were decoded."""
    many = [one for one in stored.values() if one.steps is not None]
    what = "FP8 numbers with steps" if many and many[0].dtype in FP8 else "MXFP4"
    return [f"{len(many)} tensors of the source are stored as {what}: they were read by decoding"] if many else []


def _there(stored: Mapping[str, Stored], name: str, steps: str) -> None:
    if name not in stored:
        raise CorruptWeights(f"{stored[steps].file} holds the steps {steps} of codes that are not there ({name})")


def _check_blocks(codes: Stored, steps: Stored) -> None:
    """That steps of a block each lie over the matrix, or one over all."""
    one = torch.Size(steps.shape).numel() == 1
    if not one and (len(codes.shape) != 2 or len(steps.shape) != 2 or None in map(_side, codes.shape, steps.shape)):
        raise CorruptWeights(
            f"{codes.key} in {codes.file} has shape {list(codes.shape)}, which its steps of {list(steps.shape)} do not "
            "fit; download the model again"
        )


def _side(size: int, count: int) -> int | None:
    """How many channels share a step: the smallest power of two with which so many steps cover them, or all evenly."""
    if count and size % count == 0 and (size // count) & (size // count - 1) == 0:
        return size // count
    return next((1 << bits for bits in range(32) if -(-size // (1 << bits)) == count), None)


def tensor(handles: dict[Path, Any], stored: Stored, index: int | None = None) -> Tensor:
    """A tensor of the files, decoded where it is codes.

    Args:
        handles: open files, each opened once.
        index: of a stack of codes this expert alone.
    """
    from safetensors import safe_open

    def read(one: Stored) -> Tensor:
        if one.file not in handles:
            handles[one.file] = safe_open(str(one.file), framework="pt")
        found: Tensor = (
            handles[one.file].get_tensor(one.key) if index is None else handles[one.file].get_slice(one.key)[index]
        )
        return found

    return read(stored) if stored.steps is None else decode(read(stored), read(stored.steps))


def decode(codes: Tensor, steps: Tensor) -> Tensor:
    """Weights of codes: of one matrix in FP8 (O, I), or of MXFP4 with or without the axis of experts.

    Args:
        codes: F8 (O, I), or bytes (…, O, G, 16).
        steps: (⌈O/b⌉, ⌈I/b⌉), one number, or bytes (…, O, G).
    """
    if codes.dtype is not torch.uint8:
        wide = codes.float()
        if steps.numel() == 1:
            return (wide * steps.float().reshape(())).bfloat16()
        rows, columns = (_side(size, count) or 1 for size, count in zip(codes.shape, steps.shape, strict=True))
        spread = steps.float().repeat_interleave(rows, 0)[: codes.shape[0]]
        return (wide * spread.repeat_interleave(columns, 1)[:, : codes.shape[1]]).bfloat16()
    table = torch.tensor([*VALUES, *(-value for value in VALUES)], dtype=torch.float32, device="cpu")
    numbers = torch.stack([table[(codes & 15).long()], table[(codes >> 4).long()]], -1).flatten(-2)
    made = torch.ldexp(numbers, (steps.int() - 127).unsqueeze(-1)).flatten(-2)
    return made.transpose(-1, -2).bfloat16().contiguous()
