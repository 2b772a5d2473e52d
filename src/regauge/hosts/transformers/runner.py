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
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from regauge.anatomy.model import Anatomy, Weights
from regauge.errors import ModelError
from regauge.hosts.base import Rows
from regauge.hosts.states import Call, Pool, States
from regauge.hosts.transformers.adapt import adapt_modules, loop_experts
from regauge.hosts.transformers.columns import table_for
from regauge.hosts.transformers.hooks import Change, Taps, Watch, tapped
from regauge.hosts.transformers.outside import by_rows, modules
from regauge.hosts.transformers.skeleton import body_prefix
from regauge.hosts.transformers.source import Source

Inputs = Sequence[Tensor | Mapping[str, Any]]


class _Enough(Exception):  # not an error: the way out of a forward whose rest is not wanted
    """Every layer has been called once, or every site that is watched has seen its input."""


class _Port(nn.Module):
    """Stands where a layer stood: hands the states on, and notes the call or puts in states of its own."""

    def __init__(self, session: _Session) -> None:
        super().__init__()
        self._session = [session]

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._session[0](hidden, Call(args, kwargs))


class _Session:
    """What the ports do in one forward."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.put: Tensor | None = None
        self.calls: list[Call] = []
        self.hidden: Tensor | None = None

    def __call__(self, hidden: Tensor, call: Call) -> Tensor:
        if self.put is not None:
            return self.put
        self.calls.append(call)
        self.hidden = hidden
        if len(self.calls) == self.layers:
            raise _Enough
        return hidden


class Runner:
    """Streams a source, in its own anatomy or a rewritten one.

    Args:
        anatomy: what the weights will be given in; None for the source's.
        dtype: of the computation; weights are cast block by block.
        matrices: a narrower dtype for products alone: matrices are kept in it and what they multiply is rounded to it,
            while vectors, hidden states, norms and logits are in `dtype`. None: products are in `dtype` too.
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
        self.shell = copy.deepcopy(source.model)
        self.shell.config.use_cache = False
        if attention is not None:
            self.shell.config._attn_implementation = attention
        for buffer in (b for b in self.shell.buffers() if dtype is torch.float64 and b.is_floating_point()):
            buffer.data = buffer.data.double()
        adapt_modules(self.shell, source.anatomy, self.anatomy)
        loop_experts(self.shell, self.anatomy)
        self.stem = f"{body_prefix(self.shell)}{table_for(source.config.model_type).blocks}"
        layers = self.shell.get_submodule(self.stem)
        self.layers: list[Any] = list(layers)
        self._by_rows = modules(self.shell, self.anatomy)
        self._own_head = not self.anatomy.tied and any(site.name == "head" for site in self.anatomy.sites)
        self._session = _Session(len(self.layers))
        for index in range(len(self.layers)):
            layers[index] = _Port(self._session)

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
        parameters = self._parameters(None, weights, rows)
        taps = Taps(watch or {}, inputs_at or {})
        pool = Pool()
        calls: list[tuple[Call, ...]] = []
        hidden: list[Tensor] = []
        batches: list[dict[str, Any]] = []
        for batch in inputs:
            kwargs = self._kwargs(batch)
            session = self._session
            session.put, session.calls, session.hidden = None, [], None
            sites = list(self.anatomy.in_block(None))
            outside = by_rows(self._by_rows, rows or {}, self.matrices, self.dtype)
            with tapped(self.shell, "", sites, taps, None), self._products(), outside, suppress(_Enough):
                functional_call(self.shell, parameters, (), kwargs, tie_weights=False)
            calls.append(pool.share(session.calls))
            hidden += [session.hidden.to(self.dtype)] if session.hidden is not None else []
            batches.append(kwargs)
            session.calls, session.hidden = [], None
        return States(tuple(batches), tuple(hidden), tuple(calls))

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
        parameters = self._parameters(index, weights)
        layer, prefix = self.layers[index], f"{self.stem}.{index}."
        taps = Taps(watch or {}, inputs or {}, outputs or {})
        sites = list(self.anatomy.in_block(index))

        def run(hidden: Tensor, batch: int) -> Tensor:
            call = states.calls[batch][index]
            with tapped(layer, prefix, sites, taps, states.keep(batch)), self._products():
                found = functional_call(layer, parameters, (hidden, *call.args), dict(call.kwargs), tie_weights=False)
            after: Tensor = found[0] if isinstance(found, tuple) else found
            return after

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
        run = self.bind(index, weights, states, watch, inputs, outputs)
        hidden = []
        for batch, before in enumerate(states.hidden):
            after = run(before, batch)
            hidden.append(after if states.store is None else states.store(after))
        return states.with_hidden(hidden)

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
                    raise _Enough

            return see

        run = self.bind(index, weights, states, watch={name: seeing(name) for name in watch})
        for batch, hidden in enumerate(states.hidden):
            waiting |= watch.keys()
            with suppress(_Enough):
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
        self._session.put = states.hidden[batch]
        outside = by_rows(self._by_rows, rows, self.matrices, self.dtype)
        try:
            with tapped(self.shell, "", sites, taps, states.keep(batch)), self._products(), outside:
                found = functional_call(self.shell, parameters, (), dict(states.inputs[batch]), tie_weights=False)
        finally:
            self._session.put = None
        made: Tensor = found["logits"] if "logits" in found else found["last_hidden_state"]
        return made

    def logits(self, inputs: Inputs, weights: Callable[[int | None], Weights] | None = None) -> Iterator[Tensor]:
        """The whole model on some batches, streamed.

        Args:
            weights: gives the canonical tensors of a block; None reads the source.
        """
        read = weights or self.source.block
        outer = read(None)
        states = self.begin(inputs, outer)
        for index in range(len(self.layers)):
            states = self.block(index, read(index), states)
        yield from self.tail(outer, states)

    def _kwargs(self, batch: Tensor | Mapping[str, Any]) -> dict[str, Any]:
        given = {self.shell.main_input_name: batch} if isinstance(batch, Tensor) else dict(batch)
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
        prefix = "" if index is None else f"{self.stem}.{index}."
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
