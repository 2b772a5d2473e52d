"""The C++ kernels against `kernels.reference` and float64, on every dispatch level that this CPU has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from panels import ASYM, BOOKS, FLOATS, INTS, STEPS, TOP, VALUES, case, close, random, tokens
from regauge.formats.grids import NF4
from regauge.kernels import reference
from regauge.kernels.cpu import library, matrix
from regauge.kernels.cpu.layout import Value, group_of, unit

pytestmark = [
    pytest.mark.skipif(not library.available(), reason="the C++ kernels were not built here"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_are_exact(level: str, bits: int) -> None:
    one = case(f"int{bits}", 37, 131)
    w_OI = one.codes_OI.long() - (1 << (bits - 1))
    for width in range(1, 9):
        low, high = -(1 << (width - 1)), (1 << (width - 1)) - 1
        z_TI = torch.randint(low, high + 1, (3, 131), generator=random(width), dtype=torch.int8)
        z_TI[0], z_TI[1] = low, high
        assert matrix.integers(z_TI, one.packed).long().equal(reference.integer_matmul(z_TI, w_OI)), width
    for code in (0, (1 << bits) - 1):  # where a sum of bytes would saturate
        ends = torch.full((17, 257), code, dtype=torch.uint8)
        packed = matrix.pack(ends, bits, Value(offset=1 << (bits - 1)), group_of(257, bits, 257), None)
        for z in (-128, 127):
            z_TI = torch.full((1, 257), z, dtype=torch.int8)
            assert matrix.integers(z_TI, packed).unique().tolist() == [257 * z * (code - (1 << (bits - 1)))]


def test_sums_that_32_bits_may_not_hold_are_refused() -> None:
    wide = matrix.pack(torch.zeros(1, 65_536, dtype=torch.uint8), 8, Value(offset=128), 128, None)
    with pytest.raises(ValueError, match="do not fit 32 bits"):
        matrix.integers(torch.zeros(1, 65_536, dtype=torch.int8), wide)


@pytest.mark.parametrize("name", VALUES)
def test_weights_are_the_references(level: str, name: str) -> None:
    least = unit(VALUES[name][0])
    for number, step in enumerate(STEPS):
        span = 0 if step is None else least * (1 + number)
        one = case(name, 37, 131 if step is None else 3 * span, span, step, seed=number)
        wanted = one.weights()
        assert matrix.decode(one.packed, 0, 37, torch.float32).equal(wanted), step
        assert matrix.decode(one.packed, 5, 34, torch.float32).equal(wanted[5:34])
        assert matrix.decode(one.packed, 3, 20, torch.bfloat16).equal(wanted[3:20].bfloat16())
        assert matrix.decode(one.packed, 36, 37, torch.float16).equal(wanted[36:].half())
        assert matrix.unpack(one.packed).equal(one.codes_OI)
        some = torch.tensor([36, 0, 17, 17, 5, 0])
        assert matrix.take(one.packed, some, torch.float32).equal(wanted[some])


@pytest.mark.parametrize("name", VALUES)
def test_products_are_within_what_rounding_allows(level: str, name: str) -> None:
    span = 2 * unit(VALUES[name][0])
    one, grouped = case(name), case(name, 50, 5 * span, span, torch.float16)
    for activations in matrix.ACTIVATIONS:
        for count in (1, 2, 3, 4, 5):
            x = tokens(count, 131)
            assert close(matrix.linear(x, one.packed, activations), x, one, activations), (activations, count)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = tokens(7, 5 * span, dtype)
            assert close(matrix.linear(x, grouped.packed, activations), x, grouped, activations), (activations, dtype)


@pytest.mark.parametrize("name", [*INTS, *ASYM, "fp4", "ternary"])
def test_blocked_products_are_within_what_rounding_allows(level: str, name: str) -> None:
    span = 2 * unit(VALUES[name][0])
    for one in (case(name, 53, 131), case(name, 16, 3 * span, span, torch.bfloat16)):
        for count in (1, 12, 13, 29):
            x = tokens(count, one.packed.shape[1])
            assert close(matrix.blocked(x, one.packed), x, one, "int8"), count
            z_TI = torch.randint(-128, 128, x.shape, generator=random(count), dtype=torch.int8)
            scale_T = torch.rand(count, generator=random(2)) + 0.1
            y_TO = matrix.blocked_integers(z_TI, scale_T, one.packed, torch.float32)
            assert close(y_TO, z_TI * scale_T.unsqueeze(1), one, "float32")


@pytest.mark.parametrize("activations", ["int8", "int16"])
@pytest.mark.parametrize("name", ["int4", "fp4", "ternary"])
def test_what_needs_no_rounding_has_none(level: str, name: str, activations: str) -> None:
    """Activations that are their own integers, and a step of 1: sums of halves, exact in float32."""
    bits, value, table = VALUES[name]
    codes_OI = torch.randint(len(table), (19, 64), generator=random(3)).to(torch.uint8)
    packed = matrix.pack(codes_OI, bits, value, 64, None)
    x_TI = torch.randint(-127, 128, (5, 64), generator=random(4)).float()
    x_TI[:, 7] = TOP[activations]
    wanted = x_TI.double() @ table[codes_OI.int()].double().T
    assert matrix.linear(x_TI, packed, activations).double().equal(wanted)


def test_nf4_is_within_its_own_sixteen_bits(level: str) -> None:
    """One weight at a time, so that nothing averages out."""
    codes_OI = torch.arange(16, dtype=torch.uint8).view(16, 1).expand(16, 32)
    packed = matrix.pack(codes_OI.contiguous(), *BOOKS["nf4"][:2], 32, None)
    x_TI = torch.zeros(1, 32)
    x_TI[0, 3] = 1.0
    seen = matrix.linear(x_TI, packed, "int16").view(-1)
    assert (seen - NF4().table).abs().max() <= 2.0**-16 * 1.01


@pytest.mark.parametrize("name", FLOATS)
def test_every_code_of_a_small_float_is_its_number(level: str, name: str) -> None:
    """Subnormals, zeros of both signs and the greatest among them."""
    bits, value, table = FLOATS[name]
    codes_OI = torch.arange(1 << bits).to(torch.uint8).view(1, -1)
    packed = matrix.pack(codes_OI, bits, value, 64, None)
    seen, known = matrix.decode(packed, 0, 1, torch.float32).view(-1), ~table.isnan()
    assert seen[known].equal(table[known])
    assert seen[known].signbit().equal(table[known].signbit())
    x_TI = torch.eye(1 << bits)[known]
    assert matrix.linear(x_TI, packed).view(-1).equal(table[known])


def test_a_wrong_offset_is_seen() -> None:
    """What the tests above would say of a kernel that is off by one."""
    one = case("int4")
    wrong = replace(one, packed=replace(one.packed, meta=(*one.packed.meta[:7], 7, 0, 0)))
    x = tokens(3, 131)
    for activations in matrix.ACTIVATIONS:
        assert not close(matrix.linear(x, wrong.packed, activations), x, one, activations)
    assert not matrix.decode(wrong.packed, 0, 37, torch.float32).equal(one.weights())


def test_rows_that_are_not_there() -> None:
    one = case("int4")
    for bad in (-1, 37, 1 << 40):
        with pytest.raises(IndexError, match="not in 0 … 36"):
            matrix.take(one.packed, torch.tensor([0, bad]), torch.float32)
    for start, stop in ((-1, 3), (0, 38)):
        with pytest.raises(IndexError, match="not in 0 … 36"):
            matrix.decode(one.packed, start, stop, torch.float32)


def test_what_a_product_is_not_made_for() -> None:
    one = case("int4")
    for bad in (torch.zeros(2, 130), torch.zeros(131), torch.zeros(2, 131, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"\(T, 131\) floats are wanted"):
            matrix.linear(bad, one.packed)
    with pytest.raises(ValueError, match="signed bytes"):
        matrix.integers(torch.zeros(2, 131, dtype=torch.uint8), one.packed)
    with pytest.raises(ValueError, match="steps of tokens"):
        matrix.blocked_integers(torch.zeros(2, 131, dtype=torch.int8), torch.ones(3), one.packed, torch.float32)
