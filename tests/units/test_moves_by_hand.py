"""Moves with the answer written down: conventions, storage, what is touched."""

from __future__ import annotations

import torch

from regauge.anatomy.model import Anatomy, Norm, Plumbing, Port, Site, Slot
from regauge.anatomy.moves import Move, apply, boundary, compose, inverse, transform
from regauge.anatomy.streams import with_streams
from tests.toy import SHAPES, build

F64 = torch.float64


def tiny(**changes: object) -> Anatomy:
    """One block, one head of two channels, a residual of three, two neurons."""

    def site(name: str, kind: str, o: int, i: int, block: int | None = 0) -> Site:
        return Site(name, kind, (o, i), Slot(f"{name}.weight"), None, block, heads=int(kind in "qkvo"))

    def norm(name: str, block: int | None = 0) -> Norm:
        return Norm(name, "rms", 3, name, Slot(f"{name}.weight"), block=block)

    sites = [site("embed", "embed", 5, 3, None)]
    sites += [site(f"blocks.0.attn.{kind}", kind, 2, 3) for kind in "qkv"] + [site("blocks.0.attn.o", "o", 3, 2)]
    sites += [site("blocks.0.mlp.up", "up", 2, 3), site("blocks.0.mlp.down", "down", 3, 2)]
    sites += [site("head", "head", 5, 3, None)]
    norms = [norm("blocks.0.attn.norm"), norm("blocks.0.mlp.norm"), norm("norm", None)]
    plumbing = Plumbing(activation="relu", rotary=2)
    facts: dict[str, object] = {"tied": False, "plumbing": plumbing} | changes
    return with_streams(Anatomy("tiny", 1, 3, tuple(sites), tuple(norms), (), **facts))  # type: ignore[arg-type]  # facts


V = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
O = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])


def moved_values(move: Move) -> tuple[list[list[float]], list[list[float]]]:
    out = apply([move], tiny(), {"blocks.0.attn.v.weight": V, "blocks.0.attn.o.weight": O})
    return out["blocks.0.attn.v.weight"].tolist(), out["blocks.0.attn.o.weight"].tolist()


def test_scale_multiplies_the_writer_and_divides_the_reader() -> None:
    v, o = moved_values(Move("scale", "blocks.0.value.0", torch.tensor([2.0, 4.0])))
    assert v == [[2, 4, 6], [16, 20, 24]]
    assert o == [[0.5, 0], [0, 0.25], [0.5, 0.25]]


def test_permute_takes_channel_p_of_i() -> None:
    v, o = moved_values(Move("permute", "blocks.0.value.0", torch.tensor([1, 0])))
    assert v == [[4, 5, 6], [1, 2, 3]]
    assert o == [[0, 1], [1, 0], [1, 1]]


def test_affine_is_m_on_the_writer_and_its_inverse_on_the_reader() -> None:
    """M = [[1, 1], [0, 1]], M⁻¹ = [[1, −1], [0, 1]]."""
    v, o = moved_values(Move("affine", "blocks.0.value.0", torch.tensor([[1.0, 1.0], [0.0, 1.0]])))
    assert v == [[5, 7, 9], [4, 5, 6]]
    assert o == [[1, -1], [0, 1], [1, 0]]


def test_rotate_turns_the_writer_by_q() -> None:
    """Q = [[0, −1], [1, 0]]: y′ = (−y₂, y₁)."""
    v, o = moved_values(Move("rotate", "blocks.0.value.0", torch.tensor([[0.0, -1.0], [1.0, 0.0]])))
    assert v == [[-4, -5, -6], [1, 2, 3]]
    assert o == [[0, 1], [-1, 0], [-1, 1]]


def test_shift_gives_both_sides_a_bias() -> None:
    """c = (1, 10): v gains c, o gains −O c."""
    move = Move("shift", "blocks.0.value.0", torch.tensor([1.0, 10.0]))
    out = apply([move], tiny(), {"blocks.0.attn.v.weight": V, "blocks.0.attn.o.weight": O})
    assert out["blocks.0.attn.v.bias"].tolist() == [1, 10]
    assert out["blocks.0.attn.o.bias"].tolist() == [-1, -10, -11]
    slot = transform([move], tiny()).site("blocks.0.attn.v").bias
    assert slot == Slot("blocks.0.attn.v.bias")


def test_centre_takes_the_mean_over_channels_and_fold_the_gain() -> None:
    kinds = tuple(Norm(n.name, "layer", 3, n.name, n.gain, Slot(f"{n.name}.bias"), block=n.block) for n in tiny().norms)
    anatomy = with_streams(tiny().with_(norms=kinds))
    out = apply([Move("centre", "residual")], anatomy, {"embed.weight": V, "blocks.0.attn.o.weight": O})
    assert out["embed.weight"].tolist() == [[-1, 0, 1], [-1, 0, 1]]
    assert out["blocks.0.attn.o.weight"].sum(0).abs().max() < 1e-6
    up = {
        "blocks.0.mlp.up.weight": V,
        "blocks.0.mlp.norm.gain": torch.tensor([1.0, 2.0, 3.0]),
        "blocks.0.mlp.norm.bias": torch.tensor([1.0, 0.0, 1.0]),
    }
    out = apply([Move("fold", "blocks.0.mlp.in")], anatomy, up)
    assert out["blocks.0.mlp.up.weight"].tolist() == [[1, 4, 9], [4, 10, 18]]
    assert out["blocks.0.mlp.up.bias"].tolist() == [4, 10]
    assert out["blocks.0.mlp.norm.gain"].tolist() == [1, 1, 1]
    assert out["blocks.0.mlp.norm.bias"].tolist() == [0, 0, 0]


def test_storage_keeps_its_dtype_and_nothing_is_changed_in_place() -> None:
    """Algebra in float64, one rounding at the end; untouched tensors are handed through."""
    stored = {"blocks.0.attn.v.weight": V.bfloat16(), "blocks.0.attn.o.weight": O.half(), "blocks.0.attn.q.weight": V}
    kept = {key: tensor.clone() for key, tensor in stored.items()}
    third = Move("scale", "blocks.0.value.0", torch.tensor([3.0, 7.0], dtype=F64))
    shift = Move("shift", "blocks.0.value.0", torch.tensor([0.3, 0.7], dtype=F64))
    out = apply([third, shift], tiny(), stored)
    assert {key: tensor.dtype for key, tensor in out.items()} == {
        "blocks.0.attn.v.weight": torch.bfloat16,
        "blocks.0.attn.v.bias": torch.bfloat16,
        "blocks.0.attn.o.weight": torch.float16,
        "blocks.0.attn.o.bias": torch.float16,
        "blocks.0.attn.q.weight": torch.float32,
    }
    assert out["blocks.0.attn.q.weight"] is stored["blocks.0.attn.q.weight"]
    assert all(torch.equal(stored[key], tensor) for key, tensor in kept.items())
    back = apply([third, inverse(third)] * 20, tiny(), stored)
    assert all(torch.equal(back[key], tensor) for key, tensor in kept.items())
    wide = apply([third], tiny(), stored, dtype=F64)
    assert wide["blocks.0.attn.v.weight"].dtype is F64
    assert wide["blocks.0.attn.o.weight"][2].tolist() == [1 / 3, 1 / 7]


def test_boundary_enters_in_order_and_leaves_in_reverse() -> None:
    """Turn by 90 degrees in the first two channels, then swap the last two."""
    q = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=F64)
    other = Move("scale", "blocks.0.ffn", torch.ones(2))
    enter, leave = boundary(
        [Move("rotate", "residual", q), other, Move("permute", "residual", torch.tensor([0, 2, 1]))]
    )
    x = torch.tensor([[[1.0, 2.0, 3.0]]], dtype=F64)
    assert enter(x).tolist() == [[[-2, 3, 1]]]
    assert leave(enter(x)).tolist() == x.tolist()
    enter, leave = boundary([Move("centre", "residual"), Move("rotate", "residual", q)])
    assert enter(x).tolist() == [[[0, -1, 1]]]
    assert leave(enter(x)).tolist() == [[[-1, 0, 1]]]


def test_composition_is_first_then_second() -> None:
    a = Move("permute", "s", torch.tensor([1, 2, 0]))
    b = Move("permute", "s", torch.tensor([1, 0, 2]))
    assert compose(a, b).vector().tolist() == [2, 1, 0]
    m = Move("affine", "s", torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    n = Move("affine", "s", torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    assert compose(m, n).vector().tolist() == [[2, 2], [0, 1]]
    assert compose(Move("scale", "s", torch.ones(1) * 2), Move("scale", "s", torch.ones(1) * 3)).vector().tolist() == [
        6
    ]


def test_streams_of_grouped_queries_by_hand() -> None:
    """Six query heads, two KV heads: KV head 1 serves query heads 3, 4 and 5."""
    anatomy, _ = build(SHAPES["llama"])
    value = anatomy.stream("blocks.0.value.1")
    assert value.writers == (Port("blocks.0.attn.v.weight", 0, 10),)
    assert value.readers == tuple(Port("blocks.0.attn.o.weight", 1, start) for start in (30, 40, 50))
    scores = anatomy.stream("blocks.0.qk.1")
    assert scores.writers == tuple(Port("blocks.0.attn.q.weight", 0, start) for start in (30, 40, 50))
    assert scores.readers == (Port("blocks.0.attn.k.weight", 0, 10),)
    heads = anatomy.stream("blocks.0.heads")
    assert (heads.size, heads.readers) == (2, (Port("blocks.0.attn.o.weight", 1, 0, 30),))
    residual = anatomy.stream("residual")
    assert Port("embed.weight", 1) in residual.writers
    assert Port("blocks.1.mlp.down.weight", 0) in residual.writers
    assert Port("head.weight", 1) in residual.readers
    assert Port("norm.gain", 0) in residual.through
    names = [stream.name for stream in anatomy.streams]
    assert len(names) == len(set(names)) == 1 + 2 * 8 + 1
