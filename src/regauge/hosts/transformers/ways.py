"""The ways in which a loaded model can be run, on one set of weights: so that what the runtime gave is told apart."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy
from regauge.errors import FallbackWarning
from regauge.hosts.states import SPILL, States
from regauge.hosts.transformers.attending import expect
from regauge.hosts.transformers.caching import fresh, keeps, lets_go
from regauge.hosts.transformers.plug import plug
from regauge.hosts.transformers.probe import longest, scale_of, shape_of
from regauge.hosts.transformers.runner import Runner
from regauge.hosts.transformers.sampling import whole_model
from regauge.hosts.transformers.settings import lookup, own_config
from regauge.hosts.transformers.source import Source
from regauge.hosts.transformers.table import anatomy_of
from regauge.hosts.transformers.tables import table_for
from regauge.kernels.cpu.machine import trim
from regauge.measure.subject import CLASSES, EMBEDDINGS, LABEL, LABELS, NEXT, PIECE, SCALES, Facts, Image, Outputs


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
    if model.main_input_name != "input_ids":  # no step serves it
        return Ways(model, None)
    if anatomy is None:
        anatomy = replace(anatomy_of(model.config, model), tied=bool(model.all_tied_weights_keys))
    own = model.forward
    plug(model, anatomy)
    return Ways(model, own)


def ways_of_source(source: Source, dtype: torch.dtype = torch.bfloat16) -> Ways:
    """The uncompressed source, in the dtype in which speeds are counted."""
    return ways_of(whole_model(source, dtype), source.anatomy)


def facts(model: Any, folder: Path) -> Facts:
    """What measuring needs to know of a model, with or without its weights.

    Args:
        folder: its own, where a processor may say how images are normalised.
    """
    config = model.config
    words = lookup(own_config(table_for(config), config), "vocab_size", 0)
    found = Facts(_gives(model), int(words), longest(config), keeps=keeps(model), lets_go=lets_go(model))
    if found.pictured:
        (channels, side), draws = shape_of(config), found.gives == SCALES
        scale = ((0.5,) * channels, (0.5,) * channels) if draws else scale_of(folder, channels)
        image = Image(channels, side, *scale, tokens=int(config.tokens) if draws else 0)
        return replace(found, labels=int(config.num_classes if draws else config.num_labels), image=image)
    return replace(found, labels=int(config.num_labels)) if found.gives in HEADS.values() else found


IMAGES = {"ForImageClassification": CLASSES, "VarForImageGeneration": SCALES}
HEADS = {"ForSequenceClassification": LABEL, "ForTokenClassification": LABELS}


def _gives(model: Any) -> str:
    """What a model gives for a text, by its class: transformers' models of one task are named alike."""
    name, config = type(model).__name__, model.config
    if model.main_input_name == "pixel_values" and name.endswith(tuple(IMAGES)):
        return next(gives for end, gives in IMAGES.items() if name.endswith(end))
    if model.main_input_name != "input_ids":
        return f"what it makes of images ({name})"
    if model.can_generate():
        return NEXT
    if model.base_model is model:
        return EMBEDDINGS
    if name.endswith("ForMaskedLM"):
        return LABELS
    if name.endswith(tuple(HEADS)):
        if config.num_labels < 2 or config.problem_type in ("regression", "multi_label_classification"):
            return f"{config.problem_type or 'regression'} of {config.num_labels} outputs ({name})"
        return next(gives for end, gives in HEADS.items() if name.endswith(end))
    return f"what a {name} makes of a text"


def outputs_of_source(source: Source, batches: Sequence[Mapping[str, Tensor]]) -> Outputs:
    """What a plain checkpoint gives in float32, read block by block; its last states are kept, so that only its head
    runs anew where it is asked again."""
    runner = Runner(source)
    outer = source.block(None)

    @cache
    def last() -> States:
        states = runner.begin([dict(batch) for batch in batches], outer)
        with tempfile.TemporaryDirectory(prefix="regauge-") as folder:
            if sum(hidden.nbytes for hidden in states.hidden) > SPILL:
                states = states.spill(folder)
            for index in range(source.anatomy.blocks):
                states = runner.block(index, source.block(index), states)
                trim()
        return states

    return lambda: runner.tail(outer, last())


def outputs_of_model(
    load: Callable[[], Any], batches: Sequence[Mapping[str, Tensor]], prompt: int | None = None
) -> Outputs:
    """What a model gives that is loaded when it is asked, and let go afterwards. One that keeps its past by a plan
    reads the first tokens of each text at once, and goes on in pieces that read the cache.

    Args:
        prompt: how many those are; None: half of the text.
    """

    def run() -> Iterator[Tensor]:
        model = load()
        for batch in batches:
            if keeps(model) and "input_ids" in batch:
                yield _continued(model, batch["input_ids"], prompt)
                continue
            found = model(**batch, use_cache=False) if model.can_generate() else model(**batch)
            yield found["logits"] if "logits" in found else found["last_hidden_state"]

    return run


def _continued(model: Any, ids_BT: Tensor, prompt: int | None) -> Tensor:
    first = max(1, ids_BT.shape[1] // 2 if prompt is None else prompt)
    cache, found = fresh(model), []
    expect(cache, first)
    for piece_BT in (ids_BT[:, :first], *torch.split(ids_BT[:, first:], PIECE, 1)):
        if piece_BT.shape[1]:
            found.append(model(input_ids=piece_BT, past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, 1)


@contextmanager
def unsaid() -> Iterator[None]:
    """While a model is timed: whoever loads the artifact is told what the step does not serve, and may load it
    elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        yield
