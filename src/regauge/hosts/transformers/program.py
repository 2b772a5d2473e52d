"""What transformers says of a model beside its modules, for the native step: by family table, and from the modules' own
attributes as they are now. `Reads` remembers each, so that one that changes is seen at the next text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from regauge.anatomy.model import Anatomy
from regauge.hosts.transformers.columns import Step
from regauge.hosts.transformers.skeleton import block_paths, body_prefix
from regauge.hosts.transformers.tables import table_for
from regauge.kernels.cpu.step import Program
from regauge.runtime.step import program
from regauge.runtime.step.program import BlockFacts, Copy, Facts
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
EPSILONS = ("variance_epsilon", "eps")
"""What transformers' norms and torch's call what they add inside the root."""
READING = ("norm", "attn.norm", "mlp.norm")
"""Names of the norms that read the residual, from a block or from the model."""
PROBED = 3
"""Positions of a rotary embedding that tell whether it is still the same."""


@dataclass(frozen=True, eq=False)
class Reads:
    """Attributes that were read, with what they were: what a program was built from."""

    seen: list[tuple[Any, str, Any]] = field(default_factory=list)

    def follow(self, thing: Any, path: str) -> Any:
        """The value at a dotted path of attributes."""
        for name in path.split("."):
            value = getattr(thing, name)
            self.seen.append((thing, name, value))
            thing = value
        return thing

    def unchanged(self) -> bool:
        """Whether every one of them is what it was."""
        return all((now := getattr(thing, name, None)) is value or now == value for thing, name, value in self.seen)


def build(model: Any, anatomy: Anatomy, widths: list[int], reads: Reads) -> tuple[Program, list[Copy]]:
    """The program of a model, and what of it is copied.

    Args:
        widths: channels of a head that each kind of rotary embedding turns.
        reads: takes every attribute that is read.

    Raises:
        Unservable: something in it is not described by a family table, or is held in a way that the step cannot read.
    """
    return program.build(model, anatomy, facts_of(model, anatomy, widths, reads))


def facts_of(model: Any, anatomy: Anatomy, widths: list[int], reads: Reads) -> Facts:
    """What the step must know of a model beside its anatomy.

    Raises:
        Unservable: it makes no text, its table does not say how, or it computes what the step does not.
    """
    config, table, activation = model.config, table_for(model.config).decoding, anatomy.plumbing.activation
    if table is None or not anatomy.causal or "head" not in {site.name for site in anatomy.sites}:
        raise Unservable(f"{config.model_type} does not decode token by token, or its table does not say how")
    if activation not in FUNCTIONS:
        raise Unservable(f"the activation {activation!r} is not one of the step's")
    for refusal in table.refuse:
        if reads.follow(model, f"config.{refusal.attribute}") != refusal.must_be:
            raise Unservable(f"{refusal.attribute} is not {refusal.must_be!r}: {refusal.why}")
    softcap = reads.follow(model, f"config.{table.head_softcap}") if table.head_softcap else None
    blocks = []
    for number, path in enumerate(block_paths(model)):
        module = model.get_submodule(path)
        _check_activation(module, number, activation)
        blocks.append(_block(module, number, anatomy, table, _Kinds(model, table, widths, reads)))
    fixed, added = isinstance(table_for(config).norm.eps, float), residual_of(model, table, reads)
    eps = {
        norm.name: _epsilon(model.get_submodule(norm.module), norm.name, reads, norm.eps if fixed else None)
        / (added**2 if norm.name.removeprefix(f"blocks.{norm.block}.") in READING else 1.0)
        for norm in anatomy.norms
    }
    over = float(reads.follow(model, table.head_over)) if table.head_over else 1.0
    return Facts(FUNCTIONS[activation], blocks, eps, len(widths), float(softcap or 0.0), 1.0 / over)


def residual_of(model: Any, table: Step, reads: Reads) -> float:
    """By what every layer multiplies what it adds to the residual. The step adds without it and so keeps the residual
    divided by it, which a norm gives back but for what is added inside its root.

    Raises:
        Unservable: it is 0, or layers differ in it.
    """
    if table.residual is None:
        return 1.0
    found = {float(reads.follow(model.get_submodule(path), table.residual)) for path in block_paths(model)}
    if len(found) != 1 or 0.0 in found:
        raise Unservable(f"{table.residual} is 0, or not the same number in all layers")
    return found.pop()


def embeddings_of(model: Any, table: Step, reads: Reads) -> float:
    """By what the step multiplies embeddings: as the model does, over what its residual is divided by."""
    if table.residual is None and table.embeddings is None:
        return 1.0
    body = model.get_submodule(body_prefix(model).removesuffix("."))
    own = float(reads.follow(body, table.embeddings)) if table.embeddings else 1.0
    return own / residual_of(model, table, reads)


@dataclass(frozen=True)
class _Kinds:
    """What a config says of each block where blocks differ: which rotary embedding, how wide, and whether a window."""

    model: Any
    table: Step
    widths: list[int]
    reads: Reads

    def window(self, module: Any, number: int) -> int:
        table = self.table
        if table.window_kinds:
            kind = self.reads.follow(self.model, f"config.{table.window_kinds}")[number]
            if kind != "sliding_attention":
                return 0
        return int(self.reads.follow(module, table.window) or 0) if table.window else 0

    def rotary(self, module: Any, number: int) -> tuple[int, int]:
        if not self.widths:
            return 0, 0
        kind = 0
        if self.table.rotary_where and not self.reads.follow(module, self.table.rotary_where):
            return 0, 0
        if self.table.rotary_kinds:
            kinds = self.reads.follow(self.model, f"config.{self.table.rotary_kinds}")
            kind = rotary_kinds(self.model.config, self.table).index(kinds[number])
        return kind, self.widths[kind]


def _block(module: Any, number: int, anatomy: Anatomy, table: Step, kinds: _Kinds) -> BlockFacts:
    experts = any(site.expert is not None for site in anatomy.in_block(number))
    follow, normalise = kinds.reads.follow, table.normalise
    rope, width = kinds.rotary(module, number)
    return BlockFacts(
        scale=float(follow(module, table.scaling)),
        softcap=float(follow(module, table.softcap) or 0.0) if table.softcap else 0.0,
        rope=rope,
        rotary=width,
        window=kinds.window(module, number),
        parallel=bool(follow(module, table.parallel) if isinstance(table.parallel, str) else table.parallel),
        experts_used=int(follow(module, str(table.experts_used))) if experts else 0,
        normalise=experts and bool(follow(module, normalise) if isinstance(normalise, str) else normalise),
    )


def _epsilon(module: Any, name: str, reads: Reads, told: float | None) -> float:
    """As its module has it; `told` is the number of the family's table, for modules that have none of their own."""
    for attribute in EPSILONS:
        if attribute in vars(module):
            return float(reads.follow(module, attribute))
    if told is not None:
        return told
    raise Unservable(f"{name} does not say what it adds inside its root")


def _check_activation(module: Any, number: int, name: str) -> None:
    """That the block computes the function that the config names.

    Raises:
        Unservable: no module in it does.
    """
    wanted = type(ACT2FN[name])
    if not any(type(part) is wanted for part in module.modules()):
        raise Unservable(f"block {number} has no {wanted.__name__}, which its config names as {name!r}")


def rotary_kinds(config: Any, step: Step) -> list[str | None]:
    """The kinds of rotary embedding of a model, in the order of the step's tables."""
    if not step.rotary_kinds:
        return [None]
    return sorted(set(getattr(config, step.rotary_kinds)))


def rotary_module(model: Any, step: Step, reads: Reads) -> Any:
    """The module that makes cosines and sines.

    Raises:
        Unservable: its frequencies depend on the length of the text.
    """
    module = model.get_submodule(f"{body_prefix(model)}{step.rotary}")
    kinds = reads.follow(module, "rope_type")
    moving = {str(kind) for kind in (kinds.values() if isinstance(kinds, Mapping) else [kinds])} & set(MOVING)
    if moving:
        raise Unservable(f"rotary embeddings of type {moving.pop()} change with the length of the text")
    return module


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
