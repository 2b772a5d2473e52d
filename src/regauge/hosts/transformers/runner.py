"""Runs a model block by block on transformers' own modules: peak memory is one block, its states and a batch.

The skeleton is on the meta device. `begin` runs the embeddings for real and records what each layer is called with;
`block` runs one layer by `functional_call` on the recorded arguments; `tail` runs last norm and head by the model's own
forward, with the final states put in place of the layers. Gradients flow through `block` and `tail` where weights or
states ask for them. Nothing random happens; the caller's random state is untouched.
Legend: B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from regauge.anatomy.model import Anatomy, Weights
from regauge.errors import ModelError
from regauge.hosts.base import Rows
from regauge.hosts.heads import Attend
from regauge.hosts.states import Call, Pool, States
from regauge.hosts.transformers.adapt import adapt_modules
from regauge.hosts.transformers.attended import attended
from regauge.hosts.transformers.experts import loop_experts
from regauge.hosts.transformers.hooks import Change, Taps, Watch, tapped
from regauge.hosts.transformers.outside import by_rows, modules
from regauge.hosts.transformers.session import (
    Enough,
    Port,
    Session,
    apart,
    arguments,
    handed_on,
    output_of,
    shared_on,
    uncached,
)
from regauge.hosts.transformers.settings import why_together
from regauge.hosts.transformers.skeleton import block_paths
from regauge.hosts.transformers.source import Source
from regauge.hosts.transformers.tables import table_for
from regauge.runtime.modules import put

Inputs = Sequence[Tensor | Mapping[str, Any]]


class Runner:
    """Streams a source, in its own anatomy or a rewritten one.

    Args:
        anatomy: what the weights will be given in; None for the source's.
        dtype: of the computation; weights are cast block by block.
        matrices: a narrower dtype for products alone, to which matrices and what they multiply are rounded; all else
            is in `dtype`. None: products too.
        attention: `sdpa` or `eager`; None lets transformers choose.
    """

    def __init__(
        self,
        source: Source,
        anatomy: Anatomy | None = None,
        dtype: torch.dtype = torch.float32,
        attention: str | None = None,
        matrices: torch.dtype | None = None,
    ) -> None:
        self.source = source
        self.anatomy = anatomy or source.anatomy
        self.dtype, self.matrices = dtype, matrices or dtype
        if why := why_together(table_for(source.config), source.config):
            raise ModelError(f"{why}; take a recipe that reads no text and moves nothing (rtn-w8, rtn-grouped)")
        self.shell = copy.deepcopy(source.model)
        uncached(self.shell.config)
        if attention is not None:
            self.shell.config._attn_implementation = attention
        for buffer in (b for b in self.shell.buffers() if dtype is torch.float64 and b.is_floating_point()):
            buffer.data = buffer.data.double()
        adapt_modules(self.shell, source.anatomy, self.anatomy)
        loop_experts(self.shell, self.anatomy)
        self.table, self.paths = table_for(source.config), block_paths(self.shell)
        self.layers: list[Any] = [self.shell.get_submodule(path) for path in self.paths]
        self._by_rows = modules(self.shell, self.anatomy)
        self._own_head = not self.anatomy.tied and any(site.name == "head" for site in self.anatomy.sites)
        stems = [path.rpartition(".")[0] for path in self.paths]
        self._session = Session([stems.count(stem) for stem in dict.fromkeys(stems)], self.table.returns)
        self._outer: tuple[Weights, dict[str, Rows]] = ({}, {})
        for index, path in enumerate(self.paths):
            put(self.shell, path, Port(self._session, index, self.layers[index]))

    def begin(
        self,
        inputs: Inputs,
        weights: Weights,
        watch: Watch | None = None,
        inputs_at: Change | None = None,
        rows: Mapping[str, Rows] | None = None,
    ) -> States:
        """Runs the embeddings on every batch and records what each layer is called with.

        Args:
            inputs: token ids (B, T), pixels (B, C, H, W), or the keyword arguments of the model's forward.
            weights: the canonical tensors outside the blocks.
            watch, inputs_at: taps on `embed.patch`.
            rows: `embed` → what makes its rows, in place of its weight.
        """
        self._outer = (weights, dict(rows or {})) if self._session.several else ({}, {})
        alone = not (self._session.several or self.table.carried or self.table.shared)
        empty = States(tuple(self._kwargs(batch) for batch in inputs), (), (), alone=alone)
        return self._entered(empty, weights, Taps(watch or {}, inputs_at or {}), rows or {})

    def _entered(self, states: States, weights: Weights, taps: Taps, rows: Mapping[str, Rows]) -> States:
        """Runs up to the next stack of blocks on every batch, and records what each of its layers is called with."""
        parameters, session, pool = self._parameters(None, weights, rows), self._session, Pool()
        sites = list(self.anatomy.in_block(None))
        calls, hidden = [], []
        for batch, kwargs in enumerate(states.inputs):
            session.begin([end[batch] for end in states.ends])
            outside = by_rows(self._by_rows, rows, self.matrices, self.dtype)
            with tapped(self.shell, "", sites, taps, None), self._products(), outside, suppress(Enough):
                functional_call(self.shell, parameters, (), dict(kwargs), tie_weights=False)
            before = states.calls[batch] if states.calls else ()
            calls.append((*before, *pool.share(session.calls)))
            hidden += [session.hidden.to(self.dtype)] if session.hidden is not None else []
            session.begin([])
        return replace(states, hidden=tuple(hidden), calls=tuple(calls))

    def bind(
        self,
        index: int,
        weights: Weights,
        states: States,
        watch: Watch | None = None,
        inputs: Change | None = None,
        outputs: Change | None = None,
    ) -> Callable[[Tensor, int], Tensor]:
        """Block `index` as a function of (hidden (B, T, D), number of the batch); weights are cast once."""
        whole = self._whole(index, weights, states, Taps(watch or {}, inputs or {}, outputs or {}))
        return lambda hidden, batch: whole(hidden, batch)[0][0]

    def _whole(
        self, index: int, weights: Weights, states: States, taps: Taps
    ) -> Callable[[Tensor, int], tuple[tuple[Any, ...], Call]]:
        """As `bind`, with all that the block gives, and what it was called with: a mapping that blocks share is its own
        copy, with what it has put there."""
        parameters = self._parameters(index, weights)
        layer, prefix = self.layers[index], f"{self.paths[index]}."
        sites = list(self.anatomy.in_block(index))

        def run(hidden: Tensor, batch: int) -> tuple[tuple[Any, ...], Call]:
            call = apart(states.calls[batch][index], self.table.shared)
            with tapped(layer, prefix, sites, taps, states.keep(batch)), self._products():
                found = functional_call(layer, parameters, (hidden, *call.args), dict(call.kwargs), tie_weights=False)
            return found if isinstance(found, tuple) else (found,), call

        return run

    def block(
        self,
        index: int,
        weights: Weights,
        states: States,
        watch: Watch | None = None,
        inputs: Change | None = None,
        outputs: Change | None = None,
    ) -> States:
        """Runs one block on every batch; the states given stay as they are.

        Args:
            weights: the canonical tensors of the block.
            watch: site → is shown its inputs (n tokens, I), padding left out.
            inputs: site → replaces its input (..., I), as fake quantisation of activations or an online rotation does.
            outputs: site → replaces its output (..., O).
        """
        run = self._whole(index, weights, states, Taps(watch or {}, inputs or {}, outputs or {}))
        hidden, calls, place = [], [], self._session.place(index)
        for batch, before in enumerate(states.hidden):
            (after, *more), call = run(before, batch)
            hidden.append(after if states.store is None else states.store(after))
            if self.table.carried and place.first:
                calls.append(handed_on(states.calls[batch], more, self.table.carried, index, place.count))
            elif self.table.shared:
                calls.append(shared_on(states.calls[batch], call, self.table.shared, index))
        states = replace(states, hidden=tuple(hidden), calls=tuple(calls) or states.calls)
        if not place.last or index == len(self.layers) - 1:
            return states
        ended = replace(states, ends=(*states.ends, states.hidden))
        outer, rows = self._outer
        return self._entered(ended, outer, Taps({}, {}), rows)

    def show(self, index: int, weights: Weights, states: States, watch: Watch) -> None:
        """Shows each watched site its inputs on every batch, and leaves the block where the last has seen them: what
        comes after, of a block of a llama a quarter of its products, is not computed. Experts are run to the end, for
        a batch may reach none of those watched.
        """
        alone = all(site.expert is None for site in self.anatomy.in_block(index) if site.name in watch)
        waiting: set[str] = set()

        def seeing(name: str) -> Callable[[Tensor], None]:
            def see(x_nI: Tensor) -> None:
                watch[name](x_nI)
                waiting.discard(name)
                if alone and not waiting:
                    raise Enough

            return see

        run = self.bind(index, weights, states, watch={name: seeing(name) for name in watch})
        for batch, hidden in enumerate(states.hidden):
            waiting |= watch.keys()
            with suppress(Enough):
                run(hidden, batch)

    def tail(
        self,
        weights: Weights,
        states: States,
        watch: Watch | None = None,
        inputs: Change | None = None,
        outputs: Change | None = None,
        rows: Mapping[str, Rows] | None = None,
    ) -> Iterator[Tensor]:
        """The model's output for each batch: logits (B, T, V), a classifier's (B, V), or the last hidden states.

        Args:
            weights: the canonical tensors outside the blocks.
            rows: `head` → what makes its rows, in place of its weight.
        """
        parameters = self._parameters(None, weights, rows)
        taps = Taps(watch or {}, inputs or {}, outputs or {})
        for batch in range(len(states)):  # a generator would hold on to what it has a name for
            yield self._output((parameters, rows or {}), states, batch, taps)

    def _output(
        self, tensors: tuple[dict[str, Tensor], Mapping[str, Rows]], states: States, batch: int, taps: Taps
    ) -> Tensor:
        """What the model makes of the last states of one batch."""
        sites, (parameters, rows) = list(self.anatomy.in_block(None)), tensors
        self._session.begin([*(end[batch] for end in states.ends), states.hidden[batch]])
        outside = by_rows(self._by_rows, rows, self.matrices, self.dtype)
        try:
            with tapped(self.shell, "", sites, taps, states.keep(batch)), self._products(), outside:
                found = functional_call(self.shell, parameters, (), dict(states.inputs[batch]), tie_weights=False)
        finally:
            self._session.begin([])
        return output_of(found)

    def attending(self, change: Attend) -> AbstractContextManager[None]:
        return attended(self.layers, change)

    def logits(self, inputs: Inputs, weights: Callable[[int | None], Weights] | None = None) -> Iterator[Tensor]:
        """The whole model on some batches, streamed; `weights` gives the tensors of a block, None reads the source."""
        read = weights or self.source.block
        outer = read(None)
        states = self.begin(inputs, outer)
        for index in range(len(self.layers)):
            states = self.block(index, read(index), states)
        yield from self.tail(outer, states)

    def _kwargs(self, batch: Tensor | Mapping[str, Any]) -> dict[str, Any]:
        given = arguments(self.shell, self.table, batch) if isinstance(batch, Tensor) else dict(batch)
        return {key: self._cast(value) if isinstance(value, Tensor) else value for key, value in given.items()}

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _parameters(
        self, index: int | None, weights: Weights, rows: Mapping[str, Rows] | None = None
    ) -> dict[str, Tensor]:
        """The parameters of one layer (None: of the shell), cast, by name inside it; what is run by rows is not cast.

        Args:
            rows: what makes the rows of embedding and head; taken whole where their modules cannot be run by rows.
        """
        made = {f"{name}.weight": make(slice(None)) for name, make in (rows or {}).items() if name not in self._by_rows}
        weights = {**weights, **made} if made else weights
        if index is None and self._own_head and "head.weight" not in weights:
            raise ModelError("the weights given lack head.weight, and the head is not tied to the embeddings")
        found = self.source.extras(index) | self.source.scatter(self.anatomy, weights)
        for key, other in self.source.tied.items():
            if other in found and key not in found:
                found[key] = found[other]
        prefix = "" if index is None else f"{self.paths[index]}."
        cast, apart = {}, {f"{self.anatomy.site(name).module}.weight" for name in self._by_rows}
        for key in list(found):  # each let go once it is cast: a stack of experts is most of a model's block
            tensor = found.pop(key)
            dtype = tensor.dtype if key in apart else self.matrices if tensor.dim() > 1 else self.dtype
            cast[key.removeprefix(prefix)] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return cast

    @contextmanager
    def _products(self) -> Iterator[None]:
        """Products in the dtype of the matrices, all else in that of the computation."""
        with torch.autocast("cpu", self.matrices, enabled=self.matrices is not self.dtype, cache_enabled=False):
            yield
