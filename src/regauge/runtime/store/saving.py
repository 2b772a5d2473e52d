"""Stores as tensors and numbers by name, and back: what a file of a cache holds of each block.

Legend: B sequences, H KV heads, T tokens, D head size, N blocks of all heads together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from regauge.cache.scheme import Scheme
from regauge.errors import ArtifactError
from regauge.runtime.store.growing import Growing, new_stamp
from regauge.runtime.store.packed import Packed
from regauge.runtime.store.sealing import codings
from regauge.runtime.store.shelf import Blocks, Shelf

WINDOW = ("keys", "values")
BLOCKS = ("key_blocks", "value_blocks", "key_rows", "value_rows")
BESIDE = "beside."
COUNTS, FLAGS = ("kept_at", "least"), ("record_past", "holding", "chosen")
State = tuple[dict[str, Tensor], dict[str, int]]
"""Tensors, each in one piece, and numbers."""


def told(scheme: Scheme | None) -> str:
    """A scheme in words: two that say the same put the same tokens away as the same bytes."""
    if scheme is None:
        return "whole"
    formats = (
        "as they come" if fmt is None else f"{fmt.grid.name}/{fmt.grain.name} by {fmt.ranger.name} in {fmt.scale.name}"
        for fmt in scheme.formats
    )
    turned = ", turned by a Hadamard" if scheme.hadamard else ""
    even = f", balanced {scheme.balance} times" if scheme.balance else ""
    return f"keys {next(formats)}, values {next(formats)}, window {scheme.window}{turned}{even}"


def state(store: Growing) -> State:
    """What a store without blocks holds."""
    numbers = {"length": store.length, "origin": store.origin}
    if store.keys_BHTD is None or store.values_BHTD is None:
        return {}, numbers
    pair = zip(WINDOW, (store.keys_BHTD, store.values_BHTD), strict=True)
    return {name: memory[:, :, : store.rows].contiguous() for name, memory in pair}, numbers


def packed_state(store: Packed) -> State:
    """What a packed store holds, its window in the store's own coordinates."""
    tensors, numbers = state(store)
    tensors |= {f"{BESIDE}{name}": kept.contiguous() for name, kept in store.beside.items()}
    numbers |= {name: int(getattr(store, name)) for name in (*COUNTS, *FLAGS)}
    if store.firsts_BH is not None:
        tensors["firsts"] = store.firsts_BH.contiguous()
    if store.shelf is not None and store.shelf.shared:
        raise ArtifactError(
            "a cache whose layers share what they keep is not saved: read the text again, or leave merge out"
        )
    if store.shelf is not None:
        blocks = store.shelf.packed()
        pairs = zip(BLOCKS, (*blocks.bytes_, *blocks.rows), strict=True)
        tensors |= {name: held.contiguous() for name, held in pairs if held is not None}
        tensors["counts"] = store.shelf.counts_BH.contiguous()
    return tensors, numbers


def restore(store: Growing, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
    """Fills an empty store without blocks.

    Raises:
        ArtifactError: they are of no such store.
    """
    length, origin = numbers.get("length", 0), numbers.get("origin", 0)
    if not tensors:
        return
    keys, values = (_shaped(tensors, name, 4) for name in WINDOW)
    if keys.shape[:3] != values.shape[:3] or not 0 <= origin <= length or keys.shape[2] != length - origin:
        raise ArtifactError(f"a saved cache tells of tokens {origin} to {length} and holds {keys.shape[2]} of them")
    store.length, store.origin = length, origin
    store.house(store.roomy(keys, keys.shape[2]), store.roomy(values, values.shape[2]))


def restore_packed(store: Packed, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
    """Fills an empty packed store.

    Raises:
        ArtifactError: they are of no such store.
    """
    store.kept_at, store.least = (numbers.get(name, 0) for name in COUNTS)
    store.record_past, store.holding, store.chosen = (bool(numbers.get(name, 0)) for name in FLAGS)
    restore(store, {name: tensors[name] for name in WINDOW if name in tensors}, numbers)
    store.beside = {name.removeprefix(BESIDE): held for name, held in tensors.items() if name.startswith(BESIDE)}
    if "counts" not in tensors or store.keys_BHTD is None or store.values_BHTD is None:
        return
    batch, heads = store.keys_BHTD.shape[:2]
    counts_BH = _shaped(tensors, "counts", 2)
    if counts_BH.dtype is not torch.int64 or tuple(counts_BH.shape) != (batch, heads) or int(counts_BH.min()) < 0:
        raise ArtifactError(
            f"a saved cache counts blocks of heads {tuple(counts_BH.shape)} and holds {batch} x {heads}"
        )
    shelf = Shelf(codings(store.scheme, store.keys_BHTD, store.values_BHTD), batch, heads, store.keys_BHTD.device)
    total, empty = int(counts_BH.sum()), shelf.held
    found: list[Tensor | None] = []
    for name, like in zip(BLOCKS, (*empty.bytes_, *empty.rows), strict=True):
        held = tensors.get(name)
        wanted = None if like is None else (total, like.shape[1])
        seen = None if held is None else tuple(held.shape)
        if wanted != seen or (held is not None and like is not None and held.dtype is not like.dtype):
            raise ArtifactError(f"{name} of a saved cache are {seen}, and {total} blocks of this kind are {wanted}")
        found.append(held)
    keys, values, key_rows, value_rows = found
    assert keys is not None
    assert values is not None
    shelf.fill(Blocks((keys, values), (key_rows, value_rows)), counts_BH)
    firsts_BH = tensors.get("firsts")
    store.shelf, store.firsts_BH, store.stamp = shelf, firsts_BH, new_stamp()


def _shaped(tensors: Mapping[str, Tensor], name: str, axes: int) -> Tensor:
    found = tensors.get(name)
    if found is None or found.ndim != axes:
        seen = "nothing" if found is None else f"{found.ndim} axes"
        raise ArtifactError(f"{name} of a saved cache have {axes} axes, and {seen} was found")
    return found
