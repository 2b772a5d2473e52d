"""Wrong operands get one sentence that says what they are and what is taken, before anything runs."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from regauge.errors import RegaugeError
from regauge.kernels import triton

pytestmark = pytest.mark.gpu


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def octets(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.uint8)


def bytes_(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int8)


X, W, S = ones(2, 64), octets(5, 32), ones(5, 1)

REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "bits": (lambda: triton.linear(X, W, 9, S), "codes have 1 to 8 bits, not 9"),
    "integer x": (
        lambda: triton.linear(X.int(), W, 4, S),
        "x is torch.int32 of 2 dimensions; it must be rows of floats",
    ),
    "scalar x": (lambda: triton.linear(ones(), W, 4, S), "x is torch.float32 of 0 dimensions"),
    "packed dtype": (lambda: triton.linear(X, W.int(), 4, S), "packed is int32; these kernels take uint8"),
    "packed width": (
        lambda: triton.linear(X, W, 3, S),
        "packed has shape (5, 32), but the other operands make it (any, 24)",
    ),
    "packed strides": (
        lambda: triton.linear(X, octets(32, 5).T, 4, S),
        "packed is not contiguous; pass packed.contiguous(), made once",
    ),
    "scale rows": (lambda: triton.linear(X, W, 4, ones(4, 1)), "scale has 4 rows; W has 5"),
    "scale axes": (lambda: triton.linear(X, W, 4, ones(5)), "scale has shape (5,); a step needs a row and a group"),
    "groups": (
        lambda: triton.linear(X, W, 4, ones(5, 16)),
        "16 groups of 64 channels: the GPU kernels take one group, or equal groups of 8 or a multiple",
    ),
    "no groups": (lambda: triton.linear(X, W, 4, ones(5, 0)), "0 groups of 64 channels"),
    "scale dtype": (lambda: triton.linear(X, W, 4, S.int()), "scale is int32; these kernels take float16 or bfloat16"),
    "zero shape": (
        lambda: triton.linear(X, W, 4, S, zero_ON=ones(5, 2)),
        "zero has shape (5, 2), but the other operands make it (5, 1)",
    ),
    "table": (
        lambda: triton.linear(X, W, 4, S, table=ones(8)),
        "table has shape (8), but the other operands make it (16)",
    ),
    "table and low": (lambda: triton.linear(X, W, 4, S, table=ones(16), low=-8), "low=-8 and a table are given"),
    "bias": (
        lambda: triton.linear(X, W, 4, S, bias_O=ones(4)),
        "bias has shape (4), but the other operands make it (5)",
    ),
    "devices": (lambda: triton.linear(X.to("meta"), W, 4, S), "operands lie on cpu, meta; move them to one device"),
    "dequantise dtype": (
        lambda: triton.dequantise(W, 4, 64, S, dtype=torch.int8),
        "weights are float16, bfloat16 or float32, not torch.int8",
    ),
    "float x": (
        lambda: triton.w8a8(X, None, bytes_(5, 64), None),
        "x is torch.float32 of 2 dimensions; it must be rows of int8",
    ),
    "w8a8 width": (
        lambda: triton.w8a8(bytes_(2, 64), None, bytes_(5, 63), None),
        "w has shape (5, 63), but the other operands make it (any, 64)",
    ),
    "overflow": (
        lambda: triton.w8a8(bytes_(1, 1 << 17), None, bytes_(1, 1 << 17), None),
        "131072 input channels could overflow int32; the integer kernels take 131071",
    ),
    "one scale": (
        lambda: triton.w8a8(bytes_(2, 64), ones(2), bytes_(5, 64), None),
        "give both x_scale and w_scale, or neither and no bias",
    ),
    "x_scale": (
        lambda: triton.w8a8(bytes_(2, 64), ones(3), bytes_(5, 64), ones(5)),
        "x_scale has shape (3), but the other operands make it (2)",
    ),
    "w_scale": (
        lambda: triton.w8a8(bytes_(2, 64), ones(2), bytes_(5, 64), ones(4)),
        "w_scale has shape (4), but the other operands make it (5)",
    ),
    "result": (
        lambda: triton.w8a8(bytes_(2, 64), ones(2), bytes_(5, 64), ones(5), dtype=torch.float64),
        "results are float16, bfloat16 or float32, not torch.float64",
    ),
    "low": (
        lambda: triton.packed_int(bytes_(2, 64), None, W, 4, None, low=120),
        "codes of 4 bits from 120 do not fit int8; take low from −128 to 112",
    ),
    "planes": (
        lambda: triton.w6a6(bytes_(2, 64), None, W, octets(5, 17), None),
        "high has shape (5, 17), but the other operands make it (5, 16)",
    ),
    "fp8 dtype": (lambda: triton.fp8(X, bytes_(5, 64), S), "w is int8; these kernels take float8_e4m3fn or uint8"),
    "fp8 groups": (
        lambda: triton.fp8(X, octets(5, 64), ones(5, 4)),
        "4 groups of 64 channels: FP8 takes one group, or groups of 32, 64 or a multiple of 128",
    ),
    "fp8 scale": (
        lambda: triton.fp8(X, octets(5, 64), ones(1, 2)),
        "w_scale has shape (1, 2), but the other operands make it (5, 2)",
    ),
    "fp8 x_scale": (
        lambda: triton.fp8(X, octets(5, 64), S, x_scale_T=ones(2)),
        "x_scale goes with float8_e4m3fn inputs: give both or neither",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, device: torch.device) -> None:
    call, message = REFUSED[name]
    with pytest.raises(RegaugeError, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)
