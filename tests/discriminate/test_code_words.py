"""Words of a list: what rounding them whole gains, alone and inside error feedback; and what is stored of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from regauge import parts
from regauge.formats.base import Codes, Format
from regauge.formats.codewords import CodeWords
from regauge.formats.grids import Int
from regauge.formats.runs import refusal
from regauge.parts import WEIGHTS
from regauge.plan import load
from regauge.rounding.rounders import GPTQ

NAMES = ("iq2-xxs", "iq2-xs", "iq2-s", "iq3-xxs", "iq3-s")
MSE = {"iq2-xxs": 0.107, "iq2-xs": 0.081, "iq2-s": 0.0565, "iq3-xxs": 0.031, "iq3-s": 0.0168, "iq4-xs": 0.0057}


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def preset(name: str) -> Format:
    point = load(name).of(WEIGHTS)[0].point
    assert point is not None
    return parts.format_of(point)


def grid_of(name: str) -> CodeWords:
    grid = preset(name).grid
    assert isinstance(grid, CodeWords)
    return grid


@pytest.mark.parametrize("name", NAMES)
def test_words_are_those_of_the_list_and_come_back_from_what_is_stored(name: str) -> None:
    grid = grid_of(name)
    z = draws(1, 6, 64) * 0.4 * grid.high
    found = grid.snap(z)
    assert torch.equal(grid.snap(found), found)
    assert torch.equal(grid.decode(grid.encode(found)), found)
    rows = {tuple(row) for row in grid.rows.tolist()}
    assert len(rows) == len(grid.rows)
    assert {tuple(row) for row in found.abs().view(-1, grid.rows.shape[1]).tolist()} <= rows
    if grid.even:
        assert bool(((found.view(-1, 8) < 0).sum(1) % 2 == 0).all())
    codes = grid.encode(found)
    assert torch.equal(grid.read(grid.stored(codes), 64), codes)
    assert bool(grid.snap(torch.full((1, 8), 1e9)).isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_words_rounded_whole_beat_magnitudes_rounded_apart(name: str) -> None:
    """Each magnitude to its nearest, then the row of the list nearest to those: where the null loses."""
    grid = grid_of(name)
    z = draws(2, 64, 256) * 0.4 * grid.high
    values = grid.table
    apart = values[(z[..., None] - values).abs().argmin(-1)]
    whole, late = ((z - grid.snap(at)).square().sum() for at in (z, apart))
    assert float(whole) < 0.96 * float(late)


@pytest.mark.parametrize("name", NAMES)
def test_weights_choose_the_word(name: str) -> None:
    grid = grid_of(name)
    z, weight = draws(3, 64, 256) * 0.4 * grid.high, draws(4, 64, 256).square()
    weighed = (weight * (z - grid.near(z, weight)).square()).sum()
    assert float(weighed) < 0.9 * float((weight * (z - grid.snap(z)).square()).sum())


@pytest.mark.parametrize("name", MSE)
def test_a_gaussian_keeps_so_much_error_less_than_integers_of_the_bits(name: str) -> None:
    w_OI, fmt = draws(5, 32, 512), preset(name)
    error = float((w_OI - fmt.decode(fmt.encode(w_OI))).square().mean())
    assert error == pytest.approx(MSE[name], rel=0.05)
    even = replace(fmt, grid=Int(int(name[2])))
    assert even.bytes((32, 512)) >= 0.9 * fmt.bytes((32, 512))
    least = {"iq3-xxs": 0.98}.get(name, 0.9)  # it has an eighth of a bit less
    assert error < least * float((w_OI - even.decode(even.encode(w_OI))).square().mean())


@pytest.mark.parametrize("name", [*NAMES, "iq4-nl", "iq4-xs"])
def test_gptq_in_the_format_beats_nearest_in_it(name: str) -> None:
    x_TI = draws(6, 600, 256) @ (draws(7, 256, 256) / 16 + torch.eye(256))
    hessian_II, w_OI, fmt = x_TI.T @ x_TI / 600, draws(8, 16, 256), preset(name)

    def cost(codes: Codes) -> float:
        error_OI = w_OI - fmt.decode(codes)
        return float(((error_OI @ hessian_II) * error_OI).sum())

    ordered = GPTQ(order="activation", static_groups=True)
    rounded = cost(ordered(w_OI, fmt, {"hessian": hessian_II}))
    assert rounded < 0.75 * cost(fmt.encode(w_OI))


def test_a_list_that_does_not_divide_the_width_says_so() -> None:
    point = load("iq2-xxs").of(WEIGHTS)[0].point
    assert point is not None
    fmt = replace(preset("iq2-xxs"), grain=parts.build("grain", parts.Spec("channel")))
    assert refusal(fmt, (4, 172)) == "iq2-xxs rounds runs of 8 weights, which do not divide a width of 172"


def test_rows_of_a_wrong_length_are_refused() -> None:
    grid = grid_of("iq2-xs")
    with pytest.raises(ValueError, match="packed rows of iq2-xs have 16 bytes of 64 weights"):
        grid.read(torch.zeros(2, 15, dtype=torch.uint8), 64)
