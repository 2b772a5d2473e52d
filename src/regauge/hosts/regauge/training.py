"""Trains VAR: first the tokenizer, whose trainer the reference never released, then the transformer, then its subnets.

The tokenizer learns to give its images back (mean absolute and squared error) while the quantiser's loss draws codes
and map together; a code that no place takes for a while becomes what some place had to write. The transformer learns
the cross-entropy of all tokens, with the class hidden from some images. VARiant (arXiv 2511.16546) draws at each step
either the full model or a subnet on the late scales, by a share that moves in three phases.
Every step draws from its own seed, so that a run that was stopped goes on to the same losses.
Legend: N images, L tokens, S scales, V codes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from regauge.errors import ModelError
from regauge.hosts.regauge.stages import Stages

Loss = Callable[[int, torch.Generator], Tensor]
"""(step, its source of randomness) → the loss."""
BRANCHES = ("attn.mat_qkv.weight", "attn.proj.weight", "ffn.fc1.weight", "ffn.fc2.weight")
"""Matrices that Muon trains (arXiv 2502.16982), by how their names end."""
MIXED = 0x9E3779B1
"""An odd number whose multiples lie far apart in 32 bits."""
Say = Callable[[int, float], None]
"""Is told (step, loss)."""


@dataclass(frozen=True)
class Course:
    """How long and how fast.

    Attributes:
        steps, batch: how many steps, of how many images.
        rate: of learning, at its most; it rises over `warm` steps and falls to a hundredth by a cosine.
        decay: of weights, of matrices alone.
        clip: the most that the gradient's norm may be.
        seed: of everything that is drawn.
        every: seconds between two files of the state.
    """

    steps: int
    batch: int
    rate: float
    warm: int = 100
    decay: float = 0.02
    clip: float = 1.0
    seed: int = 0
    every: float = 60.0

    def at(self, step: int) -> float:
        """The rate at a step."""
        if step < self.warm:
            return self.rate * (step + 1) / self.warm
        done = (step - self.warm) / max(1, self.steps - self.warm)
        return self.rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True)
class Phases:
    """The share of steps that train the subnet: joint, then rising, then the subnet alone (2511.16546).

    Attributes:
        joint, transition: share of all steps at which each ends.
        first: the share of subnets in the joint phase; a share that never moves has `transition` at 1 and `joint` too.
    """

    joint: float = 1 / 6
    transition: float = 2 / 3
    first: float = 0.2

    def share(self, done: float) -> float:
        """The share of subnets when so much of the course is done."""
        if done < self.joint:
            return self.first
        if done >= self.transition:
            return 1.0
        return self.first + (1 - self.first) * (done - self.joint) / (self.transition - self.joint)


@dataclass
class Curve:
    """The losses of a course, one a step."""

    losses: list[float] = field(default_factory=list)


def train(model: nn.Module, loss: Loss, course: Course, state: Path | None = None, say: Say | None = None) -> Curve:
    """Runs a course on the parameters of a model that want gradients; goes on from `state` where it exists.

    Raises:
        ModelError: the state is of another course.
    """
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimisers = _optimisers(model, course)
    curve = _resumed(model, optimisers, course, state)
    written = time.monotonic()
    for step in range(len(curve.losses), course.steps):
        made = loss(step, generator_of(course.seed, step))
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = course.at(step)
            optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(made)
        nn.utils.clip_grad_norm_(wanted, course.clip)
        for optimiser in optimisers:
            optimiser.step()
        curve.losses.append(made.item())
        if say is not None:
            say(step, curve.losses[-1])
        if state is not None and (time.monotonic() - written > course.every or step == course.steps - 1):
            _keep(model, optimisers, course, curve, state)
            written = time.monotonic()
    return curve


def _optimisers(model: nn.Module, course: Course) -> list[Any]:
    """Muon for the matrices of the transformer's branches, AdamW for all else."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    branches = [p for name, p in named if name.endswith(BRANCHES)]
    rest = [p for name, p in named if not name.endswith(BRANCHES)]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": course.decay},
        {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
    ]
    found: list[Any] = [torch.optim.AdamW(groups, lr=course.rate, betas=(0.9, 0.95))]
    if branches:
        muon = torch.optim.Muon(branches, lr=course.rate, weight_decay=course.decay, adjust_lr_fn="match_rms_adamw")
        found.append(muon)
    return found


def generator_of(seed: int, step: int) -> torch.Generator:
    """A step's own source of randomness. Of a seed torch reads 32 bits, so both are mixed into them."""
    return torch.Generator(device="cpu").manual_seed((seed * MIXED + step) % (1 << 32))


def _keep(model: nn.Module, optimisers: list[Any], course: Course, curve: Curve, state: Path) -> None:
    part = state.with_suffix(".partial")
    kept = {
        "course": repr(course),
        "losses": curve.losses,
        "model": model.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
    }
    torch.save(kept, part)
    part.replace(state)


def _resumed(model: nn.Module, optimisers: list[Any], course: Course, state: Path | None) -> Curve:
    if state is None or not state.exists():
        return Curve()
    kept = torch.load(state, weights_only=True)
    if kept["course"] != repr(course):
        raise ModelError(f"{state} is of another course ({kept['course']}); remove it or give another folder")
    model.load_state_dict(kept["model"])
    for optimiser, held in zip(optimisers, kept["optimisers"], strict=True):
        optimiser.load_state_dict(held)
    return Curve(list(kept["losses"]))


@dataclass
class TokenizerLoss:
    """The loss of the tokenizer on images (N, channels, side, side) from −1 to 1.

    Attributes:
        batch: images a step.
        patience: steps after which a code that no place took becomes a row that some place had to write.
    """

    tokenizer: Any
    images: Tensor
    batch: int
    patience: int = 50
    _idle: Tensor | None = None

    def __call__(self, step: int, generator: torch.Generator) -> Tensor:
        pixels = self.images[_some(len(self.images), self.batch, generator)]
        quantiser = self.tokenizer.quantize
        made = self.tokenizer.map(pixels)
        if step == 0:  # codes begin where maps are
            codes, rows = quantiser.embedding.weight.data, made.detach().permute(0, 2, 3, 1).flatten(0, 2)
            codes.copy_(
                rows[torch.randint(len(rows), (len(codes),), generator=generator, dtype=torch.int64, device="cpu")]
            )
        found = quantiser.trained(made)
        again = self.tokenizer.pixels(found.map_BZhw)
        self._revive(quantiser.embedding.weight, found.hits_SV.sum(0), found.rest_nZ, generator)
        loss: Tensor = functional.l1_loss(again, pixels) + functional.mse_loss(again, pixels) + found.loss
        return loss

    def _revive(self, codes_VZ: Tensor, hits_V: Tensor, rows_nZ: Tensor, generator: torch.Generator) -> None:
        idle = torch.zeros_like(hits_V) if self._idle is None else self._idle
        self._idle = torch.where(hits_V > 0, torch.zeros_like(idle), idle + 1)
        dead = (self._idle >= self.patience).nonzero().flatten()
        if len(dead):
            picked = rows_nZ[
                torch.randint(len(rows_nZ), (len(dead),), generator=generator, dtype=torch.int64, device="cpu")
            ]
            codes_VZ.data[dead] = picked
            self._idle[dead] = 0


@dataclass(frozen=True)
class TransformerLoss:
    """The loss of the transformer on images that are tokens already.

    Attributes:
        tokens_NL, labels_N: what it learns.
        batch: images a step.
        subnet: of each scale, what some steps train instead of the whole; None: never.
        phases: how often; None: never.
        steps: of the whole course, which the phases divide.
    """

    model: Any
    tokens_NL: Tensor
    labels_N: Tensor
    batch: int
    subnet: Stages = None
    phases: Phases | None = None
    steps: int = 1

    def __call__(self, step: int, generator: torch.Generator) -> Tensor:
        picked = _some(len(self.tokens_NL), self.batch, generator)
        chance = torch.rand(len(picked) + 1, generator=generator, dtype=torch.float32, device="cpu")
        config = self.model.config
        labels = torch.where(chance[1:] < config.cond_drop_rate, config.num_classes, self.labels_N[picked])
        drawn = self.phases is not None and float(chance[0]) < self.phases.share(step / self.steps)
        tokens_NL = self.tokens_NL[picked].long()
        loss: Tensor = self.model(
            tokens=tokens_NL, labels=labels.to(tokens_NL.device), subnet=self.subnet if drawn else None
        ).loss
        return loss


def _some(count: int, batch: int, generator: torch.Generator) -> Tensor:
    return torch.randint(count, (batch,), generator=generator, dtype=torch.int64, device="cpu")


@torch.no_grad()
def tokens_of(tokenizer: Any, images: Iterable[Tensor]) -> Tensor:
    """The tokens (N, L) of batches of images, as 16-bit numbers."""
    return torch.cat([torch.cat(tokenizer.encode(pixels), 1).to(torch.int16) for pixels in images])


@torch.no_grad()
def initialise(model: Any, seed: int) -> None:
    """Sets the transformer's weights as it begins to be trained: small, branches smaller the deeper the model, and the
    class nearly without effect. The caller's random state is left as it was."""
    width, depth = model.config.hidden_size, model.config.num_hidden_layers
    drawn = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if name.startswith("vae"):
            continue
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=math.sqrt(1 / width / 3), generator=drawn)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    for block in model.blocks:
        block.attn.proj.weight /= math.sqrt(2 * depth)
        block.ffn.fc2.weight /= math.sqrt(2 * depth)
        gains = block.ada_gss[0, 0] if model.config.shared_aln else block.ada_lin[1].weight.view(6, -1)
        gains[:2] *= 1e-5
        gains[2:] *= 0.5
    model.head_nm.ada_lin[1].weight *= 0.5
    model.head.weight *= 0.02


def freeze_key_bias(model: Any) -> None:
    """Keys get no bias, as the reference's have none: the middle of each vector of biases never moves."""
    for block in model.blocks:
        width = model.config.hidden_size
        block.attn.mat_qkv.bias.register_hook(lambda grad, width=width: _middle_zero(grad, width))


def _middle_zero(grad: Tensor, width: int) -> Tensor:
    grad = grad.clone()
    grad[width : 2 * width] = 0
    return grad
