"""What stands in the model: blocks whose tensors are there while they run, and the figures that this gives.

A streamed block's class becomes a subclass of its own class and name, whose forward borrows a slot of the window, sets
the block's tensors to views of it, and sets them back to empty meta tensors after, whatever happened.
"""

from __future__ import annotations

import statistics
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from regauge import amounts
from regauge.errors import BudgetError
from regauge.kernels.cpu.machine import anonymous_bytes, trim
from regauge.runtime.window.disk import Block, Disk
from regauge.runtime.window.plan import Plan
from regauge.runtime.window.reader import Memory, Reader

REFUSAL = (
    "a model loaded with memory= has most of its blocks on disk, so it cannot be {}; load it without memory= for that."
)


@dataclass(frozen=True)
class Report:
    """What a windowed model did so far; `print(model.regauge_window.report())` says it in words.

    Attributes:
        figure: the bound on memory, bytes.
        weights: resident bytes of weights, slots included, by the plan.
        pinned, streamed: how many blocks stay, and how many are read for each token.
        first_token_seconds: of the last forward that began a sequence; None before one.
        token_seconds: median of the forwards that went on with one; None before one.
        tokens: how many of those there were.
        bytes_per_token: read from disk for each of those, measured.
        waited: seconds of each of those in which nothing could run for want of a block.
        resident_peak: most anonymous resident bytes above those before loading, seen while loading and at the end of
            each streamed block; 0 where the system does not say.
    """

    figure: int
    weights: int
    pinned: int
    streamed: int
    first_token_seconds: float | None
    token_seconds: float | None
    tokens: int
    bytes_per_token: float
    waited: float
    resident_peak: int

    def __str__(self) -> str:
        told = amounts.told
        lines = [
            f"{self.pinned} of {self.pinned + self.streamed} blocks stay, {self.streamed} stream; "
            f"{told(self.weights)} of weights in memory, at most {told(self.resident_peak)} in use of the "
            f"{told(self.figure)} given"
        ]
        if self.first_token_seconds is not None:
            lines.append(f"first token after {self.first_token_seconds:.2f} s")
        if self.token_seconds is not None:
            lines.append(
                f"then {1 / self.token_seconds:.2f} tokens/s, {told(self.bytes_per_token)} read for each; "
                f"{self.waited / self.token_seconds:.0%} of the time spent waiting for the disk"
            )
        return "\n".join(lines)


class Window:
    """The window of one model, `model.regauge_window`. `build` makes it.

    Attributes:
        plan: what the figure is spent on.
    """

    def __init__(self, plan: Plan, disk: Disk, before: int) -> None:
        self.plan = plan
        self._disk, self._before = disk, before
        self._peak = anonymous_bytes() - before
        self._lock = threading.RLock()
        self._reader: Reader | None = None
        self._slots: list[Memory] = []
        self._first: float | None = None
        self._steady: list[float] = []
        self._marks = (0, 0.0)  # bytes read and seconds waited, when the first token was there
        self._ends = (0, 0.0)  # the same after the last one

    def attach(self, model: Any, stem: str, blocks: Sequence[Block]) -> None:
        """Reads the blocks that stay, and makes the others read themselves.

        Args:
            stem: path of the list of blocks.
        """
        layers = model.get_submodule(stem)
        for number in self.plan.pinned:
            memory = Memory(blocks[number].size)
            self._disk.fill(blocks[number].extents, memory.view)
            _Binding(layers[number], blocks[number]).put(memory.bytes_)
        streamed = [blocks[number] for number in self.plan.streamed]
        if streamed:
            self._slots = [Memory(self.plan.slot_bytes) for _ in range(self.plan.slots)]
            self._reader = Reader(self._disk, streamed, self._slots)
            weakref.finalize(model, self._reader.close)
            for block in streamed:
                _wrap(layers[block.number], partial(self._using, block.number, _Binding(layers[block.number], block)))
        else:
            self._disk.close()
        model.regauge_window = self
        self._watch(model)
        _refuse(model)
        trim()
        self._look()

    def report(self) -> Report:
        """The figures up to now."""
        tokens = len(self._steady)
        return Report(
            figure=self.plan.figure,
            weights=self.plan.weights,
            pinned=len(self.plan.pinned),
            streamed=len(self.plan.streamed),
            first_token_seconds=self._first,
            token_seconds=statistics.median(self._steady) if tokens else None,
            tokens=tokens,
            bytes_per_token=(self._ends[0] - self._marks[0]) / max(tokens, 1),
            waited=(self._ends[1] - self._marks[1]) / max(tokens, 1),
            resident_peak=max(self._peak, 0),
        )

    def close(self) -> None:
        """Ends the reader; the model cannot run afterwards. It happens by itself when the model goes."""
        if self._reader is not None:
            self._reader.close()

    @contextmanager
    def _using(self, number: int, binding: _Binding) -> Iterator[None]:
        """One block's tensors, while the `with` lasts. Threads take turns, block by block."""
        assert self._reader is not None, "only streamed blocks come here"
        with self._lock:
            slot = self._reader.take(number)
            try:
                binding.put(self._slots[slot].bytes_)
                yield
                self._look()
            finally:
                binding.take_away()
                self._reader.give()

    def _look(self) -> None:
        self._peak = max(self._peak, anonymous_bytes() - self._before)

    def _watch(self, model: nn.Module) -> None:
        """Times the forwards of the whole model."""
        began: list[float] = []

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            began[:] = [time.perf_counter()]

        def after(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            seconds = time.perf_counter() - began[0]
            cache = getattr(out, "past_key_values", None)
            self._ends = (self._disk.read, 0.0 if self._reader is None else self._reader.waited)
            if cache is not None and cache.get_seq_length() > _tokens(args, kwargs):
                self._steady.append(seconds)
            else:
                self._first, self._steady, self._marks = seconds, [], self._ends

        model.register_forward_pre_hook(before, with_kwargs=True)
        model.register_forward_hook(after, with_kwargs=True)

    def __reduce__(self) -> NoReturn:
        raise BudgetError(REFUSAL.format("copied or pickled"))


def _tokens(args: Any, kwargs: Any) -> int:
    """How many tokens a forward was given."""
    given = kwargs.get("input_ids")
    if given is None:
        given = kwargs.get("inputs_embeds", args[0] if args else None)
    return 0 if given is None else int(given.shape[1])


class _Binding:
    """The places of a block's tensors in its modules."""

    def __init__(self, module: nn.Module, block: Block) -> None:
        self._block = block
        self._places = [(module.get_submodule(entry.module), entry) for entry in block.entries]
        self._made: dict[int, list[Tensor]] = {}  # by address of the slot
        self._empty = [_wrapped(_empty(entry.shape, entry.dtype), entry.parameter) for entry in block.entries]

    def put(self, bytes_: Tensor) -> None:
        made = self._made.get(bytes_.data_ptr())
        if made is None:
            with torch.inference_mode(False):  # plain tensors, whoever runs
                made = [_wrapped(entry.view(bytes_), entry.parameter) for entry in self._block.entries]
            self._made[bytes_.data_ptr()] = made
        self._set(made)

    def take_away(self) -> None:
        self._set(self._empty)

    def _set(self, tensors: Sequence[Tensor]) -> None:
        for (module, entry), tensor in zip(self._places, tensors, strict=True):
            (module._parameters if entry.parameter else module._buffers)[entry.name] = tensor  # type: ignore[assignment]  # parameters are among them


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _wrapped(tensor: Tensor, parameter: bool) -> Tensor:
    return nn.Parameter(tensor, requires_grad=False) if parameter else tensor


def _wrap(block: Any, using: Callable[[], AbstractContextManager[None]]) -> None:
    """Makes a block run inside `using`."""
    old = type(block)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.__dict__["regauge_using"]():
            return old.forward(self, *args, **kwargs)

    block.__dict__["regauge_using"] = using
    block.__class__ = type(old.__name__, (old,), {"forward": forward, "__module__": old.__module__})


def _refuse(model: Any) -> None:
    """What needs all the weights at once is refused in a sentence, before it does anything."""

    def saved(*args: Any, **kwargs: Any) -> NoReturn:
        raise BudgetError(REFUSAL.format("saved or listed as a state_dict"))

    def moved(change: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        probe = torch.zeros(1, dtype=model_dtype, device="cpu")
        after = change(probe)
        if after.device != probe.device or after.dtype != probe.dtype:
            raise BudgetError(REFUSAL.format("moved to another device or dtype"))
        return found()

    model_dtype, found = model.dtype, weakref.ref(model)
    model.save_pretrained = model.state_dict = saved
    model._apply = moved
