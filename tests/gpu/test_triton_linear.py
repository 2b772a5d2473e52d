"""Weight-only products and dequantised weights against their definitions, every width, edge and grouping."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu.operands import far, guarded, packed, random
from regauge.formats.grids import E2M1, NF4
from regauge.kernels import reference, triton

pytestmark = pytest.mark.gpu

ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
NARROW = {"nf4": NF4().table, "fp4": E2M1().table}


def steps(rows: int, groups: int, seed: int) -> Tensor:
    return random(rows, groups, seed=seed).abs() + 0.5


@pytest.mark.parametrize("group", [32, 64, 128, 131])
@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_of_every_width_and_group(bits: int, group: int, device: torch.device) -> None:
    """131 is a whole row, of prime length; 256 a row of eight or four groups, 384 of three."""
    inputs, rows = (131, 37) if group == 131 else (256 if group < 128 else 384, 19)
    w, codes_OI = packed(bits, rows, inputs, device)
    scale_ON = steps(rows, inputs // group, seed=1)
    zero_ON = random(rows, inputs // group, seed=2) + (1 << (bits - 1)) if bits % 2 else None
    low = 0 if bits % 2 else -(1 << (bits - 1))
    value = torch.arange(1 << bits).float() + low
    w_OI = reference.dequantise(codes_OI, value, scale_ON, zero_ON)
    x, bias_O = random(3, inputs, seed=3), random(rows, seed=4)
    wanted = x.half().double() @ w_OI.double().T + bias_O
    on = [guarded(t, device) if t is not None else None for t in (scale_ON, zero_ON, bias_O, x.half())]
    scale, zero, bias, x_half = on
    assert scale is not None
    assert x_half is not None
    y = triton.linear(x_half, w, bits, scale, low=low, zero_ON=zero, bias_O=bias)
    assert y.dtype == torch.float16
    assert far(y, wanted) < ROUNDING[torch.float16]
    found = triton.dequantise(w, bits, inputs, scale, low=low, zero_ON=zero)
    torch.testing.assert_close(found.cpu(), w_OI, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("name", NARROW)
def test_code_books(name: str, dtype: torch.dtype, device: torch.device) -> None:
    w, codes_OI = packed(4, 23, 192, device)
    scale_ON = steps(23, 3, seed=1)
    x = random(2, 5, 192, seed=2).to(dtype)
    y = triton.linear(
        *(guarded(x, device), w, 4, guarded(scale_ON.to(dtype), device)), table=guarded(NARROW[name], device)
    )
    w_OI = reference.dequantise(codes_OI, NARROW[name], scale_ON.to(dtype).float())
    assert y.shape == (2, 5, 23)
    assert y.dtype == dtype
    assert far(y, x.double() @ w_OI.double().T) < ROUNDING[dtype]


@pytest.mark.parametrize(("tokens", "split"), [(1, 1), (1, 2), (16, 3), (17, 50), (67, 2)])
def test_parts_of_a_row_add_up(tokens: int, split: int, device: torch.device) -> None:
    """More parts than a row has tiles are as many parts as tiles."""
    w, codes_OI = packed(3, 19, 331, device)
    x, scale_ON, bias_O = random(tokens, 331), steps(19, 1, seed=1), random(19, seed=2)
    w_OI = reference.dequantise(codes_OI, torch.arange(8.0) - 4, scale_ON)
    y = triton.linear(
        guarded(x, device), w, 3, guarded(scale_ON, device), low=-4, bias_O=bias_O.to(device), split=split
    )
    assert far(y, x.double() @ w_OI.double().T + bias_O) < ROUNDING[torch.float32]


@pytest.mark.parametrize("rows", [1, 29])
def test_many_tokens_and_one_step_for_all(rows: int, device: torch.device) -> None:
    """Over 128 tokens, weights are written out first; a single row of steps serves every row of weights."""
    w, codes_OI = packed(5, rows, 96, device)
    scale_ON, zero_ON = steps(1, 3, seed=1), random(1, 3, seed=2)
    w_OI = reference.dequantise(codes_OI, torch.arange(32.0), scale_ON, zero_ON)
    for tokens in (2, 129):
        x = random(tokens, 96, seed=3)
        y = triton.linear(x.to(device), w, 5, guarded(scale_ON, device), zero_ON=guarded(zero_ON, device))
        assert far(y, x.double() @ w_OI.double().T) < ROUNDING[torch.float32]


def test_by_hand(device: torch.device) -> None:
    """Codes 5, 0, 7 of 3 bits, lowest bit first: 101 000 111 → bytes 1100_0101, 0000_0001. W = 2 · (1, −4, 3)."""
    w = torch.tensor([[0b1100_0101, 0b0000_0001]], dtype=torch.uint8, device=device)
    scale = torch.tensor([[2.0]], device=device)
    x = torch.tensor([[1.0, 10.0, 100.0]], device=device)
    assert triton.linear(x, w, 3, scale, low=-4).tolist() == [[2.0 - 80.0 + 600.0]]
    zero = torch.tensor([[3.0]], device=device)
    assert triton.dequantise(w, 3, 3, scale, zero_ON=zero).tolist() == [[4.0, -6.0, 8.0]]


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24)])
def test_no_tokens(shape: tuple[int, ...], device: torch.device) -> None:
    w, _ = packed(4, 5, 24, device)
    y = triton.linear(torch.zeros(shape, device=device), w, 4, torch.ones(5, 1, device=device), low=-8)
    assert y.shape == (*shape[:-1], 5)


def test_a_row_that_is_not_aligned(device: torch.device) -> None:
    """Rows of 7 bytes of 4 bits are read byte by byte, rows of 8 by words; a slice of a buffer may start anywhere."""
    for columns, start in ((14, 0), (16, 1), (16, 4)):
        codes_OI = packed(4, 3, columns, device)[1]
        buffer = torch.zeros(64, dtype=torch.uint8, device=device)
        row_bytes = reference.pack(codes_OI, 4).to(device)
        view = buffer[start : start + row_bytes.numel()].view(row_bytes.shape)
        view.copy_(row_bytes)
        w = triton.linear(torch.eye(columns, device=device), view, 4, torch.ones(3, 1, device=device))
        assert torch.equal(w.T.cpu(), codes_OI.float())


def test_inputs_of_any_strides(device: torch.device) -> None:
    w, codes_OI = packed(4, 7, 40, device)
    x = random(40, 6).to(device).T
    y = triton.linear(x, w, 4, torch.ones(7, 1, device=device))
    assert far(y, x.cpu().double() @ codes_OI.double().T) < ROUNDING[torch.float32]


def test_the_operators_are_registered_rightly(device: torch.device) -> None:
    """Schema, fake kernel and dispatch, as torch's own checker sees them; torch.compile relies on them."""
    w, _ = packed(4, 5, 24, device)
    x, scale = random(2, 24).to(device), torch.ones(5, 1, device=device)
    samples = {
        "linear": (x, w, 4, scale, -8, None, None, None, 0),
        "dequantise": (w, 4, 24, scale, -8, None, None, torch.float32),
    }
    for name, sample in samples.items():
        operator = getattr(torch.ops.regauge_triton, name).default
        torch.library.opcheck(operator, sample, test_utils=("test_schema", "test_faketensor"))
