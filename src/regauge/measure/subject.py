"""What is measured, and how: a model by name, opened in the dtype asked for by whoever knows a model library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regauge.measure.cost import Model


@dataclass(frozen=True)
class Facts:
    """What measuring needs to know of a loaded model.

    Attributes:
        generative: it predicts next tokens; else it is compared by its embeddings.
        most: tokens that it reads at once, or None where it does not say.
    """

    generative: bool
    vocabulary: int
    most: int | None


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to be measured.

    Attributes:
        path: its directory, or what a user would load it by.
        load: dtype → the model, as a user loads it.
        ways: dtype → the ways in which it can be run: `runtime`, and `original` where its library has its own.
        facts: of a loaded model.
        stored: bytes of the tensors in its files; None where they are in no directory here.
    """

    name: str
    path: str | Path
    load: Callable[[torch.dtype], Any]
    ways: Callable[[torch.dtype], Mapping[str, Model]]
    facts: Callable[[Any], Facts]
    stored: int | None = None


def logits(model: Model, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """(B, T, V) of each batch of ids (B, T)."""
    for ids_BT in inputs:
        yield model(input_ids=ids_BT, use_cache=False).logits
