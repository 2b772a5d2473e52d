"""Small cases with the answer written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from regauge.formats.base import Codes, Format, Grid
from regauge.formats.grains import Channel, Group, Token, Whole
from regauge.formats.grids import E2M1, E2M3, E3M2, E4M3, E5M2, NF4, CodeBook, Int, Ternary
from regauge.formats.rangers import AbsMax, Dynamic, MinMax, Search
from regauge.formats.readings import Reading, dynamic
from regauge.formats.scales import M1, M2, BFloat16, Float16, Float32, PowerOfTwo, TwoLevel
from regauge.kernels import reference


def t(*values: float) -> Tensor:
    return torch.tensor(values)


# The code book of bitsandbytes 0.4x, as published with QLoRA (arXiv 2305.14314).
NF4_PUBLISHED = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def test_nf4_is_the_published_code_book_to_the_bit() -> None:
    assert NF4().values == NF4_PUBLISHED


def test_tables_of_the_small_floats() -> None:
    assert E2M1().table.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert math.copysign(1, E2M1().table[8]) == -1
    assert E2M3().table[:32].tolist() == [
        0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875,
        2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5,
    ]  # fmt: skip
    assert E3M2().table[:32].tolist() == [
        0, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.625, 0.75, 0.875, 1, 1.25, 1.5, 1.75,
        2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28,
    ]  # fmt: skip
    e4m3 = E4M3().table
    assert (e4m3[1], e4m3[8], e4m3[0x38], e4m3[0x7E]) == (2.0**-9, 2.0**-6, 1.0, 448.0)
    assert e4m3[[0x7F, 0xFF]].isnan().all()
    e5m2 = E5M2().table
    assert (e5m2[1], e5m2[0x3C], e5m2[0x7B]) == (2.0**-16, 1.0, 57344.0)
    assert e5m2[0x7C:0x80].isnan().all()


@pytest.mark.parametrize(
    ("grid", "z", "snapped"),
    [
        (Int(4), [-9.0, -8.5, -0.5, 0.5, 1.5, 2.5, 7.5, 99.0], [-8, -8, 0, 0, 2, 2, 7, 7]),
        (Int(3, False), [-1.0, 0.5, 1.5, 6.5, 7.6], [0, 0, 2, 6, 7]),
        (Int(2), [-2.5, -1.5, -0.5, 0.5, 1.5], [-2, -2, 0, 0, 1]),
        (E2M1(), [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 7.0, -0.3], [0, 1, 1, 2, 2, 4, 4, 6, 6, -0.5]),
        (E2M3(), [0.0625, 0.1875, 1.9375, 7.4, 9.0, -2.125], [0, 0.25, 2, 7.5, 7.5, -2.0]),
        (E3M2(), [0.03125, 0.09375, 26.0, 26.1, -1.125], [0, 0.125, 24, 28, -1.0]),
        (E4M3(), [447.0, 1e9, 0.3, 1.0625, 1.1875], [448, 448, 0.3125, 1.0, 1.25]),
        (NF4(), [-2.0, 0.039, 0.04, 0.9], [-1, 0, 0.07958029955625534, 1]),
        (Ternary(), [-0.6, -0.5, 0.0, 0.5, 0.51], [-1, -1, 0, 0, 1]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_snap_and_its_ties(grid: Grid, z: list[float], snapped: list[float]) -> None:
    assert grid.snap(t(*z)).tolist() == pytest.approx(snapped, abs=0)


def test_codes_by_hand() -> None:
    assert Int(4).encode(t(-8, -1, 0, 7)).tolist() == [0, 7, 8, 15]
    assert Int(4, False).encode(t(0, 15)).tolist() == [0, 15]
    assert E2M1().encode(t(0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -6)).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9, 15]
    assert E4M3().encode(t(1, -1, 448, 2.0**-9)).tolist() == [0x38, 0xB8, 0x7E, 1]
    assert NF4().encode(t(-1, 0, 1)).tolist() == [0, 7, 15]


def test_absmax_by_hand() -> None:
    step = AbsMax()(torch.tensor([[1.5, -3.0, 0.0]]), Int(4), Float32())
    assert step.scale_G1.item() == pytest.approx(3.0 / 7.5)
    assert step.zero_G1 is None
    step = AbsMax()(torch.tensor([[1.5, -3.0, 0.0]]), Int(4, False), Float32())
    assert (step.scale_G1.item(), step.zero_G1.item() if step.zero_G1 is not None else None) == (pytest.approx(0.4), 8)
    assert AbsMax()(torch.tensor([[12.0, -3.0]]), E2M1(), Float32()).scale_G1.item() == 2.0
    assert AbsMax()(torch.tensor([[0.5, -2.0]]), NF4(), Float32()).scale_G1.item() == 2.0


def test_minmax_by_hand() -> None:
    step = MinMax()(torch.tensor([[-1.0, 2.0]]), Int(2, False), Float32())
    assert step.zero_G1 is not None
    assert (step.scale_G1.item(), step.zero_G1.item(), step.fields["zero"].item()) == (1.0, 1.0, 1)
    step = MinMax()(torch.tensor([[0.5, 2.0], [-3.0, -1.0]]), Int(2, False), Float32())  # ranges are widened to hold 0
    assert step.zero_G1 is not None
    assert step.zero_G1.flatten().tolist() == [0, 3]
    assert step.scale_G1.flatten().tolist() == pytest.approx([2 / 3, 1.0])
    assert MinMax()(torch.tensor([[-4.0, 7.0]]), Int(4), Float32()).scale_G1.item() == 1.0
    assert MinMax()(torch.tensor([[-16.0, 7.0]]), Int(4), Float32()).scale_G1.item() == 2.0


def test_search_finds_the_exact_step_of_a_group_that_lies_on_a_grid() -> None:
    x_GK = 0.37 * torch.tensor([[-7.0, -3, 0, 1, 2, 5, 6, 7]])
    step = Search(steps=40)(x_GK, Int(4), Float32())
    assert step.scale_G1.item() == pytest.approx(0.37, rel=1e-6)


def test_the_polished_step_of_search_counts_by_weight() -> None:
    x_GK, weight_GK = torch.tensor([[7.5, 2.4]]), torch.tensor([[1.0, 100.0]])
    # MinMax gives the codes 7 and 2; the step with the least weighted error for these is (7.5·7 + 240·2) / (49 + 400).
    step = Search(steps=1, least=1.0)(x_GK, Int(4), Float32(), weight_GK)
    assert step.scale_G1.item() == pytest.approx(532.5 / 449)
    step = Search(steps=1, least=1.0)(x_GK, Int(4), Float32())
    assert step.scale_G1.item() == pytest.approx((7.5 * 7 + 2.4 * 2) / 53)


def test_a_format_by_hand() -> None:
    w_OI = torch.tensor([[0.1, 0.2, -1.5, 0.7], [3.0, -0.4, 0.0, 0.05]])
    fmt = Format(Int(4), Group(2), AbsMax(), Float32())
    codes = fmt.encode(w_OI)
    assert codes.step.scale_G1.flatten().tolist() == pytest.approx([0.2 / 7.5, 0.2, 0.4, 0.05 / 7.5])
    assert codes.codes_OI.tolist() == [[12, 15, 0, 12], [15, 7, 8, 15]]
    assert fmt.decode(codes)[1].tolist() == pytest.approx([2.8, -0.4, 0.0, 0.05 / 7.5 * 7])
    whole = Format(Int(4), Whole(), AbsMax(), Float32()).encode(w_OI)
    assert whole.step.scale_G1.item() == pytest.approx(0.4)
    assert whole.codes_OI.tolist() == [[8, 8, 4, 10], [15, 7, 8, 8]]


def test_bytes_by_hand() -> None:
    shape = (3, 11)  # 11 codes of 3 bits are 33 bits: 5 bytes
    assert Format(Int(3), Channel(), AbsMax(), BFloat16()).bytes(shape) == 3 * 5 + 3 * 2
    assert Format(Int(3, False), Channel(), MinMax(), Float32()).bytes(shape) == 3 * 5 + 3 * 4 + 2
    assert Format(E2M1(), Group(11), AbsMax(), TwoLevel()).bytes(shape) == 3 * 6 + 3 + 4
    assert Format(E2M1(), Group(1), AbsMax(), M2()).bytes(shape) == 3 * 6 + 33 + 3 * 4
    assert Format(E4M3(), Whole(), AbsMax(), PowerOfTwo()).bytes(shape) == 33 + 1


def test_powers_of_two_by_hand() -> None:
    peaks = t(6.0, 4.0, 3.49, 7.0, 6.99, 8.0, 1.0, 0.0).view(-1, 1)
    raw = peaks / 6
    steps, fields = PowerOfTwo().bind(raw, E2M1(), 1).store(raw)
    assert steps.flatten().tolist() == [1, 1, 0.5, 2, 1, 2, 0.25, 1]
    assert fields["scale"].flatten().tolist() == [127, 127, 126, 128, 127, 128, 125, 127]
    strict = PowerOfTwo(strict=True).bind(raw, E2M1(), 1).store(raw)[0]
    assert strict.flatten().tolist() == [1, 1, 0.5, 1, 1, 2, 0.25, 1]
    raw = t(448.0, 256.0, 255.0).view(-1, 1) / 448
    assert PowerOfTwo().bind(raw, E4M3(), 1).store(raw)[0].flatten().tolist() == [1, 1, 1]
    assert PowerOfTwo(strict=True).bind(raw, E4M3(), 1).store(raw)[0].flatten().tolist() == [1, 1, 0.5]
    steps = M1().store(t(1.0, 1.01, 0.5, 0.51, 0.0).view(-1, 1))[0]
    assert steps.flatten().tolist() == [1, 2, 0.5, 1, 1]


def test_m2_by_hand() -> None:
    raw = t(8.0, 4.1, 4.0, 3.9, 0.001, 0.0, 1.0, 1.0).view(-1, 1)
    steps, fields = M2().bind(raw, E2M1(), 2).store(raw)
    assert fields["row_scale"].flatten().tolist() == [8, 1]
    assert fields["scale"].flatten().tolist() == [0, 0, 1, 1, 8, 8, 0, 0]
    assert steps.flatten().tolist() == pytest.approx([8, 8, 4, 4, 0.00390625, 0.00390625, 1, 1])


def test_two_levels_by_hand() -> None:
    raw = t(2.0, 1.0, 0.3, 1e-9).view(-1, 1)
    steps, fields = TwoLevel().bind(raw, E2M1(), 1).store(raw)
    assert fields["global_scale"].tolist() == [224.0]
    assert fields["scale"].flatten().float().tolist() == [448, 224, 64, 2.0**-9]  # 67.2 rounds to 64
    assert steps.flatten().tolist() == pytest.approx([2, 1, 64 / 224, 2.0**-9 / 224])


@pytest.mark.parametrize(("scale", "least"), [(Float16(), 2.0**-14), (BFloat16(), 2.0**-126), (Float32(), 2.0**-126)])
def test_casts_by_hand(scale: Float32, least: float) -> None:  # type: ignore[valid-type]  # a constructor by name
    stored = scale.store(t(1e-44, 0.0, 1e39 if least < 1e-5 else 1e6).view(-1, 1))[0].flatten().tolist()
    assert stored[:2] == [least, 1.0]
    assert 65504 <= stored[2] < math.inf


@pytest.mark.parametrize("scale", [PowerOfTwo(), M2(), TwoLevel()])
def test_a_scale_that_must_be_bound_says_so(scale: PowerOfTwo | M2 | TwoLevel) -> None:
    with pytest.raises(ValueError, match="bind it first"):
        scale.store(torch.ones(2, 1))


def token(grid: Grid) -> Reading:
    """A step a token, from its own values."""
    return dynamic(Format(grid, Token(), Dynamic(), Float32()))


def test_tokens_by_hand() -> None:
    x_TI = torch.tensor([[127.5, -255.0, 64.0], [0.0, 0.0, 0.0]])
    found = token(Int(8)).codes(x_TI)
    assert found.step.scale_G1[0].item() == 2.0
    assert found.z_TI.tolist() == [[64, -128, 32], [0, 0, 0]]
    asymmetric = token(Int(8, False)).codes(torch.tensor([[-1.0, 2.0, 0.5]]))
    assert asymmetric.step.zero_G1 is not None
    assert (asymmetric.step.zero_G1.item(), asymmetric.z_TI.tolist()) == (85, [[0, 255, 128]])
    assert token(E4M3()).simulate(torch.tensor([[448.0, 1.07]])).tolist() == [[448.0, 1.125]]


def test_bits_lie_lowest_first() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0, 5]], dtype=torch.uint8)
    # 3 bits: 001 010 011 100 101 110 111 000 101, written from the right
    assert reference.pack(codes, 3).tolist() == [[0b11010001, 0b01011000, 0b00011111, 0b00000101]]
    assert reference.pack(codes, 4).tolist() == [[0x21, 0x43, 0x65, 0x07, 0x05]]
    assert reference.pack(codes[:, :4] & 1, 1).tolist() == [[0b0101]]
    assert reference.pack(codes[:, :5] & 3, 2).tolist() == [[0b00111001, 0b01]]


def test_linear_and_embedding_by_hand() -> None:
    table = torch.tensor([-2.0, -1.0, 0.0, 1.0])
    codes = torch.tensor([[0, 1, 2, 3], [3, 3, 0, 0]], dtype=torch.uint8)
    packed = reference.pack(codes, 2)
    scale_ON = torch.tensor([[1.0, 10.0], [0.5, 2.0]])
    zero_ON = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    w_OI = [[-2.0, -1.0, -10.0, 0.0], [0.5, 0.5, -4.0, -4.0]]
    assert reference.dequantise(codes, table, scale_ON, zero_ON).tolist() == w_OI
    y = reference.linear(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), packed, 2, table, scale_ON, zero_ON, t(0.5, 0.0))
    assert y.tolist() == [[-33.5, -26.5]]
    rows = reference.embedding(torch.tensor([[1, 0, 1]]), packed, 2, 4, table, scale_ON, zero_ON)
    assert rows.tolist() == [[w_OI[1], w_OI[0], w_OI[1]]]
    product = reference.integer_matmul(torch.tensor([[255, -255]]), torch.tensor([[255, 255], [255, -255]]))
    assert product.tolist() == [[0, 130050]]


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 8 bits, not 9"):
        Int(9)
    with pytest.raises(ValueError, match="rising order"):
        CodeBook("x", 2, (0.0, 1.0, 0.5))
    with pytest.raises(ValueError, match="1 to 8 bits, not 0"):
        reference.pack(torch.zeros(1, 1, dtype=torch.uint8), 0)
    with pytest.raises(ValueError, match="is 4 bytes, not 3"):
        reference.unpack(torch.zeros(1, 3, dtype=torch.uint8), 4, 8)
    with pytest.raises(ValueError, match=r"one in \(0, 1\]"):
        Search(least=0.0)


def test_codes_carry_notes() -> None:
    step = AbsMax()(torch.ones(1, 1), Int(4), Float32())
    assert Codes(torch.zeros(1, 1, dtype=torch.uint8), step).notes == ()
