"""Steps of two levels, values of code 0 that are numbers, GGUF's formats, HQQ's zeros, searched steps of fp4."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from regauge import parts
from regauge.formats.base import Codes, Format
from regauge.formats.codewords import CodeWords
from regauge.formats.grains import Group
from regauge.formats.grids import E2M1, Int
from regauge.formats.nested import Float16Low, Super, SuperWithLow
from regauge.formats.rangers import AbsMax, MinMax, Search, squared_error
from regauge.formats.refits import HalfQuadratic, LeastSquares
from regauge.formats.scales import BFloat16, Float16, Float16Signed, PowerOfTwo, TwoLevel
from regauge.parts import WEIGHTS
from regauge.plan import load
from regauge.rounding.rounders import GPTQ, ImportanceNearest
from tests.ggml import TYPES, block_bytes, word_bytes

BLOCK = {
    "q4-0": 4.5, "q4-1": 5.0, "q5-0": 5.5, "q5-1": 6.0, "q2-k": 2.625, "q3-k": 3.4375, "q4-k": 4.5, "q5-k": 5.5,
    "q6-k": 6.5625, "gptq-q2-k": 2.625, "gptq-q3-k": 3.4375, "gptq-q4-k": 4.5, "gptq-q5-k": 5.5, "gptq-q6-k": 6.5625,
    "q2-0": 2.25, "tq2-0": 2.0625, "iq4-nl": 4.5, "iq4-xs": 4.25, "iq2-xxs": 2.0625, "iq2-xs": 2.3125, "iq2-s": 2.5625,
    "iq3-xxs": 3.0625, "iq3-s": 3.4375, "gptq-iq2-xxs": 2.0625, "gptq-iq3-xxs": 3.0625, "gptq-iq4-xs": 4.25,
}  # fmt: skip
"""Bits a weight of llama.cpp's types: `ggml-common.h`, bytes of a block over its weights."""


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def missed(w_OI: Tensor, fmt: Format) -> float:
    return float((w_OI - fmt.decode(fmt.encode(w_OI))).square().sum())


def preset(name: str) -> Format:
    point = load(name).of(WEIGHTS)[0].point
    assert point is not None
    return parts.format_of(point)


# Two levels


def test_an_8_bit_step_costs_an_eighth_of_a_bit_less_at_64_weights_and_no_error() -> None:
    w_OI, shape = draws(1, 16, 4096), (16, 4096)
    plain = Format(Int(3, False), Group(64), Search(), BFloat16())
    two = replace(plain, scale=Super(8))
    saved = 8 * (plain.bytes(shape) - two.bytes(shape)) / w_OI.numel()
    assert saved == 0.125 - 16 / 4096  # less the level of each row
    assert missed(w_OI, two) < 1.002 * missed(w_OI, plain)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_code_times_its_level_is_a_float16(bits: int) -> None:
    raw_G1 = draws(2, 96, 1).abs() * torch.logspace(-6, 2, 96)[:, None]
    for scale in (Super(bits, 8), SuperWithLow(bits, 8)):
        bound = scale.bind(raw_G1, Int(4, False), 12, -3 * raw_G1)
        steps_G1, _ = bound.store(raw_G1)
        assert torch.equal(steps_G1.half().float(), steps_G1)
        if bound.low is not None:
            lows_G1, fields = bound.low.store(-3 * raw_G1)
            assert torch.equal(lows_G1.half().float(), lows_G1)
            assert torch.equal(bound.low.load(fields), lows_G1)


def test_codes_are_found_for_the_stored_step_not_for_the_one_before() -> None:
    """llama.cpp's usual bug in other hands: codes kept from before the step was rounded."""
    w_OI = draws(3, 8, 256) * torch.rand(8, 16, generator=torch.Generator().manual_seed(4)).repeat_interleave(16, 1)
    fmt = Format(Int(4, False), Group(16), MinMax(), SuperWithLow(4, 16))
    right = fmt.encode(w_OI)
    before = replace(fmt, scale=Float16Low()).encode(w_OI)
    stale = Codes(before.codes_OI, right.step)
    error = (w_OI - fmt.decode(right)).square().sum()
    assert float(error) < 0.8 * float((w_OI - fmt.decode(stale)).square().sum())


def test_gptq_rounds_in_the_format_its_steps_stored_first() -> None:
    x_TI = draws(5, 400, 64) @ draws(6, 64, 64)
    hessian_II = x_TI.T @ x_TI / 400
    w_OI = draws(7, 24, 64)
    fmt = Format(Int(2, False), Group(16), MinMax(), SuperWithLow(4, 4))

    def cost(codes: Codes) -> float:
        error_OI = w_OI - fmt.decode(codes)
        return float(((error_OI @ hessian_II) * error_OI).sum())

    rounded = GPTQ()(w_OI, fmt, {"hessian": hessian_II})
    free = GPTQ()(w_OI, replace(fmt, scale=Float16Low()), {"hessian": hessian_II})
    assert torch.equal(fmt.load(rounded.step.fields).scale_G1, rounded.step.scale_G1)
    assert cost(rounded) < 0.7 * cost(Codes(free.codes_OI, rounded.step))
    assert cost(rounded) < 0.7 * cost(fmt.encode(w_OI))
    ordered = GPTQ(order="activation", static_groups=True, tries=4)(w_OI, fmt, {"hessian": hessian_II})
    assert torch.equal(fmt.load(ordered.step.fields).scale_G1, ordered.step.scale_G1)  # rows keep levels of their own
    assert cost(ordered) < cost(rounded)


# Values of code 0


def test_a_low_that_is_a_number_beats_a_zero_point_and_equals_it_on_whole_steps() -> None:
    w_OI = draws(8, 32, 256) + 0.5
    zeros = Format(Int(2, False), Group(32), MinMax(), Float16())
    lows = replace(zeros, scale=Float16Low())
    assert missed(w_OI, lows) < 0.97 * missed(w_OI, zeros)
    even_OI = torch.tensor([-1.0, 0.0, 1.0, 2.0]).repeat(4, 8) * 0.25
    assert torch.equal(lows.decode(lows.encode(even_OI)), even_OI)
    assert torch.equal(zeros.decode(zeros.encode(even_OI)), even_OI)


# GGUF's formats


@pytest.mark.parametrize("name", BLOCK)
def test_a_gguf_format_has_llama_cpps_bits(name: str) -> None:
    assert 8 * preset(name).bytes((64, 1024)) / (64 * 1024) == BLOCK[name]


@pytest.mark.parametrize("name", TYPES)
def test_the_bytes_of_a_gguf_block_decode_to_our_weights(name: str) -> None:
    """transformers' reader of GGUF, which shares nothing with ours, reads blocks that codes are only shuffled into."""
    reader = importlib.import_module("transformers.integrations.gguf.dequant")
    w_OI = draws(9, 4, 512) * 0.05 + 0.01
    fmt = preset(name)
    codes = ImportanceNearest()(w_OI, fmt, {"second_moment": draws(10, 512).square()})
    words = isinstance(fmt.grid, CodeWords)
    blocks = word_bytes(name, codes, fmt) if words else block_bytes(name, codes)
    assert blocks.numel() * 8 / w_OI.numel() == BLOCK[name]
    read = reader.dequantize(blocks.view(4, -1), TYPES[name], torch.float32).view(4, 512)
    assert torch.allclose(read, fmt.decode(codes), rtol=0, atol=1e-6)
    assert float((read - w_OI).norm() / w_OI.norm()) < (0.5 if words else 0.35)


def test_least_squares_errs_less_than_the_plain_range_in_every_block_of_weighted_ones() -> None:
    x_GK = draws(11, 200, 32)
    x_GK[::2, 0] *= 6
    weight_GK = draws(12, 200, 32).square()
    for grid, scale, plain in (
        (Int(2, False), Float16Low(), MinMax()),
        (Int(3), Float16Signed(), AbsMax()),
        (Int(4), Float16(), AbsMax()),
    ):
        best = squared_error(x_GK, LeastSquares()(x_GK, grid, scale, weight_GK), grid, weight_GK)
        start = squared_error(x_GK, plain(x_GK, grid, scale), grid, weight_GK)
        assert bool((best <= start).all())
        assert float(best.sum()) < 0.75 * float(start.sum())


def test_a_sign_puts_the_largest_weight_on_the_end_that_reaches_further() -> None:
    x_GK = torch.tensor([[4.0, -1.0, 1.0, 2.0, 3.0, -3.0]])
    step = LeastSquares()(x_GK, Int(3), Float16Signed())
    assert float(step.scale_G1) == -1.0
    assert float(squared_error(x_GK, step, Int(3))) == 0.0
    assert float(squared_error(x_GK, LeastSquares()(x_GK, Int(3), Float16()), Int(3))) > 0.5


# HQQ


@pytest.mark.parametrize(("bits", "least"), [(2, 0.97), (4, 0.985)])
def test_a_moved_zero_leaves_few_large_errors(bits: int, least: float) -> None:
    """Groups with one outlier: Σ |w − ŵ|^0.7 falls below that of the same range with its zero where minmax puts it."""
    w_OI = draws(13, 64, 64)
    w_OI[:, 0] *= 4
    plain = Format(Int(bits, False), Group(64), MinMax(), Float16Low())
    moved = replace(plain, ranger=HalfQuadratic())

    def spread(fmt: Format) -> float:
        return float((w_OI - fmt.decode(fmt.encode(w_OI))).abs().pow(0.7).sum())

    assert spread(moved) < least * spread(plain)
    assert torch.equal(moved.fit(w_OI).scale_G1, plain.fit(w_OI).scale_G1)  # the step stays


def test_a_zero_stays_where_weights_lie_on_the_grid() -> None:
    w_OI = torch.randint(0, 4, (8, 64), generator=torch.Generator().manual_seed(14)).float()
    w_OI[:, 0], w_OI[:, 1] = 0, 3
    fmt = Format(Int(2, False), Group(64), HalfQuadratic(), Float16Low())
    assert torch.equal(fmt.decode(fmt.encode(w_OI * 0.5 - 0.5)), w_OI * 0.5 - 0.5)


# Searched steps of small floats


def test_fp4_steps_that_are_tried_as_they_are_stored() -> None:
    """MSE of a Gaussian: 0.0091, of two steps 0.0073, of every step 0.0066; MX 0.0125, of three exponents 0.0124."""
    w_OI = draws(15, 512, 512)
    size = w_OI.numel()
    nv = Format(E2M1(), Group(16), AbsMax(), TwoLevel())
    found = [
        missed(w_OI, replace(nv, ranger=preset(name).ranger)) / size for name in ("nvfp4", "nvfp4-46", "nvfp4-search")
    ]
    assert found == pytest.approx([0.0091, 0.0073, 0.0066], rel=0.03)
    mx = Format(E2M1(), Group(32), AbsMax(), PowerOfTwo())
    found = [missed(w_OI, replace(mx, ranger=preset(name).ranger)) / size for name in ("mxfp4", "mxfp4-search")]
    assert found == pytest.approx([0.01250, 0.01244], rel=0.002)
    step = preset("nvfp4-search").fit(w_OI)
    assert step.fields["scale"].dtype is torch.float8_e4m3fn
    assert torch.equal(preset("nvfp4-search").load(step.fields).scale_G1, step.scale_G1)
    best = squared_error(w_OI.view(-1, 16), step, E2M1())
    assert bool((best <= squared_error(w_OI.view(-1, 16), nv.fit(w_OI), E2M1())).all())
