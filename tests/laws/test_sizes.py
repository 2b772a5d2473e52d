"""The law of `select`: a channel that is gone computes as one whose readers are zero, in every family's own storage."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from regauge.anatomy.model import Anatomy, Stream, Weights
from regauge.anatomy.moves import Move, apply, transform
from regauge.anatomy.sizes import parameter_shapes, resized, sizes
from regauge.anatomy.storage import gather, places, scatter
from regauge.errors import MoveError
from regauge.hosts.transformers.adapt import adapt_modules
from regauge.hosts.transformers.runner import Runner
from regauge.hosts.transformers.skeleton import parameters, skeleton
from tests.pico import PICOS, batches
from tests.streaming import distance, opened, stock

LIMIT = 1e-11


def selected(anatomy: Anatomy, kind: str, blocks: tuple[int, ...] = (0, 1)) -> list[tuple[Stream, Move]]:
    """A strict part of every stream of a kind, another number in each block, and not in order."""
    found = []
    for stream in anatomy.streams:
        if stream.kind == kind and "select" in stream.admits and stream.block in blocks:
            order = torch.randperm(stream.size, generator=torch.Generator().manual_seed(stream.block or 0))
            kept = max(1, stream.size - 1 - (4 if kind == "ffn" else 1) * (stream.block or 0))
            found.append((stream, Move("select", stream.name, order[:kept])))
    return found


def zeroed(stream: Stream, move: Move, weights: Weights) -> Weights:
    """The readers with zeros where the stream's other channels are read."""
    gone = sorted(set(range(stream.size)) - set(move.vector().tolist()))
    out = dict(weights)
    for port in stream.readers:
        tensor = weights[port.tensor].clone()
        for channel in gone:
            start = port.start + channel * port.width
            tensor.narrow(port.axis, start, port.width).zero_()
        out[port.tensor] = tensor
    return out


@pytest.mark.parametrize("kind", ["ffn", "heads"])
@pytest.mark.parametrize("name", PICOS)
def test_a_channel_that_is_gone_is_one_that_nobody_reads(name: str, kind: str) -> None:
    model, source = opened(name)
    anatomy = source.anatomy
    chosen = selected(anatomy, kind)
    assert chosen
    moves = [move for _, move in chosen]
    after = transform(moves, anatomy)
    runner = Runner(source, anatomy=after, dtype=torch.float64)
    masked = {block: source.block(block) for block in (None, *range(anatomy.blocks))}
    cut = {block: apply(moves, anatomy, weights) for block, weights in masked.items()}
    for stream, move in chosen:
        masked[stream.block] = zeroed(stream, move, masked[stream.block])
    with torch.no_grad():
        expected = torch.cat([logits.flatten(0, -2) for logits in Runner(source, dtype=torch.float64).logits(
            batches(model), masked.__getitem__)])  # fmt: skip
        found = torch.cat([logits.flatten(0, -2) for logits in runner.logits(batches(model), cut.__getitem__)])
    assert distance(found, expected) < LIMIT
    before = torch.cat([stock(model, batch).flatten(0, -2) for batch in batches(model)])
    assert distance(found, before) > 1e-4, "something must have gone"


@pytest.mark.parametrize("kind", ["ffn", "heads", "residual"])
@pytest.mark.parametrize("name", PICOS)
def test_storage_and_modules_agree_on_the_new_sizes(name: str, kind: str) -> None:
    """scatter, the skeleton and `parameter_shapes` see one shape, and what is scattered is gathered again."""
    _, source = opened(name)
    anatomy = source.anatomy
    if kind == "residual":
        if "select" in anatomy.stream("residual").stops:
            pytest.skip("the channels of this residual are fixed")
        moves = [Move("select", "residual", torch.arange(anatomy.hidden - 3))]
    else:
        moves = [move for _, move in selected(anatomy, kind)]
    after = transform(moves, anatomy)
    assert sizes(anatomy, after)
    assert resized(anatomy, sizes(anatomy, after)) == after
    model = skeleton(source.config)
    adapt_modules(model, anatomy, after)
    held = {key: tuple(tensor.shape) for key, tensor in parameters(model).items()}
    assert parameter_shapes(after, source.shapes).items() <= held.items()
    for block in (None, *range(anatomy.blocks)):
        names = list(places(anatomy, block))
        if anatomy.tied:
            names = [one for one in names if one != "head.weight"]
        cut = apply(moves, anatomy, source.read(names))
        stored = scatter(after, cut, source.shapes)
        assert {key: tuple(tensor.shape) for key, tensor in stored.items()}.items() <= held.items()
        back = gather(after, stored)
        for key, tensor in cut.items():
            assert torch.equal(back[key], tensor.to(back[key].dtype)), key


def test_experts_of_one_stack_keep_one_width() -> None:
    _, source = opened("mixtral")
    one = Move("select", "blocks.0.moe.2.ffn", torch.arange(5))
    with pytest.raises(MoveError, match=r"gate_up_proj is one stack, whose experts keep one shape: .* is 37 x 29 and"):
        transform([one], source.anatomy)
    all_of_them = [replace(one, stream=f"blocks.0.moe.{expert}.ffn") for expert in range(5)]
    after = transform(all_of_them, source.anatomy)
    assert after.site("blocks.0.moe.4.up").weight.rows == (5, 10)
    assert after.site("blocks.1.moe.4.up").weight.rows == (37, 74)


def test_slots_of_cut_storage_by_hand() -> None:
    """phi3: 6 query heads and 3 of keys, of 10; two groups stay: 40 rows of q, then 20 of k, then 20 of v."""
    after = transform([Move("select", "blocks.0.heads", torch.tensor([2, 0]))], opened("phi3")[1].anatomy)
    rows = {kind: after.site(f"blocks.0.attn.{kind}").weight.rows for kind in "qkv"}
    assert rows == {"q": (0, 40), "k": (40, 60), "v": (60, 80)}
    assert after.site("blocks.0.attn.o").shape == (60, 40)
    assert [after.attentions[block].heads for block in (0, 1)] == [4, 6]  # type: ignore[union-attr]  # it has attention
    assert after.cached == (2 + 3) * 20
    neox = transform([Move("select", "blocks.1.heads", torch.tensor([1]))], opened("gpt_neox")[1].anatomy)
    assert neox.site("blocks.1.attn.v").weight.heads == (1, 3, 2)
    assert neox.site("blocks.1.attn.v").bias.heads == (1, 3, 2)  # type: ignore[union-attr]  # neox has biases
    gpt = transform([Move("select", "blocks.1.ffn", torch.tensor([3, 1]))], opened("gpt2")[1].anatomy)
    assert gpt.site("blocks.1.mlp.up").shape == (2, 33)
    assert gpt.site("blocks.0.mlp.up").shape == (37, 33)


def test_shapes_that_do_not_fit_together_are_refused() -> None:
    anatomy = opened("llama")[1].anatomy
    for shapes, why in [
        ({"blocks.0.mlp.up": (20, 42)}, "blocks.0.mlp.gate writes 37 channels"),
        ({"blocks.0.mlp.up": (20, 42), "blocks.0.mlp.gate": (20, 42)}, "blocks.0.mlp.up writes 20 channels and"),
        ({"blocks.0.attn.k": (25, 42)}, "heads of 10 channels, which do not divide 25"),
        ({"blocks.0.attn.k": (20, 42)}, "which is no grouping"),
        ({"blocks.0.attn.q": (0, 42)}, "cannot be 0 x 42"),
        ({"blocks.9.attn.q": (60, 42)}, "there is no site 'blocks.9.attn.q'"),
        ({"blocks.0.mlp.down": (40, 37)}, "meets a residual of 42 channels with 40"),
    ]:
        with pytest.raises(ValueError, match=why):
            resized(anatomy, shapes)
