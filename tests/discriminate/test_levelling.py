"""Levelling: one step reads the very integers that a step a channel would give, and so loses what those lose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regauge.anatomy.moves import apply
from regauge.errors import RecipeError
from regauge.rewrites import GainBiases, Level
from regauge.rewrites.levelling import moved, steps
from tests.discriminate.test_rewrites import IDS, WIDE, to_grid
from tests.discriminate.test_shifting import LAYERED, offset, ranges
from tests.toy import build, forward, seeing


def activations() -> Tensor:
    """Channels of sizes from 0.02 to 50, some far off zero; one never moves."""
    drawn = torch.Generator().manual_seed(3)
    x_TC = torch.randn(400, 48, generator=drawn, dtype=torch.float64)
    x_TC = x_TC * torch.logspace(-1.7, 1.7, 48, dtype=torch.float64) + 20 * torch.randn(48, generator=drawn).double()
    x_TC[:, 7] = 1.25
    return x_TC


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_codes_are_the_same_integers(bits: int) -> None:
    x_TC = activations()
    low_C, high_C = x_TC.amin(0), x_TC.amax(0)
    s_C, z_C = steps(low_C, high_C, bits)
    apart = ((x_TC / s_C).round() + z_C).clamp(0, 2**bits - 1)
    shift_C, scale_C = moved(low_C, high_C, bits)
    one, zero = s_C.mean(), z_C.mean().round()
    together = (((x_TC + shift_C) * scale_C / one).round() + zero).clamp(0, 2**bits - 1)
    assert torch.equal(apart, together)
    assert len(apart.unique()) == 2**bits
    plain = (x_TC / ((high_C.max() - low_C.min()) / (2**bits - 1))).round()
    assert float((plain.amax(0) - plain.amin(0)).min()) <= 1  # quiet channels share a code or two with one step


def static(x: Tensor, bits: int, ends: tuple[float, float]) -> Tensor:
    low, high = ends
    step = (high - low) / (2**bits - 1)
    return ((x / step).round() + round(-low / step)).clamp(0, 2**bits - 1).sub(round(-low / step)) * step


def error(anatomy, weights, target) -> float:  # type: ignore[no-untyped-def]  # of the toys
    """Of the logits with static inputs of norms at six bits, one step a tensor."""
    seen = ranges(anatomy, weights)
    ends = {name: (float(of["minimum"].min()), float(of["maximum"].max())) for name, of in seen.items()}
    rounded = {k: to_grid(t, 6) if k.startswith("blocks.") and k.endswith(".weight") else t for k, t in weights.items()}
    read = ("attn.q", "attn.k", "attn.v", "mlp.up", "mlp.gate")
    with seeing(lambda name, x: static(x, 6, ends[name]) if name.endswith(read) else x):
        return float((forward(anatomy, rounded, IDS) - target).square().mean())


def levelled(anatomy, weights):  # type: ignore[no-untyped-def]  # of the toys
    notes: list[str] = []
    for block in (0, 1):
        stats = ranges(anatomy, weights)
        some = {name: t for name, t in weights.items() if name.startswith(f"blocks.{block}.")}
        after, moves = Level(6)(anatomy, some, stats, None, block)
        weights = {**weights, **apply(moves, anatomy, some)}
        anatomy, notes = after, [*notes, *after.notes]
    return anatomy, weights, notes


def test_one_step_then_loses_far_less() -> None:
    anatomy, weights = offset()
    target = forward(anatomy, weights, IDS)
    after, level, notes = levelled(anatomy, weights)
    assert notes == []
    assert (forward(after, level, IDS) - target).abs().max() < 1e-10 * target.abs().max()
    assert error(after, level, target) < 0.2 * error(anatomy, weights, target)
    assert LAYERED.biased


def test_without_biases_channels_are_scaled_alone() -> None:
    anatomy, weights = build(WIDE)
    weights["blocks.0.attn.norm.gain"][[3, 9]] *= 40
    target = forward(anatomy, weights, IDS)
    after, level, notes = levelled(anatomy, weights)
    assert notes[0].startswith("level: norm streams are scaled and not shifted: there are no biases")
    assert set(level) == set(weights)
    assert error(after, level, target) < 0.5 * error(anatomy, weights, target)
    given, _ = GainBiases()(anatomy, {}, {})
    some = {name: t for name, t in weights.items() if name.startswith("blocks.0.")}
    _, moves = Level(6)(given, some, ranges(anatomy, weights), None, 0)
    assert {move.kind for move in moves} == {"shift", "scale"}
    with pytest.raises(RecipeError, match="level: inputs have 2 to 8 bits, not 9"):
        Level(9)
