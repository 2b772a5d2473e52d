"""A family that is trained: what `learn/loop.py` solves for it, a step at a time.

A step draws members, runs each on the same batch, and adds the gradients up in the family's memory. Each is taught by
the model as it was, by the largest of its step, or by the one before it in size. The error that decides is the mean
cross-entropy (of an encoder: the distance from the model as it was) of the members named and the whole, on text that is
held out. Cost: a step is a forward and a backward pass of every member that it draws, and a forward of the teacher.

Legend: B windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from regauge.anatomy.members import sides
from regauge.anatomy.model import Anatomy
from regauge.elastic.dimensions import BY_NAME
from regauge.elastic.family import Family
from regauge.elastic.offers import units
from regauge.elastic.subnet import Subnet
from regauge.engine.teaching import Teaching, kept_bytes
from regauge.hosts.teaching import Taught, Trainee
from regauge.learn.base import Parameters, Rates
from regauge.learn.distillers import Read, classes, distiller_of, labels
from regauge.learn.loop import At
from regauge.learn.lots import Drawn
from regauge.learn.pictures import moved
from regauge.learn.ranks import ALONE, Ranks
from regauge.learn.samplers import Smallest
from regauge.learn.space import WHOLE, Choice, Space, Turn
from regauge.learn.training import EACH, LARGER, ORIGINAL, PLUS, Training

DRAWN = ("kernel", "depth", "ffn", "heads", "width", "experts")
"""Dimensions that training draws from, in the order in which they are opened."""
STRIDE = 1_000_003
"""Between the seeds by which the images of two runs are moved."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some windows, the mask None where all of them are full; or images (B, C, H, W) with their classes."""

    ids_BT: Tensor
    mask_BT: Tensor | None = None
    classes_B: Tensor | None = None

    @property
    def size(self) -> int:
        """Tokens, or images."""
        return self.ids_BT.numel() if self.classes_B is None else len(self.ids_BT)

    def part(self, ranks: Ranks) -> Batch:
        """The rows that one process computes."""
        some = (None if one is None else ranks.part(one) for one in (self.mask_BT, self.classes_B))
        return Batch(ranks.part(self.ids_BT), *some)

    @property
    def first(self) -> Batch:
        """Its first row."""
        return self.part(Ranks(0, len(self.ids_BT)))

    def on(self, where: torch.device) -> Batch:
        """The same rows at another place."""
        some = (None if one is None else one.to(where) for one in (self.mask_BT, self.classes_B))
        return Batch(self.ids_BT.to(where), *some)

    def changed(self, most: int, seed: int) -> Batch:
        """Images moved by up to so many pixels, by chance; 0: as they are."""
        if not most:
            return self
        return replace(self, ids_BT=moved(self.ids_BT, most, torch.Generator().manual_seed(seed)))

    def loss(self, read: Read) -> Tensor:
        """The cross-entropy of what a model makes of it: with the next token, or with the class."""
        if self.classes_B is None:
            return labels(read, self.ids_BT)
        return classes(read, self.classes_B)


@dataclass(frozen=True, eq=False)
class Raising:
    """The training of one family.

    Attributes:
        recipe: how it is trained.
        steps: that will be taken.
        text, aside: batches to train on, and held out.
        watched: members beside the whole whose error decides.
    """

    trainee: Trainee
    teacher: Taught
    recipe: Training
    steps: int
    text: Sequence[Batch]
    aside: Sequence[Batch]
    watched: tuple[Subnet, ...]
    seed: int = 0
    ranks: Ranks = ALONE

    @cached_property
    def space(self) -> Space:
        return space_of(self.trainee.family, self.trainee.anatomy, self.recipe.layers == EACH, self.trainee.bits)

    @property
    def rates(self) -> Rates:
        return dict.fromkeys(self.trainee.parameters, self.recipe.rate)

    @property
    def batches(self) -> int:
        return len(self.text)

    @cached_property
    def taught(self) -> bool:
        """Whether the data say what is right, a next token or a class; else the model gives embeddings."""
        anatomy = self.trainee.anatomy
        return anatomy.causal or anatomy.plumbing.scales or any(one.classes_B is not None for one in self.aside)

    @property
    def unit(self) -> str:
        """What errors are counted in."""
        if not self.taught:
            return "squared distance of embeddings"
        return "nats an image" if any(one.classes_B is not None for one in self.aside) else "nats a token"

    def init(self) -> Parameters:
        return {key: value.clone() for key, value in self.trainee.parameters.items()}

    @cached_property
    def _heard(self) -> Teaching:
        """The model as it was, of the text held out; the first of several distances decides."""
        first = self.recipe.distiller.partition(PLUS)[0]
        return Teaching(self.teacher, first, self.teaching.blocks, keeps=True)

    def loss(self, parameters: Parameters, batch: int, progress: float) -> Tensor:
        """The loss of one batch, without its gradient: `gradients` gives both."""
        return self.gradients(parameters, At(round(progress * self.steps), batch))[0]

    def gradients(self, parameters: Parameters, at: At) -> tuple[Tensor, Parameters]:
        """The loss of a step and its gradient, over all processes."""
        trainee, whole = self.trainee, self.text[at.batch]
        trainee.put(parameters)
        drawn = self.recipe.draws(self.space, Turn(at.step, self.steps, self.seed, at.batch))
        batch = whole.changed(self.recipe.moved, self.seed * STRIDE + at.step).part(self.ranks)
        loss = torch.zeros((), dtype=torch.float32, device=trainee.where)
        share = len(batch.ids_BT) / len(whole.ids_BT) / sum(one.weight for one in drawn)
        if self.ranks.sharded and not share:
            batch = whole.first
        if len(batch.ids_BT):
            with trainee.backward(), self.ranks.together():
                taught = self.recipe.teacher == ORIGINAL
                given = batch.ids_BT, batch.mask_BT
                self._pass(drawn, batch, share, loss, self.teaching.read(at.batch, *given) if taught else None)
        self.ranks.total([*trainee.gradients.values()], loss)
        self._clip()
        return loss, trainee.gradients

    @cached_property
    def teaching(self) -> Teaching:
        """The model as it was, where it teaches; what it says is kept where the text is read again and it is little."""
        anatomy, depth = self.trainee.anatomy, self.space.smallest.depth
        blocks = frozenset(range(anatomy.blocks))
        if depth is not None and not isinstance(depth, tuple) and self.recipe.draws == Smallest():
            blocks = frozenset(self.trainee.family.blocks(int(_count(depth, anatomy.blocks)), anatomy.blocks))
        tokens = sum(one.ids_BT.numel() for one in self.text)
        again = self.steps > self.batches and not self.recipe.moved
        keeps = again and bool(kept_bytes(self.recipe.distiller, len(blocks), anatomy.hidden, tokens))
        return Teaching(self.teacher, self.recipe.distiller, blocks, keeps)

    def _pass(self, drawn: Sequence[Drawn], batch: Batch, share: float, loss: Tensor, teacher: Read | None) -> None:
        """Runs every member forward and backward, one after another."""
        recipe = self.recipe
        distiller = distiller_of(recipe.distiller)
        for one in drawn:
            read = self.trainee.read(one.subnet, batch.ids_BT, batch.mask_BT)
            if teacher is None:
                own = batch.loss(read)
            else:
                own = distiller(read, teacher)
                if recipe.labels:
                    own = own + recipe.labels * batch.loss(read)
            if own.requires_grad:  # the whole of a family in codes has nothing that is trained
                torch.autograd.backward(one.weight * share * own)
            loss += one.weight * share * own.detach()
            if teacher is None or recipe.teacher == LARGER:
                teacher = read.detached

    def _clip(self) -> None:
        most = self.recipe.clip
        if not most:
            return
        found = list(self.trainee.gradients.values())
        norm = self.ranks.norm(found)
        for one in found:
            one.mul_(torch.clamp(most / (norm + 1e-12), max=1.0))

    def error(self, parameters: Parameters) -> float:
        found = self.errors(parameters)
        if self.watched and not self.recipe.draws.whole:
            found.pop(str(Subnet()))
        return sum(found.values()) / len(found)

    def errors(self, parameters: Parameters) -> dict[str, float]:
        """The error of each member that is watched, on the text held out."""
        self.trainee.put(parameters)
        sums = torch.zeros(len(self.watched) + 1, 2, dtype=torch.float64, device="cpu")
        with torch.no_grad(), self.ranks.together():
            for index, times in self.ranks.turns(len(self.aside)):
                batch = self.aside[index]
                rows = times * len(batch.ids_BT)
                for row, subnet in zip(sums, (Subnet(), *self.watched), strict=True):
                    read = self.trainee.read(subnet, batch.ids_BT, batch.mask_BT)
                    row += torch.tensor([rows * self._error(read, index), rows], dtype=row.dtype, device="cpu")
        self.ranks.add([sums])
        names = [str(one) for one in (Subnet(), *self.watched)]
        return {name: float(total / count) for name, (total, count) in zip(names, sums, strict=True)}

    def _error(self, read: Read, index: int) -> float:
        batch = self.aside[index]
        if self.taught:
            return float(batch.loss(read))
        heard = self._heard.read(index, batch.ids_BT, batch.mask_BT)
        return float(distiller_of(self._heard.distiller)(read, heard))


def space_of(family: Family, anatomy: Anatomy, each: bool = False, bits: Sequence[int] = ()) -> Space:
    """What there is to draw from a family, as a model has it.

    Args:
        bits: those whose adapters are trained, the most first: members differ in nothing else then.
    """
    if bits:
        levels = {one: _mean(one.bits) / bits[0] for one in family.members.values() if _level(one)}
        return Space({"bits": tuple(Choice(one, one / bits[0]) for one in bits)}, anatomy.blocks, each, levels)
    found: dict[str, tuple[Choice, ...]] = {}
    for name in DRAWN:
        if family.choices(name):
            some = {_share(name, value, family, anatomy): value for value in family.choices(name)}
            rest = [Choice(some[share], share) for share in sorted(some, reverse=True) if share < 1]
            whole = replace(WHOLE, whole=max(sides(anatomy).values())) if name == "kernel" else WHOLE
            found[name] = (whole, *rest)
    named = {one: size for one in family.members.values() if (size := _size(one, family, anatomy)) is not None}
    return Space(found, anatomy.blocks, each, named)


def _level(subnet: Subnet) -> bool:
    """Whether a member differs from the whole in its bits alone."""
    return [name for name, _ in subnet.said()] == ["bits"]


def _mean(bits: int | tuple[int, ...] | None) -> float:
    some = bits if isinstance(bits, tuple) else (bits or 0,)
    return sum(some) / len(some)


def _size(subnet: Subnet, family: Family, anatomy: Anatomy) -> float | None:
    """About which share of the whole's products a member has; None where it says what training does not draw."""
    size = 1.0
    for name, value in subnet.said():
        if name not in DRAWN or isinstance(value, str):
            return None
        if name == "depth" and isinstance(value, tuple):
            size *= len(value) / anatomy.blocks
            continue
        some = value if isinstance(value, tuple) else (value,)
        size *= sum(_share(name, one, family, anatomy) for one in some) / len(some)
    return None if subnet.full else size


def _share(name: str, value: int | float | str, family: Family, anatomy: Anatomy) -> float:
    """Which share of the whole a choice is."""
    if name == "depth":
        return _count(value, anatomy.blocks) / anatomy.blocks
    if name == "experts":
        return _count(value, 0) / anatomy.plumbing.routed
    every = range(anatomy.blocks)
    if name == "kernel":
        own = sides(anatomy)
        return sum(min(int(_count(value, 0)), side) ** 2 / side**2 for side in own.values()) / len(own)
    sizes: Mapping[str, int] = BY_NAME[name].kept(value, every, family, anatomy)
    if not sizes:
        return 1.0
    return sum(count / anatomy.stream(stream).size for stream, count in sizes.items()) / len(sizes)


def _count(value: int | float | str, whole: int) -> float:
    assert not isinstance(value, str), "depths are numbers"
    return value if isinstance(value, int) else units(value, whole, 1)
