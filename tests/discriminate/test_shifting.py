"""Shift and scale: asymmetric channels moved to their middle, and only those that stand out brought down."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy, Weights
from regauge.anatomy.moves import Move, apply, transform
from regauge.engine.job import prepare
from regauge.engine.work import Pass
from regauge.errors import RecipeError
from regauge.hosts.transformers.source import Source
from regauge.plan import parse
from regauge.rewrites import GainBiases, ShiftScale, SmoothStreams
from regauge.rewrites.shifting import scale_of, thresholds
from regauge.text.calibration import Calibration
from tests.discriminate.test_rewrites import IDS, WIDE, rewrite_all, to_grid
from tests.pico import pico, save
from tests.toy import Shape, build, forward, seeing

PLACES = ("attn.in", "mlp.in")
LAYERED = Shape(
    norm="layer",
    gated=False,
    biased=True,
    rotary=16,
    head_dim=16,
    activation="gelu",
    heads=4,
    kv_heads=4,
    hidden=64,
    vocab=97,
)


def to_range(x: Tensor, bits: int) -> Tensor:
    """One step a token, from its least value to its greatest."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    step = (high - low).clamp_min(1e-30) / (2**bits - 1)
    return ((x - low) / step).round() * step + low


def offset() -> tuple[Anatomy, Weights]:
    """A model with biases whose norms write a few channels far from zero, some up and some down."""
    anatomy, weights = build(LAYERED, 5)
    c = torch.zeros(64, dtype=torch.float64)
    c[[3, 17, 40, 55]] = torch.tensor([30.0, -24.0, 18.0, -40.0], dtype=torch.float64)
    moves = [Move("shift", f"blocks.{b}.{place}", c) for b in (0, 1) for place in PLACES]
    return transform(moves, anatomy), apply(moves, anatomy, weights)


def ranges(anatomy: Anatomy, weights: Weights) -> dict[str, dict[str, Tensor]]:
    stats: dict[str, dict[str, Tensor]] = {}

    def look(name: str, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        stats[name] = {"minimum": flat.amin(0), "maximum": flat.amax(0), "count": torch.tensor(len(flat))}
        return x

    with seeing(look):
        forward(anatomy, weights, IDS)
    return stats


class Rounding:
    """The error of the logits with some sites' weights and inputs at six bits."""

    def __init__(self, anatomy: Anatomy, weights: Weights) -> None:
        self.anatomy, self.weights, self.target = anatomy, weights, forward(anatomy, weights, IDS)

    def __call__(self, weights: Weights, sites: Collection[str] | None = None) -> float:
        now = {**self.weights, **weights}
        some = [k.removesuffix(".weight") for k in now if k.startswith("blocks.") and k.endswith(".weight")]
        chosen = some if sites is None else [site for site in some if site in sites]
        now |= {f"{site}.weight": to_grid(now[f"{site}.weight"], 6) for site in chosen}
        with seeing(lambda name, x: to_range(x, 6) if name in chosen else x):
            return float((forward(self.anatomy, now, IDS) - self.target).square().mean())


def shifted(rewrite: ShiftScale, anatomy: Anatomy, weights: Weights) -> tuple[Anatomy, Weights, list[Move]]:
    objective, done = Rounding(anatomy, weights), list[Move]()
    for block in (0, 1):
        stats = ranges(anatomy, weights)
        some = {name: t for name, t in weights.items() if name.startswith(f"blocks.{block}.")}
        after, moves = rewrite(anatomy, some, stats, objective, block)
        weights = {**weights, **apply(moves, anatomy, some)}
        objective.weights, anatomy, done = weights, after, [*done, *moves]
    return anatomy, weights, done


def test_where_channels_lie_off_centre_it_beats_any_smoothing() -> None:
    anatomy, weights = offset()
    error = Rounding(anatomy, weights)
    after, moved, moves = shifted(ShiftScale(), anatomy, weights)
    assert (forward(after, moved, IDS) - error.target).abs().max() < 1e-10 * error.target.abs().max()
    ours = error(moved)
    smooth = []
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        level, tensors, _ = rewrite_all([SmoothStreams(alpha)], anatomy, weights)
        assert level.sites == anatomy.sites
        smooth.append(error(tensors))
    assert ours < 0.5 * min(smooth)
    assert ours < 0.1 * error(weights)
    alone = error(shifted(ShiftScale(shift=False), anatomy, weights)[1])
    assert ours < 0.5 * alone
    (move,) = (move for move in moves if (move.kind, move.stream) == ("shift", "blocks.0.mlp.in"))
    assert float(move.vector()[17]) == pytest.approx(24, abs=4)  # what it is off by, up to its own spread


def test_middle_and_scale_by_hand() -> None:
    assert scale_of(torch.tensor([1.0, 4.0, 10.0]), 4.0).tolist() == [1.0, 1.0, 2.5]
    found = thresholds(torch.tensor([0.0, 2.0, 2.0, 2.0, 8.0]))
    assert (len(found), found[0], found[-1]) == (20, 8.0, pytest.approx(2.0))
    assert found[1] / found[0] == pytest.approx(0.25 ** (1 / 19))
    assert thresholds(torch.zeros(3)) == []


def test_a_model_without_biases_is_scaled_alone_or_given_some() -> None:
    anatomy, weights = build(WIDE)
    stats = ranges(anatomy, weights)
    after, moves = ShiftScale()(anatomy, _block(weights), stats, lambda *_: 0.0, 0)
    assert moves == []
    told = "shift-scale: norm streams are scaled and not shifted: there are no biases; `gain-biases` adds them"
    assert told in after.notes
    given, zeros = GainBiases()(anatomy, {}, {})
    moved = apply(zeros, anatomy, weights)
    assert torch.equal(moved["blocks.0.attn.norm.bias"], torch.zeros(64, dtype=torch.float64))
    assert torch.equal(forward(given, moved, IDS), forward(anatomy, weights, IDS))
    losses = iter([1.0, *[0.5] * 99])
    _, moves = ShiftScale("norm")(given, _block(moved), stats, lambda *_: next(losses), 0)
    assert {move.kind for move in moves} == {"shift"}  # the first threshold is the largest magnitude
    assert GainBiases()(given, {}, {})[1] == []
    with pytest.raises(RecipeError, match="thresholds are chosen by a block's error, and nothing gives it here"):
        ShiftScale()(anatomy, {}, {}, None, 0)
    with pytest.raises(RecipeError, match="'heads' is no kind of stream to smooth"):
        ShiftScale("heads")


def _block(weights: Weights) -> Weights:
    return {name: t for name, t in weights.items() if name.startswith("blocks.0.")}


def test_steps_that_are_known_later_are_stood_in_for(tmp_path: Path) -> None:
    """A threshold is chosen before calibration gives a static step: what is tried reads each batch's own range."""
    text = """
name: static
rewrites: [shift-scale]
weights:
  blocks.*: {grid: int6, grain: channel, ranger: absmax, scale: f32, rounder: nearest}
inputs:
  blocks.*: {transform: identity, grid: int6-asym, grain: tensor, ranger: static, scale: f32}
"""
    job = prepare(parse(text), Source.open(save(pico("gpt_neox"), tmp_path / "model")))
    assert job is not None
    work = Pass(job, Calibration(torch.arange(64).reshape(2, 32) % 23, "counting"))
    outer = work.read(None)
    work.begin(outer.stored, outer.exact)
    read = work.read(0)
    moved, notes, _ = work.local(0, read)
    assert any(note.startswith("shift-scale: blocks.0.attn") for note in notes)
    objective = work.objective(0, moved)
    x_TI = torch.linspace(-1, 2, 5 * job.anatomy.hidden).view(5, -1)
    found = objective.inputs["blocks.0.attn.q"](x_TI)
    assert 0 < float((found - x_TI).abs().max()) <= 1.5 / 63 * 1.001  # half a step of 3 / 63
    assert objective(moved.exact, ["blocks.0.attn.q"]) > 0
    untouched = objective(moved.exact, [])
    assert untouched < objective(moved.exact, ["blocks.0.attn.q"])  # of no site neither weights nor inputs are rounded
