"""Trellises in the panels of the kernels, at every level of this CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regauge import parts
from regauge.formats.base import Codes, Format, Step
from regauge.kernels.cpu import matrix
from regauge.kernels.cpu.interface import struct_of
from regauge.kernels.cpu.matrix import Matrix
from regauge.runtime.matrices.held import PackedMatrix

SPELLINGS = ["trellis2", "trellis2:6", "trellis3", "trellis4"]
pytestmark = pytest.mark.usefixtures("level")


def format_of(grid: str, grain: str = "channel") -> Format:
    found: Format = parts.format_of(
        parts.point("weights", grid=grid, grain=grain, ranger="deviation:1", scale="f16", rounder="nearest")
    )
    return found


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def drawn(grid: str, grain: str, rows: int = 37, columns: int = 192) -> tuple[Codes, Format]:
    """Any codes, with steps of their own."""
    fmt = format_of(grid, grain)
    some = torch.Generator().manual_seed(1)
    codes_OI = torch.randint(0, 1 << fmt.grid.bits, (rows, columns), generator=some, dtype=torch.uint8)
    raw_G1 = torch.rand(fmt.grain.groups((rows, columns))[0], 1, generator=some) + 0.5
    scale_G1, fields = fmt.scale.store(raw_G1 * 0.02)
    return Codes(codes_OI, Step(scale_G1, None, fields)), fmt


@pytest.mark.parametrize("grain", ["channel", "group:64"])
@pytest.mark.parametrize("grid", SPELLINGS)
def test_panels_hold_the_codes_and_decode_to_the_bit(grid: str, grain: str) -> None:
    codes, fmt = drawn(grid, grain)
    held = PackedMatrix(codes, fmt, torch.float32)
    assert held.native is not None
    assert held.native.meta[6] == matrix.TRELLIS
    assert torch.equal(matrix.unpack(held.native), codes.codes_OI)
    wanted_OI = fmt.decode(codes)
    assert torch.equal(held.rows(0, 37), wanted_OI)
    assert torch.equal(held.rows(17, 35), wanted_OI[17:35])
    index = torch.tensor([36, 0, 16, 15, 16])
    assert torch.equal(held.take(index), wanted_OI[index])
    bits = 48 * 192 * fmt.grid.bits // 8  # rows are padded to 48
    assert held.native.panels.numel() <= bits + 48 * 2 * 3


@pytest.mark.parametrize("activations", ["int8", "int16", "float32"])
@pytest.mark.parametrize("grain", ["channel", "group:64"])
@pytest.mark.parametrize("grid", SPELLINGS)
def test_products_of_few_and_many_tokens(grid: str, grain: str, activations: str) -> None:
    codes, fmt = drawn(grid, grain)
    w_OI = fmt.decode(codes).double()
    held = PackedMatrix(codes, fmt, torch.float32, activations=activations)
    for tokens in (1, 2, 3, 4, 7, 20):
        x_TI = draws(tokens, tokens, 192)
        y_TO = held(x_TI).double()
        wanted_TO = x_TI.double() @ w_OI.T
        share = float((y_TO - wanted_TO).norm() / wanted_TO.norm())
        assert share < {"int8": 2e-2, "int16": 1e-4, "float32": 1e-6}[activations] + (0 if tokens <= 16 else 1e-6)


@pytest.mark.parametrize("grid", SPELLINGS)
def test_the_first_rows_and_inputs_of_a_matrix(grid: str) -> None:
    codes, fmt = drawn(grid, "channel")
    native = PackedMatrix(codes, fmt, torch.float32).native
    assert native is not None
    part = native.prefix(20, 128)
    x_TI = draws(3, 2, 128)
    wanted = x_TI @ fmt.decode(codes)[:20, :128].T
    assert torch.allclose(matrix.linear(x_TI, part, "int16"), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("grid", SPELLINGS)
def test_integer_inputs_are_rounded_as_the_artifact_asks(grid: str) -> None:
    codes, fmt = drawn(grid, "channel")
    native = PackedMatrix(codes, fmt, torch.float32).native
    assert native is not None
    z_TI = torch.randint(-127, 128, (6, 192), generator=torch.Generator().manual_seed(4)).to(torch.int8)
    step_T = torch.rand(6, generator=torch.Generator().manual_seed(5)) + 0.5
    wanted = (z_TI.double() * step_T.double()[:, None]) @ fmt.decode(codes).double().T
    found = matrix.blocked_integers(z_TI, step_T, native, torch.float32)
    assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_what_is_no_trellis_is_refused() -> None:
    codes, fmt = drawn("trellis2", "channel")
    native = PackedMatrix(codes, fmt, torch.float32).native
    assert native is not None
    for place, number in ((7, 0), (8, 6), (9, 3), (3, 16)):  # offset, window, plain bits, group
        meta = (*native.meta[:place], number, *native.meta[place + 1 :])
        with pytest.raises(ValueError, match="the kernels have no matrix"):
            struct_of(native.panels, native.row_scale_O, native.table, meta)
    with pytest.raises(ValueError, match="values of codes"):
        Matrix(native.panels, native.row_scale_O, torch.zeros(4), native.meta)
