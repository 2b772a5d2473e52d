"""Planted outliers: the function stays, nearest rounding suffers, and smoothing has something to gain."""

from __future__ import annotations

import pytest
import torch

from regauge.anatomy.moves import apply
from regauge.errors import RecipeError
from regauge.rewrites import PlantOutliers, SmoothStreams
from tests.discriminate.test_rewrites import IDS, WIDE, loss, rewrite_all, to_grid, watch
from tests.toy import SHAPES, Shape, build, forward

LAYERED = Shape(norm="layer", gated=False, biased=True, rotary=0, activation="gelu", kv_heads=4, heads=4, hidden=64)


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "bert"])
def test_the_function_stays(name: str) -> None:
    anatomy, weights = build(SHAPES[name])
    ids = torch.arange(34).view(2, 17) % SHAPES[name].vocab
    after, moved, moves = rewrite_all([PlantOutliers()], anatomy, weights)
    assert moves
    target = forward(anatomy, weights, ids, SHAPES[name].parallel)
    error = (forward(after, moved, ids, SHAPES[name].parallel) - target).abs().max() / target.abs().max()
    assert error < 1e-10
    assert set(moved) == set(weights)  # no bias is gained and no head untied
    assert (after.sites, after.norms, after.tied) == (anatomy.sites, anatomy.norms, anatomy.tied)


@pytest.mark.parametrize("shape", [WIDE, LAYERED], ids=["rms", "layer"])
@pytest.mark.parametrize(("w_bits", "a_bits"), [(8, 8), (4, 0)])
def test_nearest_rounding_is_worse_on_the_planted_form(shape: Shape, w_bits: int, a_bits: int) -> None:
    ids = IDS[:, :17] % shape.vocab
    anatomy, weights = build(shape)
    after, moved, _ = rewrite_all([PlantOutliers()], anatomy, weights)
    target = forward(anatomy, weights, IDS[:, :17] % shape.vocab)
    plain, hard = (
        _loss(one, tensors, target, ids, w_bits, a_bits) for one, tensors in ((anatomy, weights), (after, moved))
    )
    assert hard > 1.5 * plain
    if (w_bits, a_bits) == (8, 8):
        milder = rewrite_all([PlantOutliers(strength=4)], anatomy, weights)
        assert plain < _loss(milder[0], milder[1], target, ids, w_bits, a_bits) < hard


def _loss(anatomy, weights, target, ids, w_bits, a_bits):  # type: ignore[no-untyped-def]  # of two kinds
    from tests.toy import seeing

    rounded = {
        k: to_grid(t, w_bits) if k.startswith("blocks.") and k.endswith(".weight") else t for k, t in weights.items()
    }
    with seeing(lambda name, x: to_grid(x, a_bits) if a_bits and name.startswith("blocks.") else x):
        return float((forward(anatomy, rounded, ids) - target).square().mean())


def test_smoothing_takes_planted_outliers_away() -> None:
    anatomy, weights = build(WIDE)
    target = forward(anatomy, weights, IDS)
    hard, tensors, _ = rewrite_all([PlantOutliers()], anatomy, weights)
    smooth, level, _ = rewrite_all([SmoothStreams(0.5)], hard, tensors)
    assert loss(smooth, level, target, 8, 8) < 0.1 * loss(hard, tensors, target, 8, 8)


def test_a_few_channels_are_a_hundred_times_as_loud_and_the_same_in_every_block() -> None:
    anatomy, weights = build(WIDE)
    after, moved, moves = rewrite_all([PlantOutliers()], anatomy, weights)
    before, now = watch(anatomy, weights), watch(after, moved)
    loud = []
    for block in range(2):
        ratio = now[f"blocks.{block}.attn.q"]["absmax"] / before[f"blocks.{block}.attn.q"]["absmax"]
        loud.append(torch.nonzero(ratio > 2).flatten().tolist())
        assert ratio[loud[-1]].tolist() == pytest.approx([128.0])  # 100 to the nearest power of two
    assert loud[0] == loud[1]
    assert len(loud[0]) == 1  # a hundredth of 64
    scales = {move.stream: move.vector() for move in moves if move.kind == "scale"}
    assert all(float(s.log2()) == round(float(s.log2())) for vector in scales.values() for s in vector)
    first, second = scales["blocks.0.qk.0"].view(2, 8)
    assert torch.equal(first, second)  # a rotary pair shares its scale
    assert float(first.min()) == 1 / 32


def test_layer_norms_with_biases_are_moved_aside() -> None:
    anatomy, weights = build(LAYERED)
    _, moved, moves = rewrite_all([PlantOutliers()], anatomy, weights)
    shifts = [move for move in moves if move.kind == "shift"]
    assert {move.stream for move in shifts} == {f"blocks.{b}.{p}.in" for b in (0, 1) for p in ("attn", "mlp")}
    move = shifts[0]
    (channel,) = torch.nonzero(move.vector()).flatten().tolist()
    gain = float(moved[f"{move.stream.removesuffix('.in')}.norm.gain"][channel])
    assert abs(float(move.vector()[channel])) == pytest.approx(0.5 * abs(gain))


def test_it_is_seeded() -> None:
    anatomy, weights = build(WIDE)

    def gauge(seed: int) -> dict[str, list[float]]:
        _, _, moves = rewrite_all([PlantOutliers(seed=seed)], anatomy, weights)
        return {f"{move.kind} {move.stream}": move.vector().tolist() for move in moves}

    assert gauge(1) == gauge(1)
    assert gauge(1) != gauge(2)
    with pytest.raises(RecipeError, match="strength is a number from 1"):
        PlantOutliers(strength=0)


def test_rare_channels_are_those_that_few_tokens_excite() -> None:
    """Of 96 neurons the one that is ten times its mean somewhere, of 16 values the one that is four times."""
    anatomy, weights = build(WIDE)
    target = forward(anatomy, weights, IDS)

    def seen(channels: int, peak: int, size: float) -> dict[str, torch.Tensor]:
        most = torch.ones(channels)
        most[peak] = size
        return {"absmax": most, "absmean": torch.ones(channels), "count": torch.tensor(9)}

    stats = {"blocks.0.mlp.down": seen(96, 53, 10.0), "blocks.0.attn.o": seen(64, 37, 4.0)}  # value 37 - 32 of group 1
    stats["blocks.0.mlp.down"]["absmax"][7] = stats["blocks.0.mlp.down"]["absmean"][7] = 90.0  # loud for every token
    some = {name: tensor for name, tensor in weights.items() if name.startswith("blocks.0.")}
    after, moves = PlantOutliers(channels="rare")(anatomy, some, stats, None, 0)
    loud = {move.stream: torch.nonzero(move.vector() > 1).flatten().tolist() for move in moves}
    assert loud["blocks.0.ffn"] == [53]
    assert loud["blocks.0.value.1"] == [5]
    moved = {**weights, **apply(moves, anatomy, some)}
    assert (forward(after, moved, IDS) - target).abs().max() < 1e-10 * target.abs().max()
    assert PlantOutliers().needs == frozenset()
    with pytest.raises(RecipeError, match="channels are chosen by 'lot' or 'rare', not 'first'"):
        PlantOutliers(channels="first")
