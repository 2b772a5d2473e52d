"""The laws of moves, on a plain float64 transformer of every arrangement."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regauge.anatomy.model import Anatomy, Weights
from regauge.anatomy.moves import Move, apply, boundary, check, compose, inverse, transform
from regauge.errors import MoveError
from tests.moving import EXACT, admitted, draw_moves, draw_value, orthogonal
from tests.toy import SHAPES, block, build, forward

LIMIT = 1e-12
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


def run(name: str, anatomy: Anatomy, weights: Weights) -> torch.Tensor:
    return forward(anatomy, weights, IDS, SHAPES[name].parallel)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", SHAPES)
def test_every_admitted_move_alone_keeps_the_function(name: str) -> None:
    anatomy, weights = build(SHAPES[name])
    before = run(name, anatomy, weights)
    for stream, kind in admitted(anatomy):
        move = Move(kind, stream.name, draw_value(anatomy, stream, kind, 1))
        moved = apply([move], anatomy, weights)
        touched = [key for key in moved if not (key in weights and moved[key] is weights[key])]
        assert touched, f"{kind} of {stream.name} touched nothing"
        assert distance(run(name, transform([move], anatomy), moved), before) < LIMIT, f"{kind} of {stream.name}"


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), count=st.integers(2, 10))
def test_sequences_of_moves_keep_the_function(name: str, seed: int, count: int) -> None:
    anatomy, weights = build(SHAPES[name], seed % 7)
    moves = draw_moves(anatomy, random.Random(seed), count)
    moved = apply(moves, anatomy, weights)
    after = transform(moves, anatomy)
    assert distance(run(name, after, moved), run(name, anatomy, weights)) < LIMIT, [(m.kind, m.stream) for m in moves]
    names = {f"{s.name}.weight" for s in after.sites} | {f"{s.name}.bias" for s in after.sites if s.bias}
    norms = {f"{n.name}.gain" for n in after.norms} | {f"{n.name}.bias" for n in after.norms if n.bias}
    assert set(moved) == names | norms


@pytest.mark.parametrize("name", SHAPES)
def test_full_gauge_fold_centre_rotate_values(name: str) -> None:
    """The way of a rotation recipe, wherever the arrangement admits it: fold, centre, rotate everything."""
    anatomy, weights = build(SHAPES[name])
    before = run(name, anatomy, weights)
    moves: list[Move] = []
    state = anatomy
    for kind in ("fold", "centre", "rotate", "permute"):
        for stream, admitted_kind in admitted(state):
            if admitted_kind == kind:
                moves.append(Move(kind, stream.name, draw_value(state, stream, kind, len(moves))))
        state = transform([m for m in moves if m.kind == kind], state)
    rotated = any(m.stream == "residual" and m.kind == "rotate" for m in moves)
    assert rotated == (name not in ("gemma", "bert", "bloom"))
    assert distance(run(name, state, apply(moves, anatomy, weights)), before) < LIMIT


@pytest.mark.parametrize("name", SHAPES)
def test_moves_are_block_local(name: str) -> None:
    """Block by block gives the tensors of the whole model at once, and `boundary` maps the states between."""
    anatomy, weights = build(SHAPES[name])
    moves = draw_moves(anatomy, random.Random(5), 9)
    whole = apply(moves, anatomy, weights)
    pieces: Weights = {}
    for b in (None, 0, 1):
        keys = set(anatomy.slots(b))
        pieces |= apply(moves, anatomy, {key: t for key, t in weights.items() if key in keys})
    assert pieces.keys() == whole.keys()
    for key, tensor in whole.items():
        assert torch.equal(pieces[key], tensor), key
    enter, leave = boundary(moves)
    x = torch.randn(2, 5, anatomy.hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    parallel = SHAPES[name].parallel
    after = transform(moves, anatomy)
    y = block(anatomy, weights, 1, x, parallel)
    z = block(after, whole, 1, enter(x), parallel)
    assert distance(z, enter(y)) < LIMIT
    assert distance(leave(z), leave(enter(y))) < LIMIT
    if not any(m.kind == "centre" for m in moves):
        assert distance(leave(z), y) < LIMIT


@pytest.mark.parametrize("name", SHAPES)
def test_move_and_inverse_are_the_identity(name: str) -> None:
    anatomy, weights = build(SHAPES[name])
    for stream, kind in admitted(anatomy):
        if kind in ("fold", "centre"):
            continue
        move = Move(kind, stream.name, draw_value(anatomy, stream, kind, 3))
        back = apply([move, inverse(move)], anatomy, weights)
        for key, tensor in weights.items():
            if kind == "permute":
                assert torch.equal(back[key], tensor), (stream.name, key)
            else:
                assert distance(back[key], tensor) < LIMIT, (stream.name, kind, key)


@pytest.mark.parametrize("name", SHAPES)
def test_select_of_everything_is_the_identity(name: str) -> None:
    anatomy, weights = build(SHAPES[name])
    for stream in anatomy.streams:
        if "select" in stream.admits:
            move = Move("select", stream.name, torch.arange(stream.size))
            assert transform([move], anatomy).sites == anatomy.sites
            back = apply([move], anatomy, weights)
            assert all(torch.equal(back[key], tensor) for key, tensor in weights.items())


@pytest.mark.parametrize("name", SHAPES)
def test_selecting_dead_channels_keeps_the_function(name: str) -> None:
    """Neurons that `down` does not read, and heads that `o` does not read, can go: sizes follow."""
    anatomy, weights = build(SHAPES[name])
    for stream in anatomy.streams:
        if stream.kind in ("ffn", "heads"):
            keep = torch.arange(stream.size)[: max(1, stream.size - 1)]
            port = stream.readers[0]
            weights[port.tensor] = weights[port.tensor].clone()
            weights[port.tensor][:, len(keep) * port.width :] = 0
    if any(s.kind == "heads" for s in anatomy.streams) and SHAPES[name].qk_norm == "long":
        pytest.skip("a norm over the whole vector sees every head, dead or not")
    before = run(name, anatomy, weights)
    moves = [
        Move("select", s.name, torch.arange(max(1, s.size - 1))) for s in anatomy.streams if s.kind in ("ffn", "heads")
    ]
    after, moved = transform(moves, anatomy), apply(moves, anatomy, weights)
    for site in after.sites:
        assert tuple(moved[f"{site.name}.weight"].shape) == site.shape, site.name
    assert distance(run(name, after, moved), before) < LIMIT


@pytest.mark.parametrize("name", SHAPES)
def test_every_stream_says_yes_or_why_not(name: str) -> None:
    anatomy, _ = build(SHAPES[name])
    for stream in anatomy.streams:
        assert not set(stream.admits) & set(stream.stops)
        for kind, reason in stream.stops.items():
            assert len(reason) > 20, (stream.name, kind)
            with pytest.raises(MoveError, match="does not admit"):
                check(anatomy, Move(kind, stream.name, None))


@pytest.mark.parametrize("name", SHAPES)
def test_forbidden_moves_would_have_changed_the_function(name: str) -> None:
    """A stop is not timidity: done all the same, scale, rotate and permute of a stopped stream change the output."""
    anatomy, weights = build(SHAPES[name])
    before = run(name, anatomy, weights)
    for stream in anatomy.streams:
        for kind in ("scale", "rotate", "permute"):
            if kind not in stream.stops or not stream.writers or (kind == "permute" and stream.kind == "norm"):
                continue
            if stream.kind in ("norm", "qk", "heads") and kind == "rotate":
                continue  # their writers are gains, or whole heads: there is no matrix to turn
            forced = replace(stream, admits={kind: ""}, stops={})
            free = replace(anatomy, streams=tuple(forced if s is stream else s for s in anatomy.streams))
            g = torch.Generator().manual_seed(4)
            value = {
                "scale": 0.5 + torch.rand(stream.size, generator=g, dtype=torch.float64),
                "rotate": orthogonal(stream.size, g),
                "permute": torch.randperm(stream.size, generator=g),
            }[kind]
            if stream.kind == "heads":
                continue
            moved = apply([Move(kind, stream.name, value)], free, weights)
            assert distance(run(name, anatomy, moved), before) > 1e-4, (stream.name, kind)


def test_composed_moves_are_one() -> None:
    anatomy, weights = build(SHAPES["alibi"])
    for kind in ("scale", "rotate", "affine", "permute", "shift"):
        stream = anatomy.stream("blocks.1.value.1")
        a, b = (Move(kind, stream.name, draw_value(anatomy, stream, kind, i)) for i in (1, 2))
        one, two = apply([compose(a, b)], anatomy, weights), apply([a, b], anatomy, weights)
        for key in one:
            assert distance(one[key], two[key]) < 1e-13, (kind, key)
    with pytest.raises(MoveError, match="do not compose"):
        compose(Move("scale", "a", torch.ones(2)), Move("shift", "a", torch.ones(2)))


def test_exact_kinds_are_all_met_somewhere() -> None:
    """The laws above draw from what is admitted; this keeps them from growing empty."""
    met = {kind for shape in SHAPES.values() for _, kind in admitted(build(shape)[0])}
    assert met == set(EXACT)
