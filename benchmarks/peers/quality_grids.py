"""Quantisers that read no text: HQQ, quanto, torchao and bitsandbytes, each by its own functions on the CPU.

KIND: hqq-w3g64, quanto-w4g64 (2, 4 bits), torchao-w3g64, bnb-nf4. Arguments and answer: `windows.py`.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()

from collections.abc import Callable  # noqa: E402
from dataclasses import replace  # noqa: E402

import torch  # noqa: E402
from plain import grouped, kind, matrices, write  # noqa: E402
from torch import Tensor  # noqa: E402
from windows import given  # noqa: E402

Rounded = Callable[[Tensor], Tensor]


def hqq(bits: int, group: int) -> tuple[Rounded, float]:
    """Real zero points and steps, float16 each."""
    from hqq.core.quantize import Quantizer

    def rounded(w_OI: Tensor) -> Tensor:
        codes, meta = Quantizer.quantize(
            w_OI.float(), nbits=bits, group_size=group, optimize=True, axis=1, device="cpu", compute_dtype=torch.float32
        )
        return Quantizer.dequantize(codes, meta)  # type: ignore[no-any-return]

    return rounded, grouped(bits, group, 16, 16)


def quanto(bits: int, group: int) -> tuple[Rounded, float]:
    """Real zero points and steps in the dtype of the weights."""
    from optimum.quanto import MaxOptimizer, qint2, qint4, quantize_weight

    def rounded(w_OI: Tensor) -> Tensor:
        kinds = {2: qint2, 4: qint4}
        scale, shift = MaxOptimizer()(w_OI, qtype=kinds[bits], axis=0, group_size=group, zeropoint=False)
        found = quantize_weight(w_OI, qtype=kinds[bits], axis=0, scale=scale, shift=shift, group_size=group)
        return found.dequantize()  # type: ignore[no-any-return]

    return rounded, grouped(bits, group, 16, 16)


def torchao(bits: int, group: int) -> tuple[Rounded, float]:
    """Steps in the dtype of the weights, zero points of 8 bits."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    def rounded(w_OI: Tensor) -> Tensor:
        layer = torch.nn.Linear(w_OI.shape[1], w_OI.shape[0], bias=False, device="cpu", dtype=w_OI.dtype)
        layer.weight = torch.nn.Parameter(w_OI.clone(), requires_grad=False)
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group), mapping_type=MappingType.ASYMMETRIC
        )
        quantize_(layer, config)
        return layer.weight.dequantize()

    return rounded, grouped(bits, group, 16, 8)


def nf4() -> tuple[Rounded, float]:
    """Blocks of 64; their largest magnitudes in 8 bits under one float32 for 256."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def rounded(w_OI: Tensor) -> Tensor:
        codes, state = quantize_4bit(w_OI.float(), blocksize=64, compress_statistics=True, quant_type="nf4")
        return dequantize_4bit(codes, state)  # type: ignore[no-any-return]

    return rounded, 4 + 8 / 64 + 32 / (64 * 256)


def main() -> None:
    job = given(__doc__, BEGAN)
    method, _, size = job.kind.partition("-")
    if job.kind == "bnb-nf4":
        rounded, bits = nf4()
    else:
        rounded, bits = {"hqq": hqq, "quanto": quanto, "torchao": torchao}[method](*kind(replace(job, kind=size)))
    decoded = {name: rounded(w_OI).detach().view(w_OI.shape) for name, w_OI in matrices(job.model).items()}
    job.ends("made")
    write(job, decoded, dict.fromkeys(decoded, bits))


if __name__ == "__main__":
    main()
