"""A whole compressed model trained towards the original's logits: what `learn/loop.py` solves for a recovery, and for a
recipe that trains at the scope of the model.

loss = KL(original ‖ compressed), nats a token, over every place of every window; of a model without a head the squared
error of what it gives, as a share of its energy. The original runs once over all the
text, block by block; its last states are kept (in mapped files where they are large) and become logits again batch by
batch. A step runs the compressed model forward and backward; of a large model each block is rebuilt from its codes and
run again in the backward pass, so that one block is in memory at a time. The error that decides is that on the windows
held out, which are never trained on.

Legend: B windows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regauge.anatomy.model import Weights
from regauge.engine.inner import bound
from regauge.hosts.base import Runner
from regauge.hosts.states import States
from regauge.learn.base import Parameters, Rates, Trial

LOGITS = 2**24  # numbers of logits that are made at once: 64 MB in float32, a few times over

Keep = Callable[[Tensor], Tensor]


@runtime_checkable
class Lesson(Protocol):
    """One block that is trained, or what lies outside the blocks."""

    def tried(self, parameters: Parameters, progress: float = 1.0) -> Trial:
        """What it computes with under these parameters, differentiable."""


@runtime_checkable
class Student(Protocol):
    """A model that is trained, block by block; None stands for what lies outside the blocks."""

    @property
    def rates(self) -> Rates: ...
    @property
    def names(self) -> Mapping[int | None, tuple[str, ...]]: ...  # block → its parameters
    @property
    def blocks(self) -> int: ...
    @property
    def small(self) -> bool: ...  # whether all of it stays in memory, with what is computed on the way

    def init(self) -> Parameters: ...
    def lesson(self, index: int | None) -> Lesson: ...


@dataclass(frozen=True, eq=False)
class Original:
    """The teacher, after its one pass.

    Attributes:
        runner: of its own anatomy.
        outer: its tensors outside the blocks.
        last: (B, T, D) of each batch, behind the last block.
    """

    runner: Runner
    outer: Weights
    last: Sequence[Tensor]

    def logits(self, ids_BT: Tensor, last_BTD: Tensor) -> Tensor:
        """(B, T, V), float32."""
        with torch.no_grad():
            states = self.runner.begin([ids_BT], self.outer).with_hidden([last_BTD.float()])
            return next(self.runner.tail(self.outer, states)).float()


def listen(
    runner: Runner,
    read: Callable[[int | None], Weights],
    batches: Sequence[Tensor],
    keep: Keep,
    tick: Callable[[int], None],
) -> Original:
    """Runs the original over all batches, block by block.

    Args:
        read: block → its tensors.
        keep: puts a batch's states where they stay.
        tick: is told how many blocks are done.
    """
    with torch.no_grad():
        outer = read(None)
        states = runner.begin(list(batches), outer)
        for index in range(runner.anatomy.blocks):
            states = runner.block(index, read(index), states)
            states = states.with_hidden([keep(hidden) for hidden in states.hidden])
            tick(index + 1)
    return Original(runner, outer, states.hidden)


@dataclass(frozen=True, eq=False)
class Distilling:
    """The problem that the loop solves.

    Attributes:
        pupil: what is trained.
        runner: of the artifact's anatomy.
        original: over the windows to train on, then those held out.
        ids: of each batch, in the same order.
        held_out: how many of the last batches are held out; 0: none, and the error is over all.
        head: whether the model gives logits.
    """

    pupil: Student
    runner: Runner
    original: Original
    ids: Sequence[Tensor]
    held_out: int
    head: bool = True

    @property
    def rates(self) -> Rates:
        return self.pupil.rates

    @property
    def batches(self) -> int:
        return len(self.ids) - self.held_out

    def init(self) -> Parameters:
        return self.pupil.init()

    def loss(self, parameters: Parameters, batch: int, progress: float) -> Tensor:
        return self._apart(parameters, batch, progress) / self.ids[batch].numel()

    def error(self, parameters: Parameters) -> float:
        """KL on the windows held out, nats a token."""
        with torch.no_grad():
            places = range(self.batches if self.held_out else 0, len(self.ids))
            return float(sum(float(self._apart(parameters, place)) for place in places)) / max(
                sum(self.ids[place].numel() for place in places), 1
            )

    def _apart(self, parameters: Parameters, batch: int, progress: float = 1.0) -> Tensor:
        """Σ KL over the places of one batch."""
        names, ids_BT = self.pupil.names, self.ids[batch]
        outer = self.pupil.lesson(None).tried({name: parameters[name] for name in names[None]}, progress)
        states = self.runner.begin([ids_BT], dict(outer.weights), inputs_at=outer.inputs)
        x_BTD = states.hidden[0]
        for index in range(self.pupil.blocks):
            own = {name: parameters[name] for name in names[index]}
            x_BTD = self._block(index, states, x_BTD, own, progress)
        wide = self.runner.anatomy.site("head").shape[0] if self.head else self.runner.anatomy.hidden
        rows = max(1, LOGITS // (ids_BT.shape[1] * wide))
        found = x_BTD.new_zeros(())
        for start in range(0, len(ids_BT), rows):
            part = slice(start, start + rows)
            found = found + self._miss(ids_BT[part], x_BTD[part], self.original.last[batch][part], outer)
        return found

    def _block(self, index: int, states: States, x_BTD: Tensor, own: Parameters, progress: float) -> Tensor:
        names = list(own)

        def run(x_BTD: Tensor, *values: Tensor) -> Tensor:
            tried = self.pupil.lesson(index).tried(dict(zip(names, values, strict=True)), progress)
            run = self.runner.bind(index, dict(tried.weights), states, inputs=tried.inputs)
            return bound(self.runner, run, tried.inside)(x_BTD, 0)

        return self._again(run, x_BTD, *own.values())

    def _miss(self, ids_BT: Tensor, x_BTD: Tensor, last_BTD: Tensor, tried: Trial) -> Tensor:
        """Σ KL over the places of some windows."""
        names, inputs = list(tried.weights), tried.inputs

        def run(x_BTD: Tensor, *values: Tensor) -> Tensor:
            outer = dict(zip(names, values, strict=True))
            with torch.no_grad():
                states = self.runner.begin([ids_BT], outer)
            found = next(self.runner.tail(outer, replace(states, hidden=(x_BTD,)), inputs=inputs)).float()
            wanted = self.original.logits(ids_BT, last_BTD)
            if not self.head:
                return (found - wanted).square().sum() / wanted.square().mean().clamp_min(1e-12) / found.shape[-1]
            log_q_BTV = torch.log_softmax(found, -1)
            log_p_BTV = torch.log_softmax(wanted, -1)
            return torch.nn.functional.kl_div(log_q_BTV, log_p_BTV, reduction="sum", log_target=True)

        return self._again(run, x_BTD, *tried.weights.values())

    def _again(self, run: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """`run(*given)`; of a large model what it computes on the way is not kept but computed again."""
        if self.pupil.small or not torch.is_grad_enabled():
            return run(*given)
        found: Tensor = checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False)
        return found
