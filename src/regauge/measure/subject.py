"""What is measured, and how: a model by name, opened in the dtype asked for by whoever knows a model library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from regauge.errors import ModelError
from regauge.measure.cost import Model

NEXT, LABEL, LABELS, EMBEDDINGS = "next tokens", "a label of each text", "a label of each token", "embeddings"
CLASSES, SCALES = "a class of each image", "tokens of images, scale by scale"
PICTURED = (CLASSES, SCALES)
"""What models of images give."""
COMPARED = (NEXT, LABEL, LABELS, *PICTURED, EMBEDDINGS)
"""What models may give, as far as it is compared."""


PIECE = 16
"""Tokens at a time in which a text is continued where the cache is measured: as many as the native step takes."""


@dataclass(frozen=True)
class Image:
    """The images that a model reads.

    Attributes:
        mean, spread: of each channel, that pixels from 0 to 1 are normalised by.
        tokens: that a model which draws makes of one; else 0.
    """

    channels: int
    side: int
    mean: tuple[float, ...]
    spread: tuple[float, ...]
    tokens: int = 0


@dataclass(frozen=True)
class Facts:
    """What measuring needs to know of a model.

    Attributes:
        gives: one of `COMPARED`, or in words what it is that nothing here compares.
        vocabulary: rows of its table of embeddings; 0: it does not say.
        most: tokens that it reads at once, or None where it does not say.
        labels: how many labels it tells apart, of a classifier, or classes that it draws; else 0.
        keeps: the recipe that its cache is kept by; "" where everything is kept as it comes.
        lets_go: whether that recipe lets tokens go.
    """

    gives: str
    vocabulary: int
    most: int | None
    labels: int = 0
    keeps: str = ""
    lets_go: bool = False
    image: Image | None = None  # of a model of images

    @property
    def pictured(self) -> bool:
        """Whether it is a model of images that is compared."""
        return self.gives in PICTURED

    @property
    def generative(self) -> bool:
        """Whether it predicts next tokens."""
        return self.gives == NEXT


Batch = Mapping[str, Tensor]
"""Arguments of a model's forward."""
Outputs = Callable[[], Iterator[Tensor]]
"""What a model gives for some batches, in order; each call goes through them anew."""


@runtime_checkable
class Reader(Protocol):
    """Reads texts with one model."""

    def __call__(self, batches: Sequence[Batch], prompt: int | None = None) -> Outputs:
        """What it gives for some batches.

        Args:
            prompt: tokens of each text that a model that keeps its past by a plan reads at once, and from which tokens
                are let go; it goes on in pieces that read the cache. None: half of the text. Others read all at once.
        """


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to be measured.

    Attributes:
        path: its directory, or what a user would load it by.
        facts: read from its files, without its weights where it is a plain checkpoint.
        outputs: batches → what it gives in float32: logits, or last hidden states where it has no head. A plain
            checkpoint is read block by block, an artifact as it is packed: never a whole model in float32.
        ways: dtype → the ways in which it can be run: `runtime`, and `original` where its library has its own.
        stored: bytes of the tensors in its files; None where they are in no directory here.
        notes: what a reader must know, a sentence each.
    """

    name: str
    path: str | Path
    facts: Callable[[], Facts]
    outputs: Reader
    ways: Callable[[torch.dtype], Mapping[str, Model]]
    stored: int | None = None
    notes: tuple[str, ...] = ()


def comparable(names: Sequence[str], found: Sequence[Facts]) -> None:
    """Refuses models that cannot be held against each other, before any is read.

    Raises:
        ModelError: one gives what nothing here compares; or two give different things, or have different vocabularies
            or labels.
    """
    first = found[0]
    for name, facts in zip(names, found, strict=True):
        if facts.gives not in COMPARED:
            raise ModelError(
                f"measure compares {', '.join(COMPARED[:-1])} or {COMPARED[-1]}, and {name} gives {facts.gives}."
            )
        if facts.gives != first.gives:
            raise ModelError(f"{names[0]} gives {first.gives} and {name} gives {facts.gives}: they are not compared.")
        if facts.vocabulary != first.vocabulary:
            raise ModelError(
                f"{names[0]} has a vocabulary of {first.vocabulary:,} tokens and {name} of {facts.vocabulary:,}: "
                "models are compared on the same tokens; measure models that share a tokenizer."
            )
        if facts.labels != first.labels:
            raise ModelError(f"{names[0]} tells {first.labels} labels apart and {name} {facts.labels}.")
        if facts.image != first.image:
            raise ModelError(f"{names[0]} reads {_told(first.image)} and {name} {_told(facts.image)}: not the same.")


def _told(image: Image | None) -> str:
    if image is None:
        return "no images"
    scale = ", ".join(f"{mean:g} ± {spread:g}" for mean, spread in zip(image.mean, image.spread, strict=True))
    return f"images of {image.channels} × {image.side} × {image.side} normalised by {scale}"


def logits_kept(model: Model, inputs: Sequence[Tensor], fresh: Callable[[], Any]) -> Iterator[Tensor]:
    """(B, T, V) of each batch of ids (B, T), read piece by piece behind what the cache has kept of those before, so
    that tokens see their past as decoding would.

    Args:
        fresh: gives an empty cache.
    """
    for ids_BT in inputs:
        cache, found = fresh(), list[Tensor]()
        for piece in torch.split(ids_BT, PIECE, 1):
            found.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits)
        yield torch.cat(found, 1)


def logits(model: Model, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """(B, T, V) of each batch of ids (B, T)."""
    for ids_BT in inputs:
        yield model(input_ids=ids_BT, use_cache=False).logits
