"""A loaded model as one program of the native step: what it says of itself, and what its torch modules hold.

A host describes what a tree of modules does not tell (`Facts`); the rest is read here from anatomy and modules. Nothing
is copied but norms and biases (float32, `Copy`): matrices are read where the packed modules hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from regauge.anatomy import model as anatomy_model
from regauge.anatomy.model import Anatomy
from regauge.anatomy.storage import rows_of
from regauge.kernels.cpu.pieces import FUNCTIONS, Block, Norm, Site, Tap, laid
from regauge.kernels.cpu.step import Program
from regauge.runtime.matrices.modules import PackedExperts, PackedLinear
from regauge.runtime.matrices.terms import HeldLowRank
from regauge.runtime.step.sites import Unservable, site_of, tap_of

TAPS = {
    "attn_in": ("q", "k", "v"),
    "attn_mixed": ("o",),
    "mlp_in": ("gate", "up", "router"),
    "mlp_hidden": ("down",),
}
"""Each tap of a block, and the kinds of sites that read it."""
SITES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down", "moe.router")
NORMS = {
    "attn_norm": "attn.norm",
    "q_norm": "attn.q.norm",
    "k_norm": "attn.k.norm",
    "attn_post": "attn.post",
    "mlp_norm": "mlp.norm",
    "mlp_post": "mlp.post",
}


@dataclass(frozen=True)
class BlockFacts:
    """What one block's modules do not tell.

    Attributes:
        scale: of scores; softcap: of scores, 0 for none.
        rope: which rotary embedding; rotary: how many channels of a head it turns, 0 for none.
        window: tokens that attention looks back, 0 for all.
        parallel: attention and feed-forward read the same residual.
        experts_used: of a token; normalise: whether their weights are made to add up to 1.
    """

    scale: float
    softcap: float = 0.0
    rope: int = 0
    rotary: int = 0
    window: int = 0
    parallel: bool = False
    experts_used: int = 0
    normalise: bool = False


@dataclass(frozen=True)
class Facts:
    """What a host says of a model, beside its anatomy and its modules.

    Attributes:
        activation: of the feed-forward layer, a name of the kernels' `FUNCTIONS`.
        eps: inside the root of each norm, by the norm's name.
        ropes: how many kinds of rotary embedding there are; 0 for none.
        softcap: of the logits, 0 for none.
        head: by what logits are multiplied.
    """

    activation: str
    blocks: Sequence[BlockFacts]
    eps: Mapping[str, float]
    ropes: int = 0
    softcap: float = 0.0
    head: float = 1.0


@dataclass(frozen=True, eq=False)
class Copy:
    """Float32 numbers that the program reads, made from a parameter of another dtype.

    Attributes:
        numbers: the copy.
        source: gives what it is a copy of, as that is now.
        offset: added to it; factor: by what the sum is multiplied.
    """

    numbers: Tensor
    source: Callable[[], Tensor]
    offset: float = 0.0
    factor: float = 1.0

    def refresh(self) -> None:
        """Copies again: a parameter's numbers can change without any mark that they did."""
        with torch.inference_mode():  # the copy may have been made inside one
            self.numbers.copy_(self.source())
        if self.offset:
            self.numbers.add_(self.offset)
        if self.factor != 1.0:
            self.numbers.mul_(self.factor)


def build(model: nn.Module, anatomy: Anatomy, facts: Facts) -> tuple[Program, list[Copy]]:
    """The program of a model, and what of it is copied.

    Raises:
        Unservable: something in it is held in a way that the step cannot read.
    """
    builder = _Builder(model, anatomy, facts)
    return builder.program(), builder.copies


class _Builder:
    def __init__(self, model: nn.Module, anatomy: Anatomy, facts: Facts) -> None:
        self.model, self.anatomy, self.facts = model, anatomy, facts
        self.sites = {site.name: site for site in anatomy.sites}
        self.norms = {norm.name: norm for norm in anatomy.norms}
        self.reads: dict[str, Tap] = {}
        self.copies: list[Copy] = []

    def program(self) -> Program:
        anatomy, facts = self.anatomy, self.facts
        blocks = [self._block(number, one) for number, one in enumerate(facts.blocks)]
        if facts.head != 1.0 and ("norm" not in self.norms or self.norms["norm"].gain is None):
            raise Unservable("logits are multiplied, and no norm before the head has a gain to do it by")
        last = self._norm(self.norms["norm"], facts.head) if "norm" in self.norms else Norm("none", anatomy.hidden, 0.0)
        head, tap = self._reading({"head": self._site("head")})
        return Program(blocks, last, head["head"], anatomy.hidden, facts.ropes, facts.softcap, tap)

    def _block(self, number: int, facts: BlockFacts) -> Block:
        plumbing, name = self.anatomy.plumbing, f"blocks.{number}."
        norms = {field: self._norm(self.norms[name + own]) for field, own in NORMS.items() if name + own in self.norms}
        self._check_known(name)
        if facts.parallel and "mlp_norm" not in norms and "attn_norm" in norms:
            norms["mlp_norm"] = norms["attn_norm"]
        for needed in ("attn_norm", "mlp_norm"):
            if needed not in norms:
                raise Unservable(f"block {number} has no {needed.replace('_', '.')} of its own")
        experts, taps = self._experts(number), {}
        found = {name + kind: self._site(name + kind) for kind in SITES if name + kind in self.sites}
        for tap, readers in TAPS.items():
            one = {site: part for site, part in (found | experts).items() if site.rpartition(".")[2] in readers}
            read, taps[tap] = self._reading(one)
            found |= {site: part for site, part in read.items() if site in found}
            experts |= {site: part for site, part in read.items() if site in experts}
        stack = self._stack(number, experts)
        if plumbing.arrangement == "post":
            raise Unservable("norms after the sum are not described in the step")
        attention = self.anatomy.attentions[number]
        if attention is None:
            raise Unservable(f"block {number} has no attention")
        if attention.value_dim != attention.head_dim:
            raise Unservable(f"the values of block {number} have another number of channels than its keys")
        integers = {
            "heads": attention.heads,
            "kv_heads": attention.kv_heads,
            "head_dim": attention.head_dim,
            "rotary": facts.rotary,
            "interleaved": int(plumbing.pairing == "interleaved"),
            "rope": facts.rope,
            "parallel": int(facts.parallel),
            "activation": FUNCTIONS[self.facts.activation],
            "window": facts.window,
            "expert_count": len(stack),
            "experts_used": facts.experts_used,
            "normalise": int(facts.normalise),
        }
        sites = {site.rpartition(".")[2]: part for site, part in found.items()}
        return Block(norms, sites, stack, integers, facts.scale, facts.softcap, taps)

    def _check_known(self, name: str) -> None:
        """Raises Unservable where a block has a site or a norm that the step would leave out."""
        for site in self.anatomy.in_block(int(name.split(".")[1])):
            if site.name.removeprefix(name) not in SITES and site.expert is None:
                raise Unservable(f"{site.name} is not one of the sites that the step computes")
            if site.expert is not None and site.bias is not None:
                raise Unservable(f"{site.name} has a bias, which the step does not add to experts")
        for norm in self.anatomy.norms:
            if norm.name.startswith(name) and norm.name.removeprefix(name) not in NORMS.values():
                raise Unservable(f"{norm.name} is not one of the norms that the step computes")
            owner = self.sites.get(norm.name.removesuffix(".norm"))
            if owner is not None and owner.heads and norm.size != owner.head_dim:
                raise Unservable(f"{norm.name} is over all heads at once, and the step's is over each")

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

    def _norm(self, norm: anatomy_model.Norm, factor: float = 1.0) -> Norm:
        gain, bias = (
            None if slot is None else self._copied(self._parameter(slot.key), slice(None), offset, factor)
            for slot, offset in ((norm.gain, norm.offset), (norm.bias, 0.0))
        )
        return Norm(norm.kind, norm.size, self.facts.eps[norm.name], gain, bias)

    def _copied(self, whole: Tensor, rows: slice | Tensor, offset: float = 0.0, factor: float = 1.0) -> Tensor:
        """Rows of a vector in float32, which follow it when they are refreshed."""
        found = torch.empty(whole[rows].shape, dtype=torch.float32, device="cpu")
        self.copies.append(Copy(found, lambda: whole[rows], offset, factor))
        self.copies[-1].refresh()
        return found

    def _parameter(self, key: str) -> Tensor:
        path, _, name = key.rpartition(".")
        found = self.model.get_submodule(path)._parameters.get(name)
        if found is None or found.device.type != "cpu":
            raise Unservable(f"{key} is not a parameter in the memory of this CPU")
        return found.detach()

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
                bias = self._copied(module.bias.detach(), rows)
            return self._part(name, part, bias)
        packed = module._modules.get("packed_weight")
        if packed is not None:
            return self._part(name, packed)
        return Site(self._full(name), self._bias(site, module))

    def _part(self, name: str, part: Any, bias: Tensor | None = None) -> Site:
        self.reads[name] = tap_of(name, part)
        site = site_of(name, part, bias)
        if site.low_rank is not None:
            low_rank = next(cast(HeldLowRank, term) for term in part.added)
            if low_rank.groups and len(low_rank.right):  # two factors, which the step reads as one
                self.copies.append(Copy(site.low_rank[1], lambda: low_rank.right_RI))
        return site

    def _bias(self, site: anatomy_model.Site, module: Any) -> Tensor | None:
        if site.bias is None:
            return None
        whole = self._parameter(site.bias.key)
        return self._copied(whole, rows_of(site.bias, whole.shape[0]))

    def _full(self, name: str) -> Tensor:
        site = self.sites[name]
        slot, weight = site.weight, self._parameter(site.weight.key)
        if slot.index is not None:
            weight = weight[slot.index]
        if slot.transposed or slot.heads is not None:
            raise Unservable(f"{name} is in full precision and stored another way round")
        if slot.rows is not None:
            weight = weight[slice(*slot.rows)]
        if tuple(weight.shape) != site.shape or not laid(weight):  # rows may be parts of longer ones
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
