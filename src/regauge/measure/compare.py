"""`measure A [B ...]`: quality, speed and memory side by side. The first model is what the others are held to.

Speeds are interleaved, all models in one round, the first also by its library's own modules, so that what compression
gave and what the runtime gave stand apart; memory is read in a fresh process each. Encoders, which predict no next
token, are compared by the cosine of their mean embeddings. Models come as `Subject`s: nothing here opens one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from regauge.kernels.cpu.machine import bandwidth
from regauge.measure.cost import (
    ORIGINAL,
    RUNTIME,
    Costs,
    Gain,
    Model,
    Speed,
    cache_bytes_a_token,
    gain,
    memory,
    prompt_of,
    speeds,
)
from regauge.measure.encoders import cosine, embed
from regauge.measure.machine import machine
from regauge.measure.quality import Paired, Quality, compare_many, paired, summarise
from regauge.measure.subject import Facts, Subject, logits
from regauge.text.windows import Windows

BATCH = 2048  # tokens
OWN = "/own"  # the first model by its library's own modules; no name has a slash


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Record):
    """One model. The first row's quality is its own: KL 0, agreement 1.

    Attributes:
        decode, prefill: against the first model, in parts; None for the first itself.
    """

    name: str
    quality: Quality | None = None
    cosine: float | None = None  # encoders: mean cosine to the first model's embeddings
    costs: Costs
    decode: Gain | None = None
    prefill: Gain | None = None


class Comparison(_Record):
    """All models, in the order given.

    Attributes:
        original: the first model by its library's own modules; None where it has none.
    """

    rows: tuple[Row, ...]
    original: Costs | None
    text: str
    tokens: int
    pairs: dict[str, Paired]  # `B against C`: mean KL of B less that of C, on the same documents
    bandwidth: float  # bytes a second, at this minute
    machine: dict[str, object]
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """How models are measured.

    Attributes:
        dtype: of activations while speed and memory are measured; quality is measured in float32.
        rounds: of the interleaved timing.
        say: is told the phase and what is measured.
    """

    seed: int = 0
    dtype: str = "bfloat16"
    rounds: int = 7
    say: Callable[[str, str], None] = lambda _, __: None


def side_by_side(
    subjects: Sequence[Subject], text: Callable[[Facts], Windows], method: Method, notes: tuple[str, ...] = ()
) -> Comparison:
    """Measures models side by side.

    Args:
        subjects: one or more; the first is the original.
        text: the windows that suit the first model.
    """
    began = time.monotonic()
    method.say("open", "")
    loaded = [subject.load(torch.float32) for subject in subjects]
    facts = subjects[0].facts(loaded[0])
    windows = text(facts)
    names = [subject.name for subject in subjects]
    found = _quality(loaded, names, windows, facts, method)
    del loaded
    costs, original = _costs(subjects, facts, method)
    first = costs[names[0]]
    rows = tuple(
        Row(
            name=name,
            quality=found.qualities.get(name),
            cosine=found.cosines.get(name),
            costs=costs[name],
            decode=None if name == names[0] else gain(costs[name].decode, first.decode, original.decode),
            prefill=None if name == names[0] else gain(costs[name].prefill, first.prefill, original.prefill),
        )
        for name in names
    )
    return Comparison(
        rows=rows,
        original=original if original.decode is not None else None,
        text=windows.description,
        tokens=windows.predicted,
        pairs=found.pairs,
        bandwidth=bandwidth(),
        machine=machine().model_dump(mode="json"),
        seconds=round(time.monotonic() - began, 2),
        notes=notes,
    )


@dataclass(frozen=True)
class _Found:
    """Quality of each model by name: of causal models, or of encoders."""

    qualities: Mapping[str, Quality]
    cosines: Mapping[str, float]
    pairs: dict[str, Paired]


def _quality(loaded: Sequence[Any], names: Sequence[str], text: Windows, facts: Facts, method: Method) -> _Found:
    method.say("measure", "quality")
    inputs = [batch.ids_BT for batch in text.batches(BATCH)]
    if not facts.generative:
        first, *others = [embed(model, inputs) for model in loaded]
        return _Found({}, {name: cosine(first, other) for name, other in zip(names[1:], others, strict=True)}, {})
    with torch.no_grad():
        base, *rest = [logits(model, inputs) for model in loaded]
        scores = compare_many(text, base, [logits(loaded[0], inputs), *rest], BATCH)
    seed = method.seed
    pairs = {
        f"{names[i]} against {names[j]}": paired(scores[i], scores[j], seed)
        for i in range(1, len(names))
        for j in range(i + 1, len(names))
    }
    return _Found({name: summarise(one, seed) for name, one in zip(names, scores, strict=True)}, {}, pairs)


def _costs(subjects: Sequence[Subject], facts: Facts, method: Method) -> tuple[dict[str, Costs], Costs]:
    """Of each model as it runs, and of the first by its library's own modules."""
    method.say("measure", "speed")
    found: dict[str, dict[str, Speed]] = {"decode": {}, "prefill": {}}
    cache: dict[str, float] = {}
    if facts.generative:
        found, cache = _speeds(subjects, facts, method)
    method.say("measure", "memory")
    costs = {
        subject.name: Costs(
            decode=found["decode"].get(subject.name),
            prefill=found["prefill"].get(subject.name),
            memory=memory(subject.path, method.dtype),
            cache_bytes=cache.get(subject.name),
            bytes=subject.stored,
        )
        for subject in subjects
    }
    return costs, Costs(decode=found["decode"].get(OWN), prefill=found["prefill"].get(OWN))


def _speeds(
    subjects: Sequence[Subject], facts: Facts, method: Method
) -> tuple[dict[str, dict[str, Speed]], dict[str, float]]:
    """Speeds of every way, interleaved, and bytes of cache a token."""
    models: dict[str, Model] = {}
    for subject in subjects:
        ways = subject.ways(getattr(torch, method.dtype))
        models[subject.name] = ways[RUNTIME]
        if subject is subjects[0] and ORIGINAL in ways:
            models[OWN] = ways[ORIGINAL]
    prompt_BT = prompt_of(facts.vocabulary, facts.most)
    cache = {name: cache_bytes_a_token(model, prompt_BT[:, :32]) for name, model in models.items() if name != OWN}
    return speeds(models, prompt_BT, method.rounds), cache
