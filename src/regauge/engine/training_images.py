"""What a family that draws images scale by scale is trained on: an .npz of images and their classes, as tokens.

A row of ids is an image's class and then its tokens, scale by scale, so that the next token's cross-entropy is the
model's own. A tenth of the images are shown without a class, which guidance needs. A tenth are held out.

Legend: N images, T ids of each: class and tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from regauge.artifact.files import sha256 as file_hash
from regauge.artifact.staging import Staging
from regauge.engine.raising import Batch
from regauge.engine.watchdog import Clock
from regauge.errors import TextError
from regauge.hosts import host_of
from regauge.hosts.base import Source
from regauge.text.arrays import named
from regauge.text.calibration import classes, images
from regauge.text.corpora import Where

WANTED = "an .npz of images 'x' (N, H, W, C) of uint8 and their classes 'y' (N)"
MIDDLE = (0.5,)
ASIDE, MOST_ASIDE, MOST = 10, 512, 1 << 17
"""One image of so many is held out, so many at most; and images that are read at most."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images and classes, not in tokens yet.

    Attributes:
        source: the model that reads them.
        x_NChw, y_N: from −1 to 1, in an order by lot.
        aside: so many of the first are held out.
        description, sha256: of the file.
    """

    source: Source
    x_NChw: Tensor
    y_N: Tensor
    aside: int
    description: str
    sha256: str
    seed: int

    @property
    def identity(self) -> dict[str, object]:
        return {"kind": "images", "sha256": self.sha256}

    def ids(self, start: int, stop: int) -> Tensor:
        """(N, T) of some of them."""
        host = host_of(self.source.path)
        return host.ids_of_images(self.source.path, self.x_NChw[start:stop], self.y_N[start:stop], self.seed)


@dataclass(frozen=True, eq=False)
class Pictured:
    """As `training_text.Reading`.

    Attributes:
        aside: batches held out.
    """

    pictures: Pictures
    batch: int
    aside: tuple[Batch, ...]

    def text(self, tokens: int, staging: Staging, clock: Clock) -> tuple[Batch, ...]:
        """Batches to train on, of `tokens` at most and one image at least."""
        clock.say("text", "images become tokens")
        each = self.aside[0].ids_BT.shape[1]
        start = self.pictures.aside
        return batched(self.pictures.ids(start, start + max(1, tokens // each)), self.batch)

    @property
    def description(self) -> str:
        """Where it comes from."""
        return self.pictures.description


def pictures(source: Source, given: Where | None, seed: int) -> Pictures:
    """Images and classes of a file.

    Raises:
        TextError: there is none, or it holds no such arrays.
    """
    if not named(given):
        raise TextError(f"this model draws images scale by scale and learns from them: give --text {WANTED}.")
    path = Path(given)
    channels, side = host_of(source.path).image_shape(source)
    found = images(path, MOST, (channels, side), (MIDDLE * channels, MIDDLE * channels))
    y_N = classes(path, MOST)
    if len(y_N) < 2 * ASIDE:
        raise TextError(f"{path} has {len(y_N)} images, too few to hold some out; give it {2 * ASIDE} or more.")
    drawn = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y_N), generator=drawn, dtype=torch.int64, device="cpu")
    aside = min(len(y_N) // ASIDE, MOST_ASIDE)
    sha256 = file_hash(path)
    return Pictures(source, found.inputs[order], y_N[order], aside, found.description, sha256, seed)


def pictured(found: Pictures, batch: int) -> Pictured:
    """Those held out are in tokens now."""
    return Pictured(found, batch, batched(found.ids(0, found.aside), batch))


def batched(ids_NT: Tensor, batch: int) -> tuple[Batch, ...]:
    """As many rows together as have about so many ids, one at least."""
    return tuple(Batch(some) for some in torch.split(ids_NT, max(1, batch // ids_NT.shape[1])))
