"""Two layers that keep one direction a token: blocks of directions that lie once in memory, and each layer's lengths.

When a prompt has been read, the deeper layer's watcher merges both layers' older tokens (`cache/merges.py`). Those that
are too far apart in keys or in values are retained, rounded up to whole blocks, and lie with the tokens that come later
in each layer's own blocks. What comes later is not merged: the paper merges it too.

Legend: B sequences, H KV heads, O older tokens, M tokens merged (of the longest sequence), D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from regauge.cache.merges import AcrossLayer, Merged, in_blocks
from regauge.kernels.attention import Part
from regauge.runtime.store.choosing import Asked
from regauge.runtime.store.growing import new_stamp
from regauge.runtime.store.packed import Packed
from regauge.runtime.store.sealing import codings, turned
from regauge.runtime.store.shelf import Shelf
from regauge.runtime.store.waiting import Waiting


@dataclass(eq=False)
class Common:
    """What one of two layers reads of their directions.

    Attributes:
        shelf: directions, as keys and as values: the same object for both layers.
        lengths: (B, M), float32, of keys and of values: this layer's.
        firsts_BH: how many tokens are padding, in front.
        owner: whether it answers for the shelf: its bytes, and its order.
    """

    shelf: Shelf
    lengths: tuple[Tensor, Tensor]
    firsts_BH: Tensor
    owner: bool

    def read(self) -> tuple[Tensor, Tensor]:
        """(keys, values), float32 (B, H, M, D)."""
        keys, values = (
            held * length_BM[:, None, :, None] for held, length_BM in zip(self.shelf.read(), self.lengths, strict=True)
        )
        return keys, values

    def part(self) -> Part:
        """As attention reads it; the lengths of a token are the same for all heads."""
        batch, most = self.lengths[0].shape
        base = self.shelf.part(self.firsts_BH)
        first_B1 = torch.arange(batch, dtype=torch.int64, device=self.lengths[0].device)[:, None] * most
        offsets_BH = first_B1.expand(base.lengths_BK.shape).contiguous()
        keys, values = (length_BM.flatten() for length_BM in self.lengths)
        return replace(base, key_rows=keys, value_rows=values, row_offsets_BK=offsets_BH)

    def pick(self, index_B: Tensor) -> None:
        """The sequences in another order: the owner first, then the other."""
        if self.owner:
            self.shelf.pick(index_B)
        keys, values = (length_BM.index_select(0, index_B.to(length_BM.device)) for length_BM in self.lengths)
        self.lengths, self.firsts_BH = (keys, values), self.firsts_BH[index_B.cpu()]

    @property
    def bytes(self) -> int:
        """Of this layer's lengths, and of the directions where it answers for them."""
        return sum(4 * length_BM.numel() for length_BM in self.lengths) + (self.shelf.bytes if self.owner else 0)


class Sharing(Shelf):
    """A shelf of a layer's own, behind what it has in common with another."""

    shared: ClassVar[bool] = True
    common: Common

    @classmethod
    def of(cls, own: Shelf, common: Common) -> Sharing:
        """A layer's own shelf with what it shares."""
        made = cls.__new__(cls)
        made.__setstate__(vars(own) | {"common": common})
        return made

    def read(self) -> tuple[Tensor, Tensor]:
        keys, values = (torch.cat(pair, 2) for pair in zip(self.common.read(), super().read(), strict=True))
        return keys, values

    def held_rows(self, firsts_BH: Tensor | None, window: int) -> Tensor | None:
        batch, heads = self.counts_BH.shape
        first = self.common.shelf.held_rows(self.common.firsts_BH, 0)
        own = super().held_rows(firsts_BH, window)
        if own is None:
            rows = int(self.counts_BH[0, 0]) * self.tokens + window
            own = torch.ones(batch, heads, rows, dtype=torch.bool, device="cpu")
        assert first is not None  # some are padding, or none: both are said
        return torch.cat((first, own), 2)

    def parts(self, firsts_BH: Tensor | None) -> tuple[Part, ...]:
        return (self.common.part(), *super().parts(firsts_BH))

    def pick(self, index_B: Tensor) -> None:
        super().pick(index_B)
        self.common.pick(index_B)

    @property
    def bytes(self) -> int:
        return super().bytes + self.common.bytes


class Sharer(Waiting):
    """Merges a layer's older tokens with those of the layer before it, once, when the prompt has been read."""

    def __init__(self, merge: AcrossLayer, shallow: Packed) -> None:
        super().__init__()
        self.merge, self.shallow = merge, shallow

    def begin(self, store: Packed) -> None:
        super().begin(store)
        self.shallow.hold()

    def expect(self, store: Packed, tokens: int) -> None:
        """A later prompt is not merged."""
        if not store.length:
            super().expect(store, tokens)

    def wants(self, store: Packed, new: int) -> bool:
        """Whether attention over the next tokens must be watched."""
        return self.pending

    def saw(self, store: Packed, asked: Asked, one: bool) -> None:
        """After attention over new tokens, which both stores hold."""
        self.blind = False
        if not self.pending or not self.over(store, one):
            return
        if store.record_past and store.settled <= store.scheme.window:
            return
        share(self.merge, self.shallow, store, asked.starts_B.cpu())
        self.pending, self.expected = False, None
        for one_of in (self.shallow, store):
            one_of.release()


def share(merge: AcrossLayer, shallow: Packed, deep: Packed, starts_B: Tensor) -> None:
    """Merges the older tokens of two stores that have sealed nothing yet."""
    older = max(0, deep.settled - deep.scheme.window) // deep.tokens * deep.tokens
    if not older or shallow.origin or deep.origin:
        return
    pair = [[memory[:, :, :older] for memory in store.read()] for store in (shallow, deep)]
    real_BO = torch.arange(older, dtype=torch.int64, device="cpu") >= starts_B[:, None]
    keys, values = (merge(pair[0][role], pair[1][role], real_BO.to(pair[0][role].device)) for role in (0, 1))
    spread_BO = torch.maximum(keys.spread_BT, values.spread_BT).cpu()
    apart_BO = in_blocks(spread_BO, (keys.retained_BT | values.retained_BT).cpu(), deep.tokens, ~real_BO)
    heads = pair[0][0].shape[1]
    for store, held in zip((shallow, deep), pair, strict=True):
        own = [[(held[0][b, h, at], held[1][b, h, at]) for h in range(heads)] for b, at in enumerate(apart_BO)]
        store.replace(own, _padding(apart_BO & ~real_BO, heads), deep.length - older)
    common = _directions(deep, keys, values, ~apart_BO)
    firsts_BH = _padding(~apart_BO & ~real_BO, heads)
    for store, owner in ((shallow, True), (deep, False)):
        lengths = tuple(
            _lengths(merged.shallow_BT if owner else merged.deep_BT, ~apart_BO) for merged in (keys, values)
        )
        store.shelf = Sharing.of(store.shelve(), Common(common, (lengths[0], lengths[1]), firsts_BH, owner))
        store.stamp = new_stamp()


def _directions(like: Packed, keys: Merged, values: Merged, which_BO: Tensor) -> Shelf:
    """A shelf of the tokens that are merged."""
    memory = like.memory
    batch, heads = memory[0].shape[:2]
    shelf = Shelf(codings(like.scheme, *memory), batch, heads, memory[0].device)
    flat: list[Any] = []
    for merged in (keys, values):
        runs = [merged.directions_BHTD[b, h, at] for b, at in enumerate(which_BO) for h in range(heads)]
        x = torch.cat(runs).to(memory[0].dtype)
        flat.append((turned(x.shape[-1])(x) if like.scheme.hadamard else x)[None, None])
    counts_BH = (which_BO.sum(1) // like.tokens)[:, None].expand(batch, heads)
    shelf.fill(shelf.sealed(flat[0], flat[1]).flat(), counts_BH.contiguous())
    return shelf


def _lengths(length_BO: Tensor, which_BO: Tensor) -> Tensor:
    """(B, M) of the tokens that are merged, in order; 0 behind the last."""
    counts_B = which_BO.sum(1)
    found = length_BO.new_zeros(len(counts_B), int(counts_B.max()))
    for row, (length_O, which_O) in enumerate(zip(length_BO, which_BO, strict=True)):
        found[row, : int(counts_B[row])] = length_O[which_O.to(length_O.device)]
    return found.float().contiguous()


def _padding(which_BO: Tensor, heads: int) -> Tensor:
    return which_BO.sum(1, keepdim=True).expand(-1, heads).contiguous()
