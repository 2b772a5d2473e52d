"""Members of a family of models of images, measured: classes of images, or pictures that are drawn scale by scale.

A member of a model that draws may run on late scales alone, the whole on those before, as it is trained: such a way is
measured beside the member as `extract` writes it, which runs on every scale; it takes what the whole takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from regauge.artifact.statistics import batch_normed
from regauge.elastic.subnet import Subnet
from regauge.engine.drafting import Drafting
from regauge.engine.seeing import images_of
from regauge.hosts import host_of
from regauge.measure.cost import Speed
from regauge.measure.images import KINDS, read, scored, speeds
from regauge.measure.quality import Kind, Quality, summarise
from regauge.measure.subject import SCALES, Facts
from regauge.text.corpora import Where

LATE = " late"
"""Behind a member that runs on late scales alone."""
UNSEEN = (
    "with the whole's statistics of batch norms, of their first channels: {}; a member has its own where it was "
    "trained under a name, and model.regauge.recalibrate takes them"
)


@dataclass(frozen=True)
class Seen:
    """What was measured, by member: of late ones with `LATE` behind its subnet."""

    kind: Kind
    text: str
    timed: Mapping[str, Mapping[str, Speed]]
    quality: Mapping[str, Quality]
    notes: tuple[str, ...] = ()
    drafting: Drafting | None = None


@dataclass(frozen=True)
class Late:
    """A model that draws, with a member on its late scales."""

    model: Any
    stages: Any

    def __call__(self, **given: Any) -> Any:
        return self.model(**given, subnet=self.stages)

    def sample(self, labels: Sequence[int], seed: int) -> Any:
        return self.model.sample(labels, seed=seed, subnet=self.stages)


def measured(
    path: str | Path, asked: Sequence[Subnet], given: Where | None, facts: Facts, how: tuple[int, int]
) -> Seen:
    """Measures members; without images no quality.

    Args:
        how: rounds of timing, and a seed.
    """
    rounds, seed = how
    host = host_of(path)
    name = Path(str(path)).name or str(path)
    seen = None if given is None else images_of(name, path, given, facts)
    model = host.load(path, dtype="float32")
    models: dict[str, Any] = {str(one): model.regauge.member(one) for one in asked}
    if facts.gives == SCALES:
        models |= {
            f"{one}{LATE}": Late(model, model.late(model.regauge.cut(one).blocks)) for one in asked if of_depth(one)
        }
    timed = speeds(models, facts, rounds)
    quality = dict[str, Quality]()
    if seen is not None:
        whole = next(iter(models.values()))
        found = scored(seen, read(whole, seen), [read(one, seen) for one in models.values()])
        quality = dict(zip(models, map(partial(summarise, seed=seed), found), strict=True))
    own = model.regauge.learnt.statistics
    normed = batch_normed(model.regauge.anatomy)
    without = [str(one) for one in asked if normed and not one.full and str(one) not in own]
    notes = (UNSEEN.format(", ".join(without)),) if without else ()
    told = "" if seen is None else seen.description
    return Seen(KINDS[facts.gives], told, timed, quality, (*notes, *(() if seen is None else seen.notes)))


def of_depth(subnet: Subnet) -> bool:
    """Whether it says depth and nothing else, in which alone the scales of an image may differ."""
    return [name for name, _ in subnet.said()] == ["depth"]
