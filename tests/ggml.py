"""Codes of ours as the bytes of GGUF's blocks (ggml's `ggml-common.h`), for tests: what an export would write.

Legend: B blocks of 32 or 256 weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regauge.formats.base import Codes, Format
from regauge.formats.codewords import CodeWords

TYPES = {"q4-0": 2, "q4-1": 3, "q2-k": 10, "q3-k": 11, "q4-k": 12, "q6-k": 14, "iq2-xxs": 16, "iq2-xs": 17,
         "iq3-xxs": 18, "iq4-nl": 20, "iq3-s": 21, "iq2-s": 22, "iq4-xs": 23}  # fmt: skip
"""Preset → ggml's number of the type."""


def word_bytes(name: str, codes: Codes, fmt: Format) -> Tensor:
    """Of the types whose codes are rows of a list."""
    grid = fmt.grid
    assert isinstance(grid, CodeWords)
    index, signs = grid.words(codes.codes_OI)
    step = codes.step.fields["scale"].int()
    level = codes.step.fields["super_scale"].float() * {"iq3-xxs": 4, "iq3-s": 1}.get(name, 8)
    d = level.half().view(-1, 1).view(torch.uint8)
    if name in ("iq2-xxs", "iq3-xxs"):
        seven = (signs.view(-1, 4) & 127) << torch.tensor([0, 7, 14, 21])
        packed = (seven.sum(1) | step.view(-1).long() << 28) & 0xFFFFFFFF
        four = _bytes((packed[:, None] >> torch.tensor([0, 8, 16, 24])) & 255)
        if name == "iq3-xxs":
            return torch.cat([d, _bytes(index.view(-1, 64)), four.view(-1, 32)], 1)
        return torch.cat([d, torch.cat([_bytes(index.view(-1, 4)), four], 1).view(-1, 64)], 1)
    scales = _bytes(_shifted(step.view(len(d), -1, 2).transpose(1, 2), 4))
    if name == "iq2-xs":
        both = (index | (signs & 127) << 9).view(-1, 32, 1) >> torch.tensor([0, 8])
        return torch.cat([d, _bytes(both & 255).flatten(1), scales], 1)
    eight, low = _bytes(signs.view(-1, 32)), _bytes(index.view(len(d), -1) & 255)
    if name == "iq2-s":
        high = _shifted((index.view(-1, 8, 4) >> 8).transpose(1, 2).int(), 2)
        return torch.cat([d, low, eight, _bytes(high), scales], 1)
    assert name == "iq3-s", name
    high = _shifted((index.view(-1, 8, 8) >> 8).transpose(1, 2).int(), 1)
    return torch.cat([d, low, _bytes(high), eight, scales], 1)


def block_bytes(name: str, codes: Codes) -> Tensor:
    """(B, bytes of a block), uint8."""
    fields, q = codes.step.fields, codes.codes_OI.int()
    halves = {key: fields[key].reshape(-1, 1).view(torch.uint8) for key in fields if fields[key].dtype == torch.float16}
    step, low = fields["scale"].int(), fields.get("low", fields["scale"]).int()
    if name in ("q4-0", "q4-1"):
        q = q.view(-1, 2, 16)
        head = [halves["scale"], halves["low"]] if name == "q4-1" else [halves["scale"]]
        return torch.cat([*head, _bytes(q[:, 0] | q[:, 1] << 4)], 1)
    if name == "iq4-nl":
        q = q.view(-1, 2, 16)
        return torch.cat([halves["scale"], _bytes(q[:, 0] | q[:, 1] << 4)], 1)
    if name == "iq4-xs":
        q, sc = q.view(-1, 8, 2, 16), step.view(-1, 8)
        high = _shifted((sc >> 4)[:, :, None], 2)
        heads = [halves["super_scale"], _bytes(torch.cat([high & 255, high >> 8], 1))]
        low_bits = _bytes(_shifted((sc & 15).view(-1, 4, 2).transpose(1, 2), 4))
        return torch.cat([*heads, low_bits, _bytes((q[:, :, 0] | q[:, :, 1] << 4).flatten(1))], 1)
    if name == "q4-k":
        q, sc, m = q.view(-1, 4, 2, 32), step.view(-1, 8), low.view(-1, 8)
        packed = [
            sc[:, :4] | sc[:, 4:] >> 4 << 6,
            m[:, :4] | m[:, 4:] >> 4 << 6,
            sc[:, 4:] & 15 | (m[:, 4:] & 15) << 4,
        ]
        parts = [halves["super_scale"], halves["super_low"], _bytes(torch.cat(packed, 1))]
        return torch.cat([*parts, _bytes((q[:, :, 0] | q[:, :, 1] << 4).flatten(1))], 1)
    if name == "q2-k":
        q, sc = q.view(-1, 2, 4, 32), step.view(-1, 16) | low.view(-1, 16) << 4
        return torch.cat([_bytes(sc), _bytes(_shifted(q, 2).flatten(1)), halves["super_scale"], halves["super_low"]], 1)
    if name == "q3-k":
        q, sc = q.view(-1, 2, 4, 32) - 4, step.view(-1, 16)
        mask = _shifted((q.view(-1, 8, 32) >= 0).int(), 1)
        high = _shifted((sc >> 4).view(-1, 4, 4), 2)
        parts = [_bytes(mask), _bytes(_shifted(q & 3, 2).flatten(1)), _bytes(sc[:, :8] & 15 | (sc[:, 8:] & 15) << 4)]
        return torch.cat([*parts, _bytes(high), halves["super_scale"]], 1)
    assert name == "q6-k", name
    low_bits = (q.view(-1, 2, 2, 64) & 15).transpose(1, 2)
    ql = (low_bits[:, 0] | low_bits[:, 1] << 4).flatten(1)
    qh = _shifted(q.view(-1, 2, 4, 32) >> 4, 2).flatten(1)
    return torch.cat([_bytes(ql), _bytes(qh), _bytes((step.view(-1, 16) - 128) & 255), halves["super_scale"]], 1)


def _shifted(fields: Tensor, bits: int) -> Tensor:
    """Fields of so many bits along the last axis but one, the first lowest, in one integer."""
    count = fields.shape[-2]
    return sum(
        (fields.select(-2, index) << (bits * index) for index in range(count)), torch.zeros((), dtype=torch.int32)
    )


def _bytes(x: Tensor) -> Tensor:
    return x.to(torch.uint8)
