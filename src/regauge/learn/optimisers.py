"""Optimisers as pure functions: parameters, gradients and state in, parameters and state out. State is flat tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from regauge.learn.base import Parameters

State = Mapping[str, Tensor]


@runtime_checkable
class Optimiser(Protocol):
    """One step. Nothing is changed in place."""

    def init(self, parameters: Parameters) -> dict[str, Tensor]:
        """The state before the first step."""

    def __call__(
        self, parameters: Parameters, gradients: Parameters, state: State, rates: Mapping[str, float]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and state after one step; `rates` gives each parameter's learning rate."""


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled decay (arXiv 1711.05101, algorithm 2), as `torch.optim.AdamW` computes it.

    Attributes:
        decay: weight decay; 0 as in OmniQuant, since no learnt clip or scale is better for being near 0.
    """

    first: float = 0.9
    second: float = 0.999
    epsilon: float = 1e-8
    decay: float = 0.0

    def init(self, parameters: Parameters) -> dict[str, Tensor]:
        state = {"step": torch.zeros((), dtype=torch.int64, device="cpu")}
        for name, value in parameters.items():
            state |= {f"first {name}": torch.zeros_like(value), f"second {name}": torch.zeros_like(value)}
        return state

    def __call__(
        self, parameters: Parameters, gradients: Parameters, state: State, rates: Mapping[str, float]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        step = int(state["step"]) + 1
        after: dict[str, Tensor] = {"step": torch.tensor(step, dtype=torch.int64, device="cpu")}
        moved: dict[str, Tensor] = {}
        shrunk, root = 1 - self.first**step, (1 - self.second**step) ** 0.5
        for name, value in parameters.items():
            gradient, rate = gradients[name], rates[name]
            m = torch.lerp(state[f"first {name}"], gradient, 1 - self.first)
            v = (state[f"second {name}"] * self.second).addcmul_(gradient, gradient, value=1 - self.second)
            below = (v.sqrt() / root).add_(self.epsilon)
            moved[name] = torch.addcdiv(value * (1 - rate * self.decay), m, below, value=-rate / shrunk)
            after |= {f"first {name}": m, f"second {name}": v}
        return moved, after


@dataclass(frozen=True)
class Sign:
    """Each parameter moves by its rate against the sign of its gradient, no momentum (SignSGD, arXiv 1802.04434).

    What moves is bounded by the sum of the rates, however large a gradient is, which suits what decides a rounding:
    with a rate of 1/N falling to 0 in N steps nothing travels further than (N + 1) / 2N (AutoRound, arXiv 2309.05516).
    """

    def init(self, parameters: Parameters) -> dict[str, Tensor]:
        return {}

    def __call__(
        self, parameters: Parameters, gradients: Parameters, state: State, rates: Mapping[str, float]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {
            name: torch.add(value, gradients[name].sign(), alpha=-rates[name]) for name, value in parameters.items()
        }, {}


@dataclass(frozen=True)
class Momentum:
    """Nesterov's accelerated gradient, as `torch.optim.SGD(nesterov=True)` computes it."""

    share: float = 0.9

    def init(self, parameters: Parameters) -> dict[str, Tensor]:
        return {name: torch.zeros_like(value) for name, value in parameters.items()}

    def __call__(
        self, parameters: Parameters, gradients: Parameters, state: State, rates: Mapping[str, float]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        after = {name: self.share * state[name] + gradients[name] for name in parameters}
        moved = {
            name: torch.add(value, gradients[name] + self.share * after[name], alpha=-rates[name])
            for name, value in parameters.items()
        }
        return moved, after


OPTIMISERS: Mapping[str, Optimiser] = {"adamw": AdamW(), "momentum": Momentum(), "sign": Sign()}
"""Name in a recipe → optimiser. The names are also in `settings.py`, which imports no torch; a test compares them."""
