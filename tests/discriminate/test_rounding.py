"""Each part strictly beats its null on data built to show it, and equals it where theory says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from regauge.formats.base import Codes, Format, Grid
from regauge.formats.grains import Channel, Group
from regauge.formats.grids import E2M1, E4M3, E5M2, NF4, Int
from regauge.formats.rangers import AbsMax, MinMax, Search, squared_error
from regauge.formats.scales import M1, M2, BFloat16, Float32, PowerOfTwo, TwoLevel
from regauge.rounding.compensators import LoRC, low_rank
from regauge.rounding.feedback import factor
from regauge.rounding.rounders import GPTQ, ImportanceNearest, Nearest

FORMATS = {
    "int4": Format(Int(4), Group(16), AbsMax(), BFloat16()),
    "int3-asym": Format(Int(3, False), Group(16), MinMax(), Float32()),
    "int2 channel": Format(Int(2), Channel(), Search(), Float32()),
    "nvfp4": Format(E2M1(), Group(16), AbsMax(), TwoLevel()),
    "mxfp4": Format(E2M1(), Group(32), AbsMax(), PowerOfTwo()),
    "nf4": Format(NF4(), Group(32), AbsMax(), BFloat16()),
    "fp8": Format(E4M3(), Channel(), AbsMax(), Float32()),
}
GPTQS = {
    "plain": GPTQ(),
    "static": GPTQ(static_groups=True),
    "ordered": GPTQ(static_groups=True, order="activation"),
}


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hessian(seed: int, width: int, tokens: int = 400) -> Tensor:
    x_TI = draws(seed, tokens, width) @ draws(seed + 1, width, width) / width**0.5 + 0.1 * draws(
        seed + 2, tokens, width
    )
    return x_TI.T @ x_TI / tokens


def loss(w_OI: Tensor, codes: Codes, fmt: Format, hessian_II: Tensor) -> float:
    e_OI = (w_OI.float() - fmt.decode(codes)).double()
    return float(((e_OI @ hessian_II.double()) * e_OI).sum())


# GPTQ


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("gptq", GPTQS)
@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_gptq_is_nearest_when_the_inputs_are_white(name: str, gptq: str, damp: float) -> None:
    w_OI = draws(1, 17, 96) * 0.05
    fmt = FORMATS[name]
    codes = replace(GPTQS[gptq], damp=damp)(w_OI, fmt, {"hessian": 3.0 * torch.eye(96)})
    nearest = Nearest()(w_OI, fmt, {})
    assert torch.equal(codes.codes_OI, nearest.codes_OI)
    assert torch.equal(codes.step.scale_G1, nearest.step.scale_G1)
    assert codes.notes == ()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("gptq", GPTQS)
def test_gptq_strictly_beats_nearest_on_correlated_inputs(name: str, gptq: str) -> None:
    w_OI, hessian_II = draws(2, 40, 96) * 0.05, hessian(3, 96)
    fmt = FORMATS[name]
    ours = loss(w_OI, GPTQS[gptq](w_OI, fmt, {"hessian": hessian_II}), fmt, hessian_II)
    plain = loss(w_OI, Nearest()(w_OI, fmt, {}), fmt, hessian_II)
    assert ours < 0.75 * plain


def test_gptq_beats_nearest_with_its_own_steps() -> None:
    """The gain is the feedback's, not that of steps fitted later."""
    w_OI, hessian_II = draws(4, 30, 96) * 0.05, hessian(5, 96)
    fmt = FORMATS["int4"]
    codes = GPTQ()(w_OI, fmt, {"hessian": hessian_II})
    same_steps = fmt.encode(w_OI, codes.step)
    assert loss(w_OI, codes, fmt, hessian_II) < 0.6 * loss(w_OI, same_steps, fmt, hessian_II)


def test_activation_order_beats_left_to_right_when_the_last_inputs_are_the_loudest() -> None:
    w_OI, hessian_II = draws(6, 60, 96) * 0.05, hessian(7, 96)
    gain_I = torch.linspace(0.05, 3.0, 96)
    hessian_II = hessian_II * gain_I * gain_I[:, None]
    fmt = FORMATS["int3-asym"]
    found = {
        name: loss(w_OI, rounder(w_OI, fmt, {"hessian": hessian_II}), fmt, hessian_II)
        for name, rounder in GPTQS.items()
    }
    assert found["ordered"] < 0.9 * found["static"]


def test_refitted_groups_follow_the_feedback() -> None:
    """Steps fitted when reached differ from those of the original weights, and hold the moved weights."""
    w_OI, hessian_II = draws(8, 20, 96) * 0.05, hessian(9, 96)
    fmt = FORMATS["int4"]
    plain, static = (GPTQ(static_groups=still)(w_OI, fmt, {"hessian": hessian_II}).step for still in (False, True))
    first_GN = plain.scale_G1.view(20, 6)[:, 0]
    assert torch.equal(first_GN, static.scale_G1.view(20, 6)[:, 0])  # nothing has moved before the first group
    assert float((plain.scale_G1 != static.scale_G1).float().mean()) > 0.5
    assert torch.equal(static.scale_G1, fmt.fit(w_OI).scale_G1)


def test_a_silent_input_loses_its_weights_and_says_so() -> None:
    w_OI, hessian_II = draws(10, 9, 32), hessian(11, 32)
    hessian_II[:, 5] = hessian_II[5] = hessian_II[:, 30] = hessian_II[30] = 0
    fmt = FORMATS["int4"]
    codes = GPTQ()(w_OI, fmt, {"hessian": hessian_II})
    assert torch.equal(fmt.decode(codes)[:, [5, 30]], torch.zeros(9, 2))
    assert codes.notes == ("2 of 32 inputs were always 0: their weights became 0",)


def test_a_site_that_no_input_reached_is_rounded_to_nearest() -> None:
    w_OI, fmt = draws(12, 9, 32), FORMATS["int4"]
    codes = GPTQ()(w_OI, fmt, {"hessian": torch.zeros(32, 32)})
    assert torch.equal(codes.codes_OI, Nearest()(w_OI, fmt, {}).codes_OI)
    assert codes.notes == ("no input reached it, so it was rounded to nearest",)
    codes = ImportanceNearest()(w_OI, fmt, {"second_moment": torch.zeros(32)})
    assert torch.equal(codes.codes_OI, Nearest()(w_OI, fmt, {}).codes_OI)
    assert codes.notes == ("no finite input reached it: every column counts alike",)


def test_a_hessian_that_cannot_be_factored_gets_more_damping_and_says_so() -> None:
    w_OI, fmt = draws(13, 9, 32), FORMATS["int4"]
    hessian_II = hessian(14, 32)
    hessian_II -= 0.2 * torch.eye(32) * hessian_II.diagonal().mean()  # no longer a second moment
    codes = GPTQ()(w_OI, fmt, {"hessian": hessian_II})
    assert len(codes.notes) == 1
    assert "could not be factored at damp 0.01" in codes.notes[0]
    holed = hessian(15, 32)
    holed[3, 4] = float("nan")
    holed[4, 3] = float("inf")
    codes = GPTQ()(w_OI, fmt, {"hessian": holed})
    assert "not finite" in codes.notes[0]
    assert bool(fmt.decode(codes).isfinite().all())
    with pytest.raises(ValueError, match="cannot be factored at any damping"):
        factor(-torch.ones(3, 3) * 1e9 + 1e-3 * torch.eye(3) + 2e9 * torch.eye(3).roll(1, 0), 0.01, None)


def test_the_factor_is_that_of_the_damped_hessian() -> None:
    """Also after damping was raised: λ is added to the original diagonal, not to one already damped."""
    hessian_II = hessian(16, 24).double()
    for shift in (0.0, 0.2):
        mean = float(hessian_II.diagonal().mean())
        h_II = hessian_II - shift * mean * torch.eye(24, dtype=torch.float64)
        made = factor(h_II, 0.01, None)
        assert torch.equal(made.feedback_II, made.feedback_II.triu())
        f_II = made.feedback_II.triu(1) + torch.eye(24, dtype=torch.float64)
        damped = h_II + made.damp * float(h_II.diagonal().mean()) * torch.eye(24, dtype=torch.float64)
        inner = torch.linalg.solve_triangular(f_II, damped, upper=True)
        scales = torch.linalg.solve_triangular(f_II, inner.T, upper=True)  # F⁻¹ H F⁻ᵀ is diagonal
        off = scales - scales.diagonal().diag()
        assert float(off.abs().max()) < 1e-9 * float(scales.abs().max())
        assert torch.allclose(made.feedback_II.diagonal().square(), scales.diagonal())
        assert (made.damp > 0.01) == (shift > 0)


def test_float32_gives_way_to_float64_before_damping_is_raised() -> None:
    """Hessians that float32 cannot factor and float64 can: no more damping than asked for."""
    found = 0
    for seed in range(20):
        x_TI = torch.ones(30, 200) + 1e-4 * draws(seed, 30, 200)
        hessian_II = x_TI.T @ x_TI
        for damp in torch.logspace(-8, -5, 13).tolist():
            damped_II = hessian_II + damp * hessian_II.diagonal().mean() * torch.eye(200)
            narrow = torch.linalg.cholesky_ex(damped_II.flip(0, 1))[1]
            wide_II = hessian_II.double() + damp * hessian_II.diagonal().double().mean() * torch.eye(200)
            if int(narrow) and not int(torch.linalg.cholesky_ex(wide_II.flip(0, 1))[1]):
                found += 1
                made = factor(hessian_II, damp, None)
                assert made.damp == damp
                assert made.notes == ()
                assert made.feedback_II.dtype is torch.float32
    assert found > 0


# Rangers and importance


@pytest.mark.parametrize(
    ("grid", "share"), [(Int(4), 0.9), (Int(4, False), 0.9), (Int(2), 0.5), (E2M1(), 0.97), (NF4(), 0.9)]
)
def test_search_strictly_beats_absmax_and_minmax_on_groups_with_an_outlier(grid: Grid, share: float) -> None:
    x_GK = draws(18, 50, 256)
    x_GK[:, 0] = 5.0
    best = squared_error(x_GK, Search()(x_GK, grid, Float32()), grid)
    for plain in (AbsMax(), MinMax()):
        error = squared_error(x_GK, plain(x_GK, grid, Float32()), grid)
        assert bool((best <= error).all())
        assert float(best.sum()) < share * float(error.sum())


def test_the_least_squares_step_improves_on_the_shrinks() -> None:
    x_GK = draws(19, 200, 32)
    with_grid_only = Search(steps=1, least=1.0)(x_GK, Int(3), Float32())
    plain = squared_error(x_GK, AbsMax()(x_GK, Int(3), Float32()), Int(3))
    found = squared_error(x_GK, with_grid_only, Int(3))
    assert float(found.sum()) < 0.97 * float(plain.sum())


@pytest.mark.parametrize("name", ["int4", "int3-asym", "nf4"])
def test_each_row_keeps_the_range_that_leaves_its_outputs_the_least_error(name: str) -> None:
    w_OI, hessian_II = draws(40, 24, 96) ** 3, hessian(41, 96)
    fmt, once = FORMATS[name], GPTQS["ordered"]

    def by_row(codes: Codes) -> Tensor:
        e_OI = (w_OI - fmt.decode(codes)).double()
        return ((e_OI @ hessian_II.double()) * e_OI).sum(1)

    whole_O = by_row(once(w_OI, fmt, {"hessian": hessian_II}))
    kept = replace(once, tries=3)(w_OI, fmt, {"hessian": hessian_II})
    shrunk_O = [by_row(once(w_OI, replace(fmt, step=fmt.fit(w_OI * s)), {"hessian": hessian_II})) for s in (0.9, 0.8)]
    least_O = torch.stack([whole_O, *shrunk_O]).min(0).values
    torch.testing.assert_close(by_row(kept), least_O, rtol=1e-5, atol=0)
    assert float(least_O.sum()) < 0.99 * float(whole_O.sum())
    assert torch.equal(fmt.load(kept.step.fields).scale_G1, kept.step.scale_G1)


@pytest.mark.parametrize("name", ["nvfp4", "fp8"])
def test_ranges_are_tried_neither_where_rows_share_a_level_nor_on_fine_grids(name: str) -> None:
    w_OI, fmt = draws(42, 17, 96), FORMATS[name]
    stats = {"hessian": hessian(43, 96)}
    once, often = GPTQS["ordered"](w_OI, fmt, stats), replace(GPTQS["ordered"], tries=4)(w_OI, fmt, stats)
    assert torch.equal(once.codes_OI, often.codes_OI)
    assert torch.equal(once.step.scale_G1, often.step.scale_G1)


def test_importance_counts_large_weights_more_as_their_spread_falls() -> None:
    w_OI, moment_I = draws(44, 64, 64) ** 3, draws(45, 64).square() + 0.1
    fmt = Format(Int(2, False), Group(64), Search(), BFloat16())
    large_OI = w_OI.abs() > w_OI.abs().quantile(0.9)

    def error(spread: float) -> float:
        codes = ImportanceNearest(spread)(w_OI, fmt, {"second_moment": moment_I})
        return float(((w_OI - fmt.decode(codes)).square() * moment_I)[large_OI].sum())

    assert error(2.0) < 0.98 * error(float("inf"))


def test_importance_strictly_lowers_the_weighted_error() -> None:
    w_OI = draws(20, 40, 64)
    moment_I = torch.ones(64)
    moment_I[:8] = 100.0
    w_OI[:, 8:] *= 3.0
    fmt = Format(Int(3), Group(64), Search(), BFloat16())

    def weighted(codes: Codes) -> float:
        return float(((w_OI - fmt.decode(codes)).square() * moment_I).sum())

    ours = ImportanceNearest(float("inf"))(w_OI, fmt, {"second_moment": moment_I})
    assert weighted(ours) < 0.7 * weighted(Nearest()(w_OI, fmt, {}))
    flat = ImportanceNearest(float("inf"))(w_OI, fmt, {"second_moment": torch.full((64,), 7.0)})
    assert torch.equal(flat.codes_OI, Nearest()(w_OI, fmt, {}).codes_OI)


def test_float_grids_beat_integers_where_weights_are_heavy_tailed_and_not_where_they_are_flat() -> None:
    heavy = draws(21, 64, 128) ** 3
    flat = torch.rand(64, 128, generator=torch.Generator().manual_seed(22)) * 2 - 1

    def error(w_OI: Tensor, grid: Grid) -> float:
        fmt = Format(grid, Group(32), AbsMax(), Float32())
        return float((w_OI - fmt.decode(fmt.encode(w_OI))).norm() / w_OI.norm())

    assert error(heavy, E2M1()) < error(heavy, Int(4))
    assert error(flat, E2M1()) > error(flat, Int(4))
    assert error(draws(23, 64, 128), NF4()) < error(draws(23, 64, 128), Int(4))


# Scales


def test_one_shared_level_resolves_steps_that_a_power_of_two_cannot() -> None:
    w_OI = draws(24, 64, 64) * torch.rand(64, 1, generator=torch.Generator().manual_seed(25))
    errors = {}
    for name, scale in (("nv", TwoLevel()), ("mx", PowerOfTwo()), ("m1", M1()), ("m2", M2()), ("f32", Float32())):
        fmt = Format(E2M1(), Group(16), AbsMax(), scale)
        errors[name] = float((w_OI - fmt.decode(fmt.encode(w_OI))).norm())
    assert errors["f32"] <= errors["nv"] < errors["m2"] < errors["m1"]
    assert errors["nv"] < errors["mx"]


@pytest.mark.parametrize("wide", [E4M3(), E5M2()])
def test_under_m2_fp4_becomes_fp8_bit_for_bit(wide: Grid) -> None:
    """Row step S_max; FP4 values times 2^−n are on the 8-bit grid, so W / S_max is exact in FP8."""
    w_OI = draws(26, 12, 96) * torch.logspace(0, -3, 6).repeat_interleave(16)
    fmt = Format(E2M1(), Group(16), AbsMax(), M2())
    codes = fmt.encode(w_OI)
    n_G1, row_R1 = codes.step.fields["scale"], codes.step.fields["row_scale"]
    assert int(n_G1.max()) == 8
    assert int(n_G1.min()) == 0
    shifted = fmt.grid.decode(codes.codes_OI) * torch.exp2(-n_G1.float()).view(12, 6).repeat_interleave(16, 1)
    eight = wide.encode(wide.snap(shifted))
    assert torch.equal(wide.decode(eight), shifted)
    assert torch.equal(wide.decode(eight) * row_R1, fmt.decode(codes))


def test_m2_never_clips_and_ties_to_its_own_row() -> None:
    w_OI = draws(27, 6, 64)
    w_OI[0] *= 1000
    step = Format(E2M1(), Group(16), AbsMax(), M2()).fit(w_OI)
    plain = Format(E2M1(), Group(16), AbsMax(), Float32()).fit(w_OI)
    ratio = step.scale_G1 / plain.scale_G1
    assert bool((ratio > 0.9999).all())
    assert bool((ratio < 2.0001).all())  # a loud row does not raise the steps of the others


# Compensators


@pytest.mark.parametrize("rank", [1, 3, 8, 13])
def test_lorc_reaches_the_bound_of_the_singular_values(rank: int) -> None:
    e_OI = draws(28, 13, 29).double()
    left, right = low_rank(e_OI, rank)
    cut = torch.linalg.svdvals(e_OI)[rank:]
    left_over = float((e_OI - left @ right).square().sum())
    assert left_over == pytest.approx(float(cut.square().sum()), rel=1e-9, abs=1e-20)
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1))  # both factors carry the square root


def test_lorc_lowers_the_error_more_with_each_rank_and_stays_near_the_bound_in_bfloat16() -> None:
    w_OI = draws(29, 48, 80)
    fmt = Format(E2M1(), Group(16), AbsMax(), BFloat16())
    w_hat_OI = fmt.decode(fmt.encode(w_OI))
    last = float((w_OI - w_hat_OI).norm())
    cut = torch.linalg.svdvals(w_OI - w_hat_OI)
    for rank in (1, 4, 8, 48):
        (term,) = LoRC(rank)(w_OI, w_hat_OI, {})
        terms = term.tensors
        assert terms["left"].dtype is terms["right"].dtype is torch.bfloat16
        now = float((w_OI - w_hat_OI - terms["left"].float() @ terms["right"].float()).norm())
        assert now < last
        bound = float(cut[rank:].square().sum().sqrt())
        assert now**2 <= bound**2 + (0.01 * float(cut.norm())) ** 2
        last = now
