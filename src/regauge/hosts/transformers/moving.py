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
    """

    start: int
    positions_BT: Tensor
    keys_BHTD: Tensor


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
class _Source:
    """Where the kept keys of a layer come from.

    Attributes:
        keys_BHTD: of the tokens held.
        positions_BT: where those keys stand.
        moved: the first token whose key stands elsewhere than the token.
    """

    keys_BHTD: Tensor
    positions_BT: Tensor
    moved: int


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

    def _source(self, number: int, moved: Moved | None) -> _Source:
        """The keys of a layer: as they were first cached where that is known."""
        one = self.held[number]
        present = self._positions(one.origin, one.length)
        if moved is not None:
            start, stop = max(moved.start, one.origin), min(moved.start + moved.keys_BHTD.shape[2], one.length)
            some, there = slice(start - moved.start, stop - moved.start), slice(start - one.origin, stop - one.origin)
            keys, positions = moved.keys_BHTD[:, :, some], moved.positions_BT[:, some]
            held, now = one.keys[:, :, there], present[:, there]
            # what happened to the cache since is not known: only keys that are still those count
            if start < stop and keys.shape == held.shape and positions.shape == now.shape:
                how = self.rotary.turns[number]
                by = self._by(how, positions, now, keys.dtype)
                if turn(keys, by, how.pairing or "half").equal(held):
                    parts = (slice(0, start - one.origin), slice(stop - one.origin, None))
                    keys = torch.cat((one.keys[:, :, parts[0]], keys, one.keys[:, :, parts[1]]), 2)
                    positions = torch.cat((present[:, parts[0]], positions, present[:, parts[1]]), 1)
                    return _Source(keys, positions, start)
        return _Source(one.keys, present, one.length)

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

    def _keep(self, number: int, layer: GrowingLayer, stretch: Stretch, source: _Source) -> None:
        """Adds what is kept, where it stands now."""
        one, how = self.held[number], self.rotary.turns[number]
        start = max(stretch.start, one.origin)
        if start >= stretch.stop:
            return
        rows = slice(start - one.origin, stretch.stop - one.origin)
        keys, old = source.keys_BHTD[:, :, rows], source.positions_BT[:, rows]
        new = self._positions(stretch.at + start - stretch.start, stretch.at + stretch.stop - stretch.start)
        if how.pairing is not None and not old.equal(new):
            by = self._by(how, old, new, keys.dtype)
            keys = turn(keys, by, how.pairing)
        layer.append(keys, one.values[:, :, rows])

    def _by(self, how: Turn, old_BT: Tensor, new_BT: Tensor, dtype: torch.dtype) -> Table:
        """What turns the keys of a layer: made once for all that turn alike."""
        kind = how.kind, how.layout, dtype
        for known, old, new, table in self._tables:
            if known == kind and old.equal(old_BT) and new.equal(new_BT):
                return table
        self._tables.append((kind, old_BT, new_BT, self.rotary.by(how, old_BT, new_BT, dtype)))
        return self._tables[-1][-1]

    def _moved(self, number: int, layer: GrowingLayer, stretches: Sequence[Stretch], source: _Source) -> Moved | None:
        """What the next edit of the new cache will turn."""
        one, keys, positions = self.held[number], [], []
        changed = [stretch.at - stretch.new for stretch in stretches if stretch.new or stretch.at != stretch.start]
        first = max(min([*changed, source.moved]), layer.origin)
        if self.rotary.turns[number].pairing is None or first >= layer.length or layer.keys is None:
            return None
        for stretch in stretches:
            begun = max(first, stretch.at - stretch.new)
            if begun < stretch.at:
                keys.append(layer.keys[:, :, begun - layer.origin : stretch.at - layer.origin])
                positions.append(self._positions(begun, stretch.at))
            start = stretch.start + max(0, first - stretch.at)
            if start < stretch.stop:
                rows = slice(start - one.origin, stretch.stop - one.origin)
                keys.append(source.keys_BHTD[:, :, rows])
                positions.append(source.positions_BT[:, rows])
        return Moved(first, torch.cat(positions, 1), torch.cat(keys, 2))
