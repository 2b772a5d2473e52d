"""The step reads a tap as the packed modules do: every transform, dynamic and static steps, with low-rank terms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from regauge import parts
from regauge.formats.base import Format, Grain, Grid, Ranger
from regauge.formats.grains import Group, Token, Whole
from regauge.formats.grids import E2M3, E4M3, Int
from regauge.formats.logs import Log2
from regauge.formats.rangers import Dynamic, Static
from regauge.formats.readings import Reading, static_step
from regauge.formats.scales import Float32
from regauge.formats.terms import LowRank
from regauge.formats.transforms import Crossed, Hadamard, Same, Scaled, Transform
from regauge.hosts.transformers.inputs import Inputs
from regauge.hosts.transformers.program import Reads, build
from regauge.kernels.cpu.library import available
from regauge.kernels.cpu.pieces import Norm, Site, Tap
from regauge.kernels.cpu.step import Program
from regauge.parts import WEIGHTS
from regauge.runtime.matrices.modules import PackedMatrix
from regauge.runtime.step.sites import Unservable, site_of, tap_of
from units.test_packed import FORMS, matrix
from units.test_step import loaded

pytestmark = pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")
CHANNELS = (64, 48, 30)  # Sylvester's; 4 x 12; no Hadamard is known, so a small random factor is in it


def transform_of(name: str, channels: int) -> Transform:
    generator = torch.Generator().manual_seed(channels)
    if name == "hadamard":
        return Hadamard().fit(channels, {}, [])
    if name == "diagonal":
        return Scaled(2.0 ** torch.randint(-3, 4, (channels,), generator=generator))
    if name == "kronecker":
        sides = (torch.randn(size, size, generator=generator) for size in (2, channels // 2))
        return Crossed(*sides)
    return Same()


GRIDS: dict[str, Grid] = {
    "int8": Int(8),
    "int6": Int(6),
    "int5": Int(5),
    "int8-asym": Int(8, symmetric=False),
    "fp8": E4M3(),
    "fp6": E2M3(),
    "log2": Log2(),
}
GRAINS: dict[str, Grain] = {"token": Token(), "tensor": Whole(), "group:1": Group(1), "group:6": Group(6)}
RANGERS: dict[str, Ranger] = {"dynamic": Dynamic(), "static": Static()}


def format_of(grid: str, grain: str, ranger: str) -> Format:
    return Format(GRIDS[grid], GRAINS[grain], RANGERS[ranger], Float32())


def packed(channels: int, reading: Reading | None, rank: int = 0, grid: str = "int8") -> PackedMatrix:
    generator = torch.Generator().manual_seed(7)
    fmt = parts.format_of(
        parts.point(WEIGHTS, grid=grid, grain="channel", scale="f32", ranger="absmax", rounder="nearest")
    )
    codes = fmt.encode(torch.randn(37, channels, generator=generator))
    if rank:
        left, right = (torch.randn(*shape, generator=generator) for shape in ((37, rank), (rank, channels)))
        codes = replace(codes, terms=(LowRank(left, right),))
    return PackedMatrix(codes, fmt, torch.float32, reading=reading, activations="float32")


def served(part: PackedMatrix, x_TI: torch.Tensor) -> torch.Tensor:
    width = x_TI.shape[1]
    program = Program((), Norm("none", width, 0.0), site_of("a", part), width, 0, 0.0, tap_of("a", part))
    return program(x_TI, [0] * len(x_TI), [0] * len(x_TI), (), ())


@pytest.mark.parametrize("form", ["f16-low", "super-low", "channel super-low", "lorc low", "lorc"])
def test_what_lies_beside_codes_is_read_where_the_module_holds_it(form: str) -> None:
    part, w_OI = matrix(FORMS[form], 37, 64, torch.bfloat16)
    x_TI = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    wanted = x_TI @ w_OI.T
    assert float((served(part, x_TI) - wanted).norm() / wanted.norm()) < 1e-2
    part.float()
    assert float((served(part, x_TI) - wanted).norm() / wanted.norm()) < 1e-4
    left, site = part.added[0].get_buffer("left"), site_of("a", part)
    assert site.low_rank is not None
    assert site.low_rank[0].data_ptr() == left.data_ptr()


READINGS = {
    "dynamic": ("int8", "token", "dynamic"),
    "dynamic 6": ("int6", "token", "dynamic"),
    "dynamic group": ("int8", "group:6", "dynamic"),
    "dynamic asymmetric": ("int8-asym", "token", "dynamic"),
    "static": ("int8", "tensor", "static"),
    "static 5": ("int5", "tensor", "static"),
    "static asymmetric": ("int8-asym", "tensor", "static"),
    "static group": ("int6", "group:6", "static"),
    "static asymmetric group": ("int8-asym", "group:6", "static"),
    "static channel": ("int8-asym", "group:1", "static"),  # no end of a range lies between two codes
    "float": ("fp8", "token", "dynamic"),
    "float group": ("fp6", "group:6", "dynamic"),
    "static float": ("fp8", "tensor", "static"),
}


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("transform", ["identity", "diagonal", "hadamard", "kronecker"])
@pytest.mark.parametrize("how", READINGS)
def test_a_reading_is_that_of_the_packed_module(how: str, transform: str, channels: int) -> None:
    """All but a token in which one input falls on the edge between two codes are equal to rounding."""
    fmt, made = format_of(*READINGS[how]), transform_of(transform, channels)
    if "group" in how and channels % 6:
        pytest.skip("groups of 6 do not divide 64 channels")
    x_TI = torch.randn(40, channels, generator=torch.Generator().manual_seed(3))
    step = None
    if fmt.ranger.needs:
        seen = made.forward(x_TI[:30])
        step = static_step(fmt, seen.amin(0), seen.amax(0))
    reading = Reading(fmt, made, step)
    for rank in (0, 5):
        part = packed(channels, reading, rank)
        if part.native is None:
            part = packed(channels, None, rank)
            part.reading = reading
            wanted = packed(channels, None, rank)(reading.simulate(x_TI))
        else:
            wanted = part(x_TI)
        found = served(part, x_TI)
        off = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert float(off.median()) < 2e-6
        assert int((off > 1e-4).sum()) <= 8
        assert float((found - packed(channels, None, rank)(made.forward(x_TI))).norm() / wanted.norm()) > 1e-3


@pytest.mark.parametrize("channels", [1536, 5632, 11008])
def test_a_hadamard_is_cut_into_two_small_sides(channels: int) -> None:
    """5632 is 4 · 32 · 44: as 4 and 1408 it would be eight times the work that it is as 128 and 44."""
    native = Hadamard().fit(channels, {}, []).native
    assert native is not None
    assert native.pair is not None
    left, right = native.pair
    assert left.shape[0] * right.shape[0] == channels
    assert left.shape[0] + right.shape[0] < 5 * channels**0.5


def test_what_the_step_does_not_read_is_refused() -> None:
    for reading, words in (
        (Reading(format_of("log2", "token", "dynamic")), "log2 inputs, which the step does not round"),
        (Reading(format_of("int8", "tensor", "dynamic")), "dynamic steps of a tensor"),
    ):
        part = packed(48, None)
        part.reading = reading
        with pytest.raises(Unservable, match=words):
            tap_of("a site", part)


@pytest.mark.parametrize("grid", ["fp8", "fp6"])
def test_small_floats_are_rounded_to_the_bit(grid: str) -> None:
    """An identity in full precision shows what the tap gives; ties, subnormals and what saturates are among it."""
    made, n = GRIDS[grid], 64
    values = made.table[~made.table.isnan()].sort().values
    middles = (values[1:] + values[:-1]) / 2
    x_TI = torch.cat([values, middles, values * 1.0001, torch.tensor([made.high * 3, -made.high * 3])])
    x_TI = torch.nn.functional.pad(x_TI, (0, -len(x_TI) % n)).view(-1, n)
    one = Tap(rounding="static", step=1.0, floats=(made.kernel.mantissa, made.high, made.kernel.tiny))  # type: ignore[union-attr]  # both have one
    program = Program((), Norm("none", n, 0.0), Site(torch.eye(n)), n, 0, 0.0, one)
    found = program(x_TI[:60].contiguous(), [0] * len(x_TI[:60]), [0] * len(x_TI[:60]), (), ())
    assert torch.equal(found, made.snap(x_TI[:60].clone()))


def test_sites_of_one_tap_each_with_their_own_copy_of_its_tensors_are_one_tap(tmp_path: Path) -> None:
    """Gate and up of one block hold one transform each; the program reads one."""
    model = loaded(tmp_path, "llama", "int8")
    mlp: Any = model.model.layers[0].mlp
    channels = mlp.gate_proj.parts[0].shape[1]
    fmt = format_of("int8", "token", "dynamic")
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.parts[0].reading = Reading(fmt, transform_of("diagonal", channels))
    step, reads = model.regauge_step, Reads()
    widths = Inputs(model, reads).widths()
    assert build(model, step.anatomy, widths, reads) is not None
    mlp.up_proj.parts[0].reading = Reading(fmt, transform_of("kronecker", channels))
    with pytest.raises(Unservable, match="in several ways"):
        build(model, step.anatomy, widths, reads)
    mlp.up_proj.parts[0].reading = None
    with pytest.raises(Unservable, match="in several ways"):
        build(model, step.anatomy, widths, reads)
