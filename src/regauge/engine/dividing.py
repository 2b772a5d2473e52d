"""A dense model divided into experts before a family of it is trained: `train: {experts: 8}`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from regauge.anatomy.model import Anatomy
from regauge.artifact.folder import read_receipt
from regauge.artifact.staging import STATES, Staging
from regauge.elastic.family import Family
from regauge.engine.reading import UNUSED
from regauge.engine.training_recipe import Asked
from regauge.errors import RecipeError
from regauge.hosts import host_of
from regauge.hosts.base import Source
from regauge.learn.training import Training, training_of
from regauge.plan import Plan

DIVIDED = "divided"


def anatomy_for(training: Training, family: Family, source: Source) -> Anatomy:
    """What the family is made of: the source's own anatomy, or that of the mixture which it is divided into.

    Raises:
        RecipeError: experts are asked for, and this model cannot be divided into them.
    """
    if not training.experts:
        return source.anatomy
    if training.rank or training.gates or not family.experts:
        raise RecipeError(
            "a model that is divided into experts is a family of how many of them a token goes to: say family: "
            "{experts: [4, 5, 6, 7]}, and neither rank nor gates"
        )
    host = host_of(source.path)
    if why := host.undivided(source, training.experts):
        raise RecipeError(f"experts: {why}")
    return host.divided(source, training.experts).anatomy


def divided(plan: Plan, model: str | Path, asked: Asked, staging: Staging) -> tuple[str | Path, str | None]:
    """The model that the family is made of, and its revision: the one given, or a mixture that is written here."""
    training = training_of(plan.train)
    if not training.experts:
        return model, asked.revision
    folder = staging.root / STATES / DIVIDED
    shutil.rmtree(folder, ignore_errors=True)  # what a run that was killed left of it
    folder.mkdir(parents=True)
    host = host_of(model)
    host.divided(host.open(model, asked.revision), training.experts, folder, asked.seed)
    return folder, None


def held_to(source: Source, training: Training, base: Path) -> dict[str, Any]:
    """What a receipt says otherwise of a model that was divided: it is held to the model as it came."""
    if not training.experts:
        return {}
    made, before = read_receipt(base), source.bytes_bf16()
    said = f"feed-forward layers were divided into {training.experts} experts each, behind a {training.router} router"
    return {
        "source": str(source.path),
        "source_hash": source.digest(),
        "bytes_bf16": before,
        "ratio": made.bytes_after / before,
        "notes": (said, *(note for note in made.notes if note != UNUSED)),
    }
