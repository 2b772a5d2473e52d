"""The one loop: whatever is trained, at any scope, is trained here.

    state = train(problem, Settings(steps=200), seed=0, watch=Watch(keep=save, tick=show), state=None)

It draws batches, steps the optimiser, keeps the parameters of the least error seen, stops early, and can be stopped at
any moment: `State` is everything (step, parameters, optimiser, best so far), as flat tensors, and a loop that goes on
from a kept state ends with the same bytes. Nothing else is random: the order of the batches is a function of the seed
and of how often the text was read through, so the step stands for the random state, and the caller's is untouched.

The error over all batches is taken before the first step and after each reading of the text (or every so many steps),
so what is kept is never worse on it than where training began. Where a problem takes its error on text that it holds
out, what is kept is never worse there. A loss or gradient that is not finite ends the loop; the best stays.
Cost: a step is the block forward and backward on one batch; a reading more for each error.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from regauge.errors import RegaugeError
from regauge.learn.base import Parameters, Problem, finite
from regauge.learn.optimisers import OPTIMISERS
from regauge.learn.settings import Settings

EVERY = 10.0  # seconds between kept states; what is kept changes nothing but how much is done again after a crash
BRIEF = 0.2  # seconds that keeping may take at that pace; what takes longer is done as much more seldom

GOES_ON, DONE, PATIENCE, NOT_FINITE = range(4)
ENDED = {
    DONE: "every step was taken",
    PATIENCE: "no reading of the text gave a better block any more",
    NOT_FINITE: "the loss or its gradient was not finite; the best so far was kept",
}


@dataclass(frozen=True, eq=False)
class State:
    """A loop at one moment.

    Attributes:
        step: how many were taken.
        parameters, optimiser: as they are now.
        best: the parameters of the least error so far.
        first, least: the error where training began, and the least so far.
        waited: readings of the text since the least was found.
        ended: why it is over, a key of `ENDED`; 0 while it is not.
        losses: of every step that was taken.
        looks: (step, error) of every look at the error.
    """

    step: int
    parameters: Parameters
    optimiser: Mapping[str, Tensor]
    best: Parameters
    first: float
    least: float
    waited: int = 0
    ended: int = GOES_ON
    losses: tuple[float, ...] = ()
    looks: tuple[tuple[int, float], ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by flat names; `State.of` is the inverse to the bit."""
        numbers = [self.step, self.first, self.least, self.waited, self.ended]
        found = {"numbers": torch.tensor(numbers, dtype=torch.float64, device="cpu")}
        found |= {
            name: torch.tensor(getattr(self, name), dtype=torch.float64, device="cpu") for name in ("losses", "looks")
        }
        for room in _ROOMS:
            found |= {f"{room}/{name}": value for name, value in getattr(self, room).items()}
        return found

    def on(self, where: torch.device) -> State:
        """The same numbers at another place."""
        parameters, optimiser, best = (
            {key: one.to(where) for key, one in getattr(self, room).items()} for room in _ROOMS
        )
        return replace(self, parameters=parameters, optimiser=optimiser, best=best)

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> State:
        step, first, least, waited, ended = tensors["numbers"].tolist()
        rooms: dict[str, dict[str, Tensor]] = {room: {} for room in _ROOMS}
        for key, value in tensors.items():
            room, slash, name = key.partition("/")
            if slash:
                rooms[room][name] = value
        looks = tuple((int(at), error) for at, error in tensors["looks"].tolist())
        held = rooms["parameters"], rooms["optimiser"], rooms["best"]
        losses = tuple(tensors["losses"].tolist())
        return State(int(step), *held, first, least, int(waited), int(ended), losses, looks)


_ROOMS = ("parameters", "optimiser", "best")


def _nothing(*_: object) -> None:
    """Watches nothing."""


def due(seconds: float) -> bool:
    """Whether a state is to be kept, so long after the last."""
    return seconds >= EVERY


@dataclass(frozen=True)
class Watch:
    """Who is told.

    Attributes:
        keep: is given a state to keep, every few seconds and when the loop is stopped from outside.
        tick: is told (steps taken, steps in all) after each; it may raise to stop the loop.
        due: says after so many seconds whether a state is to be kept.
    """

    keep: Callable[[State], None] = field(default=_nothing)
    tick: Callable[[int, int], None] = field(default=_nothing)
    due: Callable[[float], bool] = field(default=due)


@dataclass(frozen=True)
class At:
    """Where a loop is: the step, and the batch that it reads."""

    step: int
    batch: int


Gradients = Callable[[Parameters, At], tuple[Tensor, Parameters]]
"""The loss of a step and its gradient in each parameter."""


def train(
    problem: Problem,
    settings: Settings,
    seed: int = 0,
    watch: Watch | None = None,
    state: State | None = None,
    by: Gradients | None = None,
) -> State:
    """Trains to the end, from the beginning or from a kept state.

    Args:
        by: computes the gradient of a step; None: through `problem.loss`.

    Raises:
        RegaugeError: what `watch.tick` raised (a time limit); the state was kept before.
    """
    watch = watch or Watch()
    with torch.enable_grad():
        state = state or _begin(problem, settings)
        kept, took = time.monotonic(), BRIEF
        while not state.ended:
            state = _step(problem, settings, seed, state, by)
            now = time.monotonic()
            if watch.due((now - kept) * BRIEF / max(took, BRIEF)):
                watch.keep(state)
                kept = time.monotonic()
                took = kept - now
            try:
                watch.tick(state.step, settings.steps)
            except RegaugeError:
                watch.keep(state)
                raise
    return state


def _begin(problem: Problem, settings: Settings) -> State:
    parameters = {name: value.detach().clone() for name, value in problem.init().items()}
    error = _error(problem, parameters)
    state = OPTIMISERS[settings.optimiser].init(parameters)
    ended = GOES_ON if math.isfinite(error) else NOT_FINITE
    return State(0, parameters, state, parameters, error, error, ended=ended, looks=((0, error),))


def _step(problem: Problem, settings: Settings, seed: int, state: State, by: Gradients | None) -> State:
    reading, place = divmod(state.step, problem.batches)
    progress = state.step / settings.steps
    at = At(state.step, int(order(seed, reading, problem.batches)[place]))
    loss, gradients = by(state.parameters, at) if by else _gradients(problem, state.parameters, at.batch, progress)
    if not finite([loss, *gradients.values()]):
        return replace(state, ended=NOT_FINITE)
    state = replace(state, losses=(*state.losses, float(loss)))
    factor = settings.factor(progress)
    rates = {name: (1 / settings.steps if rate is None else rate) * factor for name, rate in problem.rates.items()}
    with torch.no_grad():
        parameters, optimiser = OPTIMISERS[settings.optimiser](state.parameters, gradients, state.optimiser, rates)
    state = replace(state, step=state.step + 1, parameters=parameters, optimiser=optimiser)
    last = state.step == settings.steps
    if state.step % (settings.every or problem.batches) and not last:
        return state
    error = _error(problem, parameters)
    state = replace(state, looks=(*state.looks, (state.step, error)))
    if error < state.least:
        state = replace(state, best=parameters, least=error, waited=0)
    elif not math.isfinite(error):
        return replace(state, ended=NOT_FINITE)
    else:
        state = replace(state, waited=state.waited + 1)
    if last:
        return replace(state, ended=DONE)
    return replace(state, ended=PATIENCE if settings.patience and state.waited >= settings.patience else GOES_ON)


def order(seed: int, reading: int, batches: int) -> Tensor:
    """In which order the batches come in one reading of the text: a function of its arguments and nothing else."""
    mixed = hashlib.sha256(f"{seed} {reading}".encode()).digest()[:7]
    return torch.randperm(
        batches, generator=torch.Generator().manual_seed(int.from_bytes(mixed, "big")), dtype=torch.int64, device="cpu"
    )


def _error(problem: Problem, parameters: Parameters) -> float:
    with torch.no_grad():
        return problem.error(parameters)


def _gradients(
    problem: Problem, parameters: Parameters, batch: int, progress: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch and its gradient in each parameter, 0 where it has none."""
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    loss = problem.loss(leaves, batch, progress)
    if not bool(loss.isfinite()) or not loss.requires_grad:  # nothing to learn, or no parameter has a part in it
        return loss.detach(), {name: torch.zeros_like(value) for name, value in leaves.items()}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return loss.detach(), {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(leaves.items(), found, strict=True)
    }
