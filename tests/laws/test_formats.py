"""Laws of every grid, grain, ranger and scale in the table of parts, alone and combined."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regauge import parts
from regauge.formats.base import Format, Grain, Grid, Ranger, Scale
from regauge.formats.grains import Block, Fallback, Group, Token
from regauge.formats.rangers import AbsMax, Dynamic, squared_error
from regauge.formats.readings import dynamic
from regauge.formats.scales import Float32
from regauge.kernels.reference import pack, packed_bytes, unpack
from regauge.parts import INPUTS
from regauge.parts.scales import WORDS

GRIDS = sorted(name for name in parts.TABLE["grid"] if parts.build("grid", parts.read("grid", name)).run == 1)
"""Those that round numbers one by one; runs of them have laws of their own in `test_runs.py`."""
RANGERS = sorted(parts.TABLE["ranger"])
SCALES = [*sorted(parts.TABLE["scale"]), "super:6", "super-low:4"]
GRAINS = [
    "channel",
    "tensor",
    "token",
    "time:1",
    "time:11",
    "group:1",
    "group:7",
    "group:13 else channel",
    "group:5 else group:7 else tensor",
]
# Each grid with one scale, each scale with an integer, a float and an asymmetric grid.
MATRICES = [name for name in GRIDS if parts.TABLE["grid"][name].places != (INPUTS,)]
POWERS = [name for name in GRIDS if name not in MATRICES]
"""Grids of what is never negative, which round exponents."""
WIDE = [name for name in MATRICES if name != "int1-asym"]
"""One bit is a cache's alone: its step is the whole range, which of the widest float32 numbers is none."""
PAIRS = [*((grid, "bf16") for grid in WIDE), *itertools.product(["int3", "int4-asym", "fp4"], SCALES)]
TRIPLES = [
    (ranger, grid, scale)
    for ranger, (grid, scale) in itertools.product(RANGERS, PAIRS)
    if {*parts.part("ranger", ranger).places} & {*parts.part("scale", parts.read("scale", scale).part).places}
]
"""With every ranger that can stand beside them."""
ZEROLESS = {"iq4": 1.0}
"""Grids whose table, fixed by a file format, has no 0, and the value next to it: 0 decodes to that many steps."""
SHAPE = (11, 91)  # 91 = 7 · 13


def grid_of(name: str) -> Grid:
    made: Grid = parts.build("grid", parts.read("grid", name))
    return made


def grain_of(name: str) -> Grain:
    made: Grain = parts.build("grain", parts.read("grain", name))
    return made


def ranger_of(name: str) -> Ranger:
    made: Ranger = parts.build("ranger", parts.read("ranger", name))
    return made


def scale_of(name: str) -> Scale:
    made: Scale = parts.build("scale", parts.read("scale", name))
    return made


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Grids


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_snap_is_idempotent_monotone_and_saturates(name: str, dtype: torch.dtype) -> None:
    grid = grid_of(name)
    z = torch.cat([torch.linspace(1.3 * grid.low - 1, 1.3 * grid.high + 1, 40_001), grid.table.nan_to_num(0.0)])
    z = z.sort().values.to(dtype)
    snapped = grid.snap(z.clone())
    assert snapped.dtype is dtype
    assert torch.equal(grid.snap(snapped.clone()), snapped)
    assert bool((snapped.diff() >= 0).all())
    assert snapped.min() == grid.low
    assert snapped.max() == grid.high
    assert torch.equal(grid.snap(torch.tensor([-1e30, 1e30], dtype=dtype)).float(), torch.tensor([grid.low, grid.high]))


@pytest.mark.parametrize("name", MATRICES)
def test_snap_takes_the_nearest_value(name: str) -> None:
    grid = grid_of(name)
    values = grid.table[~grid.table.isnan()].double()
    z = torch.linspace(1.1 * grid.low - 0.3, 1.1 * grid.high + 0.3, 10_007, dtype=torch.float64)
    gap = (z[:, None] - values).abs().amin(1)
    assert torch.allclose((grid.snap(z.clone()) - z).abs(), gap, rtol=0, atol=1e-7 * grid.high)


@pytest.mark.parametrize("name", POWERS)
def test_powers_take_the_nearest_exponent(name: str) -> None:
    grid = grid_of(name)
    exponents = grid.table[grid.table > 0].double().log2()
    least = float(exponents.min())
    z = torch.exp2(torch.linspace(least, 0.0, 997, dtype=torch.float64))
    gap = (z.log2()[:, None] - exponents).abs().amin(1)
    assert torch.allclose((grid.snap(z.clone()).log2() - z.log2()).abs(), gap, rtol=0, atol=1e-5)
    assert not grid.snap(torch.tensor([-1.0, 0.0, 2.0 ** (2 * least)])).any()


@pytest.mark.parametrize("name", GRIDS)
def test_snap_leaves_its_argument_alone(name: str) -> None:
    z = draws(1, 5, 7) * 3
    before = z.clone()
    grid_of(name).snap(z)
    assert torch.equal(z, before)


@pytest.mark.parametrize("name", GRIDS)
def test_every_code_that_can_be_written_decodes_and_encodes_to_itself(name: str) -> None:
    grid = grid_of(name)
    codes = torch.arange(len(grid.table), dtype=torch.uint8)[~grid.table.isnan()]
    values = grid.decode(codes)
    assert torch.equal(values, grid.table[codes.int()])
    assert torch.equal(grid.encode(values), codes)
    assert torch.equal(grid.encode(values.double()), codes)
    assert torch.equal(grid.snap(values), values)
    assert len(grid.table) <= 1 << grid.bits


@pytest.mark.parametrize("name", GRIDS)
def test_zero_is_on_the_grid_and_the_ends_are_the_table_s(name: str) -> None:
    grid = grid_of(name)
    values = grid.table[~grid.table.isnan()]
    assert bool((values == 0).any()) == (name not in ZEROLESS)
    assert float(values[values.abs().argmin()]) == ZEROLESS.get(name, 0.0)
    assert (float(values.min()), float(values.max())) == (grid.low, grid.high)


# Grains


@pytest.mark.parametrize("name", GRAINS)
def test_join_undoes_split_and_spread_follows_it(name: str) -> None:
    grain = grain_of(name)
    assert grain.name == name
    w_OI = draws(2, *SHAPE)
    w_GK = grain.split(w_OI)
    groups, size = grain.groups(SHAPE)
    assert tuple(w_GK.shape) == (groups, size)
    assert torch.equal(grain.join(w_GK, w_OI), w_OI)
    step_G1 = torch.arange(1.0, groups + 1).view(-1, 1)
    assert torch.equal(grain.spread(step_G1, SHAPE), grain.join(step_G1.expand(groups, size).clone(), w_OI))
    assert torch.equal(grain.taken(SHAPE).split(w_OI), w_GK)
    assert SHAPE[1] % grain.span(SHAPE) == 0


@given(rows=st.integers(1, 3), columns=st.integers(1, 4), high=st.integers(1, 5), wide=st.integers(1, 5))
def test_blocks_are_blocks(rows: int, columns: int, high: int, wide: int) -> None:
    shape = (rows * high, columns * wide)
    grain = Block(high, wide)
    w_OI = torch.arange(float(shape[0] * shape[1])).view(shape)
    w_GK = grain.split(w_OI)
    assert tuple(w_GK.shape) == grain.groups(shape) == (rows * columns, high * wide)
    assert torch.equal(w_GK[0].view(high, wide), w_OI[:high, :wide])
    assert torch.equal(w_GK[-1].view(high, wide), w_OI[-high:, -wide:])
    assert torch.equal(grain.join(w_GK, w_OI), w_OI)
    step_G1 = torch.arange(1.0, rows * columns + 1).view(-1, 1)
    assert torch.equal(grain.spread(step_G1, shape), grain.join(step_G1.expand_as(w_GK).clone(), w_OI))


def test_a_fallback_says_which_branch_it_takes() -> None:
    grain = grain_of("group:13 else channel")
    assert grain.taken((4, 26)) == Group(13)
    assert grain.taken((4, 27)).name == "channel"
    nested = Fallback(Group(5), Fallback(Group(7), Token()))
    assert [nested.taken((2, width)).name for width in (10, 14, 11)] == ["group:5", "group:7", "token"]


def test_a_grain_that_does_not_divide_says_so() -> None:
    assert Group(128).refuses((3, 100)) == "groups of 128 do not divide a width of 100"
    assert Block(2, 3).refuses((5, 9)) == "blocks of 2 x 3 do not divide 5 x 9"
    both = Fallback(Group(3), Group(4)).refuses((1, 10))
    assert both == "groups of 3 do not divide a width of 10; groups of 4 do not divide a width of 10"
    with pytest.raises(ValueError, match="groups of 128 do not divide a width of 100"):
        Group(128).split(torch.zeros(3, 100))
    with pytest.raises(ValueError, match="at least one weight"):
        Group(0)


# Formats


@pytest.mark.parametrize(("ranger", "grid", "scale"), TRIPLES)
def test_a_format_decodes_to_its_grid_and_encodes_it_again(ranger: str, grid: str, scale: str) -> None:
    for grain in ("group:13 else channel", "tensor"):
        fmt = Format(grid_of(grid), grain_of(grain), ranger_of(ranger), scale_of(scale))
        w_OI = draws(4, *SHAPE) * 0.03
        codes = fmt.encode(w_OI)
        step = codes.step
        assert codes.codes_OI.dtype is torch.uint8
        assert codes.codes_OI.shape == w_OI.shape
        assert int(codes.codes_OI.max()) < 1 << fmt.grid.bits
        w_hat_OI = fmt.decode(codes)
        assert w_hat_OI.dtype is torch.float32
        assert torch.equal(fmt.encode(w_hat_OI, step).codes_OI, codes.codes_OI) or fmt.grid.decode(
            fmt.encode(w_hat_OI, step).codes_OI
        ).equal(fmt.grid.decode(codes.codes_OI))  # a code of −0 may come back as 0
        loaded = fmt.load(step.fields)
        assert torch.equal(loaded.scale_G1, step.scale_G1)
        assert (loaded.zero_G1 is None) == (step.zero_G1 is None) == fmt.grid.symmetric
        if loaded.zero_G1 is not None and step.zero_G1 is not None:
            assert torch.equal(loaded.zero_G1, step.zero_G1)
        assert torch.equal(fmt.unscaled(fmt.grid.decode(codes.codes_OI), step), w_hat_OI)
        assert torch.equal(fmt.grid.encode(fmt.grid.snap(fmt.scaled(w_OI, step))), codes.codes_OI)


@settings(max_examples=40)
@given(data=st.data())
def test_bytes_are_those_that_are_stored(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 13)), data.draw(st.integers(1, 40)))
    grain: Grain = Fallback(
        Group(data.draw(st.integers(1, 12))), grain_of(data.draw(st.sampled_from(["channel", "tensor"])))
    )
    fmt = Format(
        grid_of(data.draw(st.sampled_from(MATRICES))),
        grain,
        ranger_of(data.draw(st.sampled_from(["absmax", "minmax"]))),
        scale_of(data.draw(st.sampled_from(SCALES))),
    )
    codes = fmt.encode(draws(data.draw(st.integers(0, 99)), *shape))
    stored = [pack(codes.codes_OI, fmt.grid.bits)]
    narrow = {"zero": fmt.grid.bits, **fmt.scale.packed, **(fmt.scale.low.packed if fmt.scale.low else {})}
    for name, field in codes.step.fields.items():
        stored.append(pack(field.view(1, -1), narrow[name]) if name in narrow else field)
    assert fmt.bytes(shape) == sum(tensor.numel() * tensor.element_size() for tensor in stored)
    assert torch.equal(unpack(stored[0], fmt.grid.bits, shape[1]), codes.codes_OI)


GROUPS = {
    "zeros": [0.0] * 8,
    "constant": [0.3] * 8,
    "negative constant": [-2.0] * 8,
    "subnormal": [1e-44, -1e-42, 0, 0, 3e-40, 0, 0, 0],
    "huge": [3e38, -3e38, 1.0, 0, 0, 0, 0, 2e38],
    "one outlier": [1e-6, 2e-6, -1e-6, 1e4, 0, 0, 0, 0],
}


@pytest.mark.parametrize(("ranger", "grid", "scale"), TRIPLES)
def test_degenerate_groups_get_finite_positive_steps_and_weights(ranger: str, grid: str, scale: str) -> None:
    w_OI = torch.tensor(list(GROUPS.values()))
    fmt = Format(grid_of(grid), grain_of("channel"), ranger_of(ranger), scale_of(scale))
    shared = fmt.bytes((6, 8)) != 6 * fmt.bytes(
        (1, 8)
    )  # something is stored once for all rows, so a row alone is another case
    for part_OI in (w_OI, *(row_I[None] for row_I in w_OI if shared)):
        codes = fmt.encode(part_OI)
        step_G1 = codes.step.scale_G1.abs() if fmt.scale.signed else codes.step.scale_G1
        assert bool((step_G1 > 0).all())
        assert bool(step_G1.isfinite().all())
        w_hat_OI = fmt.decode(codes)
        assert not bool(w_hat_OI.isnan().any())
        zeros_I = (codes.step.scale_G1[0] * ZEROLESS.get(grid, 0.0)).expand(8)
        assert torch.equal(w_hat_OI[0], zeros_I) or len(part_OI) == 1
    codes = fmt.encode(torch.zeros(1, 8))
    assert torch.equal(fmt.decode(codes), (codes.step.scale_G1 * ZEROLESS.get(grid, 0.0)).expand(1, 8))


SHARED = [name for name in SCALES if scale_of(name).loose or scale_of(name).shared]
"""Under a level that groups have together; zeros alone have a test above."""
KEPT = 6.2e-5
"""A little more than the least step that float16 keeps whole."""


@pytest.mark.parametrize("ranger", RANGERS)
def test_groups_of_zeros_come_back_as_zeros_and_cost_their_neighbours_nothing(ranger: str) -> None:
    """Or, where the grid has no 0, as the least that can be said: under a level that groups share, a step no longer
    than theirs."""
    pairs = [
        (grid, scale) for known, grid, scale in TRIPLES if known == ranger and (scale in SHARED or grid in ZEROLESS)
    ]
    if ranger in ("absmax", "minmax", "search", "least-squares"):  # what grids of lists are fitted by
        pairs += [("iq4", scale) for scale in SCALES if "f16-l" not in scale]
        pairs += [(grid, scale) for grid in WORDS for scale in ("f16", "super:6")]
    made = ranger_of(ranger)
    made = replace(made, steps=3) if ranger in ("search", "least-squares") else made  # type: ignore[type-var, call-arg]  # these have it
    for grid, scale in pairs:
        fmt = Format(grid_of(grid), grain_of("group:8"), made, scale_of(scale))
        least = float(fmt.grid.table.abs().nan_to_num(1.0).min()) if fmt.grid.symmetric else 0.0
        w_OI = draws(3, 3, 64) * 1e-3
        others_I = torch.ones(64, dtype=torch.bool)
        others_I[24:32] = False
        before_OI = fmt.decode(fmt.encode(w_OI.clone())) if scale in SHARED else None
        w_OI[1, ~others_I] = 0.0
        codes = fmt.encode(w_OI)
        w_hat_OI = fmt.decode(codes)
        if before_OI is not None:  # else no neighbour is asked
            was, now = ((one[1] - w_OI[1])[others_I].norm() for one in (before_OI, w_hat_OI))
            assert now <= 1.5 * was, (grid, scale)
        zeros_I = w_hat_OI[1, ~others_I].abs()
        assert zeros_I.max() <= least * codes.step.scale_G1.abs().min() * (1 + 1e-6), (grid, scale)
        assert fmt.decode(fmt.encode(torch.zeros(2, 16))).abs().max() <= least * KEPT, (grid, scale)


@pytest.mark.parametrize(("grid", "scale"), PAIRS)
@pytest.mark.parametrize("weighted", [False, True])
def test_search_is_never_worse_than_the_plain_rangers(scale: str, grid: str, weighted: bool) -> None:
    x_GK = draws(5, 60, 17)
    x_GK[::3, 0] *= 9
    x_GK[1::3] = x_GK[1::3].abs() + 0.2
    weight_GK = draws(6, 60, 17).square() if weighted else None
    made, bound = (
        grid_of(grid),
        scale_of(scale).bind(AbsMax()(x_GK, grid_of(grid), scale_of("f32")).scale_G1, grid_of(grid), 1),
    )
    best = squared_error(x_GK, ranger_of("search")(x_GK, made, bound, weight_GK), made, weight_GK)
    for name in ("absmax", "minmax"):
        plain = squared_error(x_GK, ranger_of(name)(x_GK, made, bound, weight_GK), made, weight_GK)
        assert bool((best <= plain).all())


# Activations


@pytest.mark.parametrize("grid", ["int8", "int8-asym", "fp8", "int4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_keep_shape_dtype_and_independence(grid: str, dtype: torch.dtype) -> None:
    made = dynamic(Format(grid_of(grid), Token(), Dynamic(), Float32()))
    x = draws(7, 2, 5, 19).to(dtype)
    x[0, 1] = 0
    x[1, 2] *= 1e-3
    out = made.simulate(x)
    assert out.shape == x.shape
    assert out.dtype is dtype
    assert torch.equal(out[0, 1], torch.zeros(19, dtype=dtype))
    assert torch.equal(made.simulate(x[1, 2]), out[1, 2])  # a token's own range, no other's
    worst = {"int8": 1 / 127, "int8-asym": 1 / 200, "fp8": 1 / 16, "int4": 1 / 7, "fp4": 1 / 4}[grid]
    assert float(((out - x).abs().amax(-1) / x.abs().amax(-1).clamp(min=1e-9)).max()) <= worst * 1.01 + 2**-8


def test_packed_bytes_of_a_row() -> None:
    assert [packed_bytes(11, bits) for bits in range(1, 9)] == [2, 3, 5, 6, 7, 9, 10, 11]
