"""What benchmarks/gpu.py compares: for each product, our kernel and its peers, from the same random weights.

Codes are the nearest ones; nothing here is tuned, for only time and being right to quantisation error matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.formats.base import Format as Format
from regauge.formats.grains import Token as Token
from regauge.formats.grids import NF4
from regauge.formats.grids import Int as Int
from regauge.formats.rangers import Dynamic as Dynamic
from regauge.formats.scales import Float32 as Float32
from regauge.kernels import reference, triton

NF4_GROUP, GROUP = 64, 128
Call = Callable[[], Tensor]
Make = Callable[[Tensor], tuple[Call, int]]
"""From bf16 weights to a call and the bytes it reads."""


@dataclass(frozen=True)
class Contest:
    """Contenders for one product: the first is ours. `wanted` is the product of weights `w` in float64."""

    title: str
    operations: int
    w: Callable[[int], Tensor]
    wanted: Callable[[Tensor], Tensor]
    contenders: dict[str, Make]
    tolerance: float
    """Largest relative error, quantisation included."""
    graph: bool = True
    """Whether calls are timed as one CUDA graph; else as they are started from Python, one after another."""


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def weight_only(x: Tensor, bits: int) -> Make:
    """Ours: codes of `bits` with zero points in groups of 128, or NF4 in groups of 64 for bits = 0."""

    def make(w_OI: Tensor) -> tuple[Call, int]:
        group = min(GROUP if bits else NF4_GROUP, w_OI.shape[1])
        w_ONG = w_OI.float().view(w_OI.shape[0], -1, group)
        if bits:
            least = w_ONG.amin(-1)
            scale_ON = (w_ONG.amax(-1) - least) / ((1 << bits) - 1)
            zero_ON, table = (-least / scale_ON).to(w_OI.dtype), None
            scale_ON = scale_ON.to(w_OI.dtype)
            codes = (w_ONG / scale_ON.unsqueeze(-1) + zero_ON.unsqueeze(-1)).round().clamp(0, (1 << bits) - 1)
        else:
            scale_ON, zero_ON = w_ONG.abs().amax(-1).to(w_OI.dtype), None
            table = NF4().table.to(w_OI.device)
            middles = (table[1:] + table[:-1]) / 2
            codes = torch.bucketize(w_ONG / scale_ON.unsqueeze(-1), middles)
        packed = reference.pack(codes.to(torch.uint8).view(w_OI.shape), bits or 4)
        return lambda: triton.linear(x, packed, bits or 4, scale_ON, table=table, zero_ON=zero_ON), nbytes(
            packed, scale_ON, zero_ON
        )

    return make


def bf16(x: Tensor) -> Make:
    return lambda w_OI: (lambda: torch.nn.functional.linear(x, w_OI), nbytes(w_OI))


def torch_int4(x: Tensor) -> Make:
    def make(w_OI: Tensor) -> tuple[Call, int]:
        w_ONG = w_OI.float().view(w_OI.shape[0], -1, GROUP)
        least = w_ONG.amin(-1)
        scale = ((w_ONG.amax(-1) - least) / 15).bfloat16()
        codes = ((w_ONG - least.unsqueeze(-1)) / scale.float().unsqueeze(-1)).round().clamp(0, 15).to(torch.uint8)
        codes = codes.view(w_OI.shape)
        packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
        middle = (least + 8 * scale.float()).bfloat16()  # the kernel counts codes from −8
        steps = torch.stack([scale, middle], -1).transpose(0, 1).contiguous()
        return lambda: torch._weight_int4pack_mm(x, packed, GROUP, steps), nbytes(packed, steps)

    return make


def torchao_int4(x: Tensor) -> Make:
    def make(w_OI: Tensor) -> tuple[Call, int]:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        layer = torch.nn.Linear(w_OI.shape[1], w_OI.shape[0], bias=False, dtype=w_OI.dtype, device=w_OI.device)
        layer.weight = torch.nn.Parameter(w_OI.clone(), requires_grad=False)
        quantize_(layer, Int4WeightOnlyConfig(group_size=GROUP))
        return lambda: layer(x), w_OI.numel() // 2 + 4 * w_OI.numel() // GROUP

    return make


def by_rows(x: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """A tensor on a grid up to `top`, a step for each row."""
    step = x.float().abs().amax(-1) / top
    return x.float() / step.unsqueeze(-1), step


def integers(x: Tensor, bits: int, torchs: bool = False) -> Make:
    """Both operands at 8 bits, or at 6 with weights by planes; torch's product of int8 with the same scaling after."""
    top = (1 << (bits - 1)) - 1
    x_grid, x_step = by_rows(x, top)
    x_int = x_grid.round().to(torch.int8)

    def make(w_OI: Tensor) -> tuple[Call, int]:
        w_grid, w_step = by_rows(w_OI, top)
        w_int = w_grid.round().to(torch.int8)
        if torchs:
            scale = x_step.unsqueeze(-1) * w_step
            return lambda: (torch._int_mm(x_int, w_int.T) * scale).to(x.dtype), nbytes(w_int, w_step)
        if bits == 8:
            return lambda: triton.w8a8(x_int, x_step, w_int, w_step, dtype=x.dtype), nbytes(w_int, w_step)
        planes = triton.split_planes((w_int + 32).to(torch.uint8))
        return lambda: triton.w6a6(x_int, x_step, *planes, w_step, dtype=x.dtype), nbytes(*planes, w_step)

    return make


def e4m3(x: Tensor, both: bool, torchs: bool = False) -> Make:
    x_grid, x_step = by_rows(x, 448.0)
    x_fp8 = x_grid.to(torch.float8_e4m3fn)

    def make(w_OI: Tensor) -> tuple[Call, int]:
        w_grid, w_step = by_rows(w_OI, 448.0)
        w = w_grid.to(torch.float8_e4m3fn)
        size, steps = nbytes(w, w_step), w_step.unsqueeze(-1)
        if torchs:
            scales = x_step.unsqueeze(-1), w_step.unsqueeze(0)
            return lambda: torch._scaled_mm(x_fp8, w.T, *scales, out_dtype=x.dtype), size
        if both:
            return lambda: triton.fp8(x_fp8, w, steps, x_scale_T=x_step, dtype=x.dtype), size
        return lambda: triton.fp8(x, w, steps), size

    return make


def linears(rows: int, columns: int, tokens: int, device: torch.device) -> Iterator[Contest]:
    x = torch.randn(tokens, columns, device=device).bfloat16()

    def w(seed: int) -> Tensor:
        drawn = torch.Generator(device).manual_seed(seed)
        return (torch.randn(rows, columns, generator=drawn, device=device) * columns**-0.5).bfloat16()

    def wanted(w_OI: Tensor) -> Tensor:
        return x.double() @ w_OI.double().T

    cost = 2 * rows * columns * tokens
    errors = {8: 0.02, 6: 0.04, 4: 0.15, 3: 0.3, 2: 0.7, 0: 0.15}
    for bits, error in errors.items():
        contenders = {"regauge": weight_only(x, bits), "torch bf16": bf16(x)}
        if bits == 4:
            contenders |= {"torch int4pack": torch_int4(x), "torchao int4": torchao_int4(x)}
        name = f"W{bits}A16 g{GROUP}" if bits else f"NF4 g{NF4_GROUP}"
        yield Contest(f"{name}, {tokens} tokens", cost, w, wanted, contenders, error)
    with_ints = {"regauge": integers(x, 8), "torch _int_mm": integers(x, 8, torchs=True), "torch bf16": bf16(x)}
    yield Contest(f"W8A8, {tokens} tokens", cost, w, wanted, with_ints, 0.03)
    planes = {"regauge": integers(x, 6), "torch bf16": bf16(x)}
    yield Contest(f"W6A6 planes, {tokens} tokens", cost, w, wanted, planes, 0.1)
    mixed = {"regauge": e4m3(x, False), "torch bf16": bf16(x)}
    yield Contest(f"FP8 x bf16, {tokens} tokens", cost, w, wanted, mixed, 0.05)
    both = {"regauge": e4m3(x, True), "torch _scaled_mm": e4m3(x, True, torchs=True), "torch bf16": bf16(x)}
    yield Contest(f"FP8 x FP8, {tokens} tokens", cost, w, wanted, both, 0.06)
