"""The ways in which a loaded model can be run, on one set of weights: so that what the runtime gave is told apart."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from regauge.anatomy.model import Anatomy
from regauge.errors import FallbackWarning
from regauge.hosts.transformers.plug import plug
from regauge.hosts.transformers.sampling import whole_model
from regauge.hosts.transformers.source import Source
from regauge.hosts.transformers.table import anatomy_of
from regauge.measure.subject import Facts


@dataclass(frozen=True, eq=False)
class Ways:
    """How a model can be run.

    Attributes:
        runtime: as an artifact is: by the native step, where it serves the model.
        own: by transformers' own modules; None for an artifact, whose packed modules are ours.
    """

    runtime: Any
    own: Callable[..., Any] | None

    @property
    def native(self) -> bool:
        """Whether the native step has served a token so far."""
        step = getattr(self.runtime, "regauge_step", None)
        return step is not None and step.steps > 0


def ways_of(model: Any, anatomy: Anatomy | None = None) -> Ways:
    """The ways of a loaded model. A plain one has the native step plugged in."""
    if getattr(model, "hf_quantizer", None) is not None:
        return Ways(model, None)
    if anatomy is None:
        anatomy = replace(anatomy_of(model.config, model), tied=bool(model.all_tied_weights_keys))
    own = model.forward
    plug(model, anatomy)
    return Ways(model, own)


def ways_of_source(source: Source, dtype: torch.dtype = torch.bfloat16) -> Ways:
    """The uncompressed source, in the dtype in which speeds are counted."""
    return ways_of(whole_model(source).to(dtype), source.anatomy)


def facts(model: Any) -> Facts:
    """What measuring needs to know of a loaded model."""
    config = model.config
    most = getattr(config, "max_position_embeddings", None)
    return Facts(bool(model.can_generate()), int(getattr(config, "vocab_size", 0)), int(most) if most else None)


@contextmanager
def unsaid() -> Iterator[None]:
    """While a model is timed: whoever loads the artifact is told what the step does not serve, and may load it
    elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        yield
