"""What a family's table is held to on one model: streamed by it the model computes what transformers computes, and
every kind of move that it admits, on every stream at once, leaves the output as it was.

In float64 all the way, on a few tokens. Cost: the model in float64, a forward pass for each kind of move, and
transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regauge.anatomy.certificate import relative_error
from regauge.anatomy.drawing import admitted, draw_value
from regauge.anatomy.model import Anatomy, Weights
from regauge.anatomy.moves import Move, apply, transform
from regauge.hosts.precise import precise
from regauge.hosts.transformers.probe import probe, reads
from regauge.hosts.transformers.runner import Runner
from regauge.hosts.transformers.sampling import whole_model
from regauge.hosts.transformers.session import output_of
from regauge.hosts.transformers.source import Source
from regauge.hosts.transformers.tables import family

SAME = 1e-8
"""Most that two ways of computing one function in float64 may differ, of the output's size. Deep models give 1e-11."""


@dataclass(frozen=True)
class Law:
    """One thing that was tried.

    Attributes:
        name: `as transformers computes it`, or the kind of move.
        streams: on how many.
        error: relative maximum of the change; holds: whether that is rounding.
        first: where it does not hold, the first stream that alone breaks it.
    """

    name: str
    streams: int
    error: float
    holds: bool
    first: str = ""


@dataclass(frozen=True)
class Checked:
    """A table, tried on a model.

    Attributes:
        family: the model's type; sites, norms: how many the table describes.
        kept: what stays as it is, in sentences.
        laws: what was tried.
        stops: moves that some stream stops → why, each reason once.
    """

    family: str
    sites: int
    norms: int
    kept: tuple[str, ...]
    laws: tuple[Law, ...]
    stops: Mapping[str, str]

    @property
    def holds(self) -> bool:
        """Whether every law does."""
        return all(law.holds for law in self.laws)


def check_family(table: str | Path | None, model: str | Path) -> Checked:
    """Tries a table on a model: best on a small one of the same architecture.

    Args:
        table: a file as docs/families.md describes it; None for the table that is known.

    Raises:
        ModelError: the file is no table, or describes no such model, or not all of it (it says which parameter).
    """
    with family(table):
        source = Source.open(model)
        anatomy, weights = source.anatomy, _weights(source)
        before = _output(source, anatomy, lambda block: weights[block])
        laws = [_own(source, before)]
        for kind in sorted({kind for _, kind in admitted(anatomy)}):
            laws.append(_law(source, weights, before, kind))
        stops = {f"{kind} of {_place(s.name)}": why for s in anatomy.streams for kind, why in s.stops.items()}
        return Checked(anatomy.family, len(anatomy.sites), len(anatomy.norms), anatomy.notes, tuple(laws), stops)


def _weights(source: Source) -> dict[int | None, Weights]:
    return {
        block: {name: tensor.double() for name, tensor in source.block(block).items()}
        for block in (None, *range(source.anatomy.blocks))
    }


def _output(source: Source, anatomy: Anatomy, weights: Callable[[int | None], Weights]) -> Tensor:
    with precise(), torch.no_grad():
        runner = Runner(source, anatomy, dtype=torch.float64, attention="eager")
        return next(iter(runner.logits(probe(source), weights)))


def _own(source: Source, streamed: Tensor) -> Law:
    """transformers' own forward of the whole model."""
    model = whole_model(source).double()
    if source.config._attn_implementation != "eager":
        model.set_attn_implementation("eager")
    model.config._experts_implementation = "eager"
    given: Any = probe(source)[0]
    given = {reads(source)[0]: given} if isinstance(given, Tensor) else given
    given = {key: x.double() if x.is_floating_point() else x for key, x in given.items()}
    cacheless = {"use_cache": False} if model.can_generate() else {}
    with precise(), torch.no_grad():
        error = relative_error(streamed, output_of(model(**given, **cacheless)))
    return Law("as transformers computes it", 0, error, error <= SAME)


def _law(source: Source, weights: Mapping[int | None, Weights], before: Tensor, kind: str) -> Law:
    anatomy = source.anatomy
    streams = [stream for stream, one in admitted(anatomy) if one == kind]
    moves = [Move(kind, s.name, draw_value(anatomy, s, kind, seed)) for seed, s in enumerate(streams)]

    def change(some: list[Move]) -> float:
        moved = transform(some, anatomy)
        return relative_error(_output(source, moved, lambda block: apply(some, anatomy, weights[block])), before)

    error = change(moves)
    first = "" if error <= SAME else next((move.stream for move in moves if not change([move]) <= SAME), "")
    return Law(kind, len(streams), error, error <= SAME, first)


def _place(stream: str) -> str:
    """A stream's name with its numbers left out: `blocks.N.attn.in`."""
    return ".".join("N" if word.isdigit() else word for word in stream.split("."))
