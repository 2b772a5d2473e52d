"""The members of a family, measured beside each other: `regauge subnets OUT`.

Every member is run where it will run, over the family's memory. Size is of its tensors by their formats, which is what
`extract` writes; speed is interleaved over all members; quality is against the whole. Cost: one pass of the text for
each member, and some thirty tokens a round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from regauge.amounts import told
from regauge.anatomy.model import Anatomy
from regauge.artifact.adapters import read_adapters
from regauge.artifact.codec.sizes import tensor_bytes
from regauge.artifact.cutting import layout_of
from regauge.artifact.families import family_at
from regauge.artifact.files import weight_bytes
from regauge.elastic.family import Family
from regauge.elastic.legal import member_in, settled
from regauge.elastic.subnet import Subnet
from regauge.engine.drafting import Drafting, Way, weighed
from regauge.engine.measuring import text_of
from regauge.engine.seeing import refuse_images
from regauge.engine.subnets_images import LATE, Seen, measured
from regauge.engine.watchdog import Clock, Watcher, nobody, quiet_torch
from regauge.hosts import host_of
from regauge.measure.cost import Speed, prompt_of, speeds
from regauge.measure.quality import Kind, Quality, compare_many, summarise
from regauge.measure.several import together
from regauge.measure.subject import Facts
from regauge.runtime.drafts.worth import MOST as MOST_GUESSES
from regauge.text.corpora import Where
from regauge.text.windows import Windows

MOST, TOGETHER = 32, 4096
"""Members that are measured at once, and tokens of a batch."""


class MemberFigures(BaseModel):
    """What was measured of one member.

    Attributes:
        subnet: as the family says it; `name`: what the family calls it, or "".
        late: it runs on late scales of an image alone, the whole on those before, and takes what the whole takes.
        blocks: which blocks of the whole run.
        bytes: of its tensors, by their formats.
        decode, prefill: of images, images a second, one at a time and several together.
        quality: against the whole; None where there was no text.
        drafts: what it is worth as a draft of the whole; None of the whole, of a member with a cache of its own kind,
            and where there was no text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    subnet: str
    name: str = ""
    late: bool = False
    blocks: tuple[int, ...]
    bytes: int
    decode: Speed
    prefill: Speed
    quality: Quality | None = None
    drafts: Way | None = None


class Subnets(BaseModel):
    """A family's members side by side, the whole first.

    Attributes:
        offers: dimension → its choices beside the whole.
        text: what quality was measured on, in words.
        drafting: which drafts the whole is best decoded with; None without text.
        kind: of `Quality`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    offers: dict[str, tuple[str, ...]]
    layers: str
    text: str
    members: tuple[MemberFigures, ...]
    drafting: Drafting | None = None
    kind: Kind = "tokens"
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        first = self.members[0]
        unit = "tokens/s" if self.kind == "tokens" else "images/s"
        rows = (f"{one.subnet}: {told(one.bytes)}, {one.decode.median:.0f} {unit}" for one in self.members)
        return "\n".join([f"{self.path}: {told(first.bytes)} as a whole", *rows])


def subnets(
    path: str | Path,
    subnet: Sequence[str | Subnet] = (),
    *,
    eval: Where | None = None,
    rounds: int = 5,
    seed: int = 0,
    progress: Watcher | None = None,
) -> Subnets:
    """Measures members of a family.

    Args:
        path: an artifact that a recipe with `family` made.
        subnet: which; none: every choice by itself, the smallest of all together, and those that have a name.
        eval: text for quality; None: the model samples its own where nothing in it is rounded, else no quality. Of a
            model of images an .npz of them; None: no quality.
        rounds: of timing.

    Raises:
        SettingError: the directory is no family, or a subnet not legal in it; the sentence names the nearest that is.
    """
    clock, host = Clock(progress or nobody), host_of(path)
    folder = host.folder(str(path))
    artifact, family = family_at(folder)
    layout, adapters = artifact.layout, read_adapters(folder, artifact.layout.anatomy)
    found = list(_asked(subnet, family, layout.anatomy))
    with quiet_torch(), host.unsaid():
        facts = host.facts(path)
        clock.say("subnets", f"{len(found)} members")
        if facts.pictured:
            seen = measured(path, found, eval, facts, (rounds, seed))
        else:
            refuse_images(folder.name, eval)
            seen = _read(path, found, eval, facts, (rounds, seed))
    worth = {} if seen.drafting is None else {way.drafts: way for way in seen.drafting.ways}
    names = {settled(one, family, layout.anatomy): name for name, one in family.members.items()}
    cuts = {str(one): member_in(one, family, layout.anatomy) for one in found}
    sizes = {name: tensor_bytes(layout_of(layout, cut, adapters=adapters)) for name, cut in cuts.items()}
    whole = next(iter(sizes.values()))
    beside = max(0, weight_bytes(folder) - whole) if facts.pictured else 0  # tokenizers of images, which members share
    members = tuple(
        MemberFigures(
            subnet=str(one),
            name="" if late else names.get(one, ""),
            late=late,
            blocks=cuts[str(one)].blocks,
            bytes=beside + (whole if late else sizes[str(one)]),
            decode=seen.timed["decode"][key],
            prefill=seen.timed["prefill"][key],
            quality=seen.quality.get(key),
            drafts=worth.get(key),
        )
        for one in found
        for key, late in ((str(one), False), (f"{one}{LATE}", True))
        if key in seen.timed["decode"]
    )
    return Subnets(
        path=str(path),
        offers={name: tuple(map(str, family.choices(name))) for name in family.offered},
        layers=family.layers,
        text=seen.text,
        members=members,
        drafting=seen.drafting,
        kind=seen.kind,
        notes=seen.notes,
    )


def _read(path: str | Path, found: Sequence[Subnet], eval: Where | None, facts: Facts, how: tuple[int, int]) -> Seen:
    """Members of a model of text."""
    host, (rounds, seed) = host_of(path), how
    windows = text_of(path, eval, facts, seed) if eval is not None or not host.packed(path) else None
    model = host.load(path)
    models = {str(one): model.regauge.member(one) for one in found}
    timed = speeds(models, prompt_of(facts.vocabulary, facts.most), rounds)
    quality = {} if windows is None else _quality(windows, models, seed)
    drafting = None if windows is None else _drafting(model, models, windows, facts, rounds)
    return Seen("tokens", "" if windows is None else windows.description, timed, quality, drafting=drafting)


def _drafting(model: Any, models: Mapping[str, Any], windows: Windows, facts: Facts, rounds: int) -> Drafting:
    """What look-up and the members are worth that keep the past as the whole does."""
    members = {
        name: one for name, one in models.items() if not (subnet := Subnet.parse(name)).full and not subnet.cache
    }
    times = together(model, members, prompt_of(facts.vocabulary, facts.most), MOST_GUESSES + 1, rounds)
    return weighed(model, members, windows.halves(), times, facts.most)


def _asked(asked: Sequence[str | Subnet], family: Family, anatomy: Anatomy) -> Iterator[Subnet]:
    """The whole, and the members that are asked for or worth a look, each once."""
    wanted: list[str | Subnet] = [Subnet(), *asked]
    if not asked:
        alone = [name for name in family.offered if name != "bits"]
        wanted += [Subnet(**{name: one}) for name in alone for one in family.choices(name)]  # type: ignore[arg-type]  # of its kind
        sizes = [name for name in alone if name != "cache"]
        wanted.append(Subnet(**{name: min(family.choices(name), key=float) for name in sizes}))  # type: ignore[arg-type]  # of its kind
        wanted += family.members.values()
    yield from list(dict.fromkeys(settled(one, family, anatomy) for one in wanted))[:MOST]


def _quality(windows: Windows, models: dict[str, Any], seed: int) -> dict[str, Quality]:
    """Member → its figures against the whole, which is the first."""

    def read(model: Any) -> Iterator[Tensor]:
        with torch.no_grad():
            for batch in windows.batches(TOGETHER):
                yield model(input_ids=batch.ids_BT, use_cache=False).logits.float()

    whole = next(iter(models.values()))
    scores = compare_many(windows, read(whole), [read(one) for one in models.values()], TOGETHER)
    return dict(zip(models, map(partial(summarise, seed=seed), scores), strict=True))
