"""Artifacts for tests, made without the engine: each site rounded to nearest, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regauge import parts
from regauge.anatomy.model import Anatomy, Site
from regauge.artifact.codec.base import Layout, Wire
from regauge.artifact.codec.choose import choose
from regauge.artifact.codec.taps import by_tap
from regauge.artifact.config import artifact_files
from regauge.artifact.staging import Staging
from regauge.formats.base import Codes
from regauge.formats.readings import Reading, dynamic
from regauge.formats.terms import summed
from regauge.hosts.transformers.source import Source
from regauge.parts import INPUTS, WEIGHTS, Point


@dataclass(frozen=True)
class Choice:
    """What a test wants of one site: the point of its weight, and how it reads its tap."""

    point: Point
    reading: Point | None = None

    @property
    def activations(self) -> Reading | None:
        """How what the site reads is rounded, from each call's own values."""
        return None if self.reading is None else dynamic(parts.format_of(self.reading))


def choice(
    grid: str,
    grain: str = "channel",
    scale: str = "f32",
    ranger: str = "absmax",
    inputs: str | None = None,
    lorc: int = 0,
) -> Choice:
    """A choice by its spellings, rounded to nearest."""
    low = {"compensator": f"lorc:{lorc}"} if lorc else {}
    point = parts.point(WEIGHTS, grid=grid, grain=grain, ranger=ranger, scale=scale, rounder="nearest", **low)
    return Choice(point, parts.point(INPUTS, grid=inputs) if inputs else None)


@dataclass
class Made:
    """An artifact with what it was made of: `weights` are the canonical tensors that it stands for, float32."""

    path: Path
    wire: Wire
    refusals: tuple[str, ...]
    weights: dict[str, Tensor]
    source: Source


def layout_of(source: Anatomy, anatomy: Anatomy, choices: Mapping[str, Choice | None], *more: Any) -> Layout:
    """The layout of what is wanted of each site."""
    points = {name: how and how.point for name, how in choices.items()}
    inputs, apart = by_tap(anatomy, {name: how and how.reading for name, how in choices.items()})
    return Layout(source, anatomy, points, *more, inputs=inputs, apart=apart)


def make(
    model: Path,
    out: Path,
    choose_for: Callable[[Site], Choice | None] | Mapping[str, Choice | None],
    prefer: str | None = None,
    anatomy: Anatomy | None = None,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> Made:
    """Quantises a checkpoint into an artifact. `anatomy` and `change` stand for what moves did."""
    source = Source.open(model)
    anatomy = anatomy or source.anatomy
    pick = choose_for.get if isinstance(choose_for, Mapping) else None
    choices = {s.name: pick(s.name) if pick else choose_for(s) for s in anatomy.sites}  # type: ignore[operator]  # one of two
    if anatomy.tied:
        choices["head"] = None
    chosen = choose(layout_of(source.anatomy, anatomy, choices, source.dtype, source.shapes), prefer)
    total, weights = anatomy.blocks + 2, {}
    with Staging(out, {"test": "artifact"}) as staging:
        for index in range(total):
            block = index - 1 if 0 < index <= anatomy.blocks else None
            tensors = change(dict(source.block(block)))
            if block is None:
                last = [name for name in tensors if name.startswith(("norm.", "head."))]
                tensors = {n: t for n, t in tensors.items() if (n in last) == (index > 0)}
                if anatomy.tied:
                    tensors.pop("head.weight", None)
            codes: dict[str, Codes] = {}
            for name in list(tensors):
                site = name.removesuffix(".weight")
                found = choices.get(site) if name.endswith(".weight") else None
                if found is not None:
                    w_OI = tensors.pop(name).float()
                    codes[site] = encode(w_OI, found)
                    weights[name] = decode(codes[site], found)
            weights |= {name: tensor.float() for name, tensor in tensors.items()}
            packed = chosen.wire.pack(tensors, codes)
            if index:
                packed |= source.extras(None if index == total - 1 else block)
            staging.write(chosen.wire.shard(index, total), packed)
        staging.finish(artifact_files(source.path, chosen.wire, staging.index(), "name: test\n", "{}"))
    if anatomy.tied:
        weights["head.weight"] = weights["embed.weight"]
    return Made(out, chosen.wire, chosen.refusals, weights, source)


def encode(w_OI: Tensor, how: Choice) -> Codes:
    fmt = parts.format_of(how.point)
    codes = fmt.encode(w_OI)
    compensator = parts.compensator_of(how.point)
    terms = () if compensator is None else compensator(w_OI, fmt.decode(codes), {})
    return Codes(codes.codes_OI, codes.step, terms)


def decode(codes: Codes, how: Choice) -> Tensor:
    return summed(codes, parts.format_of(how.point))


def outputs(model: Any, inputs: Tensor) -> Tensor:
    """Logits, or the last hidden state of a model without a head; float32."""
    with torch.inference_mode():
        if model.main_input_name == "pixel_values":
            found = model(pixel_values=inputs.to(model.dtype))
        else:
            found = model(input_ids=inputs)
    return (found.logits if "logits" in found else found.last_hidden_state).float()
