"""Products with e4m3 weights against the numbers that torch says the bytes are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu.operands import far, guarded, integers, random
from regauge.kernels import triton
from regauge.kernels.triton import floats

pytestmark = pytest.mark.gpu

E4M3 = torch.float8_e4m3fn
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def numbers(*shape: int, seed: int) -> Tensor:
    """e4m3 of any size, subnormals among them, none of them NaN."""
    codes = integers(0, 256, *shape, seed=seed).to(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x39
    return codes.view(E4M3)


def poisoned(values: Tensor, device: torch.device) -> Tensor:
    """`guarded` for e4m3: 255 is a NaN."""
    return guarded(values.view(torch.uint8), device).view(E4M3)


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_every_code(dtype: torch.dtype, device: torch.device) -> None:
    """1 · w for each of the 256 bytes: exactly torch's value, of either sign of zero, NaN where it is NaN."""
    codes = torch.arange(256, dtype=torch.uint8)
    one = torch.ones(1, 1, dtype=dtype, device=device)
    y = triton.fp8(one, codes.view(256, 1).to(device), torch.ones(1, 1, device=device))
    torch.testing.assert_close(y[0].cpu(), codes.view(E4M3).to(dtype), rtol=0, atol=0, equal_nan=True)
    y = triton.fp8(one.to(E4M3), codes.view(256, 1).to(device), torch.ones(1, 1, device=device), x_scale_T=one[0])
    finite = (codes & 0x7F) != 0x7F
    assert torch.equal(y[0].cpu()[finite], codes.view(E4M3).float()[finite])


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("groups", [1, 2, 6, 12])
def test_float_inputs(groups: int, dtype: torch.dtype, device: torch.device) -> None:
    """Groups of 384, 192 (refused), 64 and 32 channels; a whole row may have any length."""
    inputs = {1: 391, 2: 256}.get(groups, 384)
    w, scale_ON = numbers(37, inputs, seed=0), random(37, groups, seed=1).abs() + 0.5
    w_OI = w.float().view(37, groups, -1) * scale_ON.unsqueeze(-1)
    bias_O = random(37, seed=2)
    for tokens, split in ((1, 0), (19, 2)):
        x = random(tokens, inputs, seed=3).to(dtype)
        y = triton.fp8(
            *(guarded(x, device), poisoned(w, device), guarded(scale_ON, device)),
            bias_O=guarded(bias_O, device),
            split=split,
        )
        assert y.dtype == dtype
        assert far(y, x.double() @ w_OI.view(37, -1).double().T + bias_O) < ROUNDING[dtype]


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 12])
def test_e4m3_inputs(groups: int, native: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native products are what the GPU, or the interpreter, makes of e4m3 operands."""
    if device.type == "cpu":
        monkeypatch.setattr(floats, "native_fp8", lambda _: native)
    elif native != floats.native_fp8(device):
        pytest.skip("this GPU has only the other of the two ways")
    inputs = 391 if groups == 1 else 384 if groups == 12 else 256
    w, x = numbers(37, inputs, seed=0), numbers(2, 9, inputs, seed=1)
    scale_ON, x_scale_T = random(37, groups, seed=2).abs() + 0.5, random(18, seed=3).abs() + 0.5
    w_OI = (w.float().view(37, groups, -1) * scale_ON.unsqueeze(-1)).view(37, -1)
    wanted = (x.double() * x_scale_T.view(2, 9, 1)) @ w_OI.double().T
    for split in (1, 3):
        y = triton.fp8(
            *(poisoned(x, device), poisoned(w, device), guarded(scale_ON, device)),
            x_scale_T=guarded(x_scale_T, device),
            split=split,
        )
        assert y.dtype == torch.float32
        assert y.shape == (2, 9, 37)
        assert far(y, wanted) < (1e-5 if device.type == "cpu" else 1e-3)  # Hopper keeps 14 bits inside a product


def test_no_tokens(device: torch.device) -> None:
    w, scale = numbers(5, 32, seed=0).to(device), torch.ones(5, 1, device=device)
    assert triton.fp8(torch.zeros(0, 32, device=device), w, scale).shape == (0, 5)
    x, none = torch.zeros(2, 0, 32, device=device).to(E4M3), torch.ones(0, device=device)
    assert triton.fp8(x, w, scale, x_scale_T=none, dtype=torch.float16).shape == (2, 0, 5)


def test_the_operator_is_registered_rightly(device: torch.device) -> None:
    w, scale = numbers(5, 32, seed=0).to(device), torch.ones(5, 1, device=device)
    sample = (torch.ones(2, 32, device=device), w.view(torch.uint8), scale, None, None, torch.float16, 0)
    torch.library.opcheck(torch.ops.regauge_triton.fp8.default, sample, test_utils=("test_schema", "test_faketensor"))
