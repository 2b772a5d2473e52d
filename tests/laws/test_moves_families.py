"""The laws of moves on transformers' own modules, for every family, in float64 all the way."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regauge.anatomy.model import Anatomy, Weights
from regauge.anatomy.moves import Move, apply, check, transform
from regauge.errors import MoveError
from regauge.hosts.precise import precise
from regauge.hosts.transformers.runner import Runner
from regauge.hosts.transformers.source import Source
from regauge.rewrites import FoldNorm, LayerNormToRMS, RotateHadamard
from tests.moving import admitted, draw_moves, draw_value
from tests.pico import PICOS, batches, pico, save

LIMIT = 1e-12


Opened = tuple[Source, dict[int | None, Weights], list[Tensor], Tensor]


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Opened]:
    """Pico checkpoints in float64: source, canonical tensors by block, inputs, output. Each is made once."""

    @cache
    def make(name: str) -> Opened:
        model = pico(name, dtype=torch.float64)
        source = Source.open(save(model, tmp_path_factory.mktemp("picos") / name))
        weights = {block: source.block(block) for block in (None, *range(source.anatomy.blocks))}
        inputs = batches(model, sizes=((2, 7),))
        return source, weights, inputs, output(source, source.anatomy, weights, inputs)

    return make


def output(source: Source, anatomy: Anatomy, weights: dict[int | None, Weights], inputs: list[Tensor]) -> Tensor:
    with precise(), torch.no_grad():
        runner = Runner(source, anatomy, dtype=torch.float64, attention="eager")
        return next(iter(runner.logits(inputs, lambda block: weights[block])))


def change(model: Opened, moves: list[Move]) -> float:
    """Relative change of the model's output under moves applied block by block."""
    source, weights, inputs, before = model
    moved = {block: apply(moves, source.anatomy, some) for block, some in weights.items()}
    after = output(source, transform(moves, source.anatomy), moved, inputs)
    return float((after - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("name", PICOS)
def test_every_kind_of_move_keeps_the_output(opened: Callable[[str], Opened], name: str) -> None:
    """All admitted moves of one kind at once, on every stream."""
    anatomy = opened(name)[0].anatomy
    for kind in sorted({kind for _, kind in admitted(anatomy)}):
        streams = [stream for stream, k in admitted(anatomy) if k == kind]
        moves = [Move(kind, s.name, draw_value(anatomy, s, kind, i)) for i, s in enumerate(streams)]
        assert change(opened(name), moves) < LIMIT, kind


@pytest.mark.parametrize("name", PICOS)
@settings(max_examples=2, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), count=st.integers(3, 12))
def test_sequences_of_moves_keep_the_output(opened: Callable[[str], Opened], name: str, seed: int, count: int) -> None:
    moves = draw_moves(opened(name)[0].anatomy, random.Random(seed), count)
    assert change(opened(name), moves) < LIMIT, [(move.kind, move.stream) for move in moves]


TURNED = [name for name in PICOS if not name.startswith(("bert", "gemma")) and not name.endswith("headless")]


@pytest.mark.parametrize("name", TURNED)
def test_the_whole_way_to_a_rotated_model_keeps_the_output(opened: Callable[[str], Opened], name: str) -> None:
    """Centre, fold, rotate residual and values by the rewrites of a recipe."""
    anatomy = opened(name)[0].anatomy
    moves: list[Move] = []
    for rewrite in (LayerNormToRMS(), FoldNorm(), RotateHadamard(seed=3)):
        anatomy, more = rewrite(anatomy, {}, {})
        moves += more
    assert all(norm.kind == "rms" for norm in anatomy.norms)
    assert change(opened(name), moves) < LIMIT


def refusal(model: Opened, move: Move) -> str:
    with pytest.raises(MoveError) as caught:
        check(model[0].anatomy, move)
    return str(caught.value)


def test_how_far_from_orthogonal_a_rotation_may_be(opened: Callable[[str], Opened]) -> None:
    """One part in 10⁹ of what is turned, however large that is."""
    anatomy, eye = opened("llama")[0].anatomy, torch.eye(10, dtype=torch.float64)
    check(anatomy, Move("rotate", "blocks.0.value.0", eye * (1 + 4.5e-10)))
    with pytest.raises(MoveError, match="not orthogonal"):
        check(anatomy, Move("rotate", "blocks.0.value.0", eye * (1 + 5.5e-10)))


def test_stops_of_the_families_say_why(opened: Callable[[str], Opened]) -> None:
    """The stops of the design's table, each on the family that it is known from."""
    ones = torch.ones(10, dtype=torch.float64)
    eye = torch.eye(10, dtype=torch.float64)
    mirror = torch.diag(torch.cat([-ones[:1], ones[1:]]))
    flip = torch.arange(9, -1, -1)
    swap = torch.cat([torch.tensor([1, 0]), torch.arange(2, 10)])
    unequal = torch.cat([2 * ones[:1], ones[1:]])
    for name, move, why in [
        ("qwen3", Move("scale", "blocks.0.qk.1", ones), "gains are shared by the heads"),
        ("gemma3", Move("scale", "blocks.0.qk.1", ones), "gains are shared by the heads"),
        ("gemma2", Move("rotate", "residual"), "the post-norm .* writes the residual channel by channel"),
        ("llama", Move("rotate", "residual"), "has a gain: fold it into its readers first"),
        ("gpt2", Move("rotate", "residual"), "is a LayerNorm: centre the writers of the residual first"),
        ("bert", Move("rotate", "residual"), "the norm's output is the residual, so its gain acts channel by channel"),
        ("bert", Move("centre", "residual"), "the norm's output is the residual"),
        ("bert", Move("scale", "blocks.0.mlp.in"), "the norm's output is the residual"),
        ("llama", Move("centre", "residual"), "RMSNorm already"),
        ("llama", Move("permute", "blocks.0.qk.0", flip), "the order is fixed"),
        ("llama", Move("scale", "blocks.0.qk.0", unequal), "must share one scale"),
        ("llama", Move("rotate", "blocks.0.qk.0", mirror), "a reflection or a shear does not"),
        ("llama", Move("rotate", "blocks.0.qk.0", eye[flip]), "only inside each pair"),
        ("gpt_neox", Move("permute", "blocks.0.qk.0", swap), "must stay where they are"),
        ("opt", Move("scale", "blocks.0.ffn", -torch.ones(37)), "only positive scales"),
        ("gpt2", Move("scale", "blocks.0.ffn", torch.ones(37)), "gelu_new does not let a scale through"),
        ("llama", Move("rotate", "blocks.0.ffn"), "the activation acts neuron by neuron"),
        ("mixtral", Move("shift", "blocks.0.mlp.in"), "cannot be given a bias"),
        ("llama", Move("affine", "blocks.0.value.0", torch.zeros(10, 10)), "singular"),
        ("llama", Move("rotate", "blocks.0.value.0", 2 * eye), "not orthogonal"),
        ("llama", Move("rotate", "blocks.0.value.0", (eye[flip] + 1e-7)), "not orthogonal"),
        ("llama", Move("scale", "blocks.0.value.0", torch.ones(7)), "has shape .*7.*10 channels"),
        ("llama", Move("scale", "blocks.0.value.0", ones * 0), "cannot be undone"),
        ("llama", Move("scale", "blocks.0.value.0", ones / 0), "NaN or infinite"),
        ("llama", Move("permute", "blocks.0.value.0", flip * 0), "must be distinct"),
        ("llama", Move("scale", "blocks.0.valu.0", ones), "did you mean 'blocks.0.value.0'"),
        ("llama", Move("skale", "blocks.0.value.0", ones), "did you mean 'scale'"),
        ("llama-headless", Move("rotate", "residual"), "the model has no head"),
    ]:
        said = refusal(opened(name), move)
        assert re.search(why, said), (name, move.kind, said)


def test_moves_that_untie_a_head_say_so(opened: Callable[[str], Opened]) -> None:
    """Folding the last gain, or centring the embedding, makes the head a tensor of its own; a permutation does not."""
    for name, moves, tied in [
        ("llama-tied", [Move("fold", "head.in")], False),
        ("llama-tied", [Move("scale", "head.in", torch.full((42,), 2.0))], False),
        ("gpt2", [Move("centre", "residual")], False),
        ("llama-tied", [Move("permute", "residual", torch.arange(41, -1, -1))], True),
        ("llama-tied", [Move("fold", "blocks.0.attn.in")], True),
    ]:
        source, weights, _, _ = opened(name)
        after = transform(moves, source.anatomy)
        outer = apply(moves, source.anatomy, {k: t for k, t in weights[None].items() if k != "head.weight"})
        assert source.anatomy.tied
        assert after.tied == tied
        assert ("head.weight" in outer) == (not tied)
        assert any("unties the head" in note for note in after.notes) == (not tied)
