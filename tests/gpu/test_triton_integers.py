"""Products of integers are exact against int64; with steps, they are the same numbers scaled."""

from __future__ import annotations

import pytest
import torch

from gpu.operands import far, guarded, integers, packed, random
from regauge.kernels import reference, triton

pytestmark = pytest.mark.gpu

ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [(1, 37, 131), (3, 1, 256), (17, 41, 300), (67, 5, 97)]


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(("tokens", "rows", "inputs"), SHAPES)
def test_w8a8_is_exact(tokens: int, rows: int, inputs: int, split: int, device: torch.device) -> None:
    x, w = integers(-128, 128, tokens, inputs), integers(-128, 128, rows, inputs, seed=1)
    on = guarded(x.to(torch.int8), device), None, guarded(w.to(torch.int8), device), None
    sums = triton.w8a8(*on, split=split)
    assert sums.dtype == torch.int32
    assert torch.equal(sums.cpu().long(), x @ w.T)


def test_the_greatest_sums(device: torch.device) -> None:
    """By hand: 4,096 products of −128 · −128 are 2^26, past what float32 adds exactly one by one."""
    x = torch.full((1, 4096), -128, dtype=torch.int8, device=device)
    w = torch.full((2, 4096), -128, dtype=torch.int8, device=device)
    w[1, 0] = -127
    assert triton.w8a8(x, None, w, None).tolist() == [[1 << 26, (1 << 26) - 128]]


@pytest.mark.parametrize("bits", range(1, 9))
def test_weights_of_every_width_are_exact(bits: int, device: torch.device) -> None:
    for tokens, rows, inputs in SHAPES[:3]:
        w, codes_OI = packed(bits, rows, inputs, device)
        x = integers(-128, 128, tokens, inputs, seed=1)
        sums = triton.packed_int(guarded(x.to(torch.int8), device), None, w, bits, None, split=1 + tokens % 3)
        assert torch.equal(sums.cpu().long(), x @ (codes_OI.long() - (1 << (bits - 1))).T)
    w, codes_OI = packed(4, 3, 24, device)
    x = integers(-8, 8, 2, 24)
    sums = triton.packed_int(x.to(torch.int8).to(device), None, w, 4, None, low=-3)
    assert torch.equal(sums.cpu().long(), x @ (codes_OI.long() - 3).T)


@pytest.mark.parametrize(("tokens", "rows", "inputs"), SHAPES)
def test_w6a6_by_planes_is_exact(tokens: int, rows: int, inputs: int, device: torch.device) -> None:
    w, x = integers(-32, 32, rows, inputs), integers(-32, 32, tokens, inputs, seed=1)
    low_OB, high_OB = triton.split_planes((w + 32).to(torch.uint8))
    assert low_OB.shape == (rows, -(-inputs // 2))
    assert high_OB.shape == (rows, -(-inputs // 4))
    planes = guarded(low_OB, device), guarded(high_OB, device)
    x_int8 = guarded(x.to(torch.int8), device)
    for split in (1, 2):
        sums = triton.w6a6(x_int8, None, *planes, None, split=split)
        assert torch.equal(sums.cpu().long(), x @ w.T)


def test_planes_by_hand() -> None:
    """Codes 63, 1, 16: low four bits 15, 1, 0; high two 3, 0, 1."""
    low, high = triton.split_planes(torch.tensor([[63, 1, 16]], dtype=torch.uint8))
    assert low.tolist() == [[0b0001_1111, 0]]
    assert high.tolist() == [[0b01_00_11]]


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("split", [1, 2])
def test_steps_and_bias(split: int, dtype: torch.dtype, device: torch.device) -> None:
    x, w = integers(-32, 32, 6, 270).view(2, 3, 270), integers(-32, 32, 11, 270, seed=1)
    x_scale_T, w_scale_O, bias_O = random(6, seed=2).abs(), random(11, seed=3).abs(), random(11, seed=4)
    wanted = (x @ w.T).double() * x_scale_T.view(2, 3, 1) * w_scale_O + bias_O
    x_int8, x_scale = guarded(x.to(torch.int8), device), guarded(x_scale_T, device)
    after = guarded(w_scale_O, device), guarded(bias_O, device)
    y = triton.w8a8(x_int8, x_scale, guarded(w.to(torch.int8), device), *after, dtype=dtype, split=split)
    assert y.dtype == dtype
    assert y.shape == (2, 3, 11)
    assert far(y, wanted) < ROUNDING[dtype]
    planes = triton.split_planes((w + 32).to(torch.uint8))
    y = triton.w6a6(x_int8, x_scale, *(p.to(device) for p in planes), *after, dtype=dtype, split=split)
    assert far(y, wanted) < ROUNDING[dtype]
    codes = reference.pack((w + 32).to(torch.uint8), 6).to(device)
    y = triton.packed_int(x_int8, x_scale, codes, 6, *after, dtype=dtype, split=split)
    assert far(y, wanted) < ROUNDING[dtype]
    one = torch.tensor([0.25], device=device)
    y = triton.w8a8(x_int8, x_scale, w.to(torch.int8).to(device), one, split=split)
    assert far(y, (x @ w.T).double() * x_scale_T.view(2, 3, 1) * 0.25) < ROUNDING[torch.float32]


@pytest.mark.parametrize("shape", [(0, 40), (3, 0, 40)])
def test_no_tokens(shape: tuple[int, ...], device: torch.device) -> None:
    x, steps = torch.zeros(shape, dtype=torch.int8, device=device), torch.ones(0, device=device)
    w = torch.ones(3, 40, dtype=torch.int8, device=device)
    assert triton.w8a8(x, None, w, None).shape == (*shape[:-1], 3)
    y = triton.w6a6(
        x, steps, *(p.to(device) for p in triton.split_planes(w.cpu().byte())), torch.ones(3, device=device)
    )
    assert y.shape == (*shape[:-1], 3)
    assert y.dtype == torch.float32


def test_the_operator_is_registered_rightly(device: torch.device) -> None:
    x, w = torch.ones(2, 24, dtype=torch.int8, device=device), torch.ones(5, 24, dtype=torch.int8, device=device)
    steps = torch.ones(2, device=device), torch.ones(5, device=device)
    for sample in (
        (x, None, [w], [], 0, None, None, torch.float32, 0),
        (x, steps[0], [w], [], 0, steps[1], None, torch.float16, 0),
    ):
        torch.library.opcheck(
            torch.ops.regauge_triton.integer.default, sample, test_utils=("test_schema", "test_faketensor")
        )
