"""Models whose blocks differ, as artifacts: streams of every kind cut, another part in each block."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regauge.anatomy.model import Anatomy, Weights
from regauge.anatomy.moves import Move, apply, transform
from regauge.hosts.transformers.source import Source
from tests.artifacts import Made, choice, make
from tests.pico import pico, save

FORMS = {"full": None, "int4": choice("int4", "group:5 else channel", "f16"), "nf4": choice("nf4")}
UNPACKED = ("position", "router", "type", "patch")


def moves_of(anatomy: Anatomy, kind: str) -> list[Move]:
    """Another part of the streams of a kind in each block; of the residual, all but three channels."""
    if kind == "residual":
        return [Move("select", "residual", torch.arange(anatomy.hidden - 3).flip(0))]
    found = []
    for stream in anatomy.streams:
        if stream.kind == kind and "select" in stream.admits:
            kept = max(1, stream.size - 1 - (4 if kind == "ffn" else 1) * (stream.block or 0))
            found.append(Move("select", stream.name, torch.arange(stream.size).flip(0)[:kept]))
    return found


@dataclass
class CutModel:
    """A pico, its artifact with streams cut, and the anatomy."""

    model: Any
    made: Made
    anatomy: Anatomy


def cut(folder: Path, name: str, kind: str, form: str) -> CutModel:
    """Cuts the streams of a kind and writes what is left in our own format."""
    model = pico(name)
    path = save(model, folder / "source")
    source = Source.open(path)
    moves = moves_of(source.anatomy, kind)
    anatomy = transform(moves, source.anatomy)

    def change(weights: Weights) -> Weights:
        return apply(moves, source.anatomy, weights)

    wanted = FORMS[form]
    made = make(
        path,
        folder / "out",
        lambda site: None if site.kind in UNPACKED else wanted,
        prefer="regauge",
        anatomy=anatomy,
        change=change,
    )
    return CutModel(model, made, anatomy)
