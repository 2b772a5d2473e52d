"""Stacks of experts, one expert at a time: so that what each is given can be seen or changed, and how each is held.

transformers' own stacks differ in how gate and up lie in one parameter, in biases, and in what is made of the two. The
first two stand in the sites' slots; the last is asked of transformers' own module, whose parameters are taken out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from regauge.anatomy.members import Member
from regauge.anatomy.model import Anatomy, Site
from regauge.anatomy.storage import Place, take
from regauge.hosts.transformers.columns import Table
from regauge.hosts.transformers.settings import lookup, own_config
from regauge.hosts.transformers.tables import table_for
from regauge.runtime.modules import put

ROUTES = "top_k"
"""What routers of all families call the number of experts that a token goes to."""
ALIGNED = 8
"""Numbers of 2 bytes by which torch's grouped product of experts wants rows to begin: 16 bytes."""


class Gating(nn.Module):
    """What a stack of experts makes of gate and up (n tokens, neurons): act(gate) · up, or what its own code does.

    Args:
        experts: transformers' module; its parameters are let go.
        turns: whether gate and up lie in turn, a row of each, rather than one after the other.
    """

    def __init__(self, experts: Any, turns: bool) -> None:
        super().__init__()
        from transformers.integrations.moe import _default_apply_gate

        self.turns = turns
        rule = getattr(experts, "_apply_gate", None)
        self.own = rule is not None and rule.__func__ is not _default_apply_gate
        if self.own:
            for name in list(experts._parameters):
                del experts._parameters[name]
            self.experts = experts
        else:
            self.activation: Callable[[Tensor], Tensor] = experts.act_fn

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        if not self.own:
            return self.activation(gate) * up
        both = torch.stack([gate, up], -1).flatten(-2) if self.turns else torch.cat([gate, up], -1)
        found: Tensor = self.experts._apply_gate(both)
        return found


def gating(experts: Any, sites: Sequence[Site]) -> Gating:
    """What a stack of experts makes of gate and up."""
    return Gating(experts, any(site.kind == "gate" and site.weight.heads is not None for site in sites))


class ExpertLoop(nn.Module):
    """A stack of gated experts, one at a time.

    Same parameters and same sums as transformers' own eager form. `see(role, expert, x, tokens)` may look at or replace
    the input x (n, I) of `up`, `gate` or `down`; tokens says which rows of the batch.

    Args:
        experts: transformers' module; its parameters go over to this.
        sites: those in it.
    """

    def __init__(self, experts: Any, sites: Sequence[Site]) -> None:
        super().__init__()
        for name, parameter in experts._parameters.items():
            self.register_parameter(name, parameter)
        self.combine = gating(experts, sites)
        self._sites = {(site.kind, site.expert or 0): site for site in sites}
        self.count = 1 + max(expert for _, expert in self._sites)
        self.see: Callable[[str, int, Tensor, Tensor], Tensor] | None = None

    def forward(self, hidden: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None) -> Tensor:
        return looped(hidden, top_k_index, top_k_weights, self.count, self._expert)

    def _expert(self, expert: int, x: Tensor, tokens: Tensor) -> Tensor:
        gate = self._product("gate", expert, x, tokens)
        inner = self.combine(gate, self._product("up", expert, x, tokens))
        return self._product("down", expert, inner, tokens)

    def _product(self, role: str, expert: int, x: Tensor, tokens: Tensor) -> Tensor:
        site = self._sites[role, expert]
        x = x if self.see is None else self.see(role, expert, x, tokens)
        weight = take(self._held(site.weight.key), Place(site.weight, site.shape))
        bias = None
        if site.bias is not None:
            bias = take(self._held(site.bias.key), Place(site.bias, site.shape[:1]))
        return nn.functional.linear(x, weight, bias)

    def _held(self, key: str) -> Tensor:
        return cast(Tensor, self._parameters[key.rpartition(".")[2]])  # functional_call puts plain tensors there


def looped(
    hidden: Tensor,
    top_k_index: Tensor | None,
    top_k_weights: Tensor | None,
    count: int,
    expert: Callable[[int, Tensor, Tensor], Tensor],
) -> Tensor:
    """The sums of a mixture: each token through its experts, weighted; or, without an index, every token through every
    expert: `hidden` holds them once for each expert then.

    Args:
        expert: (number, x (n, I), which tokens these are) → (n, O).
    """
    if top_k_index is None or top_k_weights is None:
        rows = torch.arange(hidden.shape[0] // count, dtype=torch.int64, device=hidden.device)
        return torch.cat([expert(number, x, rows) for number, x in enumerate(hidden.chunk(count))])
    out = torch.zeros_like(hidden)
    for number in range(count):
        tokens, position = torch.where(top_k_index == number)
        if tokens.numel() == 0:
            continue
        y = expert(number, hidden[tokens], tokens) * top_k_weights[tokens, position, None]
        out = out.index_add(0, tokens, y.to(out.dtype))
    return out


def loop_experts(model: Any, anatomy: Anatomy) -> None:
    """Replaces, in place, every stack of experts by an `ExpertLoop` with the same parameters."""
    stacks: dict[str, list[Site]] = {}
    for site in anatomy.sites:
        if site.expert is not None:
            stacks.setdefault(site.module, []).append(site)
    for path, sites in stacks.items():
        put(model, path, ExpertLoop(model.get_submodule(path), sites))


def routed(table: Table, config: Any, sites: Sequence[Site]) -> int:
    """Experts that a token goes to; 0 where there are none, or its router takes no fewer.

    Args:
        config: of the model that the table describes.
    """
    name = table.config.routed
    return int(lookup(config, name, 0)) if name and any(site.expert is not None for site in sites) else 0


def route_config(config: Any, member: Member) -> None:
    """Tells a config, in place, how many experts a token of a member goes to."""
    count, table = member.anatomy.plumbing.routed, table_for(config)
    if count != member.whole.plumbing.routed:
        own, name = own_config(table, config), table.config.routed
        vars(own)[own.attribute_map.get(name, name)] = count


def route(tree: Any, member: Member) -> None:
    """Tells the modules of a member, and their configs, how many experts a token goes to."""
    count, before = member.anatomy.plumbing.routed, member.whole.plumbing.routed
    if count == before:
        return
    route_config(tree.config, member)
    for module in tree.modules():
        for name in (ROUTES, table_for(tree.config).config.routed):
            if vars(module).get(name) == before:
                setattr(module, name, count)


def biases(sites: Sequence[Site], full: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Site → its bias, of the sites of a stack that have one."""
    found = {}
    for site in sites:
        if site.bias is not None:
            found[site.name] = take(full[site.bias.key], Place(site.bias, site.shape[:1])).to(dtype).clone()
    return found


def plain_experts(config: Any, anatomy: Anatomy) -> None:
    """Has transformers multiply by one expert after another where its grouped product refuses their shapes
    ("strides should be multiple of 16 bytes"). Changes the config of the part that has them.

    Args:
        config: of a model, before it is built or after.
    """
    if any(site.expert is not None and site.shape[1] % ALIGNED for site in anatomy.sites):
        own_config(table_for(config), config)._experts_implementation = "eager"
