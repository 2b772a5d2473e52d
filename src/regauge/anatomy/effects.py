"""What a move changes in the anatomy: kinds of norms, biases gained, a tied head untied, sizes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from regauge.anatomy.model import Anatomy, Norm, Port, Site, Slot, Stream
from regauge.anatomy.streams import input_norms, with_streams
from regauge.anatomy.values import Move


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


def effect(move: Move, anatomy: Anatomy) -> Anatomy:
    """The anatomy after one move, which must have been checked."""
    stream = anatomy.stream(move.stream)
    norms: dict[str, Norm] = {}
    sites: dict[str, Site] = {}
    hidden = anatomy.hidden
    if move.kind == "centre":
        for norm in input_norms(anatomy):
            norms[norm.name] = replace(norm, kind="rms", source_kind=norm.source_kind or norm.kind)
    if move.kind == "fold":
        for norm in _norms_of(stream.writers, anatomy):
            norms[norm.name] = replace(norm, plain=True)
            if norm.bias is not None and not norm.plain:
                sites |= _with_biases(stream.readers, anatomy)
    if move.kind in ("scale", "shift"):
        for norm in _norms_of(stream.writers, anatomy):
            norms[norm.name] = replace(norm, plain=False)
    if move.kind == "shift":
        sites |= _with_biases((*stream.readers, *stream.writers), anatomy)
        for name, norm in norms.items():
            if norm.bias is None and norm.gain is not None:
                norms[name] = replace(norm, bias=_bias_slot(norm.gain))
    if move.kind == "select":
        kept = len(move.vector())
        hidden = kept if stream.kind == "residual" else hidden
        norms, sites = _shrunk(stream, kept, anatomy)
    untied = unties(move, anatomy)
    changed = untied or any(anatomy.norm(name) != norm for name, norm in norms.items())
    changed = changed or any(anatomy.site(name) != site for name, site in sites.items())
    if not changed:
        return anatomy
    return with_streams(
        replace(
            anatomy,
            sites=tuple(sites.get(site.name, site) for site in anatomy.sites),
            norms=tuple(norms.get(norm.name, norm) for norm in anatomy.norms),
            hidden=hidden,
            tied=anatomy.tied and not untied,
            notes=(*anatomy.notes, _note(move)) if untied else anatomy.notes,
        )
    )


def _note(move: Move) -> str:
    return f"{move.kind} of {move.stream} unties the head from the embedding: its bytes are counted on their own"


def _norms_of(ports: Iterable[Port], anatomy: Anatomy) -> list[Norm]:
    names = {port.tensor.rpartition(".")[0] for port in ports}
    return [norm for norm in anatomy.norms if norm.name in names]


def _sites_of(ports: Iterable[Port], anatomy: Anatomy) -> list[tuple[Site, Port]]:
    by_name = {f"{site.name}.weight": site for site in anatomy.sites}
    return [(by_name[port.tensor], port) for port in ports if port.tensor in by_name]


def _with_biases(ports: Iterable[Port], anatomy: Anatomy) -> dict[str, Site]:
    return {
        site.name: site if site.bias is not None else replace(site, bias=_bias_slot(site.weight))
        for site, _ in _sites_of(ports, anatomy)
    }


def _bias_slot(weight: Slot) -> Slot:
    """The bias beside a weight or gain: same rows of the same module."""
    return replace(weight, key=weight.key.rpartition(".")[0] + ".bias", transposed=False)


def _shrunk(stream: Stream, kept: int, anatomy: Anatomy) -> tuple[dict[str, Norm], dict[str, Site]]:
    ports = (*stream.writers, *stream.readers, *stream.through)
    sites: dict[str, Site] = {}
    for site, port in _sites_of(ports, anatomy):
        shape = list(sites.get(site.name, site).shape)
        # A table is (N, D) with (O, I) = its shape as it stands; every port's axis counts in the stored tensor.
        shape[port.axis] = kept * port.width
        sites[site.name] = replace(site, shape=(shape[0], shape[1]))
    norms = {}
    for norm in _norms_of(ports, anatomy):
        width = next(p.width for p in ports if p.tensor.startswith(f"{norm.name}."))
        norms[norm.name] = replace(norm, size=kept * width)
    return norms, sites
