"""What transformers says of a model beside its modules, for the native step: by family table and config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy
from regauge.hosts.transformers.columns import Step, table_for
from regauge.hosts.transformers.skeleton import body_prefix
from regauge.kernels.cpu.step import Program
from regauge.runtime.step import program
from regauge.runtime.step.program import BlockFacts, Facts
from regauge.runtime.step.sites import Unservable

FUNCTIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "quick_gelu": "quick_gelu",
}
"""transformers' names of activations → ours."""
MOVING = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the length of the text."""


def build(model: Any, anatomy: Anatomy) -> Program:
    """The program of a model.

    Raises:
        Unservable: something in it is not described by a family table, or is held in a way that the step cannot read.
    """
    return program.build(model, anatomy, facts_of(model, anatomy))


def facts_of(model: Any, anatomy: Anatomy) -> Facts:
    """What the step must know of a model beside its anatomy.

    Raises:
        Unservable: it makes no text, its table does not say how, or it computes what the step does not.
    """
    config, family = model.config, table_for(model.config.model_type)
    table, activation = family.step, anatomy.plumbing.activation
    if table is None or not anatomy.causal or "head" not in {site.name for site in anatomy.sites}:
        raise Unservable(f"{config.model_type} does not decode token by token, or its table does not say how")
    if activation not in FUNCTIONS:
        raise Unservable(f"the activation {activation!r} is not one of the step's")
    softcap, kinds = getattr(config, table.head_softcap) if table.head_softcap else None, rotary_kinds(config, table)
    stem = f"{body_prefix(model)}{family.blocks}"
    blocks = [_block(model.get_submodule(f"{stem}.{n}"), n, anatomy, config, table) for n in range(anatomy.blocks)]
    return Facts(FUNCTIONS[activation], blocks, len(kinds) if table.rotary else 0, float(softcap or 0.0))


def _block(module: Any, number: int, anatomy: Anatomy, config: Any, table: Step) -> BlockFacts:
    experts = any(site.expert is not None for site in anatomy.in_block(number))
    normalise, softcap = table.normalise, _follow(module, table.softcap) if table.softcap else None
    rope = 0
    if table.rotary_kinds:
        rope = rotary_kinds(config, table).index(getattr(config, table.rotary_kinds)[number])
    return BlockFacts(
        scale=float(_follow(module, table.scaling)),
        softcap=float(softcap or 0.0),
        rope=rope,
        window=int(_follow(module, table.window) or 0) if table.window else 0,
        parallel=bool(table.parallel and _follow(module, table.parallel)),
        experts_used=int(_follow(module, str(table.experts_used))) if experts else 0,
        normalise=experts and bool(_follow(module, normalise) if isinstance(normalise, str) else normalise),
    )


def _follow(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def rotary_kinds(config: Any, step: Step) -> list[str | None]:
    """The kinds of rotary embedding of a model, in the order of the step's tables."""
    if not step.rotary_kinds:
        return [None]
    return sorted(set(getattr(config, step.rotary_kinds)))


def rotary_module(model: Any, step: Step) -> Any:
    """The module that makes cosines and sines.

    Raises:
        Unservable: its frequencies depend on the length of the text.
    """
    parameters: Mapping[str, Any] = getattr(model.config, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, Mapping))]
    moving = {str(kind.get("rope_type")) for kind in kinds} & set(MOVING)
    if moving:
        raise Unservable(f"rotary embeddings of type {moving.pop()} change with the length of the text")
    return model.get_submodule(f"{body_prefix(model)}{step.rotary}")


def rotary_tables(module: Any, kinds: list[str | None], rows: int) -> list[tuple[Tensor, Tensor]]:
    """(cosines, sines), float32 (rows, half the channels that turn), of each kind, from the model's own module."""
    found = []
    positions, like = (
        torch.arange(rows, dtype=torch.int64, device="cpu").unsqueeze(0),
        torch.empty(1, dtype=torch.float32, device="cpu"),
    )
    for kind in kinds:
        cosines, sines = module(like, positions) if kind is None else module(like, positions, kind)
        half = cosines.shape[-1] // 2
        found.append((cosines[0, :, :half].float().contiguous(), sines[0, :, :half].float().contiguous()))
    return found
