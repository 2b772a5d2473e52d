"""Each rewrite does what it is for, on models with planted outliers, and leaves the function alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy, Weights
from regauge.anatomy.moves import Move, apply, transform
from regauge.errors import MoveError, RecipeError
from regauge.rewrites import (
    FoldNorm,
    LayerNormToRMS,
    PermuteByImportance,
    Rewrite,
    RotateHadamard,
    SmoothNorms,
    SmoothStreams,
    fixed,
)
from regauge.rewrites.smoothing import GRID, strength
from tests.toy import SHAPES, Shape, build, forward, seeing

WIDE = Shape(hidden=64, heads=4, kv_heads=2, head_dim=16, rotary=16, neurons=96, vocab=97)
IDS = torch.arange(96).view(4, 24) % 97


def planted(seed: int = 0, shape: Shape = WIDE) -> tuple[Anatomy, Weights]:
    """Few loud channels in the residual, in the norms' gains, in the values and among the neurons."""
    anatomy, weights = build(shape, seed)
    weights["embed.weight"][:, [3, 41]] *= 25
    for b in range(shape.blocks):
        weights[f"blocks.{b}.attn.norm.gain"][[7, 20]] *= 30
        weights[f"blocks.{b}.mlp.norm.gain"][[9]] *= 30
        weights[f"blocks.{b}.attn.v.weight"][[2, 21]] *= 30
        weights[f"blocks.{b}.mlp.up.weight"][[5, 50]] *= 30
        for name in ("q", "k", "v"):
            weights[f"blocks.{b}.attn.{name}.weight"][:, [7, 20]] /= 20
    return anatomy, weights


def loud() -> tuple[Anatomy, Weights]:
    """Two channels of the residual that every writer writes loudly, and two loud channels of each value head."""
    anatomy, weights = build(WIDE, 0)
    for port in anatomy.stream("residual").writers:
        weights[port.tensor].narrow(port.axis, 3, 1).mul_(12)
        weights[port.tensor].narrow(port.axis, 41, 1).mul_(12)
    for b in range(2):
        weights[f"blocks.{b}.attn.v.weight"].view(2, 16, 64)[:, [2, 11]] *= 12
    return anatomy, weights


def watch(anatomy: Anatomy, weights: Weights) -> dict[str, dict[str, Tensor]]:
    """The statistics an engine would collect."""
    stats: dict[str, dict[str, Tensor]] = {}

    def look(name: str, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        stats[name] = {
            "absmax": flat.abs().amax(0),
            "second_moment": flat.square().mean(0),
            "count": torch.tensor(len(flat)),
        }
        return x

    with seeing(look):
        forward(anatomy, weights, IDS)
    return stats


def rewrite_all(rewrites: list[Rewrite], anatomy: Anatomy, weights: Weights) -> tuple[Anatomy, Weights, list[Move]]:
    """What an engine does, in small: model scope first, then block by block, statistics anew before each."""
    done: list[Move] = []
    for rewrite in rewrites:
        stats = watch(anatomy, weights) if rewrite.needs else {}
        for block in [None] if rewrite.scope == "model" else range(anatomy.blocks):
            some = {} if block is None else {k: t for k, t in weights.items() if k.startswith(f"blocks.{block}.")}
            after, moves = rewrite(anatomy, some, stats, None, block)
            weights = apply(moves, anatomy, weights)
            anatomy = after
            done += moves
    return anatomy, weights, done


def to_grid(x: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Symmetric, one step a row."""
    step = x.abs().amax(dim, keepdim=True).clamp_min(1e-30) / (2 ** (bits - 1) - 1)
    return (x / step).round() * step


def loss(anatomy: Anatomy, weights: Weights, target: Tensor, w_bits: int, a_bits: int = 0) -> float:
    """Squared error of the logits with every linear of the blocks quantised, inputs too where a_bits says so."""
    rounded = {
        k: to_grid(t, w_bits) if k.startswith("blocks.") and k.endswith(".weight") else t for k, t in weights.items()
    }
    with seeing(lambda name, x: to_grid(x, a_bits) if a_bits and name.startswith("blocks.") else x):
        return float((forward(anatomy, rounded, IDS) - target).square().mean())


def kurtosis(x: Tensor) -> float:
    """Of each token's channels, averaged; 3 for a Gaussian."""
    x = x.flatten(0, -2)
    x = x - x.mean(-1, keepdim=True)
    return float((x.pow(4).mean(-1) / x.pow(2).mean(-1).pow(2)).mean())


def residual_kurtosis(anatomy: Anatomy, weights: Weights) -> list[float]:
    seen: dict[str, float] = {}

    def look(name: str, x: Tensor) -> Tensor:
        seen[name] = kurtosis(x)
        return x

    with seeing(look):
        forward(anatomy, weights, IDS)
    return [seen[f"blocks.{b}.{place}"] for b in range(anatomy.blocks) for place in ("attn.q", "mlp.up", "attn.o")]


def test_rotation_lowers_kurtosis_towards_three_and_permutation_does_not() -> None:
    anatomy, weights = loud()
    before = forward(anatomy, weights, IDS)
    folded, plain, _ = rewrite_all([FoldNorm()], anatomy, weights)
    start = residual_kurtosis(folded, plain)
    turned, moved, _ = rewrite_all([RotateHadamard(seed=1)], folded, plain)
    end = residual_kurtosis(turned, moved)
    assert min(start) > 6
    assert max(end) < 3.5
    assert all(a > b + 1 for a, b in zip(start, end, strict=True))
    assert (forward(turned, moved, IDS) - before).abs().max() < 1e-12 * before.abs().max()
    shuffled = apply([Move("permute", "residual", torch.randperm(64))], folded, plain)
    assert residual_kurtosis(folded, shuffled) == pytest.approx(start, rel=1e-9)


def test_rotation_lowers_the_error_of_quantised_inputs() -> None:
    """Outliers of inputs are what it removes (weights here have none that it could)."""
    anatomy, weights = loud()
    target = forward(anatomy, weights, IDS)
    turned, moved, _ = rewrite_all([FoldNorm(), RotateHadamard(seed=1)], anatomy, weights)
    for bits, part in ((8, 0.3), (4, 0.8)):
        assert loss(turned, moved, target, 8, bits) < part * loss(anatomy, weights, target, 8, bits)


def test_rotation_is_seeded_and_each_stream_has_its_own_signs() -> None:
    folded, _, _ = rewrite_all([FoldNorm()], *planted())
    draws = [RotateHadamard(seed=seed)(folded, {}, {})[1] for seed in (0, 0, 1)]
    eye = torch.eye(16, dtype=torch.float64)

    def matrix(moves: list[Move], stream: str) -> Tensor:
        (found,) = [m.fast for m in moves if m.stream == stream]
        assert found is not None
        return found(eye, 0)

    first, again, other = (matrix(moves, "blocks.0.value.0") for moves in draws)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, matrix(draws[0], "blocks.1.value.0"))


def test_rotation_says_what_it_made_and_refuses_what_it_cannot() -> None:
    after = RotateHadamard()(FoldNorm()(build(WIDE)[0], {}, {})[0], {}, {})[0]
    assert "rotate: residual by a Hadamard of size 64 (Sylvester 2^6)" in after.notes
    with pytest.raises(MoveError, match="fold it into its readers first"):
        RotateHadamard()(build(WIDE)[0], {}, {})
    gemma = FoldNorm()(build(SHAPES["gemma"])[0], {}, {})[0]
    with pytest.raises(MoveError, match="post-norm"):
        RotateHadamard()(gemma, {}, {})
    assert RotateHadamard(streams="value")(gemma, {}, {})[1]
    with pytest.raises(RecipeError, match="no kind of stream to rotate"):
        RotateHadamard(streams="values")


def test_strength_by_hand() -> None:
    """s = max|X|^α / max|W|^(1−α)."""
    x, w = torch.tensor([4.0, 1.0, 0.0, 9.0]), torch.tensor([1.0, 4.0, 2.0, 0.0])
    assert strength(x, w, 0.5).tolist() == [2.0, 0.5, 1.0, 1.0]
    assert strength(x, w, 1.0).tolist() == [4.0, 1.0, 1.0, 1.0]
    assert strength(x, w, 0.0).tolist() == [1.0, 0.25, 1.0, 1.0]


def test_smoothing_norms_lowers_w8a8_error() -> None:
    anatomy, weights = planted()
    target = forward(anatomy, weights, IDS)
    after, moved, moves = rewrite_all([SmoothNorms(0.5)], anatomy, weights)
    assert {m.stream for m in moves} == {f"blocks.{b}.{p}.in" for b in (0, 1) for p in ("attn", "mlp")}
    assert (forward(after, moved, IDS) - target).abs().max() < 1e-12 * target.abs().max()
    assert loss(after, moved, target, 8, 8) < 0.5 * loss(anatomy, weights, target, 8, 8)


def test_alpha_one_levels_the_inputs() -> None:
    anatomy, weights = planted()
    after, moved, _ = rewrite_all([SmoothStreams(1.0)], anatomy, weights)
    for name, seen in watch(after, moved).items():
        if name.startswith("blocks.") and name.rpartition(".")[2] in ("q", "up", "down"):
            assert torch.allclose(seen["absmax"], seen["absmax"].mean().expand_as(seen["absmax"])), name
    values = watch(after, moved)["blocks.0.attn.o"]["absmax"].view(2, 2, 16).amax(1)  # KV group, head of it, channel
    assert torch.allclose(values, values.mean().expand_as(values))


def test_alpha_zero_levels_the_weights_of_all_readers_together() -> None:
    anatomy, weights = planted()
    _, moved, _ = rewrite_all([SmoothStreams(0.0)], anatomy, weights)
    for names in (("attn.q", "attn.k", "attn.v"), ("mlp.gate", "mlp.up"), ("mlp.down",)):
        columns = torch.stack([moved[f"blocks.1.{name}.weight"].abs().amax(0) for name in names])
        assert torch.allclose(columns.amax(0), columns.max().expand(columns.shape[1])), names


def test_smoothing_every_stream_beats_norms_alone() -> None:
    anatomy, weights = planted()
    target = forward(anatomy, weights, IDS)
    losses = {}
    for name, rewrite in (("norms", SmoothNorms(0.5)), ("streams", SmoothStreams(0.5))):
        after, moved, moves = rewrite_all([rewrite], anatomy, weights)
        assert (forward(after, moved, IDS) - target).abs().max() < 1e-12 * target.abs().max()
        losses[name] = loss(after, moved, target, 8, 8)
    assert losses["streams"] < 0.7 * losses["norms"]
    kinds = {anatomy.stream(m.stream).kind for m in moves}
    assert kinds == {"norm", "value", "ffn"}


def test_alpha_is_searched_by_the_loss_of_the_whole_model() -> None:
    """The outer loop of `rewrites/base.py`: the α found beats α = 0.5 and plain rounding."""
    anatomy, weights = planted()
    target = forward(anatomy, weights, IDS)
    search = SmoothStreams()
    assert dict(search.search) == {"alpha": GRID}
    assert GRID[0] == 0
    assert GRID[10] == 0.5
    assert GRID[-1] == 1
    assert len(GRID) == 21
    losses = {}
    for alpha in search.search["alpha"]:
        settled = fixed(search, alpha=alpha)
        assert not settled.search
        after, moved, _ = rewrite_all([settled], anatomy, weights)
        losses[alpha] = loss(after, moved, target, 4)
    best = min(losses, key=lambda alpha: losses[alpha])
    assert losses[best] < losses[0.5]
    assert losses[best] < 0.8 * loss(anatomy, weights, target, 4)
    with pytest.raises(RecipeError, match="still to be searched"):
        search(anatomy, weights, {}, None, 0)


def test_smoothing_leaves_what_it_cannot_scale_and_says_so() -> None:
    """GELU's neurons, a shared norm on nothing, and experts that no token reached."""
    anatomy, weights = build(SHAPES["neox"])
    stats = {
        k: {"absmax": torch.rand(s.shape[1]) + 0.1, "count": torch.tensor(9)} for s in anatomy.sites for k in [s.name]
    }
    after, moves = SmoothStreams(0.5)(anatomy, weights, stats, None, 0)
    assert not any(m.stream.endswith("ffn") for m in moves)
    assert any("ffn streams are left as they are: gelu does not let a scale through" in note for note in after.notes)
    anatomy, weights = build(SHAPES["moe"])
    stats = {
        s.name: {"absmax": torch.rand(s.shape[1]) + 0.1, "count": torch.tensor(0 if ".moe.2." in s.name else 9)}
        for s in anatomy.sites
    }
    after, moves = SmoothStreams(0.5)(anatomy, weights, stats, None, 1)
    assert {"blocks.1.moe.0.ffn", "blocks.1.moe.1.ffn"} <= {m.stream for m in moves}
    assert "smooth-streams: blocks.1.moe.2.ffn is left as it is: no calibration token reached it" in after.notes
    with pytest.raises(RecipeError, match="needs the statistic 'absmax'"):
        SmoothStreams(0.5)(anatomy, weights, {}, None, 1)


def test_smoothing_survives_dead_and_extreme_channels() -> None:
    anatomy, weights = planted()
    weights["blocks.0.attn.norm.gain"][5] = 0
    for name in ("q", "k", "v"):
        weights[f"blocks.0.attn.{name}.weight"][:, 6] = 0
    weights["blocks.0.mlp.norm.gain"][4] = 1e-30
    target = forward(anatomy, weights, IDS)
    for alpha in (0.0, 0.5, 1.0):
        after, moved, moves = rewrite_all([SmoothStreams(alpha)], anatomy, weights)
        assert (forward(after, moved, IDS) - target).abs().max() < 1e-12 * target.abs().max()
        for move in moves:
            assert float(move.vector().max() / move.vector().min()) < 1e12


def test_permutation_sorts_by_contribution() -> None:
    anatomy, weights = planted()
    target = forward(anatomy, weights, IDS)
    after, moved, _ = rewrite_all([PermuteByImportance("ffn+heads")], anatomy, weights)
    assert (forward(after, moved, IDS) - target).abs().max() < 1e-12 * target.abs().max()
    for b in (0, 1):
        inner = watch(after, moved)[f"blocks.{b}.mlp.down"]["second_moment"]
        score = inner * moved[f"blocks.{b}.mlp.down.weight"].square().sum(0)
        assert bool((score[:-1] >= score[1:] * (1 - 1e-12)).all())
        assert not torch.equal(moved[f"blocks.{b}.mlp.down.weight"], weights[f"blocks.{b}.mlp.down.weight"])


def test_the_important_half_is_the_better_half() -> None:
    """Cutting the second half of the neurons hurts less after sorting than before, and less than cutting the first."""
    anatomy, weights = planted(seed=3)
    target = forward(anatomy, weights, IDS)

    def cut(weights: Weights, keep: Tensor) -> float:
        moves = [Move("select", f"blocks.{b}.ffn", keep) for b in range(2)]
        small = forward(transform(moves, anatomy), apply(moves, anatomy, weights), IDS)
        return float((small - target).square().mean())

    _, moved, _ = rewrite_all([PermuteByImportance()], anatomy, weights)
    first, second = torch.arange(48), torch.arange(48, 96)
    assert cut(moved, first) < 0.7 * cut(weights, first)
    assert cut(moved, first) < 0.3 * cut(moved, second)


def test_permutation_by_hand() -> None:
    """Neuron 1 is loud, neuron 2 feeds a large column, neuron 0 neither."""
    shape = replace(WIDE, hidden=2, neurons=3, blocks=1, heads=1, kv_heads=1, head_dim=2, rotary=2)
    anatomy, weights = build(shape)
    weights["blocks.0.mlp.down.weight"] = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    stats = {"blocks.0.mlp.down": {"second_moment": torch.tensor([1.0, 16.0, 1.0])}}
    _, (move,) = PermuteByImportance()(anatomy, weights, stats, None, 0)
    assert move.vector().tolist() == [1, 2, 0]


def test_residual_is_sorted_once_for_the_model() -> None:
    anatomy, weights = planted()
    rewrite = PermuteByImportance("residual")
    assert (rewrite.scope, PermuteByImportance().scope) == ("model", "block")
    target = forward(anatomy, weights, IDS)
    after, moved, (move,) = rewrite_all([rewrite], anatomy, weights)
    assert move.stream == "residual"
    assert set(move.vector()[:4].tolist()) & {7, 20}
    assert (forward(after, moved, IDS) - target).abs().max() < 1e-12 * target.abs().max()
    with pytest.raises(RecipeError, match="needs the statistic 'second_moment'"):
        rewrite(anatomy, {}, {})


def test_centring_and_folding() -> None:
    anatomy, weights = build(SHAPES["gpt2"])
    ids = IDS[:, :11] % 29
    target = forward(anatomy, weights, ids)
    after, moved, _ = rewrite_all([LayerNormToRMS(), FoldNorm()], anatomy, weights)
    assert all(norm.kind == "rms" and norm.plain and norm.source_kind == "layer" for norm in after.norms)
    assert not after.tied
    assert moved["embed.weight"].mean(1).abs().max() < 1e-15
    assert moved["blocks.0.attn.o.bias"].mean().abs() < 1e-15
    assert torch.equal(moved["norm.gain"], torch.ones(23, dtype=torch.float64))
    assert (forward(after, moved, ids) - target).abs().max() < 1e-12 * target.abs().max()
    again, moves = LayerNormToRMS()(after, {}, {})
    assert moves == []
    assert "already" in again.notes[-1]
    with pytest.raises(MoveError, match="post-norm"):
        FoldNorm()(build(SHAPES["bert"])[0], {}, {})
    with pytest.raises(MoveError, match="post-norm"):
        LayerNormToRMS()(build(SHAPES["bert"])[0], {}, {})


@pytest.mark.parametrize(
    "rewrite",
    [FoldNorm(), LayerNormToRMS(), SmoothNorms(), SmoothStreams(), RotateHadamard(), PermuteByImportance()],
)
def test_every_rewrite_keeps_the_contract(rewrite: Rewrite) -> None:
    assert isinstance(rewrite, Rewrite)
    assert rewrite.scope in ("model", "block")
    assert hash(rewrite) == hash(replace(rewrite))  # type: ignore[type-var]  # every rewrite is a dataclass
