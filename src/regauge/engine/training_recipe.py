"""What is asked of a training, and the recipe that says how."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from regauge.engine.job import plan_of
from regauge.engine.recovery_text import Amounts
from regauge.errors import RecipeError, SettingError
from regauge.learn.ranks import processes
from regauge.learn.training import FRONTS, PLUS, Training, training_of
from regauge.plan import Plan
from regauge.runtime.device import placed
from regauge.runtime.rows import CPU


@dataclass(frozen=True)
class Asked:
    """What is asked of a training beside recipe, model and text.

    Attributes:
        amounts: steps, tokens, length of a window and time, where the user says them.
        force: replace an `out` that exists.
        device: where members run forward and backward: `cpu`, `cuda`, `cuda:1`.
        shard: whether parameters, gradients and what the optimiser keeps are divided over the processes of torchrun.
    """

    amounts: Amounts = field(default_factory=Amounts)
    seed: int = 0
    revision: str | None = None
    force: bool = False
    command: str = ""
    device: str = CPU
    shard: bool = False


def read_recipe(recipe: str | Path | Plan, amounts: Amounts) -> tuple[Plan, Training]:
    """A recipe with how it trains, in the user's amounts.

    Raises:
        RecipeError: it says nothing of a training, or rounds weights.
    """
    plan = plan_of(recipe)
    if not plan.train or plan.family is None:
        raise RecipeError(
            f"recipe {plan.name!r} trains no family: it needs 'family' and 'train'; `regauge methods` lists such"
        )
    training = training_of(plan.train)
    if plan.places and not training.rank:
        raise RecipeError(
            f"recipe {plan.name!r} says what becomes of {', '.join(plan.places)}, and a family is trained in full "
            "precision: train first, and compress the trained family with another recipe; or say train: {rank: 8}, so "
            "that adapters are trained beside weights of several precisions"
        )
    if training.rank and not plan.family.bits:
        raise RecipeError(
            f"recipe {plan.name!r} trains adapters of rank {training.rank} for each precision, and its family offers "
            "one: say family: {bits: [4, 3, 2]} and weights with grid: nested:8"
        )
    return plan, training if amounts.steps is None else replace(training, steps=amounts.steps)


def refuse_device(training: Training, device: str) -> None:
    """
    Raises:
        SettingError: there is no such device here, or what is trained is computed on the CPU alone.
    """
    if placed(device).kind != CPU and training.rank:
        raise SettingError(
            f"adapters beside codes are trained on the CPU, and device={device!r} was asked for: leave it out."
        )


def refuse_shard(training: Training, images: bool, asked: Asked) -> None:
    """
    Args:
        images: whether the model reads or draws images.

    Raises:
        SettingError: a family is to be divided over processes, and cannot be.
    """
    if not asked.shard:
        return
    if processes() < 2:
        raise SettingError(
            "shard divides a family over processes, and there is one: start several (torchrun --nproc-per-node 2 -m "
            "regauge learn RECIPE MODEL -o OUT --shard), or leave it out."
        )
    wholes = {"adapters": training.rank, "a router": training.route, "gates": training.gates, "images": images}
    wholes |= {"experts": training.experts, "frozen embeddings": bool(training.frozen)}
    wholes["a comparison of fronts"] = FRONTS in training.distiller.split(PLUS)
    if found := [what for what, here in wholes.items() if here]:
        raise SettingError(f"a training with {found[0]} needs the whole family in each process: leave shard out.")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes()))
    if placed(asked.device).kind != CPU and torch.cuda.device_count() < here:
        raise SettingError(
            f"a family is divided over GPUs of which each process has one, and {here} processes have "
            f"{torch.cuda.device_count()}: start as many, or leave shard out."
        )
