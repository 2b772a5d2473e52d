"""Trellises under error feedback: what they gain over integers, and what feedback inside and between words gains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regauge import parts
from regauge.formats.base import Format
from regauge.plan import parse
from regauge.plan.contradictions import reasons_of_parts
from regauge.rounding import rounders, tries, words
from regauge.rounding.feedback import Factor
from regauge.rounding.retargeting import Retargeted
from regauge.rounding.rounders import GPTQ, Nearest

SPELLINGS = ["trellis2", "trellis2:6", "trellis3", "trellis4"]


def format_of(grid: str, grain: str = "channel", ranger: str = "deviation:1") -> Format:
    found: Format = parts.format_of(parts.point("weights", grid=grid, grain=grain, ranger=ranger, scale="f16"))
    return found


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def correlated(inputs: int, exponent: float = 1.0) -> Tensor:
    """A Hessian with a power law for its spectrum, in a random basis."""
    basis, _ = torch.linalg.qr(draws(1, inputs, inputs).double())
    spectrum = torch.arange(1, inputs + 1, dtype=torch.float64) ** -exponent
    return ((basis * spectrum) @ basis.T).float()


def error(w_OI: Tensor, fmt: Format, rounder: GPTQ | Nearest | Retargeted, hessian_II: Tensor) -> float:
    e_OI = w_OI - fmt.decode(rounder(w_OI, fmt, {"hessian": hessian_II}))
    return float(((e_OI @ hessian_II) * e_OI).sum() / ((w_OI @ hessian_II) * w_OI).sum())


@pytest.mark.parametrize(("grid", "other", "share"), [("trellis2", "int2-asym", 0.75), ("trellis4", "int4-asym", 0.9)])
def test_it_beats_integers_of_more_bytes(grid: str, other: str, share: float) -> None:
    w_OI, hessian_II = draws(2, 64, 256), correlated(256)
    fmt, integers = format_of(grid), format_of(other, "group:64", "minmax")
    assert fmt.bytes((64, 256)) < 0.95 * integers.bytes((64, 256))
    ours = error(w_OI, fmt, GPTQ(order="activation", static_groups=True), hessian_II)
    theirs = error(w_OI, integers, GPTQ(order="activation", static_groups=True, tries=4), hessian_II)
    assert ours < share * theirs


@pytest.mark.parametrize("grid", SPELLINGS)
def test_feedback_is_nothing_on_white_inputs_and_much_on_others(grid: str) -> None:
    w_OI, fmt = draws(3, 48, 128), format_of(grid)
    white = torch.eye(128)
    plain, fed = Nearest()(w_OI, fmt, {}), GPTQ()(w_OI, fmt, {"hessian": white})
    assert torch.equal(plain.codes_OI, fed.codes_OI)
    hessian_II = correlated(128)
    assert error(w_OI, fmt, GPTQ(), hessian_II) < 0.6 * error(w_OI, fmt, Nearest(), hessian_II)


@pytest.mark.parametrize("grid", ["trellis2:6", "trellis3"])
def test_paying_inside_a_word_beats_paying_between_words_alone(grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w_OI, fmt, hessian_II = draws(4, 64, 256), format_of(grid), correlated(256, 1.2)
    within = error(w_OI, fmt, GPTQ(), hessian_II)
    monkeypatch.setattr(words, "PART", 64)
    assert within < 0.92 * error(w_OI, fmt, GPTQ(), hessian_II)


@pytest.mark.parametrize("grid", SPELLINGS)
@pytest.mark.parametrize("static", [False, True])
def test_kernels_and_the_definition_round_alike(grid: str, static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    w_OI, fmt, hessian_II = draws(5, 20, 128), format_of(grid, "group:64", "deviation:2"), correlated(128)
    rounder = GPTQ(static_groups=static, block=64)
    fast = rounder(w_OI, fmt, {"hessian": hessian_II})
    monkeypatch.setattr(words.trellis, "here", lambda: False)
    slow = rounder(w_OI, fmt, {"hessian": hessian_II})
    assert float((fast.codes_OI == slow.codes_OI).float().mean()) > 0.9  # a path that differs once goes on to differ
    one, two = (error(w_OI, fmt, lambda *_, codes=codes: codes, hessian_II) for codes in (fast, slow))  # type: ignore[arg-type]  # a rounder that knows
    assert one == pytest.approx(two, rel=0.02)
    assert torch.allclose(fast.step.scale_G1, slow.step.scale_G1, rtol=0.3)


def test_words_are_ordered_whole_and_dead_inputs_cost_nothing() -> None:
    order = words.falling(torch.tensor([1.0, 2, 9, 0, 3, 3, 5, 5]), 2)
    assert order.tolist() == [6, 7, 2, 3, 4, 5, 0, 1]
    assert words.falling(torch.tensor([1.0, 3, 2]), 1).tolist() == [1, 2, 0]
    assert (words.whole(128, 32), words.whole(20, 32), words.whole(100, 32)) == (128, 32, 96)
    hessian_II = correlated(128)
    hessian_II[40:44] = hessian_II[:, 40:44] = 0
    w_OI = draws(6, 16, 128)
    codes = GPTQ(order="activation", static_groups=True, tries=2)(w_OI, format_of("trellis2"), {"hessian": hessian_II})
    assert "4 of 128 inputs were always 0" in codes.notes[0]


def test_errors_count_by_what_their_column_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of very different size: without weights a path is as exact where nothing comes in as where all does."""
    w_OI, fmt, size_I = draws(9, 48, 128), format_of("trellis2"), torch.linspace(-1.5, 1.5, 128).exp()
    hessian_II = correlated(128, 0.3) * size_I * size_I[:, None]
    mixed = torch.randperm(128, generator=torch.Generator().manual_seed(3))
    hessian_II = hessian_II[mixed][:, mixed].contiguous()
    weighed = error(w_OI, fmt, GPTQ(), hessian_II)
    made = rounders.factor

    def alike(*given: Any) -> Factor:
        found = made(*given)
        found.feedback_II.diagonal().fill_(1)
        return found

    monkeypatch.setattr(rounders, "factor", alike)
    assert weighed < 0.85 * error(w_OI, fmt, GPTQ(), hessian_II.clone())


def test_each_row_keeps_the_best_of_several_ranges() -> None:
    w_OI, fmt, hessian_II = draws(7, 64, 256), format_of("trellis2"), correlated(256, 1.2)
    one = error(w_OI, fmt, GPTQ(order="activation", static_groups=True), hessian_II)
    assert error(w_OI, fmt, GPTQ(order="activation", static_groups=True, tries=4), hessian_II) < 0.97 * one
    assert tries.shares(4, fmt, (64, 256)) == pytest.approx((1.0, 1.2, 1.4, 1.6))
    assert tries.shares(4, format_of("int4", ranger="minmax"), (64, 256)) == pytest.approx(
        (1.0, 0.9333, 0.8667, 0.8), abs=1e-4
    )


def test_steps_are_searched_where_groups_are_short() -> None:
    w_OI = draws(8, 64, 256)
    missed = {}
    for count in (1, 5):
        fmt = format_of("trellis4", "group:64", f"deviation:{count}")
        missed[count] = float((fmt.decode(fmt.encode(w_OI)) - w_OI).square().mean())
    assert missed[5] < 0.93 * missed[1]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"grid": "trellis2", "grain": "channel"}, "'trellis2' works through ranger deviation, and 'minmax' is set"),
        (
            {"grid": "trellis2", "grain": "channel", "ranger": "deviation", "rounder": "learnt-offset"},
            "'learnt-offset' cannot stand beside grid 'trellis2': offsets are in steps",
        ),
        ({"grid": "trellis2:9", "grain": "channel", "ranger": "deviation"}, "no table for windows of 9 at 2 bits"),
        ({"grid": "int4", "grain": "channel", "ranger": "deviation"}, "'deviation' works through grid trellis2 or"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_told_so(weights: dict[str, str], said: str) -> None:
    reasons = reasons_of_parts(parse({"name": "x", "weights": {"blocks.*": weights}}))
    assert any(said in reason for reason in reasons)
