"""Attention of one new token over long caches: packed blocks as our kernel reads them, and torch's over bf16 rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gpu_contests import Call, Contest, Make, nbytes
from regauge.kernels.attention import Part, Window
from regauge.kernels.blocks import BlockLayout
from regauge.kernels.triton.cached import attend

KV_HEADS, HEADS, CHANNELS, BLOCK = 8, 32, 128, 32
"""Of Llama-3-8B; and the tokens of a sealed block."""
ERRORS = {16: 0.01, 8: 0.02, 4: 0.2, 2: 0.9}


def blocks(x_BKTD: Tensor, role: str, bits: int) -> tuple[BlockLayout, Tensor]:
    """Keys with one step a channel and block, values with one a token, each beside its least value."""
    x_NTD = x_BKTD.reshape(-1, BLOCK, CHANNELS)
    if bits == 16:
        layout = BlockLayout(role, BLOCK, CHANNELS, 16, dtype=x_BKTD.dtype)
        return layout, layout.rows(x_NTD).flatten()
    time = role == "keys"
    layout = BlockLayout(role, BLOCK, CHANNELS, bits, "time" if time else "channels", BLOCK if time else CHANNELS, True)
    low, high = x_NTD.float().aminmax(dim=1 if time else 2, keepdim=True)
    step = ((high - low) / ((1 << bits) - 1)).clamp(min=1e-6)
    codes = ((x_NTD.float() - low) / step).round().clamp(0, (1 << bits) - 1).to(torch.uint8)
    return layout, layout.pack(codes, step.flatten(1), low.flatten(1)).flatten()


def ours(q_BQHD: Tensor, bits: int) -> Make:
    def make(w: Tensor) -> tuple[Call, int]:
        batch, heads, tokens = *w.shape[1:3], w.shape[3] - BLOCK
        (keys, key_bytes), (values, value_bytes) = (
            blocks(half[:, :, :-BLOCK], role, bits) for half, role in zip(w, ("keys", "values"), strict=True)
        )
        own = torch.arange(batch * heads, dtype=torch.int64).view(batch, heads) * (tokens // BLOCK)
        lengths = torch.full((batch, heads), tokens, dtype=torch.int32)
        device = w.device
        offsets = [(own * layout.bytes).to(device) for layout in (keys, values)]
        part = Part(keys, values, key_bytes, value_bytes, *offsets, lengths.to(device))
        window = Window(*(half[:, :, -BLOCK:].contiguous() for half in w))
        size = nbytes(key_bytes, value_bytes, window.keys_BKTD, window.values_BKTE)
        return lambda: attend(q_BQHD, [part], window, CHANNELS**-0.5), size

    return make


def torchs(q_BQHD: Tensor) -> Make:
    def make(w: Tensor) -> tuple[Call, int]:
        keys, values = w
        return lambda: torch.nn.functional.scaled_dot_product_attention(
            q_BQHD.transpose(1, 2), keys, values, enable_gqa=True
        ).transpose(1, 2), nbytes(w)

    return make


def caches(batch: int, tokens: int, device: torch.device) -> Iterator[Contest]:
    """At 8 heads of keys and values, 32 of queries and 128 channels."""
    q = torch.randn(batch, 1, HEADS, CHANNELS, device=device).bfloat16()

    def w(seed: int) -> Tensor:
        drawn = torch.Generator(device).manual_seed(seed)
        shape = 2, batch, KV_HEADS, tokens + BLOCK, CHANNELS  # the newest lie in the window as they are
        return torch.randn(shape, generator=drawn, device=device, dtype=torch.bfloat16)

    def wanted(w: Tensor) -> Tensor:
        found = []
        for index in range(batch):  # float64, a sequence at a time
            query = q[index].double().view(KV_HEADS, -1, CHANNELS)
            weight = (query @ w[0, index].double().mT * CHANNELS**-0.5).softmax(-1)
            found.append((weight @ w[1, index].double()).view(1, HEADS, CHANNELS))
        return torch.stack(found)

    cost = 4 * batch * HEADS * tokens * CHANNELS
    for bits, error in ERRORS.items():
        contenders = {"regauge": ours(q, bits), "torch bf16": torchs(q)}
        title = f"cache of {bits} bits, {batch} x {tokens} tokens"
        yield Contest(title, cost, w, wanted, contenders, error, graph=False)
