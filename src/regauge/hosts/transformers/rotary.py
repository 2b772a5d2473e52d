"""How the keys that a model caches carry their positions: found by asking the model, layer by layer.

A token that has no other before it leaves, wherever it stands, the same states in every layer, so that its keys at two
positions differ by their rotary embedding and by nothing else. Each layer is therefore tried: which kind of embedding
(gemma 3 has two), which channels are pairs, whether it turns at all (smollm3 has layers that do not). A family needs no
table for it, and one whose keys do anything else with positions is refused, not misread.

Legend: B sequences, H KV heads, T tokens, D head size, C pairs that turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from regauge.errors import ModelError
from regauge.hosts.transformers.program import MOVING
from regauge.runtime.store.rotate import Pairing, Table, turn, turning

Layout = Literal["twice", "spaced", "once"]
"""How the model's tables hold the numbers of C pairs: all of them and all of them again, each twice, or once."""
INSTEAD = "crop the cache to the first edit, and let the model read the rest again"

TRIED = (3, 40)
"""The two positions."""
TOKENS = 4
"""Tokens that are tried at each, one a sequence."""
NEAR = {torch.float64: 1e-6, torch.float32: 1e-4}
"""How far keys may be from what they are turned to, relative to their size: rounding, and no more."""
NEAR_16 = 0.03
"""And in 16 bits. Keys that turn in another way than is tried are some 0.5 away."""


@dataclass(frozen=True)
class Turn:
    """How the keys of one layer turn.

    Attributes:
        kind: of the model's rotary embeddings; None where there is one.
        pairing: which channels make a pair; None: these keys carry no position.
        layout: of the embedding's tables.
        size: (H, D) of the layer's keys.
    """

    kind: str | None
    pairing: Pairing | None
    layout: Layout
    size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Rotary:
    """The rotary embedding of a model, and how each layer of its cache turns."""

    module: Any
    turns: tuple[Turn, ...]

    def by(self, turn: Turn, old_BT: Tensor, new_BT: Tensor, dtype: torch.dtype) -> Table:
        """What turns keys of that dtype from old positions to new ones, each (B, T, C)."""
        old, new = (_table(self.module, turn, positions, dtype) for positions in (old_BT, new_BT))
        return turning(old, new, dtype)


_known: WeakKeyDictionary[Any, Rotary] = WeakKeyDictionary()


def rotary_of(model: Any) -> Rotary:
    """How keys of a model turn. Found once a model, by one pass over single tokens.

    Raises:
        ModelError: it has no rotary embedding, one whose frequencies change with the length of the text, or a cache
            that carries positions, or the text before, in yet another way.
    """
    if model not in _known:
        module, layers = _module(model), _layers(model)
        turns = _turns(model, module, _read(model)[: len(layers)])
        if all(turn.pairing is None for turn in turns):
            raise ModelError(
                f"no key of {type(model).__name__} turns with its position, so none can be moved; {INSTEAD}"
            )
        _known[model] = Rotary(module, turns)
    return _known[model]


def _module(model: Any) -> Any:
    """The module that makes cosines and sines."""
    body, name = model.get_decoder(), type(model).__name__
    found = [module for path, module in body.named_modules() if path.rpartition(".")[2] == "rotary_emb"]
    if len(found) != 1:
        raise ModelError(f"{name} has no rotary embedding by which cached keys could be moved; {INSTEAD}")
    moving = sorted({str(kind) for kind in _types(found[0]).values()} & set(MOVING))
    if moving:
        raise ModelError(
            f"the rotary embedding of {name} is of type {moving[0]}, which changes with the length of the text, so "
            f"cached keys cannot be moved; {INSTEAD}"
        )
    return found[0]


def _types(module: Any) -> dict[str | None, Any]:
    """Kind → type of each of a module's embeddings."""
    return dict(module.rope_type) if isinstance(module.rope_type, Mapping) else {None: module.rope_type}


def _layers(model: Any) -> list[Any]:
    """The layers of the model's cache: of keys and values alone."""
    layers: list[Any] = DynamicCache(config=model.config).layers
    for number, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ModelError(
                f"layer {number} of {type(model).__name__} keeps a {type(layer).__name__}, which says nothing of "
                "single tokens and cannot be edited; let the model read the text again"
            )
    return layers


def _read(model: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (2B, H, 1, D) of each layer, of a few tokens alone at one position, then at another."""
    body, cache = model.get_decoder(), DynamicCache(config=model.config)
    rows = body.get_input_embeddings().num_embeddings
    ids_B1 = torch.arange(TOKENS, dtype=torch.int64, device=model.device).unsqueeze(1) * 7919 % rows
    places_B1 = torch.tensor(TRIED, dtype=torch.int64, device=model.device).repeat_interleave(TOKENS).unsqueeze(1)
    with torch.no_grad():
        body(input_ids=ids_B1.repeat(2, 1), position_ids=places_B1, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def _turns(model: Any, module: Any, read: list[tuple[Tensor, Tensor]]) -> tuple[Turn, ...]:
    """The way in which each layer's keys turn from the first position to the second."""
    tried: dict[tuple[str | None, Layout, torch.dtype], Table] = {}
    found = []
    for number, (keys, values) in enumerate(read):
        old, new, near = keys[:TOKENS], keys[TOKENS:], NEAR.get(keys.dtype, NEAR_16)
        away = {
            trial: _distance(module, trial, old, new, tried) for trial in _trials(module, (old.shape[1], old.shape[3]))
        }
        best = min(away, key=lambda trial: away[trial])
        if away[best] > near or _apart(values[:TOKENS], values[TOKENS:]) > near:
            raise ModelError(
                f"the keys of layer {number} of {type(model).__name__} do not turn as its rotary embedding says, so "
                f"they cannot be moved; {INSTEAD}"
            )
        found.append(best)
    return tuple(found)


def _trials(module: Any, size: tuple[int, int]) -> Iterator[Turn]:
    yield Turn(None, None, "once", size)
    for kind in _types(module):
        for pairing in get_args(Pairing):
            for layout in get_args(Layout):
                yield Turn(kind, pairing, layout, size)


def _distance(module: Any, trial: Turn, old: Tensor, new: Tensor, tried: dict[Any, Table]) -> float:
    """How far the old keys, turned, are from the new ones.

    Args:
        tried: what turns keys from the one position to the other, of the tables that were made so far.
    """
    if trial.pairing is None:
        return _apart(old, new)
    which = trial.kind, trial.layout, old.dtype
    if which not in tried:
        places = [torch.full((1, 1), at, dtype=torch.int64, device=old.device) for at in TRIED]
        tables = [_table(module, trial, at, old.dtype) for at in places]
        tried[which] = turning(tables[0], tables[1], old.dtype)
    if 2 * tried[which][0].shape[-1] > old.shape[-1]:
        return float("inf")
    return _apart(turn(old, tried[which], trial.pairing), new)


def _apart(one: Tensor, other: Tensor) -> float:
    """The difference of two tensors, relative to their size."""
    return float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30))


def _table(module: Any, turn: Turn, positions_BT: Tensor, dtype: torch.dtype) -> Table:
    """Cosines and sines (B, T, C) of positions, as the model's own module gives them beside states of that dtype."""
    like = torch.empty(1, dtype=dtype, device=positions_BT.device)
    with torch.no_grad():
        found = module(like, positions_BT, *(() if turn.kind is None else (turn.kind,)))
    cosines, sines = (found.real, found.imag) if isinstance(found, Tensor) else found
    pairs = cosines.shape[-1]
    some = {"twice": slice(0, pairs // 2), "spaced": slice(0, None, 2), "once": slice(None)}[turn.layout]
    return cosines[..., some], sines[..., some]
