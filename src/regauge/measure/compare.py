"""`measure A [B ...]`: quality, speed and memory side by side. The first model is what the others are held to.

Speeds are interleaved, all models in one round, the first also by its library's own modules, so that what compression
gave and what the runtime gave stand apart; memory is read in a fresh process each. Classifiers are compared by their
labels, encoders by the cosine of their mean embeddings. Models come as `Subject`s: nothing here opens one.

Cost: quality is read from two models at a time, so that no more than one packed artifact, a block of each plain
checkpoint and the original's last states are in memory; the original's head runs once for every other model.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from regauge.kernels.cpu.machine import bandwidth, trim
from regauge.measure.contexts import at_lengths
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
    speed,
    speeds,
)
from regauge.measure.encoders import cosine
from regauge.measure.likeness import Labels, embeddings, labels, read
from regauge.measure.long import Long, generations, refused
from regauge.measure.machine import machine
from regauge.measure.quality import Kind, Paired, Quality, Scores, compare, paired, summarise
from regauge.measure.subject import EMBEDDINGS, PIECE, Facts, Subject, comparable
from regauge.measure.tasks import Score
from regauge.text.windows import Windows

BATCH, LOGITS = 2048, 2**25  # most tokens and logits of a batch: of large vocabularies fewer tokens are read at once
LONG = 2048
"""Tokens of a text on which the growth of packed caches is read, and of windows at most."""
OWN = "/own"  # the first model by its library's own modules; no name has a slash


def batch_tokens(vocabulary: int) -> int:
    """Tokens of a batch at most, for a vocabulary of so many."""
    return min(BATCH, max(1, LOGITS // max(1, vocabulary)))


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Record):
    """One model. The first row's quality is its own: KL 0, agreement 1.

    Attributes:
        decode, prefill: against the first model, in parts; None for the first itself.
        long: what it makes of what the first model wrote, where that was asked for; None for the first itself.
    """

    name: str
    quality: Quality | None = None
    cosine: float | None = None  # encoders: mean cosine to the first model's embeddings
    labels: Labels | None = None  # classifiers: against the first model's labels
    costs: Costs
    decode: Gain | None = None
    prefill: Gain | None = None
    long: Long | None = None


class Comparison(_Record):
    """All models, in the order given.

    Attributes:
        original: the first model by its library's own modules; None where it has none.
        kind: of `Quality`: of images, speeds are images a second, one at a time (`decode`) and several together.
    """

    kind: Kind = "tokens"

    rows: tuple[Row, ...]
    original: Costs | None
    text: str
    tokens: int
    pairs: dict[str, Paired]  # `B against C`: mean KL of B less that of C, on the same documents
    tasks: tuple[Score, ...] = ()
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
        apart: models are timed one at a time, each loaded anew in every round, so that no two are in memory.
        long: tokens that the first model writes and the others read; 0: none.
        say: is told the phase and what is measured.
    """

    seed: int = 0
    dtype: str = "bfloat16"
    rounds: int = 7
    apart: bool = False
    long: int = 0
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
    names = [subject.name for subject in subjects]
    all_facts = [subject.facts() for subject in subjects]
    comparable(names, all_facts)
    facts = all_facts[0]
    keeps = [one.keeps for one in all_facts]
    windows = replace(text(replace(facts, keeps=next(filter(None, keeps), ""))), halved=any(keeps))
    if method.long:
        refused(names, all_facts, windows, method.long)
    found = _quality(subjects, windows, facts, method)
    longs = {}
    if method.long:
        method.say("measure", "long generation")
        longs = generations(subjects, all_facts, windows, method.long, getattr(torch, method.dtype))
    costs, original = _costs(subjects, all_facts, method)
    first = costs[names[0]]
    rows = tuple(
        Row(
            name=name,
            quality=found.qualities.get(name),
            cosine=found.cosines.get(name),
            labels=found.labels.get(name),
            costs=costs[name],
            decode=None if name == names[0] else gain(costs[name].decode, first.decode, original.decode),
            prefill=None if name == names[0] else gain(costs[name].prefill, first.prefill, original.prefill),
            long=longs.get(name),
        )
        for name in names
    )
    return Comparison(
        rows=rows,
        original=original if original.decode is not None else None,
        text=windows.description,
        tokens=windows.predicted,
        pairs=found.pairs,
        bandwidth=bandwidth(folder=Path(tempfile.gettempdir())),
        machine=machine().model_dump(mode="json"),
        seconds=round(time.monotonic() - began, 2),
        notes=(*notes, *(note for subject in subjects for note in subject.notes), *_kept(names, keeps, windows)),
    )


@dataclass(frozen=True)
class _Found:
    """Quality of each model by name: of causal models, of encoders, or of classifiers."""

    qualities: Mapping[str, Quality] = field(default_factory=dict)
    cosines: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, Labels] = field(default_factory=dict)
    pairs: dict[str, Paired] = field(default_factory=dict)


@torch.no_grad()
def _quality(subjects: Sequence[Subject], text: Windows, facts: Facts, method: Method) -> _Found:
    method.say("measure", "quality")
    tokens = 1 if text.halved else batch_tokens(facts.vocabulary)  # windows one by one, each from its own half on
    seen = read(text, facts, tokens)
    first, *others = subjects
    base = first.outputs(seen.arguments)
    if facts.gives == EMBEDDINGS:
        original_ND = embeddings(base(), seen)
        near = {one.name: cosine(original_ND, embeddings(one.outputs(seen.arguments)(), seen)) for one in others}
        return _Found(cosines=near)
    if not facts.generative:
        told = {one.name: labels(base, one.outputs(seen.arguments), seen, method.seed) for one in others}
        return _Found(labels=told)
    once, again = itertools.tee(base())
    scores: dict[str, Scores] = {first.name: compare(text, once, again, tokens)}
    for one in others:  # each let go before the next is opened
        scores[one.name] = compare(text, base(), one.outputs(seen.arguments)(), tokens)
    pairs = {
        f"{a.name} against {b.name}": paired(scores[a.name], scores[b.name], method.seed)
        for a, b in itertools.combinations(others, 2)
    }
    return _Found({name: summarise(one, method.seed) for name, one in scores.items()}, pairs=pairs)


def _kept(names: Sequence[str], keeps: Sequence[str], text: Windows) -> tuple[str, ...]:
    """How models were read that keep their past in codes."""
    told = [f"{name} with its cache by {kept}" for name, kept in zip(names, keeps, strict=True) if kept]
    if not told:
        return ()
    longest = max(len(ids) for ids in text.ids)
    return (
        f"{', '.join(told)}: the first half of each window ({longest} tokens at most) is read at once and not scored, "
        f"the rest in pieces of {PIECE} tokens that read the cache",
    )


def _costs(subjects: Sequence[Subject], all_facts: Sequence[Facts], method: Method) -> tuple[dict[str, Costs], Costs]:
    """Of each model as it runs, and of the first by its library's own modules."""
    method.say("measure", "speed")
    found: dict[str, dict[str, Speed]] = {"decode": {}, "prefill": {}}
    at: dict[str, dict[int, Speed]] = {}
    cache: dict[str, float] = {}
    facts = replace(all_facts[0], keeps=next((one.keeps for one in all_facts if one.keeps), ""))
    if facts.generative:
        found, at, cache = _speeds(subjects, facts, method)
    method.say("measure", "memory")
    costs = {
        subject.name: Costs(
            decode=found["decode"].get(subject.name),
            prefill=found["prefill"].get(subject.name),
            decode_at=at.get(subject.name, {}),
            memory=memory(subject.path, method.dtype),
            cache_bytes=cache.get(subject.name),
            bytes=subject.stored,
        )
        for subject in subjects
    }
    own = Costs(decode=found["decode"].get(OWN), prefill=found["prefill"].get(OWN), decode_at=at.get(OWN, {}))
    return costs, own


def _speeds(
    subjects: Sequence[Subject], facts: Facts, method: Method
) -> tuple[dict[str, dict[str, Speed]], dict[str, dict[int, Speed]], dict[str, float]]:
    """Speeds of every way, interleaved; decoding by the length of the context; bytes of cache a token."""
    dtype, prompt_BT = getattr(torch, method.dtype), prompt_of(facts.vocabulary, facts.most)
    shares = [[subject] for subject in subjects] if method.apart else [subjects]
    rates: dict[str, dict[str, list[float]]] = {"decode": {}, "prefill": {}}
    at: dict[str, dict[int, Speed]] = {}
    cache: dict[str, float] = {}
    for turn in range(method.rounds if method.apart else 1):
        for some in shares:
            models = _ways(some, dtype, subjects[0])
            text_BT = growing(prompt_BT, facts)
            cache |= {n: cache_bytes_a_token(model, text_BT) for n, model in models.items() if n != OWN}
            found = speeds(models, prompt_BT, 1 if method.apart else method.rounds)
            if not turn:
                a_token = sum(cache.get(name, max(cache.values())) for name in models)
                at |= at_lengths(models, facts.vocabulary, facts.most, found, lambda *_: True, a_token)
            if not method.apart:
                return found, at, cache
            for resource, speeds_of in found.items():
                for name, one in speeds_of.items():
                    rates[resource].setdefault(name, []).append(one.median)
            del models
            trim()
    taken = {resource: {name: speed(all_of) for name, all_of in some.items()} for resource, some in rates.items()}
    return taken, at, cache


def growing(prompt_BT: Tensor, facts: Facts) -> Tensor:
    """The text on which a cache's growth is read: long enough for codes, where some are kept in codes."""
    if not facts.keeps:
        return prompt_BT[:, :32]
    length = min(LONG, facts.most or LONG)
    return prompt_BT.repeat(1, -(-length // prompt_BT.shape[1]))[:, :length]


def _ways(subjects: Sequence[Subject], dtype: torch.dtype, first: Subject) -> dict[str, Model]:
    models: dict[str, Model] = {}
    for subject in subjects:
        ways = subject.ways(dtype)
        models[subject.name] = ways[RUNTIME]
        if subject is first and ORIGINAL in ways:
            models[OWN] = ways[ORIGINAL]
    return models
