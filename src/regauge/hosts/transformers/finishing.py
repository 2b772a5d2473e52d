"""What is done to every model once its tensors are there: settings, what it keeps of the past, who may choose."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from regauge.anatomy.model import Anatomy
from regauge.artifact.caches import read_cache
from regauge.artifact.gains import read_gains
from regauge.cache.scheme import CachePlan
from regauge.documents import read_json
from regauge.elastic.subnet import FULL
from regauge.errors import ArtifactError
from regauge.hosts.transformers.absorbing import absorb
from regauge.hosts.transformers.aligned import align
from regauge.hosts.transformers.caching import keep, planned
from regauge.hosts.transformers.configs import FOREIGN, first_line
from regauge.hosts.transformers.drafting import draftable
from regauge.hosts.transformers.gaining import give
from regauge.hosts.transformers.plug import plug
from regauge.hosts.transformers.switching import offer
from regauge.hosts.transformers.tight import tighten
from regauge.parts import Point
from regauge.plan.caches import Asked, of_points
from regauge.runtime.device import Placed
from regauge.runtime.rows import CPU, CUDA


def kept_by(folder: Path, anatomy: Anatomy, points: Mapping[str, Point], cache: Asked | None) -> CachePlan | None:
    """What a user asks to be kept of the past, or else what the artifact says: in its header, or beside it."""
    points = points or read_cache(folder, anatomy)
    return planned(cache, anatomy, of_points(folder.name, points, anatomy) if points else None)


def keeping(model: Any, folder: Path | None, anatomy: Anatomy, kept: CachePlan | None, at: Placed) -> Any:
    """A plain model with its plan, by which it decodes as an artifact does: packed caches are read natively then."""
    if folder is not None:
        give(model, anatomy, read_gains(folder, anatomy).get(FULL, {}))
    if at.kind == CPU:
        tighten(model, anatomy)
        if kept is not None and not kept.plain:
            plug(model, anatomy)
    keep(model, anatomy, kept, at.kind == CUDA)
    absorb(model)
    if folder is not None:
        offered(model, folder, anatomy)
    draftable(model)
    return model


def offered(model: Any, folder: Path, anatomy: Anatomy) -> None:
    """Lets a model run as any member that its directory offers, each the same to the bit as it is alone."""
    offer(model, folder, anatomy)
    if "regauge" in vars(model):
        align(model)


def finish(model: Any, folder: Path, method: str | None) -> None:
    """Generation settings, and a mark that keeps `save_pretrained` from writing what stock code would misread."""
    from transformers import GenerationConfig

    from regauge.hosts.transformers.quantizer import mark
    from regauge.hosts.transformers.vocabulary import guard

    if (folder / "generation_config.json").exists() and model.can_generate():
        read_json(folder / "generation_config.json", ArtifactError)
        try:
            model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
        except FOREIGN as error:
            raise ArtifactError(
                f"{folder / 'generation_config.json'} cannot be read ({first_line(error)}); fetch or remove it."
            ) from error
    if method is not None:
        mark(model, method)
        guard(model)
    for module in model.modules():
        module._is_hf_initialized = (
            True  # as from_pretrained leaves it: init_weights() draws anew what has no such mark
        )
    model.eval().requires_grad_(False)


def running_at(
    model: Any, anatomy: Anatomy, kept: CachePlan | None, at: Placed, gains: Mapping[str, Tensor] | None = None
) -> Any:
    """An artifact's model where it is to run, decoding natively where it can.

    Args:
        gains: site → what its outputs are multiplied by, in a member that was taken out of a family.
    """
    model = model.to(at.where)
    give(model, anatomy, gains or {})
    if at.kind == CPU:
        tighten(model, anatomy)
        plug(model, anatomy)
    keep(model, anatomy, kept, at.kind == CUDA)
    absorb(model)
    return model
