"""Steps and error feedback by the C++ kernels against torch, which stays the reference, and against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regauge.formats import rangers
from regauge.formats.base import Codes, Format, Grid, Scale
from regauge.formats.grains import Block, Channel, Group, Whole
from regauge.formats.grids import E2M1, E2M3, E4M3, E5M2, NF4, Int, Ternary
from regauge.formats.rangers import AbsMax, MinMax, Search, squared_error
from regauge.formats.scales import M1, BFloat16, Float16, Float32, PowerOfTwo, TwoLevel
from regauge.kernels.cpu import sweep
from regauge.kernels.cpu.library import available
from regauge.rounding import rounders
from regauge.rounding.feedback import Factor, factor
from regauge.rounding.rounders import GPTQ
from regauge.rounding.sweep import swept
from tests.discriminate.test_rounding import GPTQS, draws

pytestmark = pytest.mark.skipif(not available(), reason="the C++ kernels are not built here")

GRIDS = [Int(4), Int(3, False), Int(8), Int(2), E4M3(), E5M2(), E2M1(), E2M3(), NF4(), Ternary()]
SCALES = [Float32(), BFloat16(), Float16(), PowerOfTwo(), PowerOfTwo(strict=True), TwoLevel()]
PAIRS = [*((grid, BFloat16()) for grid in GRIDS), *((E2M1(), scale) for scale in SCALES), (Int(8), Float32())]
FORMATS = {
    "int4-asym g32 search": Format(Int(4, False), Group(32), Search(), BFloat16()),
    "int3-asym g16 minmax": Format(Int(3, False), Group(16), MinMax(), Float16()),
    "int4 g48 absmax": Format(Int(4), Group(48), AbsMax(), BFloat16()),
    "int2-asym g144 search": Format(Int(2, False), Group(144), Search(5, 0.6), BFloat16()),
    "int8 channel search": Format(Int(8), Channel(), Search(), BFloat16()),
    "int4 tensor": Format(Int(4), Whole(), AbsMax(), Float32()),
    "nf4 g32 search": Format(NF4(), Group(32), Search(), BFloat16()),
    "nvfp4": Format(E2M1(), Group(16), AbsMax(), TwoLevel()),
    "mxfp4": Format(E2M1(), Group(32), AbsMax(), PowerOfTwo()),
    "fp8 channel": Format(E4M3(), Channel(), AbsMax(), Float32()),
}


def hessian(seed: int, width: int) -> Tensor:
    x_TI = draws(seed, 2 * width + 40, width) @ draws(seed + 1, width, width) / width**0.5
    return x_TI.T @ x_TI / len(x_TI)


@pytest.fixture
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """With this the test turns the kernels off: `monkeypatch.setattr(sweep, "library", ...)`, undone behind it."""
    return monkeypatch


def off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sweep, "library", lambda: None)


def loss(w_OI: Tensor, codes: Codes, fmt: Format, hessian_II: Tensor) -> float:
    e_OI = (w_OI - fmt.decode(codes)).double()
    return float(((e_OI @ hessian_II.double()) * e_OI).sum())


# Ranges


@pytest.mark.parametrize(("grid", "scale"), PAIRS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_search_finds_the_steps_that_torch_finds(
    grid: Grid, scale: Scale, weighted: bool, torch_alone: pytest.MonkeyPatch
) -> None:
    x_GK = draws(3, 131, 37) * 0.1
    x_GK[::3, 0] *= 9
    x_GK[1::3] = x_GK[1::3].abs() + 0.2
    weight_GK = draws(4, 131, 37).square() if weighted else None
    ours = Search()(x_GK, grid, scale, weight_GK)
    off(torch_alone)
    theirs = Search()(x_GK, grid, scale, weight_GK)
    same_G1 = torch.isclose(ours.scale_G1, theirs.scale_G1, rtol=1e-5, atol=0)
    assert float(same_G1.float().mean()) > 0.96  # a shrink may be as good within rounding
    bound = scale.bind(AbsMax()(x_GK, grid, Float32()).scale_G1, grid, 1)
    assert torch.equal(bound.load(ours.fields), ours.scale_G1)
    lost, least = (squared_error(x_GK, step, grid, weight_GK) for step in (ours, theirs))
    assert torch.allclose(lost, least, rtol=2e-4, atol=0)  # of int8 a small difference of large ones


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_groups_of_any_dtype_and_layout_are_read(dtype: torch.dtype, torch_alone: pytest.MonkeyPatch) -> None:
    x_GK = draws(5, 40, 70).to(dtype).T
    ours = Search()(x_GK, Int(4, False), BFloat16())
    off(torch_alone)
    theirs = Search()(x_GK, Int(4, False), BFloat16())
    assert torch.equal(ours.scale_G1, theirs.scale_G1)
    assert torch.equal(ours.fields["zero"], theirs.fields["zero"])


def test_where_two_shrinks_are_equal_the_first_stays() -> None:
    """Constants are met by several steps without error; the first candidate of them is that of AbsMax."""
    x_GK = torch.full((3, 8), 0.75)
    assert torch.equal(Search()(x_GK, NF4(), Float32()).scale_G1, AbsMax()(x_GK, NF4(), Float32()).scale_G1)


def test_long_groups_other_dtypes_and_numbers_without_end_are_left_to_torch(torch_alone: pytest.MonkeyPatch) -> None:
    asked = []
    real = sweep.fitted
    torch_alone.setattr(sweep, "fitted", lambda *all_of: (asked.append(all_of[0]), real(*all_of))[1])
    for x_GK, count in ((draws(6, 2, rangers.LONGEST + 1), 0), (draws(7, 4, 9).double(), 0), (draws(8, 4, 9), 1)):
        asked.clear()
        Search()(x_GK, Int(4), Float32())
        assert len(asked) == count
    x_GK = draws(9, 4, 9)
    x_GK[1, 2] = float("nan")
    x_GK[3, 2] = float("inf")
    ours = Search()(x_GK, Int(4), Float32())
    off(torch_alone)
    assert torch.equal(ours.scale_G1, Search()(x_GK, Int(4), Float32()).scale_G1)


# Error feedback


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("gptq", GPTQS)
def test_codes_and_objective_are_those_of_torch(name: str, gptq: str, torch_alone: pytest.MonkeyPatch) -> None:
    w_OI, fmt, stats = draws(11, 70, 288) * 0.05, FORMATS[name], {"hessian": hessian(12, 288)}
    ours = GPTQS[gptq](w_OI, fmt, stats)
    off(torch_alone)
    theirs = GPTQS[gptq](w_OI, fmt, stats)
    assert float((ours.codes_OI == theirs.codes_OI).float().mean()) >= 0.999
    want = loss(w_OI, theirs, fmt, stats["hessian"])
    assert loss(w_OI, ours, fmt, stats["hessian"]) == pytest.approx(want, rel=1e-4)
    assert torch.allclose(ours.step.scale_G1, theirs.step.scale_G1, rtol=0.05)
    assert set(ours.step.fields) == set(theirs.step.fields)


@pytest.mark.parametrize("name", ["int4-asym g32 search", "int8 channel search", "nf4 g32 search", "mxfp4"])
def test_codes_are_those_of_float64_where_no_weight_lies_near_a_tie(name: str) -> None:
    w_OI, fmt, stats = draws(13, 29, 96) * 0.05, FORMATS[name], {"hessian": hessian(14, 96)}
    wide = GPTQ(precision="double")(w_OI.double(), fmt, stats)
    assert torch.equal(GPTQ()(w_OI, fmt, stats).codes_OI, wide.codes_OI)


def excess(w_OI: Tensor, made: Factor, codes: Codes, fmt: Format) -> float:
    """By how much a code is farther than the nearest from what its column had to round, at most, in grid units.

    What it had to round follows in float64 from the errors that the codes before it made.
    """
    shape = (w_OI.shape[0], w_OI.shape[1])
    scale_OI = fmt.grain.spread(codes.step.scale_G1, shape).double()
    zero_OI = torch.zeros(1) if codes.step.zero_G1 is None else fmt.grain.spread(codes.step.zero_G1, shape).double()
    z_OI = fmt.grid.decode(codes.codes_OI).double()
    error_OI = w_OI.double() - (z_OI - zero_OI) * scale_OI
    target_OI = w_OI.double() + error_OI @ made.feedback_II.double().triu(1)
    wanted_OI = target_OI / scale_OI + zero_OI
    miss_OI = (z_OI - wanted_OI).abs() - (fmt.grid.snap(wanted_OI.clone()) - wanted_OI).abs()
    return float(miss_OI.max())


@settings(max_examples=60)
@given(data=st.data())
def test_each_code_is_the_nearest_given_the_errors_before_it(data: st.DataObject) -> None:
    """On odd shapes and strange weights; and steps fitted on the way fit what their columns would be were they free."""
    rows = data.draw(st.sampled_from([1, 2, 7, 63, 64, 65, 130]))
    size, groups = data.draw(st.sampled_from([1, 5, 13, 37, 131])), data.draw(st.integers(1, 3))
    columns, seed = size * groups, data.draw(st.integers(0, 99))
    grain = data.draw(st.sampled_from([Channel(), Whole(), Group(size)]))
    scale = data.draw(st.sampled_from(SCALES))
    fmt = Format(data.draw(st.sampled_from(GRIDS)), grain, data.draw(st.sampled_from([Search(), AbsMax()])), scale)
    w_OI = draws(seed, rows, columns)
    kind = data.draw(st.sampled_from(["plain", "zeros", "constant", "large", "subnormal", "some zeros"]))
    if kind == "large":
        w_OI *= 1e15
    elif kind == "subnormal":
        w_OI *= 1e-39
    elif kind == "zeros":
        w_OI[:] = 0
    elif kind == "constant":
        w_OI[:] = 0.3
    elif kind == "some zeros":
        w_OI[::2, ::3] = 0
    dead = data.draw(st.booleans())
    h_II = hessian(seed + 1, columns)
    if dead and columns > 1:
        h_II[0], h_II[:, 0], w_OI[:, 0] = 0, 0, 0
    made = factor(h_II.clone(), 0.01, None)
    step = fmt.fit(w_OI) if data.draw(st.booleans()) or fmt.grain.span((rows, columns)) == columns else None
    codes = swept(w_OI, fmt, step, made, None)
    assert codes is not None
    scales_G1 = codes.step.scale_G1
    assert bool((scales_G1 > 0).all() and scales_G1.isfinite().all())
    error = excess(w_OI, made, codes, fmt)
    assert error <= 1e-3 * max(1.0, fmt.grid.high / 100)
    if step is None and kind == "plain":
        searched = replace(fmt, ranger=fmt.ranger).bound(w_OI)
        what = fmt.decode(codes)
        for start in range(0, columns, size):
            e_OI = (w_OI - what).double()
            target = w_OI[:, start : start + size].double() + (
                e_OI[:, :start] @ made.feedback_II[:start, start : start + size].double()
            )
            free = made_free(made, w_OI[:, start : start + size].double(), target, start, start + size)
            ours = scales_G1.view(rows, groups)[:, start // size].unsqueeze(1)
            wanted = searched.fit(free.float()).scale_G1
            assert float((ours / wanted - 1).abs().median()) < 1e-5


def made_free(made: Factor, w_OB: Tensor, target_OB: Tensor, start: int, end: int) -> Tensor:
    wide = Factor(made.feedback_II.double(), made.damp, ())
    return wide.conditional(w_OB, target_OB, start, end)


@pytest.mark.parametrize("name", ["int4-asym g32 search", "int4 g48 absmax", "int8 channel search", "nvfp4"])
def test_no_row_depends_on_threads_or_on_the_rows_beside_it(name: str) -> None:
    w_OI, fmt = draws(15, 700, 288) * 0.05, FORMATS[name]
    fmt = fmt.bound(w_OI)
    made = factor(hessian(16, 288), 0.01, None)
    step = fmt.fit(w_OI) if fmt.grain.span((700, 288)) == 288 else None
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            codes = swept(w_OI, fmt, step, made, None)
            assert codes is not None
            found.append(codes)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other.codes_OI, found[0].codes_OI)
        assert torch.equal(other.step.scale_G1, found[0].step.scale_G1)
    for rows in (slice(0, 1), slice(63, 200), slice(699, 700)):
        alone = swept(w_OI[rows], fmt, None if step is None else fmt.fit(w_OI[rows]), made, None)
        assert alone is not None
        assert torch.equal(alone.codes_OI, found[0].codes_OI[rows])


def test_what_the_search_offers_goes_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_fixed", "_refitted"):
        monkeypatch.setattr(rounders, name, None)  # what is called then is no function
    w_OI, stats = draws(17, 9, 288), {"hessian": hessian(18, 288)}
    for fmt in FORMATS.values():
        for gptq in GPTQS.values():
            assert gptq(w_OI, fmt, stats).codes_OI.shape == w_OI.shape


@pytest.mark.parametrize(
    ("fmt", "gptq"),
    [
        (Format(Int(4), Group(16), AbsMax(), M1()), GPTQ()),  # steps that the kernels do not store
        (Format(Int(4), Block(3, 16), AbsMax(), Float32()), GPTQ()),  # groups of several rows
        (Format(Int(4), Group(16), AbsMax(), Float32()), GPTQ(precision="double")),
    ],
)
def test_what_the_kernels_lack_is_left_to_torch(fmt: Format, gptq: GPTQ, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    real = rounders._refitted
    monkeypatch.setattr(rounders, "_refitted", lambda *all_of: (called.append(1), real(*all_of))[1])
    w_OI, stats = draws(19, 6, 32), {"hessian": hessian(20, 32)}
    gptq(w_OI, fmt, stats)
    assert called == [1]


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -3e38])
@pytest.mark.parametrize("static", [False, True])
def test_weights_without_end_round_as_in_torch(strange: float, static: bool, torch_alone: pytest.MonkeyPatch) -> None:
    w_OI, fmt, stats = draws(21, 5, 48), FORMATS["int3-asym g16 minmax"], {"hessian": hessian(22, 48)}
    w_OI[2, 7] = strange
    ours = GPTQ(static_groups=static)(w_OI, fmt, stats)
    off(torch_alone)
    theirs = GPTQ(static_groups=static)(w_OI, fmt, stats)
    assert torch.equal(ours.codes_OI, theirs.codes_OI)
    assert torch.equal(ours.step.scale_G1, theirs.step.scale_G1)


def test_what_does_not_fit_together_is_refused() -> None:
    w_OI, f_II, values = torch.zeros(3, 8), torch.eye(8), sweep.Values(sweep.INTEGERS, 4, -8.0, 7.0)
    scale_ON, group_I = torch.ones(3, 2), torch.zeros(8, dtype=torch.int32)
    found, stored = sweep.Range(sweep.SEARCH, (1.0,)), sweep.Stored(sweep.BF16)
    assert sweep.fed_back(w_OI, f_II, values, scale_ON, None, group_I) is not None
    for told, call in (
        ("weights are float32", lambda: sweep.fed_back(w_OI.double(), f_II, values, scale_ON, None, group_I)),
        ("factors are float32", lambda: sweep.fed_back(w_OI, f_II[:7, :7], values, scale_ON, None, group_I)),
        ("steps are float32", lambda: sweep.fed_back(w_OI, f_II, values, scale_ON[:2], None, group_I)),
        ("groups of columns", lambda: sweep.fed_back(w_OI, f_II, values, scale_ON, None, group_I[:7])),
        ("zero points are given", lambda: sweep.fed_back(w_OI, f_II, values, scale_ON, scale_ON, group_I)),
        ("do not round", lambda: sweep.fed_back(w_OI, f_II, values, scale_ON, None, group_I + 2)),
        ("do not round", lambda: sweep.fed_back_fitting(w_OI, f_II, values, found, stored, 3)),
        ("do not round", lambda: sweep.fitted(w_OI, replace(values, high=9.0), found, stored)),
        ("do not round", lambda: sweep.fitted(w_OI, values, sweep.Range(sweep.SEARCH), stored)),
        ("do not round", lambda: sweep.fitted(w_OI, values, found, sweep.Stored(9))),
        ("how much errors count", lambda: sweep.fitted(w_OI, values, found, stored, torch.ones(3, 7))),
    ):
        with pytest.raises(ValueError, match=told):
            call()


def test_what_becomes_endless_on_the_way_is_told() -> None:
    values, group_I = sweep.Values(sweep.INTEGERS, 4, -8.0, 7.0), torch.zeros(8, dtype=torch.int32)
    w_OI, f_II = torch.full((3, 8), 1e38), torch.full((8, 8), 9.0).triu()
    assert sweep.fed_back(w_OI, f_II, values, torch.ones(3, 1), None, group_I) is None
    assert sweep.fed_back(w_OI * 1e-30, f_II, values, torch.ones(3, 1), None, group_I) is not None
