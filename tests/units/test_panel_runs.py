"""Panels in runs: the first inputs of a matrix lie together, and nothing that is computed changes by a bit."""

from __future__ import annotations

import pytest
import torch

from regauge.formats.base import Codes, Format
from regauge.kernels.cpu import library, matrix
from regauge.kernels.cpu.interface import has
from regauge.kernels.cpu.layout import cut_at, cuts_of, stride_of
from regauge.runtime.matrices.held import PackedMatrix
from tests import panels
from tests.panels import case, tokens
from tests.units.test_nested import FMT, coded
from tests.units.test_trellis_panels import drawn

pytestmark = pytest.mark.skipif(
    not (library.available() and has("rg_has_cuts")), reason="the C++ kernels that are here read no runs"
)
NAMES = ("int1", "int2", "int3", "int4", "int5-asym", "int6", "int7", "int8-asym", "fp4", "nf4", "fp8")


def test_a_row_is_cut_where_members_end_and_nowhere_else() -> None:
    assert cuts_of((768,), 1536, 64) == (12,)
    assert cuts_of((256,), 576, 64) == (4,)  # of 9: four, and five that are left
    assert cuts_of((1152, 384, 768), 1536, 64) == (6, 12, 18)
    assert cuts_of((256, 448), 576, 64) == (4, 7)
    assert cuts_of((250,), 500, 100) == (3,)  # a group that two share lies in the member's run
    assert cuts_of((1280, 64, 768, 512), 1536, 64) == (1, 8, 12)  # four runs are the most
    assert cuts_of((1536,), 1536, 64) == cuts_of((), 1536, 64) == cuts_of((40,), 60, 64) == ()
    assert cuts_of((64,), 64 << 12, 64) == ()  # too many groups to be said
    assert stride_of(40, 1536, 64, (12,)) == -(3 * 2**48 + 24 * 2**36 + 24 * 2**24 + 24 * 2**12 + 12)
    assert stride_of(16, 576, 64, (4, 7)) == -(2**48 + 9 * 2**36 + 9 * 2**24 + 7 * 2**12 + 4)
    assert stride_of(16 << 15, 576, 64, (4,)) == 0  # too many rows
    assert cut_at(stride_of(40, 1536, 64, (6, 12, 18))) == (6, 12, 18)
    assert cut_at(stride_of(40, 1536, 64, (12,))) == (12,)
    assert cut_at() == cut_at(4096) == ()
    assert stride_of(40, 1536, 64, ()) == 0


def test_the_first_run_lies_together_and_memory_is_the_same() -> None:
    codes_OI = torch.randint(16, (50, 160), dtype=torch.uint8, generator=panels.random(3))
    steps_ON = torch.rand(50, 5, generator=panels.random(4)).half()
    value = panels.VALUES["int4"][1]
    whole = matrix.pack(codes_OI, 4, value, 32, steps_ON, cuts=(2, 3))
    assert whole.panels.numel() == matrix.pack(codes_OI, 4, value, 32, steps_ON).panels.numel()
    for first, end in ((0, 2), (2, 3), (3, 5)):  # runs of 2, 1 and 2 groups, behind each other
        own = slice(32 * first, 32 * end)
        alone = matrix.pack(codes_OI[:, own], 4, value, 32, steps_ON[:, first:end].contiguous())
        start = 1152 * first  # four panels of 288 bytes a group
        assert whole.panels[start : start + alone.panels.numel()].equal(alone.panels)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cuts", [(3,), (2, 3, 9)], ids=str)
def test_products_and_weights_in_runs(level: str, name: str, cuts: tuple[int, ...]) -> None:
    one = case(name, 45, 416, 32, torch.float16)
    plain, runs = one.packed, case(name, 45, 416, 32, torch.float16, cuts=cuts).packed
    assert not runs.panels.equal(plain.panels)
    assert matrix.unpack(runs).equal(one.codes_OI)
    assert matrix.decode(runs, 3, 45, torch.float32).equal(matrix.decode(plain, 3, 45, torch.float32))
    for rows, columns in ((45, 416), (45, 192), (20, 100), (33, 300)):
        parts = [found.prefix(rows, columns) for found in (runs, plain)]
        for count in (1, 2, 3, 5, 8, 9):
            x_TI = tokens(count, columns)
            for activations in ("int8", "int16", "float32"):
                found, wanted = (matrix.linear(x_TI, part, activations) for part in parts)
                assert found.equal(wanted), (rows, columns, count, activations)
        if name not in ("nf4", "fp8"):
            found, wanted = (matrix.blocked(tokens(30, columns), part) for part in parts)
            assert found.equal(wanted)


@pytest.mark.parametrize("kind", ["planes", "trellis"])
def test_planes_and_trellises_in_runs(kind: str) -> None:
    codes, fmt = _drawn(kind)
    columns = codes.codes_OI.shape[1]
    plain = PackedMatrix(codes, fmt, torch.float32)
    runs = PackedMatrix(codes, fmt, torch.float32, widths=(columns // 2,))
    assert runs.meta is not None
    assert cut_at(runs.meta[-1])
    pairs = [(runs, plain), *((runs.level(bits), plain.level(bits)) for bits in (2, 5, 7) if kind == "planes")]
    for one, other in pairs:
        assert one.rows(1, 19).equal(other.rows(1, 19))
        for width in (columns, columns // 2, columns - 32):
            for count in (1, 3, 8, 20):
                x_TI = tokens(count, width)
                assert one.prefix(17, width)(x_TI).equal(other.prefix(17, width)(x_TI)), (width, count)


def _drawn(kind: str) -> tuple[Codes, Format]:
    return (coded(40, 320), FMT) if kind == "planes" else drawn("trellis2", "group:32")
