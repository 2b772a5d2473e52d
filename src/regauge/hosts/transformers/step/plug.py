"""The native step under `model.forward`: one new token a sequence goes through it, all else through transformers.

`generate` keeps sampling, stopping, streaming and beams. Where the step cannot serve a model or a call, transformers
computes, and a warning says so once. What is checked, and when: the modules and their hooks whenever more than one
token comes (the beginning of every text); the shapes of a call at every call.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regauge.anatomy.model import Anatomy
from regauge.errors import FallbackWarning
from regauge.hosts.transformers.columns import table_for
from regauge.hosts.transformers.skeleton import body_prefix
from regauge.hosts.transformers.step.cache import GrowingLayer, adopt
from regauge.hosts.transformers.step.program import Unservable, build, rotary_kinds, rotary_module, rotary_tables
from regauge.kernels.cpu.library import available
from regauge.kernels.cpu.step import MOST, Program

SERVED = frozenset(("input_ids", "attention_mask", "position_ids", "past_key_values"))
HARMLESS = {"use_cache": (True, None), "return_dict": (True, None), "logits_to_keep": (0, 1)}
HARMLESS |= {"output_attentions": (False, None), "output_hidden_states": (False, None)}
HARMLESS |= {"output_router_logits": (False, None)}
"""Arguments that change nothing for one token while they have these values."""


def plug(model: Any, anatomy: Anatomy) -> None:
    """Lets a loaded model decode natively. Changes `model.forward` alone; does nothing where it can never serve."""
    step = table_for(model.config.model_type).step
    if (
        step is None
        or not available()
        or not model.can_generate()
        or getattr(model, "regauge_window", None) is not None
    ):
        return
    native = NativeStep(model, anatomy)
    eager = model.forward

    @functools.wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            found = native.serve(args, kwargs)
            if found is not None:
                return found
        return eager(*args, **kwargs)

    model.forward = forward
    model.regauge_step = native


class NativeStep:
    """One model's native step.

    Attributes:
        program: what runs; None until the first text, and where it cannot.
        steps: tokens that went through it.
    """

    def __init__(self, model: Any, anatomy: Anatomy) -> None:
        self.model, self.anatomy = model, anatomy
        self.program: Program | None = None
        self.steps = 0
        self._signature: tuple[object, ...] | None = None
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._said: set[str] = set()
        self._cached: tuple[int, ...] = ()
        self._starts: tuple[object, list[int]] = (None, [])

    def serve(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What `forward` returns for one new token a sequence, or None: let transformers compute."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        if len(args) > 1 or not isinstance(ids, Tensor) or ids.ndim != 2:
            return None
        if ids.shape[1] != 1 or cache is None or cache.get_seq_length() == 0:
            if self._ready() and cache is not None:
                adopt(cache, self.anatomy.blocks)  # so that the first pass already writes where the step reads
            return None
        for name, value in kwargs.items():
            if name not in SERVED and value is not None and not any(value is ok for ok in HARMLESS.get(name, ())):
                return self._eager(f"the call has {name}={_short(value)}")
        if self.program is None and not self._ready():
            return None
        layers = adopt(cache, self.anatomy.blocks)
        if layers is None:
            return self._eager(f"the cache is a {type(cache).__name__} that the step does not write")
        return self._step(ids, cache, layers, kwargs.get("attention_mask"), kwargs.get("position_ids"))

    def _step(self, ids: Tensor, cache: Any, layers: list[GrowingLayer], mask: Any, position_ids: Any) -> Any:
        program, past, batch = self.program, layers[0].length, ids.shape[0]
        assert program is not None
        if batch > MOST or any(layer.length != past for layer in layers):
            return self._eager(f"{batch} sequences at once, or layers of unequal length")
        starts = self._first_tokens(mask, batch, past)
        if starts is None:
            return self._eager("the attention mask is not one of padding on the left")
        for layer in layers:
            layer.reserve(1)
        keys = [layer.keys_BHTD for layer in layers]
        values = [layer.values_BHTD for layer in layers]
        sizes = {None if held is None else held.shape for held in (*keys, *values)}
        dtypes = {None if held is None else held.dtype for held in (*keys, *values)}
        if len(sizes) > 1 or len(dtypes) > 1 or keys[0] is None or keys[0].shape[0] != batch:
            return self._eager("the cache is of another shape than the model's")
        addresses = tuple(held.data_ptr() for held in (*keys, *values) if held is not None)
        if addresses != self._cached:
            program.caches([k for k in keys if k is not None], [v for v in values if v is not None])
            self._cached = addresses
        positions = self._positions(position_ids, mask, batch, past)
        x_BH = self._embedded(ids, positions)
        tables = self._rotary(max(positions) + 1)
        logits_BV = program(x_BH, positions, starts, tables, past, keys[0].shape[2], keys[0].dtype)
        for layer in layers:
            layer.length += 1
        self.steps += 1
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(logits=logits_BV.unsqueeze(1), past_key_values=cache)

    def _first_tokens(self, mask: Any, batch: int, past: int) -> list[int] | None:
        """The first token of each sequence that counts; None where the mask says more than that."""
        if mask is None:
            return [0] * batch
        if not isinstance(mask, Tensor) or mask.ndim != 2 or tuple(mask.shape) != (batch, past + 1):
            return None
        counted = mask.count_nonzero(1).tolist() if batch > 1 else [int(mask.count_nonzero())]
        starts = [past + 1 - count for count in counted]
        if any(start and bool(mask[row, :start].any()) for row, start in enumerate(starts)):
            return None
        return starts if all(start <= past for start in starts) else None

    def _positions(self, position_ids: Any, mask: Any, batch: int, past: int) -> list[int]:
        if position_ids is not None:
            found = [int(position) for position in position_ids.reshape(-1).tolist()]
            return found * batch if len(found) == 1 else found
        table = table_for(self.model.config.model_type).step
        if table is not None and table.positions_from and mask is not None:  # opt counts what the mask shows
            return [int(count) - 1 for count in mask.count_nonzero(1).tolist()]
        return [past] * batch

    def _embedded(self, ids: Tensor, positions: list[int]) -> Tensor:
        """(B, H), float32, by the model's own modules."""
        x_BH: Tensor = self.model.get_input_embeddings()(ids)[:, 0].float()
        step = table_for(self.model.config.model_type).step
        if step is not None and step.positions:
            rows = torch.tensor(positions) + step.positions_from
            module = self.model.get_submodule(f"{body_prefix(self.model)}{step.positions}")
            x_BH = (
                x_BH + nn.Embedding.forward(module, rows).float()
                if "matrix" not in module._modules
                else (x_BH + module.matrix.take(rows).float())
            )
        return x_BH.contiguous()

    def _rotary(self, rows: int) -> list[tuple[Tensor, Tensor]]:
        step = table_for(self.model.config.model_type).step
        if step is None or not step.rotary:
            return []
        if not self._tables or self._tables[0][0].shape[0] < rows:
            room = max(256, 1 << (rows - 1).bit_length())
            kinds = rotary_kinds(self.model.config, step)
            self._tables = rotary_tables(rotary_module(self.model, step), kinds, room)
        return self._tables

    def _ready(self) -> bool:
        """Whether the program is the model as it now is; builds it anew where modules changed."""
        if not torch.get_num_threads() or self.model.training:
            return False
        signature = _signature(self.model)
        if signature == self._signature:
            return self.program is not None
        self._signature, self.program, self._cached = signature, None, ()
        try:
            if any(_hooked(module) for module in self.model.modules()):
                raise Unservable("modules have hooks, which the step would not call")
            step = table_for(self.model.config.model_type).step
            if step is not None and step.rotary:
                rotary_module(self.model, step)
            self.program = build(self.model, self.anatomy)
        except Unservable as why:
            self._eager(str(why))
        return self.program is not None

    def _eager(self, why: str) -> None:
        """Says once that transformers computes, and why."""
        if why not in self._said:
            self._said.add(why)
            warnings.warn(
                f"transformers' own modules decode, not the native step: {why}.", FallbackWarning, stacklevel=5
            )


def _signature(model: Any) -> tuple[object, ...]:
    """Changes whenever a module is replaced, a hook is set, or a full-precision tensor is."""
    modules = tuple(model.modules())
    hooks = sum(_hooked(module) for module in modules)
    tensors = tuple((tensor.data_ptr(), tensor._version) for tensor in model.parameters() if not tensor.is_meta)
    return (tuple(map(id, modules)), hooks, tensors)


def _hooked(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _short(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, Tensor) or len(repr(value)) > 30 else repr(value)
