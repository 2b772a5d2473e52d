"""Laws of every rounder and compensator in the table of parts, over every grid and grain."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regauge import parts
from regauge.formats.base import Codes, Format, Grain
from regauge.formats.grains import Block
from regauge.rounding.base import Compensator, Rounder, Stats
from regauge.rounding.learnt_levels import LearntLevels
from regauge.rounding.levels import Levels
from regauge.rounding.rounders import GPTQ

GRIDS = sorted(name for name in parts.TABLE["grid"] if parts.build("grid", parts.read("grid", name)).run == 1)
SCALES = sorted(parts.TABLE["scale"])
ROUNDERS = sorted(parts.TABLE["rounder"])
GPTQS = [GPTQ(), GPTQ(static_groups=True), GPTQ(static_groups=True, order="activation"), GPTQ(tries=3)]
COMPENSATORS = sorted(parts.TABLE["compensator"])


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stats_of(x_TI: Tensor) -> Stats:
    return {"hessian": x_TI.T @ x_TI / len(x_TI), "second_moment": x_TI.square().mean(0)}


def correlated(seed: int, tokens: int, width: int) -> Tensor:
    return draws(seed, tokens, width) @ draws(seed + 1, width, width) + 0.1 * draws(seed + 2, tokens, width)


def format_of(grid: str, grain: str | Grain, scale: str, ranger: str = "absmax") -> Format:
    made = parts.build("grain", parts.read("grain", grain)) if isinstance(grain, str) else grain
    built = {axis: parts.build(axis, parts.read(axis, name)) for axis, name in (("grid", grid), ("ranger", ranger))}
    return Format(built["grid"], made, built["ranger"], parts.build("scale", parts.read("scale", scale)))


def rounder_of(name: str) -> Rounder:
    made: Rounder = parts.build("rounder", parts.read("rounder", name))
    return made


def check(codes: Codes, w_OI: Tensor, fmt: Format) -> None:
    """The codes are whole: on the grid, on stored steps, in range."""
    assert codes.codes_OI.shape == w_OI.shape
    assert codes.codes_OI.dtype is torch.uint8
    assert not bool(fmt.grid.table[codes.codes_OI.int()].isnan().any())
    loaded = fmt.load(codes.step.fields)
    assert torch.equal(loaded.scale_G1, codes.step.scale_G1)
    if loaded.zero_G1 is not None and codes.step.zero_G1 is not None:
        assert torch.equal(loaded.zero_G1, codes.step.zero_G1)
    groups, _ = fmt.grain.groups((w_OI.shape[0], w_OI.shape[1]))
    assert codes.step.scale_G1.shape == (groups, 1)
    assert bool(fmt.decode(codes).isfinite().all())


@pytest.mark.parametrize("rounder", ROUNDERS)
@pytest.mark.parametrize(("grid", "scale"), [*((grid, "bf16") for grid in GRIDS), *(("fp4", name) for name in SCALES)])
def test_every_rounder_works_on_every_format(rounder: str, grid: str, scale: str) -> None:
    w_OI = draws(1, 7, 26) * 0.05
    stats = stats_of(correlated(2, 60, 26))
    before = w_OI.clone()
    wanted = parts.part("rounder", rounder).wants.get("grid", ())
    if wanted and grid not in wanted:  # a recipe is refused by the table of parts; the rounder itself refuses too
        with pytest.raises(ValueError, match=r"have no levels to be grown"):
            rounder_of(rounder)(w_OI, format_of(grid, "channel", scale), stats)
        grid = wanted[0]
    for grain in ("group:13 else channel", "group:5 else channel", "tensor"):
        fmt = format_of(grid, grain, scale)
        codes = rounder_of(rounder)(w_OI, fmt, stats)
        check(codes, w_OI, fmt)
        assert torch.equal(w_OI, before)
        again = rounder_of(rounder)(w_OI, fmt, stats)
        assert torch.equal(again.codes_OI, codes.codes_OI)


@settings(max_examples=30)
@given(data=st.data())
def test_gptq_on_odd_shapes(data: st.DataObject) -> None:
    rows, groups, size = (data.draw(st.integers(1, high)) for high in (9, 4, 9))
    columns = groups * size
    made = replace(data.draw(st.sampled_from(GPTQS)), block=data.draw(st.integers(1, 12)))
    grain = data.draw(st.sampled_from(["channel", "tensor", f"group:{size}"]))
    fmt = format_of(data.draw(st.sampled_from(GRIDS)), grain, data.draw(st.sampled_from(SCALES)))
    seed = data.draw(st.integers(0, 999))
    w_OI = draws(seed, rows, columns)
    check(made(w_OI, fmt, stats_of(correlated(seed, 20, columns))), w_OI, fmt)


@pytest.mark.parametrize("rounder", GPTQS)
def test_gptq_does_not_depend_on_the_size_of_its_blocks(rounder: GPTQ) -> None:
    w_OI, stats = draws(3, 1100, 24), stats_of(correlated(4, 100, 24))  # more rows than are swept together
    fmt = format_of("int3-asym", "group:6", "f32", "minmax")
    first = replace(rounder, precision="double")(w_OI, fmt, stats)
    for block in (1, 5, 24):
        codes = replace(rounder, block=block, precision="double")(w_OI, fmt, stats)
        assert float((codes.codes_OI != first.codes_OI).float().mean()) < 1e-4


def test_gptq_on_blocks_of_two_dimensions() -> None:
    w_OI, stats = draws(5, 6, 20), stats_of(correlated(6, 60, 20))
    for rounder in GPTQS:
        fmt = format_of("int4", Block(3, 5), "bf16")
        check(rounder(w_OI, fmt, stats), w_OI, fmt)


@pytest.mark.parametrize("name", COMPENSATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compensators_name_what_they_add_and_lower_the_error(name: str, dtype: torch.dtype) -> None:
    short = parts.part("compensator", name).short
    made: Compensator = parts.build("compensator", parts.read("compensator", f"{name}:3" if short else name))
    w_OI = draws(7, 14, 24).to(dtype)  # `phases` pairs halves
    fmt = format_of("int2", "channel", "bf16", "search")
    w_hat_OI = fmt.decode(fmt.encode(w_OI))
    terms = made(w_OI, w_hat_OI, {"hessian": torch.eye(24, dtype=torch.float64)})
    assert all(term.kind == parts.part("compensator", name).term for term in terms)
    added = sum((term.dense().float() for term in terms), torch.zeros(14, 24))
    assert added.shape == w_OI.shape
    assert (w_OI.float() - w_hat_OI - added).norm() < (w_OI.float() - w_hat_OI).norm()


@pytest.mark.parametrize("rounder", [parts.build("rounder", parts.read("rounder", n)) for n in ROUNDERS] + GPTQS)
def test_codes_do_not_depend_on_how_a_weight_lies_in_memory(rounder: Rounder) -> None:
    """A transposed weight (Conv1D, a rotated writer) or a single row gives the codes of a row-major copy, unchanged."""
    for rows in (7, 1):
        w_OI, stats = draws(1, rows, 96), stats_of(correlated(5, 300, 96))
        grid = "nested:3" if isinstance(rounder, Levels | LearntLevels) else "int3-asym"
        fmt = format_of(grid, "group:32", "bf16", "minmax")
        turned_OI = w_OI.T.contiguous().T
        found, kept = rounder(turned_OI, fmt, stats), turned_OI.clone()
        expected = rounder(w_OI, fmt, stats)
        assert torch.equal(found.codes_OI, expected.codes_OI)
        assert torch.equal(fmt.decode(found), fmt.decode(expected))
        assert torch.equal(turned_OI, kept)
        better = w_OI - fmt.decode(expected)
        plain = w_OI - fmt.decode(fmt.encode(w_OI))
        loss, null = (float(((e @ stats["hessian"]) * e).sum()) for e in (better, plain))
        assert loss <= null * (1 + 1e-5)
