"""A loaded model as one program of the native step, built from its anatomy, its family table and its packed modules.

Nothing is copied but norms and biases (float32): matrices are read where the packed modules hold them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regauge.anatomy import model as anatomy_model
from regauge.anatomy.model import Anatomy
from regauge.artifact.codec.base import rows_of
from regauge.hosts.transformers.columns import Step, table_for
from regauge.hosts.transformers.skeleton import body_prefix
from regauge.kernels.cpu.step import FUNCTIONS as CODES
from regauge.kernels.cpu.step import Block, Norm, Program, Site, Tap
from regauge.runtime.matrices.modules import PackedExperts, PackedLinear
from regauge.runtime.step.sites import Unservable, site_of, tap_of

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
TAPS = {
    "attn_in": ("q", "k", "v"),
    "attn_mixed": ("o",),
    "mlp_in": ("gate", "up", "router"),
    "mlp_hidden": ("down",),
}
"""Each tap of a block, and the kinds of sites that read it."""
MOVING = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the length of the text."""


def build(model: Any, anatomy: Anatomy) -> Program:
    """The program of a model.

    Raises:
        Unservable: something in it is not described by a family table, or is held in a way that the step cannot read.
    """
    return _Builder(model, anatomy).program()


class _Builder:
    def __init__(self, model: Any, anatomy: Anatomy) -> None:
        step = table_for(model.config.model_type).step
        if step is None or not anatomy.causal or "head" not in {site.name for site in anatomy.sites}:
            raise Unservable(f"{model.config.model_type} does not decode token by token, or its table does not say how")
        self.model, self.anatomy, self.table = model, anatomy, step
        self.body = body_prefix(model)
        self.blocks_at = f"{self.body}{table_for(model.config.model_type).blocks}."
        self.sites = {site.name: site for site in anatomy.sites}
        self.norms = {norm.name: norm for norm in anatomy.norms}
        self.kinds = rotary_kinds(model.config, step)
        self.reads: dict[str, Tap] = {}

    def program(self) -> Program:
        anatomy, config = self.anatomy, self.model.config
        blocks = [self._block(number) for number in range(anatomy.blocks)]
        softcap = getattr(config, self.table.head_softcap) if self.table.head_softcap else None
        last = self._norm(self.norms["norm"]) if "norm" in self.norms else Norm("none", anatomy.hidden, 0.0)
        ropes = len(self.kinds) if self.table.rotary else 0
        head, tap = self._reading({"head": self._site("head")})
        return Program(blocks, last, head["head"], anatomy.hidden, ropes, softcap or 0.0, tap)

    def _block(self, number: int) -> Block:
        anatomy, plumbing, table = self.anatomy, self.anatomy.plumbing, self.table
        module = self.model.get_submodule(f"{self.blocks_at}{number}")
        name = f"blocks.{number}."
        norms = {
            field: self._norm(self.norms[name + own])
            for field, own in (
                ("attn_norm", "attn.norm"),
                ("q_norm", "attn.q.norm"),
                ("k_norm", "attn.k.norm"),
                ("attn_post", "attn.post"),
                ("mlp_norm", "mlp.norm"),
                ("mlp_post", "mlp.post"),
            )
            if name + own in self.norms
        }
        for needed in ("attn_norm", "mlp_norm"):
            if needed not in norms:
                raise Unservable(f"block {number} has no {needed.replace('_', '.')} of its own")
        experts, taps = self._experts(number), {}
        kinds = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down", "moe.router")
        found = {name + kind: self._site(name + kind) for kind in kinds if name + kind in self.sites}
        for tap, readers in TAPS.items():
            one = {site: part for site, part in (found | experts).items() if site.rpartition(".")[2] in readers}
            read, taps[tap] = self._reading(one)
            found |= {site: part for site, part in read.items() if site in found}
            experts |= {site: part for site, part in read.items() if site in experts}
        sites = {site.rpartition(".")[2]: part for site, part in found.items()}
        stack = self._stack(number, experts)
        if plumbing.activation not in FUNCTIONS:
            raise Unservable(f"the activation {plumbing.activation!r} is not one of the step's")
        if plumbing.arrangement == "post":
            raise Unservable("norms after the sum are not described in the step")
        attention = anatomy.attentions[number]
        if attention is None:
            raise Unservable(f"block {number} has no attention")
        if attention.value_dim != attention.head_dim:
            raise Unservable(f"the values of block {number} have another number of channels than its keys")
        integers = {
            "heads": attention.heads,
            "kv_heads": attention.kv_heads,
            "head_dim": attention.head_dim,
            "rotary": plumbing.rotary if table.rotary else 0,
            "interleaved": int(plumbing.pairing == "interleaved"),
            "rope": self._rope(number),
            "parallel": int(bool(table.parallel and _follow(module, table.parallel))),
            "activation": CODES[FUNCTIONS[plumbing.activation]],
            "window": int(_follow(module, table.window) or 0) if table.window else 0,
            "expert_count": len(stack),
        }
        if stack:
            integers["experts_used"] = int(_follow(module, str(table.experts_used)))
            normalise = table.normalise
            integers["normalise"] = int(bool(_follow(module, normalise) if isinstance(normalise, str) else normalise))
        softcap = _follow(module, table.softcap) if table.softcap else None
        return Block(norms, sites, stack, integers, float(_follow(module, table.scaling)), float(softcap or 0.0), taps)

    def _reading(self, sites: Mapping[str, Site]) -> tuple[dict[str, Site], Tap]:
        """Sites that read one activation, and how they all read it.

        Raises:
            Unservable: they read it in several ways.
        """
        taps = {name: self.reads.get(name, Tap()) for name in sites}
        ways = [tap for tap in taps.values() if not tap.plain]
        tap = ways[0] if ways else Tap()
        others = [name for name in sites if taps[name].plain and not tap.plain]
        if not all(tap.same(way) for way in ways) or (others and tap.transforms):
            raise Unservable(f"{' and '.join(sorted(sites)[:2])} read one activation in several ways")
        return {name: replace(site, unrounded=True) if name in others else site for name, site in sites.items()}, tap

    def _rope(self, number: int) -> int:
        if not self.table.rotary_kinds:
            return 0
        return self.kinds.index(getattr(self.model.config, self.table.rotary_kinds)[number])

    def _norm(self, norm: anatomy_model.Norm) -> Norm:
        gain = None if norm.gain is None else self._parameter(norm.gain.key).float() + norm.offset
        bias = None if norm.bias is None else self._parameter(norm.bias.key).float().clone()
        return Norm(norm.kind, norm.size, norm.eps, None if gain is None else gain.contiguous(), bias)

    def _parameter(self, key: str) -> Tensor:
        path, _, name = key.rpartition(".")
        found = self.model.get_submodule(path)._parameters.get(name)
        if found is None or found.device.type != "cpu":
            raise Unservable(f"{key} is not a parameter in the memory of this CPU")
        return found.detach()  # type: ignore[no-any-return]  # a parameter

    def _site(self, name: str) -> Site:
        site = self.sites[name]
        module = self.model.get_submodule(site.module)
        if isinstance(module, PackedLinear):
            fused = [other for other in self.anatomy.sites if other.weight.key == site.weight.key]
            parts = list(module.parts)
            part = parts[0] if len(parts) == 1 else parts[[other.name for other in fused].index(name)]
            bias = None
            if module.bias is not None:
                rows = rows_of(site.weight, module.out_features) if len(parts) > 1 else slice(None)
                bias = module.bias.detach()[rows].float().contiguous()
            return self._part(name, part, bias)
        packed = module._modules.get("packed_weight")
        if packed is not None:
            return self._part(name, packed)
        return Site(self._full(name), self._bias(site, module))

    def _part(self, name: str, part: Any, bias: Tensor | None = None) -> Site:
        self.reads[name] = tap_of(name, part)
        return site_of(name, part, bias)

    def _bias(self, site: anatomy_model.Site, module: Any) -> Tensor | None:
        if site.bias is None:
            return None
        whole = self._parameter(site.bias.key)
        return whole[rows_of(site.bias, whole.shape[0])].float().contiguous()

    def _full(self, name: str) -> Tensor:
        site = self.sites[name]
        slot, weight = site.weight, self._parameter(site.weight.key)
        if slot.index is not None:
            weight = weight[slot.index]
        if slot.transposed or slot.heads is not None:
            raise Unservable(f"{name} is in full precision and stored another way round")
        if slot.rows is not None:
            weight = weight[slice(*slot.rows)]
        if tuple(weight.shape) != site.shape or not weight.is_contiguous():
            raise Unservable(f"{name} is in full precision and does not lie in one piece")
        return weight

    def _experts(self, number: int) -> dict[str, Site]:
        """Every expert's sites, by name."""
        return {s.name: self._expert(s.name) for s in self.anatomy.in_block(number) if s.expert is not None}

    def _stack(self, number: int, sites: Mapping[str, Site]) -> list[tuple[Site | None, Site, Site]]:
        """(gate or None, up, down) of each expert."""
        numbers = sorted({self.sites[name].expert or 0 for name in sites})
        at = [f"blocks.{number}.moe.{expert}." for expert in numbers]
        return [(sites.get(one + "gate"), sites[one + "up"], sites[one + "down"]) for one in at]

    def _expert(self, name: str) -> Site:
        site = self.sites[name]
        module = self.model.get_submodule(site.module)
        if not isinstance(module, PackedExperts):
            return Site(self._full(name))
        return self._part(name, module.experts[site.expert or 0].get_submodule(site.kind))


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
    positions, like = torch.arange(rows).unsqueeze(0), torch.empty(1, dtype=torch.float32)
    for kind in kinds:
        cosines, sines = module(like, positions) if kind is None else module(like, positions, kind)
        half = cosines.shape[-1] // 2
        found.append((cosines[0, :, :half].float().contiguous(), sines[0, :, :half].float().contiguous()))
    return found
