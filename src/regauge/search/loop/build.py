"""From an allocation to an artifact, and from the artifact to figures: what a budget is held against.

The artifact is made by the engine from an explicit recipe, loaded as a user would load it, and run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regauge.artifact.files import weight_bytes
from regauge.artifact.receipt import Receipt
from regauge.cache.scheme import CachePlan
from regauge.engine import apply
from regauge.errors import ArtifactError
from regauge.hosts import host_of
from regauge.hosts.base import Source
from regauge.kernels.cpu.machine import give_back
from regauge.measure.contexts import Can, at_lengths
from regauge.measure.cost import (
    COMPRESSED,
    ORIGINAL,
    RUNTIME,
    Costs,
    Model,
    Speed,
    cache_bytes_a_token,
    memory,
    prompt_of,
)
from regauge.measure.cost import speeds as timed
from regauge.measure.quality import Scores
from regauge.measure.reading import Read, inputs_of, logits_of, scores_of
from regauge.measure.subject import Facts, logits_kept
from regauge.parts import CACHE
from regauge.plan import Plan
from regauge.plan.caches import asked, cache_plan
from regauge.plan.keeping import bytes_at, rate
from regauge.search.loop.desk import Desk
from regauge.search.options import SiteGroup, plan_of
from regauge.search.pictures import Material, imaged
from regauge.search.subject import Subject
from regauge.text.windows import Windows


@dataclass(frozen=True, eq=False)
class Built:
    """An artifact on disk, with what was read from it."""

    folder: Path
    receipt: Receipt
    search: Scores  # on the search text
    cache: CachePlan | None = None  # what its blocks keep, where the search chose that

    @property
    def bytes(self) -> int:
        return self.receipt.bytes_after

    @property
    def kl(self) -> float:
        return float(self.search.kl_N.mean())


def plan_for(picks: Mapping[str, str], groups: Sequence[SiteGroup], name: str, texts: Material) -> Plan:
    """The recipe of named picks: every site by name."""
    for group in groups:
        known = [option.name for option in group.options]
        if picks.get(group.name) not in known:
            raise ArtifactError(
                f"point {name} gives {group.name} {picks.get(group.name)!r}, which is none of its options "
                f"({', '.join(known)}): the record is of another model or version; run fit again."
            )
    options = {group.name: group.option(picks[group.name]) for group in groups}
    return plan_of(options, groups, name, "found by regauge fit", texts.tokens, texts.length)


def build(desk: Desk, plan: Plan) -> Built:
    """Makes the artifact (an earlier one is replaced), loads it and scores it on the search text."""
    texts, folder = desk.texts, desk.folder.path / "build"
    receipt = apply(
        plan,
        desk.subject.source.path,
        folder,
        **texts.given,
        seed=desk.ask.seed,
        force=True,
        max_memory=desk.limits.bound,
        wire=desk.ask.menu.wire,
        cache=desk.ask.cache,
        progress=desk.clock.within("build"),
        command=desk.ask.command,
    )
    cache = cache_plan(plan, desk.subject.anatomy) if plan.of(CACHE) else None
    model = desk.subject.host.load(folder, dtype=torch.float32)
    return Built(folder, receipt, score(model, desk.subject, texts.search, cache), cache)


@torch.no_grad()
def score(model: Any, subject: Subject, windows: Read, cache: CachePlan | None = None) -> Scores:
    """A loaded model against the subject, whose own forward is streamed beside it in float32.

    Args:
        cache: what the model keeps of the past; it reads its text in pieces then, each behind what was kept before.
    """
    inputs, found = inputs_of(windows, subject.batch), logits_of(model, windows, subject.batch)
    if cache is not None and isinstance(windows, Windows):
        ids = [batch.ids_BT for batch in windows.batches(subject.batch)]
        found = logits_kept(model, ids, lambda: subject.host.cache(model, cache))
    return scores_of(windows, subject.exact.logits(inputs, subject.read), [found], subject.batch)[0]


def cache_at(source: Source, cache: str | None, tokens: int) -> int:
    """Bytes of the cache of a sequence of so many tokens: by the formats of a recipe, or as bf16 without one.

    Raises:
        RecipeError: it is none of a cache, or does not fit the model.
    """
    plan = None if cache is None else asked(cache)
    if plan is None:
        return 2 * source.anatomy.cached * tokens
    return bytes_at(cache_plan(plan, source.anatomy), source.anatomy, tokens)


def cache_growth(source: Source) -> float:
    """Bytes of the source's cache a token, in bf16."""
    return _growth(host_of(source.path).ways_of_source(source).runtime)


def _growth(model: Model) -> float:
    return cache_bytes_a_token(model, torch.ones(1, 32, dtype=torch.int64, device="cpu"))


def speeds(source: Source, folder: Path, turns: int) -> dict[str, dict[str, Speed]]:
    """`decode` and `prefill`, interleaved, of what `_models` gives."""
    host = host_of(source.path)
    models = _models(source, folder)
    with host.unsaid():
        return timed(models, prompt_of(source.anatomy.site("embed").shape[0], host.context(source)), turns)


def _models(source: Source, folder: Path) -> dict[str, Model]:
    """The source in bf16 by its library's own modules (`original`) and by the same runtime (`runtime`), and the
    artifact (`compressed`)."""
    host = host_of(source.path)
    ways = host.ways_of_source(source)
    models = {RUNTIME: ways.runtime, COMPRESSED: host.load(folder, dtype=torch.bfloat16)}
    return models if ways.own is None else models | {ORIGINAL: ways.own}


def _at_lengths(
    source: Source, folder: Path, turns: int, can: Can
) -> tuple[dict[str, dict[str, Speed]], dict[str, dict[int, Speed]], dict[str, float]]:
    """`speeds`, decoding by the length of the context, and bytes of the cache a token."""
    host, vocabulary = host_of(source.path), source.anatomy.site("embed").shape[0]
    models, most = _models(source, folder), host.context(source)
    with host.unsaid():
        found = timed(models, prompt_of(vocabulary, most), turns)
        growth = {ORIGINAL: _growth(models[RUNTIME]), COMPRESSED: _growth(models[COMPRESSED])}
        a_token = growth[COMPRESSED] + (len(models) - 1) * growth[ORIGINAL]
        return found, at_lengths(models, vocabulary, most, found, can, a_token), growth


def costs(
    source: Source, built: Built, turns: int, resident: bool, can: Can, facts: Facts | None = None
) -> dict[str, Costs]:
    """Everything measured about the cost of the source, by both runtimes, and of the artifact.

    Args:
        can: whether there is time for a length of context (`measure.contexts`).
        facts: of a model of images.
    """
    folder = built.folder
    if facts is not None:
        return imaged(source, folder, facts, turns, resident)
    found, at, cache = _at_lengths(source, folder, turns, can)
    if built.cache is not None:
        cache[COMPRESSED] = rate(built.cache, source.anatomy)
    give_back()
    paths = {ORIGINAL: source.path, COMPRESSED: folder}
    return {
        name: Costs(
            decode=found["decode"][name],
            prefill=found["prefill"][name],
            decode_at=at.get(name, {}),
            memory=memory(paths[name], "bfloat16") if resident and name in paths else None,
            cache_bytes=cache.get(name),
            bytes=weight_bytes(paths[name]) if name in paths else None,
        )
        for name in (ORIGINAL, RUNTIME, COMPRESSED)
    }
