"""What a move changes in the anatomy: kinds of norms, biases gained, a tied head untied, sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from regauge.anatomy.model import Anatomy, Norm, Port, Site, Slot, Stream
from regauge.anatomy.sizes import check_sizes, relaid
from regauge.anatomy.streams import input_norms, with_streams
from regauge.anatomy.values import Move
from regauge.errors import MoveError


def unties(move: Move, anatomy: Anatomy) -> bool:
    """Whether the move makes the head differ from the embedding it was tied to.

    Folding or scaling the last norm changes the head alone; centring changes the embedding alone. A rotation or a
    permutation of the residual changes both alike, so they stay one tensor.
    """
    if not anatomy.tied:
        return False
    if move.stream == "head.in":
        (norm,) = (norm for norm in anatomy.norms if norm.name == "norm")
        return move.kind == "scale" or (move.kind == "fold" and not norm.plain)
    if move.stream == "residual":
        head = Port("head.weight", 1)
        return move.kind == "centre" or head not in anatomy.stream("residual").readers
    return False


def effect(moves: Sequence[Move], anatomy: Anatomy) -> Anatomy:
    """The anatomy after moves of one kind on different streams, each of which must have been checked against it.

    Raises:
        MoveError: experts of one stack would keep different numbers of neurons.
    """
    norms = {norm.name: norm for norm in anatomy.norms}
    sites = {site.name: site for site in anatomy.sites}
    hidden, tied, notes = anatomy.hidden, anatomy.tied, list(anatomy.notes)
    for move in moves:
        stream = anatomy.stream(move.stream)
        if move.kind == "centre":
            norms |= {n.name: replace(n, kind="rms", source_kind=n.source_kind or n.kind) for n in input_norms(anatomy)}
        if stream.kind == "batch":
            gone = stream.name.removesuffix(".out") + ".norm"
            norms[gone] = replace(norms[gone], gain=None, bias=None, mean=None, var=None, plain=True)
            _gain_biases(stream.writers, sites)
        elif move.kind in ("fold", "scale", "shift"):
            _norms_change(move.kind, stream, norms, sites)
        if move.kind == "shift":
            _gain_biases((*stream.readers, *stream.writers), sites)
        if move.kind == "select":
            kept = len(move.vector())
            hidden = kept if stream.kind == "residual" else hidden
            _shrink(stream, kept, norms, sites)
        if tied and unties(move, anatomy):
            tied = False
            notes.append(_note(move))
    changed = tuple(sites.values()), tuple(norms.values())
    if changed == (anatomy.sites, anatomy.norms) and tied == anatomy.tied:
        return anatomy
    after = replace(anatomy, sites=changed[0], norms=changed[1], hidden=hidden, tied=tied, notes=tuple(notes))
    if hidden != anatomy.hidden or any(move.kind == "select" for move in moves):
        try:
            check_sizes(after)
        except ValueError as error:
            raise MoveError(f"select on {moves[0].stream}{' …' if len(moves) > 1 else ''}: {error}") from error
        after = relaid(after)
    return with_streams(after)


def _note(move: Move) -> str:
    return f"{move.kind} of {move.stream} unties the head from the embedding: its bytes are counted on their own"


def _norms_change(kind: str, stream: Stream, norms: dict[str, Norm], sites: dict[str, Site]) -> None:
    """What folding, scaling or shifting a norm's output makes of the norm, and of the readers that take its bias."""
    for name in {port.tensor.rpartition(".")[0] for port in stream.writers} & norms.keys():
        norm = norms[name]
        if kind == "fold" and norm.bias is not None and not norm.plain:
            _gain_biases(stream.readers, sites)
        if kind == "shift" and norm.bias is None and norm.gain is not None:
            norm = replace(norm, bias=_bias_slot(norm.gain))
        norms[name] = replace(norm, plain=kind == "fold")


def _gain_biases(ports: Iterable[Port], sites: dict[str, Site]) -> None:
    for port in ports:
        site = sites.get(port.tensor.removesuffix(".weight"))
        if site is not None and site.bias is None:
            sites[site.name] = replace(site, bias=_bias_slot(site.weight))


def _bias_slot(weight: Slot) -> Slot:
    """The bias beside a weight or gain: same rows of the same module."""
    return replace(weight, key=weight.key.rpartition(".")[0] + ".bias", transposed=False)


def _shrink(stream: Stream, kept: int, norms: dict[str, Norm], sites: dict[str, Site]) -> None:
    if stream.kind == "residual":  # a norm without a gain is no port of it, and has its size all the same
        size = stream.size
        norms |= {n.name: replace(n, size=kept) for n in norms.values() if n.gain is None and n.size == size}
    for port in (*stream.writers, *stream.readers, *stream.through):
        owner, _, part = port.tensor.rpartition(".")
        if part == "weight":
            shape = list(sites[owner].shape)
            shape[port.axis] = kept * port.width
            heads = sites[owner].heads
            if stream.kind == "heads":  # a group takes all its heads with it
                heads = kept * (heads // stream.size)
            sites[owner] = replace(sites[owner], shape=(shape[0], shape[1]), heads=heads)
        elif owner in norms:
            norms[owner] = replace(norms[owner], size=kept * port.width)
