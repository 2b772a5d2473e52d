"""What a family of a model of images is trained on: images with their classes, of which every tenth is held out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy, Site
from regauge.artifact.disk import put
from regauge.artifact.files import sha256
from regauge.artifact.staging import Staging
from regauge.artifact.statistics import FILE, statistics_bytes
from regauge.elastic.family import Family
from regauge.engine.raised import rounded, stored
from regauge.engine.raising import Batch, Raising
from regauge.engine.watchdog import Clock
from regauge.errors import RecipeError, TextError
from regauge.hosts import host_of
from regauge.hosts.base import Source
from regauge.learn.base import Parameters
from regauge.learn.loop import order
from regauge.learn.training import Training
from regauge.text.arrays import named
from regauge.text.calibration import classes, images
from regauge.text.corpora import Where

HELD_OUT, LEAST, MOST = 10, 20, 1 << 20
"""One image in so many is held out; images that a file has at the least; that are read at most."""
LOOKED_AT, TOGETHER, CALIBRATED = 1000, 250, 16
"""Images held out that a look asks, and of them at once: batch norms compute with the statistics of these. Batches by
which they get those that are stored."""
UNLIKE = (
    "recipe {!r} compares states of tokens ({}), and {} gives classes of images: distiller is one of kl, alpha, none "
    "for it."
)
WANTED = "an .npz with 'x' (N, H, W, C) of uint8 and 'y' (N), classes counted from 0, is needed"


def classifies(source: Source) -> bool:
    """Whether a model gives classes of images."""
    head = any(site.name == "head" for site in source.anatomy.sites)
    drawing = source.anatomy.plumbing.scales
    return head and not drawing and host_of(source.path).medium(source) == "images"


def refuse_moved(training: Training, family: Family, anatomy: Anatomy) -> None:
    """
    Raises:
        RecipeError: images are to be moved while they are learnt from, and this model reads none so.
    """
    if training.moved and not any(site.window for site in anatomy.sites):
        raise RecipeError(
            f"this recipe learns from labelled images, moved by up to {training.moved} pixels, and {anatomy.family} "
            "is no network of convolutions: take another recipe, or leave 'moved' out"
        )


def places(source: Source, site: Site) -> int:
    """How often a matrix is used on one input: once, or for each place of the image of a convolution's stage."""
    if not site.window or site.block is None:
        return 1
    before = sum(block <= site.block for block in source.anatomy.plumbing.stays)
    return max(1, host_of(source.path).image_shape(source)[1] >> before) ** 2


@dataclass(frozen=True, eq=False)
class Classed:
    """Labelled images, those to train on and those held out, as the model reads them.

    Attributes:
        pixels, classes: to train on; aside: batches held out.
        batch: images of a step.
    """

    pixels: Tensor
    classes: Tensor
    aside: tuple[Batch, ...]
    description: str
    identity: dict[str, object]
    batch: int = 1

    def text(self, tokens: int, staging: Staging, clock: Clock) -> tuple[Batch, ...]:
        """Batches to train on, of as many images at most, shuffled once."""
        rows = order(0, 0, len(self.pixels))[: max(tokens, self.batch)]
        parts = [one for one in torch.split(rows, self.batch) if len(one) == self.batch or len(rows) < self.batch]
        return tuple(Batch(self.pixels[some], classes_B=self.classes[some]) for some in parts)


def classed(source: Source, given: Where | None) -> Classed:
    """Opens and splits labelled images.

    Raises:
        TextError: there are none, too few, or their classes are none of the model's.
    """
    family = source.anatomy.family
    if not named(given):
        raise TextError(f"{family} reads images: give --text a file of them; {WANTED}.")
    path, host = Path(given).expanduser(), host_of(source.path)
    x_NCHW = images(path, MOST, host.image_shape(source), host.image_scale(source)).inputs
    y_N = classes(path, MOST)
    known = source.anatomy.site("head").shape[0]
    if len(y_N) < LEAST:
        raise TextError(f"{path} holds {len(y_N)} images, too few to hold some out: {LEAST} at the least.")
    if int(y_N.min()) < 0 or int(y_N.max()) >= known:
        raise TextError(
            f"{path} has classes {int(y_N.min())} to {int(y_N.max())}, and the model knows 0 to {known - 1}."
        )
    held_out = torch.arange(len(y_N), dtype=torch.int64, device="cpu") % HELD_OUT == HELD_OUT - 1
    rows = held_out.nonzero().flatten()
    rows = rows[order(0, 0, len(rows))[:LOOKED_AT]]
    aside = tuple(Batch(x_NCHW[some], classes_B=y_N[some]) for some in torch.split(rows, TOGETHER))
    told = f"{path.name} ({len(y_N):,} images, every tenth held out)"
    return Classed(x_NCHW[~held_out], y_N[~held_out], aside, told, {"kind": "images", "sha256": sha256(path)})


def statistics(trainee: Any, problem: Raising, learnt: Parameters, base: Path) -> dict[str, Tensor]:
    """Statistics of batch norms of the whole by the module's key and, in a file of the family, of each named member;
    nothing of a model that reads no images."""
    pixels = [one.ids_BT for one in problem.text if one.classes_B is not None][:CALIBRATED]
    if not pixels:
        return {}
    trainee.put(learnt)
    whole, members = trainee.statistics(problem.watched, pixels)
    if members:
        put(base / FILE, statistics_bytes({name: _here(some) for name, some in members.items()}))
    return rounded(_here(whole), stored(base))


def _here(some: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: one.cpu() for key, one in some.items()}
