"""Weights that run at 2 to 8 bits: every level is an ordinary matrix, in the family and taken out, to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import regauge as rg
from regauge.engine import apply, dry_run
from regauge.engine.extracting import extract
from regauge.errors import SettingError
from regauge.formats.base import Codes, Format
from regauge.formats.grains import Channel, Group
from regauge.formats.planes import LEVELS, Float16Levels, level
from regauge.formats.prefixes import Nested
from regauge.formats.rangers import MinMax
from regauge.kernels.cpu import matrix
from regauge.kernels.cpu.interface import has
from regauge.kernels.cpu.library import available
from regauge.plan import parse
from regauge.runtime.matrices import native
from regauge.runtime.matrices.held import PackedMatrix
from tests import tiny
from tests.families import SIZES, given, same

BITS = tuple(range(2, 9))
FMT = Format(Nested(8), Group(32), MinMax(), Float16Levels(6))
TEXT = (
    "name: nested\nfamily: {bits: [8, 5, 3, 2], depth: [2], ffn: [0.5]}\n"
    "weights: {blocks.*: {grid: nested:8, grain: group:32, ranger: minmax, scale: f16-levels:3, "
    "rounder: {part: gptq-levels, passes: 0}}}\n"
)
PLANES = pytest.mark.skipif(
    not (available() and has("rg_has_planes")), reason="the C++ kernels that are here read no planes"
)
KERNELS = pytest.mark.skipif(not available(), reason="the C++ kernels are not here")


def coded(rows: int = 40, columns: int = 160, fmt: Format = FMT) -> Codes:
    """A matrix whose levels have bytes of their own."""
    generator = torch.Generator().manual_seed(rows)
    codes = fmt.encode(torch.randn(rows, columns, generator=generator))
    count = fmt.scale.count if isinstance(fmt.scale, Float16Levels) else 0
    size = (codes.step.scale_G1.numel() * count,)
    bytes_ = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    return replace(codes, step=fmt.load({**codes.step.fields, LEVELS: bytes_}))


def test_a_level_is_the_first_bits_and_planes_keep_them() -> None:
    codes = coded()
    stored = FMT.grid.stored(codes.codes_OI)
    assert stored.shape == (8, 40, 20)
    assert torch.equal(FMT.grid.read(stored, 160), codes.codes_OI)
    for bits in BITS:
        found, fmt = level(codes, FMT, bits)
        assert torch.equal(FMT.grid.read(stored[:bits], 160), found.codes_OI)
        assert (fmt.grid.bits, fmt.grid.symmetric, fmt.scale.name) == (bits, False, "f16-low")
    with pytest.raises(ValueError, match="no level of 1 bits"):
        level(codes, FMT, 1)
    with pytest.raises(ValueError, match="planes of bytes"):
        FMT.grid.read(stored.int(), 160)


def test_values_of_a_level_are_the_middles_of_cells() -> None:
    codes = FMT.encode(torch.randn(8, 64, generator=torch.Generator().manual_seed(1)))
    whole = FMT.decode(codes)
    for bits in BITS:
        found, fmt = level(codes, FMT, bits)
        wide = 1 << (8 - bits)
        gap = fmt.decode(found) - whole
        half = codes.step.scale_G1.repeat_interleave(32, 1).view(8, 64) * (wide - 1) / 2
        assert bool((gap.abs() <= half * 1.01 + 2e-3).all())
        assert bits == 8 or abs(float(gap.mean())) < float(half.mean()) / 4  # cut off, they would all lie above


@PLANES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_level_of_panels_is_the_ordinary_matrix_to_the_bit(dtype: torch.dtype) -> None:
    codes = coded()
    whole = PackedMatrix(codes, FMT, dtype)
    x_TI = torch.randn(23, 160, generator=torch.Generator().manual_seed(2)).to(dtype)
    for bits in BITS:
        found, fmt = level(codes, FMT, bits)
        one, other = whole.level(bits), PackedMatrix(found, fmt, dtype)
        assert one._buffers["panels"] is whole._buffers["panels"]
        assert one.native is not None
        assert torch.equal(matrix.unpack(one.native), found.codes_OI)
        for tokens in (1, 2, 3, 4, 6, 8, 23):
            assert torch.equal(one(x_TI[:tokens]), other(x_TI[:tokens])), (bits, tokens)
        assert torch.equal(one.rows(3, 19), other.rows(3, 19))
        part = x_TI[:2, :96].contiguous()
        assert torch.equal(one.prefix(17, 96)(part), other.prefix(17, 96)(part)), bits
        assert torch.equal(one.prefix(33, 128).prefix(17, 96)(part), other.prefix(17, 96)(part)), bits
    assert whole.native is not None
    assert torch.equal(matrix.unpack(whole.native), codes.codes_OI)


@PLANES
def test_panels_hold_every_level_once_and_a_level_reads_its_own_planes() -> None:
    codes = coded(320, 1280)
    whole = PackedMatrix(codes, FMT, torch.float32)
    alone = PackedMatrix(*level(codes, FMT, 8), torch.float32)
    assert whole.native is not None
    assert alone.native is not None
    steps = 6 * 320 * 1280 // 32 * 2  # of six more levels
    assert alone.native.nbytes + steps <= whole.native.nbytes < 1.01 * (alone.native.nbytes + steps)
    x_TI = torch.randn(4, 1280, generator=torch.Generator().manual_seed(5))
    two = whole.level(2)
    want = two(x_TI)
    # Steps of seven levels and two planes of eight come first: what lies behind them is no concern of two bits.
    panels = whole._buffers["panels"]
    assert panels is not None
    panels[7 * 320 * 1280 // 32 * 2 + 320 * 1280 // 4 + 64 * 9 :] = 255
    assert torch.equal(two(x_TI), want)
    assert not torch.equal(whole.level(3)(x_TI), PackedMatrix(*level(codes, FMT, 3), torch.float32)(x_TI))


@PLANES
def test_groups_too_long_for_planes_are_packed_anew() -> None:
    fmt = replace(FMT, grain=Group(352))
    codes = coded(48, 704, fmt)
    whole = PackedMatrix(codes, fmt, torch.float32)
    assert whole.meta is not None
    assert dict(zip(matrix.META, whole.meta, strict=True))["bias"] == 0
    x_TI = torch.randn(2, 704, generator=torch.Generator().manual_seed(4))
    found, fewer = level(codes, fmt, 3)
    assert torch.equal(whole.level(3)(x_TI), PackedMatrix(found, fewer, torch.float32)(x_TI))


@KERNELS
@pytest.mark.parametrize("grain", [Group(32), Channel()], ids=["group", "row"])
def test_without_planes_a_level_is_packed_anew(monkeypatch: pytest.MonkeyPatch, grain: Any) -> None:
    fmt = replace(FMT, grain=grain)
    codes = coded(fmt=fmt)
    monkeypatch.setattr(native, "has", lambda name: False)
    whole = PackedMatrix(codes, fmt, torch.float32)
    x_TI = torch.randn(3, 160, generator=torch.Generator().manual_seed(3))
    for bits in (2, 5):
        found, fewer = level(codes, fmt, bits)
        assert torch.equal(whole.level(bits)(x_TI), PackedMatrix(found, fewer, torch.float32)(x_TI))


@PLANES
def test_a_matrix_in_planes_that_is_none_is_refused() -> None:
    whole = PackedMatrix(coded(), FMT, torch.float32).native
    assert whole is not None
    for name, value in (
        ("bits", 1),
        ("mantissa", 7),
        ("mantissa", 9),
        ("bias", 4),
        ("step", 3),
        ("group", 16),
        ("bias", 1 << 30),
    ):
        meta = tuple(value if key == name else number for key, number in zip(matrix.META, whole.meta, strict=True))
        with pytest.raises(ValueError, match=r"no matrix of|too few"):
            matrix.Matrix(whole.panels, None, None, meta)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("nested")
    source = tiny.folder(where / "model", "llama", num_hidden_layers=3, **SIZES["llama"])
    apply(parse(TEXT), source, where / "out", calibration=tiny.text(where, 6000), tokens=512, length=32)
    return where / "out"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_members_of_fewer_bits_are_their_extracts(out: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = rg.load(out, dtype=dtype)
    whole = given(model)
    for number, text in enumerate(("bits=3", "bits=8/2/5", "depth=2,bits=2/5", "ffn=0.5,bits=5", "bits=8")):
        done = extract(out, text, tmp_path / str(number))
        alone = rg.load(tmp_path / str(number), dtype=dtype)
        with rg.use(model, text) as active:
            assert str(active) == done.subnet
            found = given(model)
        assert same(found, given(alone)), text
        assert same(found, given(rg.load(out, dtype=dtype, subnet=text))), text
        assert same(found, whole) == (text == "bits=8")
        assert model.regauge.member(text).regauge_step.steps == 2
    assert same(given(model), whole)


def test_what_is_not_legal_is_told(out: Path) -> None:
    model = rg.load(out)
    for text, why in (
        ("bits=4", "nearest that is: bits=5"),
        ("bits=3/3", "2 numbers for 3 blocks"),
        ("bits=3/4/2", "bits=3/5/2"),
    ):
        with pytest.raises(SettingError, match=why), rg.use(model, text):
            pass


def test_a_family_of_bits_needs_weights_that_have_them(out: Path, tmp_path: Path) -> None:
    source = out.parent / "model"
    plain = (
        TEXT.replace("nested:8", "int8-asym")
        .replace("f16-levels:3", "f16-low")
        .replace("{part: gptq-levels, passes: 0}", "nearest")
    )
    for text, why in (
        (plain, "no weights hold several"),
        (TEXT.replace("[8, 5, 3, 2]", "[9, 1]"), "bits 9: weights have 2 to 8"),
    ):
        found = dry_run(parse(text), source, tmp_path / "out", calibration=tiny.text(tmp_path, 6000))
        assert any(why in one for one in found.refusals), text
