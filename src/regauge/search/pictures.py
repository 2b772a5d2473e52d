"""The images of a search, which never share one: calibration, search, evaluation; and what differs from text.

Of one file each part takes every so many-th image that none before it took, since files are often sorted by class.
Amounts of effort are images, and tokens of text nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regauge.artifact.files import sha256, weight_bytes
from regauge.engine.seeing import WANTED, count_of, images_of, labelled, refuse_asked, refuse_images, rows_in
from regauge.errors import BudgetError, TextError
from regauge.hosts import host_of
from regauge.hosts.base import Source
from regauge.measure.cost import COMPRESSED, ORIGINAL, RUNTIME, Costs, memory
from regauge.measure.images import DTYPE, Seen, cache_bytes, probe_of, speeds
from regauge.measure.subject import CLASSES, Facts
from regauge.search.budgets import Budget
from regauge.search.subject import reader
from regauge.text.arrays import named
from regauge.text.corpora import Where
from regauge.text.split import Sizes, Text, Texts, prepare

CALIBRATION, SEARCH, GRADIENT, SEEN = 512, 512, 128, 256
"""Images that rounders read when the artifact is made, that variants are compared on, that go backward, and that
options are rounded by while they are compared."""
TOKENS = 8192
"""Tokens of images of a model that draws, in place of images, for search and sensitivity."""
LEAST = 32
"""Images that a file must leave for each part."""
BATCH = 32


@dataclass(frozen=True, eq=False)
class Pictures:
    """As `Texts`. `calibration` is a file of which `apply` reads the same images.

    Attributes:
        tokens, length: of the recipe: what the images count as, and each of them.
        read: what calibrates, as the search gives it to the model.
    """

    calibration: Path
    tokens: int
    length: int
    read: Seen
    search: Seen
    evaluation: Seen
    records: tuple[Text, ...]
    notes: tuple[str, ...]
    prompts: tuple[str, ...] = ()

    @property
    def given(self) -> dict[str, Any]:
        """What `apply` is given of it."""
        return {"calibration": self.calibration, "tokens": self.tokens}

    def batches(self, images: int, size: int) -> list[Mapping[str, Tensor]]:
        """So many images of the calibration, every so many-th, in batches."""
        joined = {name: torch.cat([one[name] for one in self.read.arguments]) for name in self.read.arguments[0]}
        count = len(next(iter(joined.values())))
        rows = torch.arange(min(images, count), dtype=torch.int64, device="cpu") * count // min(images, count)
        return [{name: x[some] for name, x in joined.items()} for some in torch.split(rows, min(BATCH, size))]


Material = Texts | Pictures


def sizes_of(facts: Facts, tokens: int | None) -> Mapping[str, int]:
    """Amounts of work in images, under the names of `Effort`.

    Args:
        tokens: of calibration, as the user says: images, as `apply` counts them.
    """
    each = 1 if facts.gives == CLASSES or facts.image is None else facts.image.tokens
    most = CALIBRATION if tokens is None else max(1, min(CALIBRATION, tokens // _length(facts)))
    few = max(LEAST, TOKENS // each)
    search, gradient = min(SEARCH, few), min(GRADIENT, few)
    found = {"calibration": most, "search": search, "evaluation": count_of(facts), "gradient": min(gradient, most)}
    return found | {"seen": min(SEEN, few, most)}


def _length(facts: Facts) -> int:
    """What an image counts as where `apply` counts tokens."""
    return 1 if facts.image is None else max(1, (facts.image.side // 16) ** 2)


def refuse(name: str, budgets: Sequence[Budget], given: Mapping[str, object]) -> None:
    """
    Raises:
        BudgetError: a budget is of text. SettingError: so is an option.
    """
    for budget in budgets:
        if budget.resource != "memory" or budget.context is not None:
            what = "a cache of text" if budget.context is not None else "the speed of a model of text"
            raise BudgetError(
                f"{budget.text!r} is about {what}, and {name} is a model of images: its speeds (images a second) are "
                "measured and not searched for; what can be asked is memory=0.25x or memory=1MB, and --floor kl=0.05."
            )
    refuse_asked(name, {one: value for one, value in given.items() if value != "none"}, "searches of models of text")


def pictures(source: Source, facts: Facts, given: Where | None, held_out: Where | None, sizes: Sizes) -> Pictures:
    """Opens, checks and splits the images.

    Raises:
        TextError: there is no file, it holds something else, or too few.
    """
    name, image = source.path.name, facts.image
    assert image is not None, "of a model of images"
    first = given if given is not None else held_out
    if not named(first):
        raise TextError(f"{name} is a model of images, and samples none of its own: give --calibration "
                        f"{WANTED.format(image.channels)}.")  # fmt: skip
    path = Path(first).expanduser()
    apart = given is not None and held_out is not None
    if apart:
        labelled(name, held_out, facts)  # refused before anything is read
        apart = sha256(path) != sha256(Path(str(held_out)).expanduser())
    total = rows_in(path, image.channels)
    count = min(sizes.calibration, total * 3 // 4 if apart else total // 2)
    used = [index * total // count for index in range(count)] if count else []
    left = sorted(set(range(total)) - set(used))
    search = _spread(left, min(sizes.search, len(left) if apart else len(left) // 2))
    rest = sorted(set(left) - set(search))
    if min(len(used), len(search), len(rest) if not apart else LEAST) < LEAST:
        raise TextError(
            f"{path} has {total} images, too few to keep calibration, search"
            f"{'' if apart else ' and evaluation'} apart: give it {4 * LEAST} or more."
        )
    read, tried = (images_of(name, source.path, path, facts, rows, "train") for rows in (used, search))
    if apart:
        assert held_out is not None, "said above"
        evaluation = images_of(name, source.path, Path(str(held_out)).expanduser(), facts, None, "test")
    else:
        evaluation = images_of(name, source.path, path, facts, _spread(rest, min(sizes.evaluation, len(rest))), "train")
    notes = tuple(dict.fromkeys((*read.notes, *evaluation.notes)))
    if not apart:
        notes = (*notes, "one file of images was given: it was split; none serves twice")
    begun = (("calibration", read, path), ("search", tried, path))
    last = ("evaluation", evaluation, Path(str(held_out)) if apart else path)
    records = tuple(
        Text(role=role, description=f"{at.name} ({one.images} images)", tokens=one.predicted, documents=one.images,
             sha256=one.hash())
        for role, one, at in (*begun, last)
    )  # fmt: skip
    each = _length(facts)
    return Pictures(path, each * len(used), each, read, tried, evaluation, records, notes)


def material(
    source: Source,
    facts: Facts | None,
    given: tuple[Where | None, Where | None],
    sizes: Sizes,
    how: tuple[int, int | None],
) -> Material:
    """What a search reads: texts, or images of a model of those.

    Args:
        given: to calibrate and to be measured on.
        how: seed, and tokens of a window.
    """
    if facts is not None:
        return pictures(source, facts, *given, sizes)
    for one in given:
        refuse_images(source.path.name, one)
    seed, length = how
    return prepare(reader(source, seed, length), *given, sizes, seed)


def _spread(rows: Sequence[int], count: int) -> list[int]:
    return [rows[index * len(rows) // count] for index in range(count)] if count else []


def imaged(source: Source, folder: Path, facts: Facts, turns: int, resident: bool) -> dict[str, Costs]:
    """What a model of images and what was made of it cost: images a second, and memory."""
    host = host_of(source.path)
    models = {RUNTIME: host.load(source.path, dtype=DTYPE), COMPRESSED: host.load(folder, dtype=DTYPE)}
    timed = speeds(models, facts, turns)
    caches = {name: cache_bytes(model, facts) for name, model in models.items()}
    del models
    paths = {RUNTIME: source.path, COMPRESSED: folder}
    found = {
        name: Costs(
            decode=timed["decode"][name],
            prefill=timed["prefill"][name],
            memory=memory(path, DTYPE, probe_of(facts)) if resident else None,
            cache_bytes=caches[name],
            bytes=weight_bytes(path),
        )
        for name, path in paths.items()
    }
    whole = found[RUNTIME]
    return found | {ORIGINAL: _unsped(whole), RUNTIME: whole.model_copy(update={"memory": None, "bytes": None})}


def _unsped(costs: Costs) -> Costs:
    """The same without speeds: of the original, whose modules are the runtime's."""
    return costs.model_copy(update={"decode": None, "prefill": None})
