"""What stands where a model's blocks stood while the rest of it runs: it notes how each is called, and puts in states.

A model may have several stacks of blocks, one after another (an encoder, then a decoder that reads it). Those before
the present one give the last states that they came to; those of the present one are called once each, and what they
are called with is kept; then the way leads out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from regauge.errors import ModelError
from regauge.hosts.states import Call
from regauge.hosts.transformers.columns import Table

OUTPUTS = ("logits", "logits_per_image", "last_hidden_state")
"""What a model gives, by transformers' names, the first that is there."""


class Enough(Exception):  # not an error: the way out of a forward whose rest is not wanted
    """Every layer has been called once, or every site that is watched has seen its input."""


@dataclass(frozen=True)
class Place:
    """Where a block stands: its stack, whether it is the first or the last there, and how many that has."""

    stack: int
    first: bool
    last: bool
    count: int


class Session:
    """What the ports do in one forward.

    Args:
        stacks: how many blocks each stack has.
        returns: how many things a block gives beside the states.
    """

    def __init__(self, stacks: Sequence[int], returns: int) -> None:
        self.returns, self.several = returns, len(stacks) > 1
        self._places = [
            Place(stack, number == 0, number == count - 1, count)
            for stack, count in enumerate(stacks)
            for number in range(count)
        ]
        self.begin([])

    def begin(self, ends: Sequence[Tensor]) -> None:
        """Forgets all; the stacks before the present one come to `ends`."""
        self._ends = list(ends)
        self.calls: list[Call] = []
        self.hidden: Tensor | None = None

    def place(self, index: int) -> Place:
        return self._places[index]

    def __call__(self, index: int, hidden: Tensor, call: Call) -> Tensor:
        place = self._places[index]
        if place.stack < len(self._ends):
            return self._ends[place.stack] if place.last else hidden
        self.calls.append(call)
        self.hidden = hidden
        if place.last:
            raise Enough
        return hidden


class Port(nn.Module):
    """Stands where a layer stood: hands the states on, and notes the call or puts in states of its own. What the model
    asks of the layer itself (which kind of attention it has) it answers as the layer does."""

    def __init__(self, session: Session, index: int, layer: nn.Module) -> None:
        super().__init__()
        self._session, self._index, self._layer = [session], index, [layer]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        session = self._session[0]
        found = session(self._index, hidden, Call(args, kwargs))
        return (found, *[None] * session.returns) if session.returns else found


def handed_on(
    calls: Sequence[Call], more: Sequence[Any], carried: Mapping[int, int], index: int, count: int
) -> tuple[Call, ...]:
    """The calls of a batch after the first block of a stack, whose other blocks are called with what it gave.

    Args:
        more: what block `index` gave beside the states.
        carried: number of one of these, from 1 → argument after the states, from 0.
        count: blocks of the stack.
    """
    found = list(calls)
    for later in range(index + 1, index + count):
        args = list(found[later].args)
        for number, argument in carried.items():
            args[argument] = more[number - 1]
        found[later] = Call(tuple(args), found[later].kwargs)
    return tuple(found)


def apart(call: Call, name: str) -> Call:
    """The same call with a copy of the mapping that blocks share by that argument: what a block puts there is seen by
    no other run, of other weights."""
    shared = call.kwargs.get(name)
    return call if shared is None else Call(call.args, {**call.kwargs, name: copy.copy(shared)})


def shared_on(calls: Sequence[Call], call: Call, name: str, index: int) -> tuple[Call, ...]:
    """The calls of a batch after block `index`: those of later blocks are given what it has put in the mapping.

    Args:
        call: what the block was called with.
    """
    made = {name: call.kwargs[name]}
    return tuple(c if number <= index else Call(c.args, {**c.kwargs, **made}) for number, c in enumerate(calls))


def arguments(model: Any, table: Table, batch: Tensor) -> dict[str, Any]:
    """What a model's forward takes for one batch of its main input; a decoder beside an encoder reads the same text.

    Raises:
        ModelError: it takes something else beside it.
    """
    reads = table.reads or [model.main_input_name]
    rest = [name for name in reads if name not in (reads[0], "decoder_input_ids")]
    if rest or (len(reads) > 1 and reads[0] != "input_ids"):
        raise ModelError(
            f"a {model.config.model_type} reads {' and '.join(reads)} together, which regauge does not gather from "
            "files yet; take a recipe that needs no calibration (regauge methods says which)"
        )
    return dict.fromkeys(reads, batch)


def output_of(found: Mapping[str, Any]) -> Tensor:
    """What a model's forward gave: logits, or the last states."""
    made: Tensor = next(found[name] for name in OUTPUTS if name in found)
    return made


def uncached(config: Any) -> None:
    """Lets a model, and the models in it, keep nothing between calls."""
    config.use_cache = False
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            uncached(getattr(config, name))
