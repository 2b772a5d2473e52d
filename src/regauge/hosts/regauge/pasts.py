"""What a VAR keeps of the scales so far, by a plan: all of it, chosen tokens of each head, or codes.

A layer is given the keys and values of a new scale, gives what attention reads, and keeps what its rule says: after
each scale, since all tokens of one are read at once. What no scale to come reads is kept by nobody, the last scale's
own among it.

Legend: B batch, H heads, T tokens, Q queries, D channels of a head, N tokens of all heads and sequences together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from regauge.cache.base import NOTHING, Layer, Seen, probabilities
from regauge.cache.choosing import Choice, choose, disposed
from regauge.cache.scheme import BlockCache, CachePlan, Policy, Scheme
from regauge.cache.triggers import due
from regauge.errors import SettingError
from regauge.hosts.regauge.stages import Layers
from regauge.runtime.store.packed import Packed


@dataclass(frozen=True, eq=False)
class Read:
    """What attention reads.

    Attributes:
        keys_BHTD, values_BHTD: of the scales so far, as they are held, and of the new one.
        held_BHT: which of them are tokens; None: all.
    """

    keys_BHTD: Tensor
    values_BHTD: Tensor
    held_BHT: Tensor | None = None


@runtime_checkable
class Kept(Protocol):
    """One layer's."""

    def add(self, queries_BHQD: Tensor, keys_BHTD: Tensor, values_BHTD: Tensor, last: bool) -> Read:
        """A new scale; `last`: no scale to come reads it."""

    @property
    def bytes(self) -> int: ...


class Whole:
    """Keys and values as they come."""

    def __init__(self) -> None:
        self._held: tuple[Tensor, Tensor] | None = None

    def add(self, queries_BHQD: Tensor, keys_BHTD: Tensor, values_BHTD: Tensor, last: bool) -> Read:
        new = keys_BHTD, values_BHTD
        if self._held is not None:
            new = torch.cat([self._held[0], keys_BHTD], 2), torch.cat([self._held[1], values_BHTD], 2)
        self._held = None if last else new
        return Read(*new)

    @property
    def bytes(self) -> int:
        return _bytes(*(self._held or ()))


class Coded:
    """Codes of older tokens behind a window of whole ones."""

    def __init__(self, scheme: Scheme) -> None:
        self._store = Packed(scheme)

    def add(self, queries_BHQD: Tensor, keys_BHTD: Tensor, values_BHTD: Tensor, last: bool) -> Read:
        if not last:
            return Read(*self._store.append(keys_BHTD, values_BHTD))
        held = self._store.read() if self._store.length else (keys_BHTD[:, :, :0], values_BHTD[:, :, :0])
        self._store.reset()
        return Read(torch.cat([held[0], keys_BHTD], 2), torch.cat([held[1], values_BHTD], 2))

    @property
    def bytes(self) -> int:
        return self._store.bytes


class Chosen:
    """Tokens of each head that a policy chooses, of the heads one after another without room between.

    Args:
        window: newest tokens that always stay.
        scale: what products of queries and keys are multiplied by.
    """

    def __init__(self, policy: Policy, window: int, layer: Layer, scale: float) -> None:
        self.policy, self.window, self.layer, self.scale = policy, window, layer, scale
        self._rows: tuple[Tensor, ...] = ()  # keys, values (N, D), positions, and mass where it is read (N,)
        self._counts_BH: Tensor | None = None
        self._text = self._chosen_at = 0

    def add(self, queries_BHQD: Tensor, keys_BHTD: Tensor, values_BHTD: Tensor, last: bool) -> Read:
        seen = self._seen(queries_BHQD, keys_BHTD, values_BHTD)
        if last:
            self._rows, self._counts_BH = (), None
        else:
            self._keep(seen)
        held_BHT = seen.positions_BHT >= 0
        return Read(seen.keys_BHTD, seen.values_BHTD, None if bool(held_BHT.all()) else held_BHT)

    @property
    def bytes(self) -> int:
        return _bytes(*self._rows, *(() if self._counts_BH is None else (self._counts_BH,)))

    def _seen(self, queries_BHQD: Tensor, keys_BHTD: Tensor, values_BHTD: Tensor) -> Seen:
        batch, heads, new, _ = keys_BHTD.shape
        text_T = torch.arange(self._text, self._text + new, dtype=torch.int32, device=keys_BHTD.device)
        fresh = [keys_BHTD, values_BHTD, text_T.expand(batch, heads, -1)]
        if self.policy.score.accumulates:
            fresh.append(torch.zeros(batch, heads, new, dtype=torch.float32, device=keys_BHTD.device))
        rows = [torch.cat([old, one], 2) for old, one in zip(self._padded(fresh), fresh, strict=True)]
        self._text += new
        asked = int(max(self.policy.score.queries, self.policy.budget.queries, 0))
        found = Seen(
            rows[0], rows[1], rows[2].long(), _spread(queries_BHQD, asked).unsqueeze(2), min(self.window, self._text),
            self.scale, text_B=torch.full((batch,), self._text, dtype=torch.int64, device="cpu"), causal=False,
        )  # fmt: skip
        if not self.policy.score.accumulates:
            return found
        every = probabilities(Seen(**vars(found) | {"queries_BHGQD": queries_BHQD.unsqueeze(2)}))
        return Seen(**vars(found) | {"mass_BHT": rows[3] + every.sum((2, 3))})

    def _padded(self, like: Sequence[Tensor]) -> list[Tensor]:
        """What is held, (B, H, T, …), with nothing in front of heads that hold less than others."""
        counts_BH = self._counts_BH
        if counts_BH is None:
            return [one[:, :, :0] for one in like]
        most = int(counts_BH.max())
        shape = (*counts_BH.shape, most)
        if bool((counts_BH == most).all()):
            return [rows.view(*shape, *rows.shape[1:]) for rows in self._rows]
        place_T = torch.arange(most, dtype=torch.int64, device=counts_BH.device)
        is_BHT = place_T >= most - counts_BH.unsqueeze(-1)
        found = []
        for rows in self._rows:
            fill = NOTHING if rows.dtype == torch.int32 else 0
            found.append(rows.new_full((*shape, *rows.shape[1:]), fill))
            found[-1][is_BHT] = rows
        return found

    def _keep(self, seen: Seen) -> None:
        trigger, rows = self.policy.trigger, seen.keys_BHTD.shape[2]
        time = trigger.kind == "prefill" or due(trigger, self._text, self._chosen_at, rows)
        real_BHT = seen.positions_BHT >= 0
        if not time or seen.older <= 0:
            self._take(seen, real_BHT)
            return
        self._chosen_at = self._text
        choice = choose(self.policy.score, self.policy.budget, seen, self.layer)
        kept_BHT = functional.pad(choice.kept_BHO, (0, seen.window), value=True) & real_BHT
        self._take(self._merged(seen, choice) if self.policy.disposal.merges else seen, kept_BHT)

    def _take(self, seen: Seen, kept_BHT: Tensor) -> None:
        mass = () if seen.mass_BHT is None else (seen.mass_BHT[kept_BHT],)
        positions_N = seen.positions_BHT[kept_BHT].to(torch.int32)
        self._rows = (seen.keys_BHTD[kept_BHT], seen.values_BHTD[kept_BHT], positions_N, *mass)
        self._counts_BH = kept_BHT.sum(-1)

    def _merged(self, seen: Seen, choice: Choice) -> Seen:
        """With what is let go in what is kept."""
        keys_BHTD, values_BHTD = seen.keys_BHTD.clone(), seen.values_BHTD.clone()
        for b, row in enumerate(disposed(self.policy.disposal, seen, choice)):
            for h, (keys_KD, values_KD) in enumerate(row):
                at_K = choice.kept_BHO[b, h].nonzero().flatten()
                keys_BHTD[b, h, at_K], values_BHTD[b, h, at_K] = keys_KD, values_KD
        return Seen(**vars(seen) | {"keys_BHTD": keys_BHTD, "values_BHTD": values_BHTD})


class Past:
    """Keys and values of the scales so far, for each layer that a scale to come still runs.

    Args:
        layers: of each scale.
        plan: what each layer keeps; None: everything.
        scale: what products of queries and keys are multiplied by.
    """

    def __init__(self, layers: Layers, plan: CachePlan | None = None, scale: float = 1.0) -> None:
        self.layers, self.plan, self.scale = layers, plan, scale
        self._kept: dict[int, Kept] = {}
        self._now = 0
        self.most = 0

    def begin(self, scale: int) -> None:
        """Frees what no scale from this one on reads."""
        self._now = scale
        wanted = {layer for some in self.layers[scale:] for layer in some}
        self._kept = {layer: kept for layer, kept in self._kept.items() if layer in wanted}

    def append(self, layer: int, queries_BHQD: Tensor, keys_BHTD: Tensor, values_BHTD: Tensor) -> Read:
        """What a layer's attention over a new scale reads."""
        if layer not in self._kept:
            self._kept[layer] = self._made(layer)
        last = not any(layer in some for some in self.layers[self._now + 1 :])
        found = self._kept[layer].add(queries_BHQD, keys_BHTD, values_BHTD, last)
        self.most = max(self.most, self.bytes)
        return found

    def _made(self, layer: int) -> Kept:
        blocks = () if self.plan is None else self.plan.blocks
        rule = blocks[layer] if blocks else None
        if rule is None or (rule.policy is None and rule.scheme.whole):
            return Whole()
        if rule.policy is None:
            return Coded(rule.scheme)
        return Chosen(rule.policy, rule.scheme.window, Layer(layer, len(blocks), 1), self.scale)

    @property
    def bytes(self) -> int:
        """Of what is held now."""
        return sum(kept.bytes for kept in self._kept.values())


def check(plan: CachePlan) -> None:
    """
    Raises:
        SettingError: it asks for what a cache of scales cannot keep.
    """
    for block in plan.blocks:
        if block is not None and (why := _why_not(block)):
            raise SettingError(f"{plan.name} cannot be kept by a model that draws by scales: {why}")


def _why_not(block: BlockCache) -> str:
    if block.merge is not None:
        return "layers are not merged there; leave merge out"
    if block.policy is None:
        return ""
    if not block.scheme.whole:
        return "tokens are let go or put in codes, not both; leave the budget or the formats out"
    return "queries are not turned by position, which this score undoes" if block.policy.score.turns else ""


def _spread(queries_BHQD: Tensor, count: int) -> Tensor:
    """So many queries of a scale's map, or fewer: the middles of as many squares (ScaleKV, arXiv 2505.19602)."""
    side = math.isqrt(queries_BHQD.shape[2])
    squares = min(math.isqrt(count), side)
    if squares == side:
        return queries_BHQD
    middles = [(2 * number + 1) * side // (2 * squares) for number in range(squares)]
    return queries_BHQD[:, :, [row * side + column for row in middles for column in middles]]


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
