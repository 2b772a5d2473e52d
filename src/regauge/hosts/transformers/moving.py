"""Builds the cache of an edited text from that of the old one: what is new is read, what is kept turns.

Legend: B sequences (1 where all have the same positions), H KV heads, T tokens, N tokens inserted, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regauge.errors import SettingError
from regauge.hosts.transformers.cache import GrowingLayer
from regauge.hosts.transformers.held import Held, empty_like
from regauge.hosts.transformers.rotary import Rotary, Turn
from regauge.runtime.store.rotate import Table, turn

MOVED = "regauge_moved"
"""The attribute of a cache that holds a `Moved` of each layer, or None."""


@dataclass(frozen=True, eq=False)
class Moved:
    """Keys of a layer as they were first cached, from the first token that was moved on. The next edit turns these, so
    that roundings do not add up.

    Attributes:
        start: the first of them, in the text as it is now.
        positions_BT: where they stood when they were cached.
        keys_BHTD: as they were.
        sums_BHT: of the bits of each as the cache holds it, by which one that has been replaced since is told.
    """

    start: int
    positions_BT: Tensor
    keys_BHTD: Tensor
    sums_BHT: Tensor


@dataclass(frozen=True, eq=False)
class Stretch:
    """New ids, and what is kept of the cached text behind them.

    Attributes:
        insert_BN: read anew.
        start, stop: of the old text.
        at: the first kept token in the new text.
    """

    insert_BN: Tensor
    start: int
    stop: int
    at: int

    @property
    def new(self) -> int:
        """Tokens inserted."""
        return self.insert_BN.shape[1]


@dataclass(frozen=True, eq=False)
class _Run:
    """Some of the kept keys of a layer, one token after another.

    Attributes:
        start: the first of them, in the old text.
        keys_BHTD: what is turned.
        positions_BT: where those keys stand.
        moved: whether they stand elsewhere than the tokens do.
    """

    start: int
    keys_BHTD: Tensor
    positions_BT: Tensor
    moved: bool = False

    def some(self, start: int, stop: int) -> _Run:
        """Those of a stretch of the old text; views."""
        first = max(start, self.start)
        rows = slice(first - self.start, max(first, stop) - self.start)
        return _Run(first, self.keys_BHTD[:, :, rows], self.positions_BT[:, rows], self.moved)

    @property
    def tokens(self) -> int:
        return self.keys_BHTD.shape[2]


@dataclass(frozen=True, eq=False)
class Editor:
    """Builds the new cache of one edit.

    Attributes:
        held: what each layer of the old cache holds.
        pads_B1: tokens of padding; (1, 1) where there is none.
        mask_BT: of the new text.
    """

    model: Any
    rotary: Rotary
    held: Sequence[Held]
    pads_B1: Tensor
    mask_BT: Tensor | None
    _tables: list[tuple[object, Tensor, Tensor, Table]] = field(default_factory=list)

    def build(self, cache: Any, stretches: Sequence[Stretch]) -> Any:
        """The new cache.

        Raises:
            SettingError: a sliding window has let go of tokens that the new text must have.
        """
        found = empty_like(cache, self.model.config.get_text_config(decoder=True))
        if not stretches:
            return found
        tokens = stretches[-1].at + stretches[-1].stop - stretches[-1].start
        begins = [self._begin(number, stretches, tokens) for number in range(len(self.held))]
        layers = [one.layer(at, tokens - at) for one, at in zip(self.held, begins, strict=True)]
        found.layers[:] = layers
        before = getattr(cache, MOVED, None) or (None,) * len(layers)
        sources = [self._source(number, moved) for number, moved in enumerate(before)]
        for stretch in stretches:
            if stretch.new:
                self._read(found, stretch)
            for number, layer in enumerate(layers):
                self._keep(number, layer, stretch, sources[number])
        if self.held[0].keys.element_size() == 2 and all(one.scheme is None for one in self.held):
            made = [self._moved(number, layers[number], stretches, source) for number, source in enumerate(sources)]
            setattr(found, MOVED, tuple(made))
        for one, layer in zip(self.held, layers, strict=True):
            one.settle(layer)
        return found

    def _begin(self, number: int, stretches: Sequence[Stretch], tokens: int) -> int:
        """The first token of the new text that a layer can hold."""
        one, first = self.held[number], 0
        for stretch in stretches:
            if one.origin > stretch.start:
                first = stretch.at + min(stretch.stop, one.origin) - stretch.start
        read = [stretch.at - stretch.new for stretch in stretches if stretch.new]
        if first and min(*read, tokens, tokens) - one.window + 1 < first:
            raise SettingError(
                f"the window of layer {number} has let go of the first {one.origin} tokens, and the edited text looks "
                "back to some of them; call cache.activate_past_recording() before the text is read, or read it again"
            )
        return first

    def _source(self, number: int, moved: Moved | None) -> list[_Run]:
        """The keys of a layer, from the first that is held on: as they were first cached where that is known."""
        one = self.held[number]
        whole = _Run(one.origin, one.keys, self._positions(one.origin, one.length))
        if moved is None:
            return [whole]
        start, stop = max(moved.start, one.origin), min(moved.start + moved.keys_BHTD.shape[2], one.length)
        some = slice(start - moved.start, stop - moved.start)
        first = _Run(start, moved.keys_BHTD[:, :, some], moved.positions_BT[:, some], moved=True)
        held, sums = whole.some(start, stop).keys_BHTD, moved.sums_BHT[:, :, some]
        # what happened to the cache since is not known: only keys that are still those count
        if start >= stop or first.keys_BHTD.shape != held.shape or not _sums(held).equal(sums):
            return [whole]
        runs = whole.some(one.origin, start), first, whole.some(stop, one.length)
        return [run for run in runs if run.tokens]

    def _positions(self, start: int, stop: int) -> Tensor:
        """(B, T) of a stretch of the text."""
        slots = torch.arange(start, stop, dtype=torch.int64, device=self.pads_B1.device)
        return (slots - self.pads_B1).clamp(min=0)

    def _read(self, cache: Any, stretch: Stretch) -> None:
        """Lets the model read what is new, over what the cache holds by then."""
        self.model.get_decoder()(
            input_ids=stretch.insert_BN,
            attention_mask=None if self.mask_BT is None else self.mask_BT[:, : stretch.at],
            position_ids=self._positions(stretch.at - stretch.new, stretch.at),
            past_key_values=cache,
            use_cache=True,
        )

    def _keep(self, number: int, layer: GrowingLayer, stretch: Stretch, source: list[_Run]) -> None:
        """Adds what is kept, where it stands now."""
        one, how = self.held[number], self.rotary.turns[number]
        for run in (run.some(stretch.start, stretch.stop) for run in source):
            if not run.tokens:
                continue
            at, keys = run.start + stretch.at - stretch.start, run.keys_BHTD
            values = one.values[:, :, run.start - one.origin :][:, :, : run.tokens]
            new = self._positions(at, at + run.tokens)
            turns = how.pairing is not None and not run.positions_BT.equal(new)
            by = self._by(how, run.positions_BT, new, keys.dtype) if turns else None
            if one.scheme is not None:
                layer.append(keys if by is None else turn(keys, by, how.pairing or "half"), values)
                continue
            keys_to, values_to = _room(layer, run.tokens)
            values_to.copy_(values)
            if by is None:
                keys_to.copy_(keys)
            else:
                turn(keys, by, how.pairing or "half", keys_to)

    def _by(self, how: Turn, old_BT: Tensor, new_BT: Tensor, dtype: torch.dtype) -> Table:
        """What turns the keys of a layer: made once for all that turn alike."""
        kind = how.kind, how.layout, dtype
        for known, old, new, table in self._tables:
            if known == kind and old.equal(old_BT) and new.equal(new_BT):
                return table
        self._tables.append((kind, old_BT, new_BT, self.rotary.by(how, old_BT, new_BT, dtype)))
        return self._tables[-1][-1]

    def _moved(
        self, number: int, layer: GrowingLayer, stretches: Sequence[Stretch], source: list[_Run]
    ) -> Moved | None:
        """What the next edit of the new cache will turn."""
        keys, positions = [], []
        changed = [stretch.at - stretch.new for stretch in stretches if stretch.new or stretch.at != stretch.start]
        first = max(min([*changed, *(run.start for run in source if run.moved), layer.length]), layer.origin)
        if self.rotary.turns[number].pairing is None or first >= layer.length or layer.keys is None:
            return None
        for stretch in stretches:
            begun = max(first, stretch.at - stretch.new)
            if begun < stretch.at:
                keys.append(layer.keys[:, :, begun - layer.origin : stretch.at - layer.origin])
                positions.append(self._positions(begun, stretch.at))
            start = stretch.start + max(0, first - stretch.at)
            for run in (run.some(start, stretch.stop) for run in source):
                keys.append(run.keys_BHTD)
                positions.append(run.positions_BT)
        sums = _sums(layer.keys[:, :, first - layer.origin :])
        return Moved(first, torch.cat(positions, 1), torch.cat(keys, 2), sums)


def _room(layer: GrowingLayer, new: int) -> tuple[Tensor, Tensor]:
    """The rows (B, H, new, D) behind what a layer holds, which count as held from now on; there is room for them."""
    start = layer.rows
    layer.length += new
    keys, values = layer.memory
    return keys[:, :, start : start + new], values[:, :, start : start + new]


def _sums(keys_BHTD: Tensor) -> Tensor:
    """(B, H, T) of the bits of keys, 64 at a time where they lie so."""
    numbers = 8 // keys_BHTD.element_size()
    *strides, last = keys_BHTD.stride()
    lie = last == 1 and not any(n % numbers for n in (*strides, keys_BHTD.shape[-1], keys_BHTD.storage_offset()))
    return keys_BHTD.view(torch.int64 if lie else torch.int16).sum(-1, dtype=torch.int64)
