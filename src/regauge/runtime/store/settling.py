"""Many stores sealed at once: a block of tokens is due in all layers together, and one costs as much as ten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from regauge.runtime.store.growing import Growing
from regauge.runtime.store.packed import Packed
from regauge.runtime.store.shelf import Blocks


def settle(stores: Sequence[Growing]) -> None:
    """Seals what is due in some stores: those of one scheme and size together."""
    alike: dict[object, list[Packed]] = {}
    for store in stores:
        if due := store.due:
            packed = cast(Packed, store)  # nothing is due elsewhere
            keys, values = packed.memory
            kind = due, packed.scheme, keys.shape[:2], keys.shape[3], values.shape[3], keys.dtype, keys.device
            alike.setdefault(kind, []).append(packed)
    for group in alike.values():
        due, batch = group[0].due, group[0].memory[0].shape[0]
        keys, values = (torch.cat([store.memory[i][:, :, :due] for store in group]) for i in (0, 1))
        blocks = group[0].shelve().sealed(keys, values)
        for index, store in enumerate(group):
            store.put(_some(blocks, slice(index * batch, (index + 1) * batch)), due)


def _some(blocks: Blocks, part: slice) -> Blocks:
    (keys, values), (key_rows, value_rows) = blocks.bytes_, blocks.rows
    rows = None if key_rows is None else key_rows[part], None if value_rows is None else value_rows[part]
    return Blocks((keys[part], values[part]), rows)
