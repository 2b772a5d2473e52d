"""Each part of the shape axes strictly beats its null on data built to show it, and equals it where theory says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy, Stream, Weights
from regauge.errors import RecipeError
from regauge.prune.allocations import Global, Uniform
from regauge.prune.base import Group, groups
from regauge.prune.repairs import LeastSquares, Nothing
from regauge.prune.schedules import Once
from regauge.prune.scores import Activation, Magnitude, Random
from regauge.prune.units import Neuron
from tests.toy import SHAPES, build

T, N, O = 4000, 24, 7


def unit(name: str = "llama") -> tuple[Anatomy, Stream, Weights]:
    anatomy, weights = build(SHAPES[name])
    return anatomy, anatomy.stream("blocks.0.ffn"), weights


def stats(x_TN: Tensor) -> dict[str, Tensor]:
    return {"second_moment": x_TN.square().mean(0), "hessian": x_TN.T @ x_TN / len(x_TN)}


def correlated(seed: int = 0, rank: int = 9) -> tuple[Tensor, Tensor]:
    """Activations of low rank with a little noise, and a matrix that reads them."""
    g = torch.Generator().manual_seed(seed)
    x_TN = torch.randn(T, rank, generator=g, dtype=torch.float64) @ torch.randn(rank, N, generator=g).double()
    return x_TN + 0.05 * torch.randn(T, N, generator=g).double(), torch.randn(O, N, generator=g).double()


def error(x_TN: Tensor, w_ON: Tensor, kept_K: Tensor, w_OK: Tensor) -> float:
    y = x_TN @ w_ON.T
    return float((x_TN[:, kept_K] @ w_OK.T - y).norm() / y.norm())


def test_repair_strictly_lowers_the_output_error() -> None:
    x_TN, w_ON = correlated()
    kept_K = torch.arange(N)[::2]
    bare = error(x_TN, w_ON, kept_K, Nothing()(w_ON, kept_K, {}))
    mended = error(x_TN, w_ON, kept_K, LeastSquares()(w_ON, kept_K, stats(x_TN)))
    assert mended < 0.2 * bare, (mended, bare)


def test_repair_is_the_least_squares_solution_of_the_same_mask() -> None:
    """Oracle: torch.linalg.lstsq on the activations themselves; with next to no damping they agree."""
    x_TN, w_ON = correlated(1)
    kept_K = torch.tensor([0, 3, 4, 11, 17, 20])
    found = LeastSquares(damp=1e-12)(w_ON, kept_K, stats(x_TN))
    expected = torch.linalg.lstsq(x_TN[:, kept_K], x_TN @ w_ON.T).solution.T
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-8)


def test_repair_equals_nothing_where_units_are_uncorrelated_or_all_stay() -> None:
    _, w_ON = correlated()
    kept_K = torch.tensor([5, 1, 2])
    white = {"hessian": torch.eye(N, dtype=torch.float64)}
    assert torch.equal(LeastSquares()(w_ON, kept_K, white), w_ON[:, kept_K])
    x_TN, _ = correlated()
    assert torch.equal(LeastSquares()(w_ON, torch.arange(N), stats(x_TN)), w_ON)
    dead = {"hessian": torch.zeros(N, N, dtype=torch.float64)}
    assert torch.equal(LeastSquares()(w_ON, kept_K, dead), w_ON[:, kept_K])


def test_repair_by_hand() -> None:
    """Two units with H = [[2, 1], [1, 3]], W = [[4, 6]], the second dropped, λ = 1 (damp 0.4 of the mean 2.5).

    W′ = 4 + 6 · 1 / (2 + 1) = 6.
    """
    h_NN = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    w_ON = torch.tensor([[4.0, 6.0]], dtype=torch.float64)
    assert LeastSquares(damp=0.4)(w_ON, torch.tensor([0]), {"hessian": h_NN}).tolist() == [[6.0]]


def test_scores_by_hand() -> None:
    """Two neurons of a plain unit: up = [[3, 0], [0, 1]], down = [[4, 0], [0, 2]], E[x²] = [0.25, 100]."""
    anatomy, stream, weights = unit("opt")
    up, down = weights["blocks.0.mlp.up.weight"].zero_(), weights["blocks.0.mlp.down.weight"].zero_()
    up[0, 0], up[1, 1], down[0, 0], down[1, 1] = 3, 1, 4, 2
    moment_N = torch.zeros(stream.size, dtype=torch.float64)
    moment_N[0], moment_N[1] = 0.25, 100
    assert Magnitude()(stream, weights, {})[:3].tolist() == [5, 5**0.5, 0]
    assert Activation()(stream, weights, {"second_moment": moment_N})[:3].tolist() == [2, 20, 0]
    assert anatomy.stream("blocks.0.ffn") == stream


def test_the_gate_counts_to_the_magnitude() -> None:
    _, stream, weights = unit()
    before = Magnitude()(stream, weights, {})
    weights["blocks.0.mlp.gate.weight"][5] *= 3
    assert (Magnitude()(stream, weights, {}) - before).nonzero().flatten().tolist() == [5]


def test_activation_beats_magnitude_where_a_scale_stands_in_the_wrong_place() -> None:
    """Planted: half of the neurons fire a hundred times less, and have weights three times as large."""
    _, stream, weights = unit()
    quiet = torch.arange(stream.size) % 2 == 0
    for tensor, axis in (("gate", 0), ("up", 0), ("down", 1)):
        name = f"blocks.0.mlp.{tensor}.weight"
        weights[name] = weights[name] * (1 + 2 * quiet.double()).unsqueeze(1 - axis)
    g = torch.Generator().manual_seed(3)
    x_TN = torch.randn(T, stream.size, generator=g, dtype=torch.float64) * (1 - 0.99 * quiet.double())
    w_ON, kept = weights["blocks.0.mlp.down.weight"], stream.size // 2

    def lost(score_N: Tensor) -> float:
        kept_K = score_N.argsort(descending=True)[:kept]
        return error(x_TN, w_ON, kept_K, w_ON[:, kept_K])

    told = stats(x_TN)
    best, null, lot = (lost(score(stream, weights, told)) for score in (Activation(), Magnitude(), Random()))
    assert best < 0.05 < lot < null, (best, lot, null)


def test_activation_is_the_error_of_dropping_one_neuron() -> None:
    _, stream, weights = unit()
    g = torch.Generator().manual_seed(4)
    x_TN = torch.randn(T, stream.size, generator=g, dtype=torch.float64).cumsum(1)
    w_ON = weights["blocks.0.mlp.down.weight"]
    score_N = Activation()(stream, weights, stats(x_TN))
    for neuron in (0, 9, 36):
        lost = torch.outer(x_TN[:, neuron], w_ON[:, neuron]).norm() / T**0.5
        assert float(score_N[neuron]) == pytest.approx(float(lost), rel=1e-9)


def test_a_scale_moved_from_up_to_down_changes_magnitude_and_not_activation() -> None:
    from regauge.anatomy.moves import Move, apply

    anatomy, stream, weights = unit()
    s_N = torch.ones(stream.size, dtype=torch.float64)
    s_N[4] = 50
    moved = apply([Move("scale", stream.name, s_N)], anatomy, weights)
    moment_N = torch.rand(stream.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = Activation()(stream, weights, {"second_moment": moment_N})
    after = Activation()(stream, moved, {"second_moment": moment_N * s_N**2})
    assert torch.allclose(before, after, rtol=1e-12)
    assert float(Magnitude()(stream, moved, {})[4]) > 2 * float(Magnitude()(stream, weights, {})[4])


def test_random_is_another_draw_in_each_stream_and_the_same_again() -> None:
    anatomy, stream, weights = unit()
    other = anatomy.stream("blocks.1.ffn")
    draw = Random(seed=7)
    assert torch.equal(draw(stream, weights, {}), draw(stream, weights, {}))
    assert not torch.equal(draw(stream, weights, {}), draw(other, weights, {}))
    assert not torch.equal(draw(stream, weights, {}), Random(seed=8)(stream, weights, {}))


@pytest.mark.parametrize(
    ("units", "keep", "multiple", "kept"),
    [
        (704, 0.75, 0, 512),  # 528, to the nearest 64: an eighth of 704 is 88
        (5632, 0.75, 0, 4224),  # 33 times 128
        (37, 0.75, 0, 28),  # to the nearest 4
        (37, 0.75, 1, 28),  # 27.75
        (704, 0.75, 32, 512),  # 16.5 times 32: the smaller of two as near
        (704, 0.75, 16, 528),
        (704, 1.0, 0, 704),
        (37, 1.0, 8, 37),  # nothing goes, so nothing is rounded
        (37, 0.99, 8, 32),  # 36.6 to 40, which it has not
        (704, 0.001, 64, 64),  # one multiple stays
        (5, 0.5, 0, 2),
    ],
)
def test_widths_by_hand(units: int, keep: float, multiple: int, kept: int) -> None:
    assert Uniform(keep=keep, multiple=multiple)([Group(("a", "b"), units)], {}) == {"a": kept, "b": kept}


def test_global_takes_from_the_block_in_which_little_matters() -> None:
    """One stream of twelve with three that matter, one of equals: at a half, three and nine stay."""
    some = torch.tensor([9.0, 9.0, 9.0] + [0.1] * 9, dtype=torch.float64)
    equal = torch.ones(12, dtype=torch.float64)
    both = [Group(("a",), 12), Group(("b",), 12)]
    assert Global(keep=0.5, multiple=3)(both, {"a": some, "b": equal}) == {"a": 3, "b": 9}
    even = Uniform(keep=0.5, multiple=3)(both, {})
    assert even == {"a": 6, "b": 6}

    def lost(kept: dict[str, int]) -> float:
        """The share of each stream's squares that goes."""
        dropped = {name: s.sort().values[: 12 - kept[name]].square().sum() for name, s in (("a", some), ("b", equal))}
        return float(dropped["a"] / some.square().sum() + dropped["b"] / equal.square().sum())

    assert lost({"a": 3, "b": 9}) < lost(even)


def test_global_does_not_follow_the_size_of_a_blocks_output() -> None:
    """The same scores at a hundred times the size: the deep block is not kept whole for being loud."""
    quiet = torch.rand(64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    both = [Group(("a",), 64), Group(("b",), 64)]
    found = Global(keep=0.5, multiple=1)(both, {"a": quiet, "b": 100 * quiet})
    assert found == {"a": 32, "b": 32}


def test_experts_of_one_stack_keep_the_mean() -> None:
    a = torch.tensor([1.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    b = torch.ones(8, dtype=torch.float64)
    found = Global(keep=0.625, multiple=1)([Group(("a", "b"), 8)], {"a": a, "b": b})
    assert found == {"a": 5, "b": 5}


def test_streams_of_one_stack_are_one_group() -> None:
    from tests.streaming import opened

    anatomy = opened("qwen3_moe")[1].anatomy
    streams = [stream for stream in anatomy.streams if stream.kind == "ffn"]
    found = groups(anatomy, streams)
    assert [(len(group.names), group.units) for group in found] == [(1, 37), (5, 17)]
    with pytest.raises(RecipeError, match=r"shape names blocks.1.moe.0.ffn and not blocks.1.moe.1.ffn"):
        groups(anatomy, streams[:2])


@pytest.mark.parametrize("keep", [0, 0.0, 1.2, -0.5])
def test_a_share_that_is_none_is_refused(keep: float) -> None:
    with pytest.raises(ValueError, match=rf"keep is the share that stays, above 0 and at most 1; you wrote {keep:g}"):
        Uniform(keep=keep)


def test_other_options_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="multiple is 1 or more, or 0 for an automatic one; you wrote -8"):
        Global(multiple=-8)
    with pytest.raises(ValueError, match=r"multiple is 64, and blocks\.0\.ffn has 37 units in all"):
        Uniform(multiple=64)([Group(("blocks.0.ffn",), 37)], {})
    with pytest.raises(ValueError, match="damp is above 0; you wrote 0"):
        LeastSquares(damp=0.0)
    _, stream, weights = unit()
    with pytest.raises(RecipeError, match=r"score 'activation' needs the statistic 'second_moment'.*give calibration"):
        Activation()(stream, weights, {})


def test_a_neuron_is_a_unit_of_feed_forward_streams_alone() -> None:
    anatomy, stream, _ = unit()
    assert Neuron().refuses(stream) is None
    for name, why in [
        ("blocks.0.heads", "a group of heads is no neuron; write blocks"),
        ("blocks.0.value.0", "the channels of a head are no neurons"),
        ("residual", "the residual is shared by all blocks"),
        ("blocks.0.mlp.in", "in the order of the residual"),
    ]:
        assert why in str(Neuron().refuses(anatomy.stream(name)))


def test_once_is_one_step() -> None:
    assert Once()(37, 28) == (28,)
