"""An artifact as a model that is trained: its blocks under parameters, and as shards again.

A block is read from its files when it is asked for; small models are kept in memory. Parameters are called
`{place} › {own}`: `blocks.3.attn.q › step`, `blocks.3.attn.norm.gain › value`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from regauge.anatomy.model import Weights
from regauge.artifact.codec.base import decoder
from regauge.artifact.codec.taps import readings
from regauge.artifact.reader import Artifact, Block
from regauge.formats.base import Codes
from regauge.learn.base import Parameters, Rates, Trial
from regauge.learn.left import Matrix, Whole

HELD = 2**26  # weights of a model up to which its blocks are read once and kept
TABLE = 2**24  # numbers of a matrix in full precision outside the blocks up to which it is trained
Change = dict[str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True, eq=False)
class Lesson:
    """What is trained of one block, or of what lies outside the blocks.

    Attributes:
        block: as the artifact holds it.
        matrices: site → its matrix in codes; wholes: canonical tensor → itself, of those that are trained.
        inputs: site → what becomes of its input; gradients pass.
        notes: what stays as it is and might not have, a sentence each.
    """

    block: Block
    matrices: Mapping[str, Matrix]
    wholes: Mapping[str, Whole]
    inputs: Change
    notes: tuple[str, ...] = ()

    @property
    def places(self) -> Mapping[str, Matrix | Whole]:
        return {**self.matrices, **self.wholes}

    @cached_property
    def rates(self) -> Rates:
        return {f"{name} › {own}": rate for name, part in self.places.items() for own, rate in part.rates.items()}

    def init(self) -> Parameters:
        return {f"{name} › {own}": value for name, part in self.places.items() for own, value in part.init().items()}

    def weights(self, parameters: Parameters) -> Weights:
        """Canonical tensors of the block under these parameters, float32, differentiable."""
        found = {name: tensor.float() for name, tensor in self.block.weights.items()}
        found |= {name: part.apply(self._own(name, parameters)) for name, part in self.wholes.items()}
        return found | {
            f"{name}.weight": part.apply(self._own(name, parameters)) for name, part in self.matrices.items()
        }

    def tried(self, parameters: Parameters, progress: float = 1.0) -> Trial:
        """What the block computes with under these parameters, differentiable."""
        return Trial(self.weights(parameters), self.inputs)

    def finish(self, parameters: Parameters) -> tuple[Weights, dict[str, Codes]]:
        """What an artifact holds of the block: full-precision tensors, and codes."""
        wholes = {name: part.finish(self._own(name, parameters)) for name, part in self.wholes.items()}
        codes = {name: part.finish(self._own(name, parameters)) for name, part in self.matrices.items()}
        return {**self.block.weights, **wholes}, codes

    def _own(self, name: str, parameters: Parameters) -> Parameters:
        return {own: parameters[f"{name} › {own}"] for own in self.places[name].rates}


@dataclass(frozen=True, eq=False)
class Pupil:
    """An artifact that is trained.

    Attributes:
        rank: of the low-rank terms to begin; 0 for none.
    """

    artifact: Artifact
    rank: int = 0
    _kept: dict[int | None, Lesson] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return self.artifact.layout.anatomy.blocks

    @cached_property
    def small(self) -> bool:
        """Whether all of it is kept in memory, with what is computed on the way."""
        return sum(math.prod(site.shape) for site in self.artifact.layout.anatomy.sites) <= HELD

    def lesson(self, index: int | None) -> Lesson:
        """One block; None for what lies outside the blocks."""
        if index in self._kept:
            return self._kept[index]
        found = self._lesson(index)
        if self.small:
            self._kept[index] = found
        return found

    @cached_property
    def rates(self) -> Rates:
        return {name: rate for index in self._all for name, rate in self.lesson(index).rates.items()}

    @cached_property
    def names(self) -> Mapping[int | None, tuple[str, ...]]:
        """Block → its parameters."""
        return {index: tuple(self.lesson(index).rates) for index in self._all}

    def init(self) -> Parameters:
        return {name: value for index in self._all for name, value in self.lesson(index).init().items()}

    def notes(self) -> list[str]:
        """What of the artifact stays as it is and might not have."""
        return list(dict.fromkeys(note for index in self._all for note in self.lesson(index).notes))

    @property
    def _all(self) -> tuple[int | None, ...]:
        return (None, *range(self.blocks))

    def _lesson(self, index: int | None) -> Lesson:
        layout = self.artifact.layout
        block = self.artifact.block(index)
        matrices, notes = dict[str, Matrix](), list[str]()
        for name, codes in block.codes.items():
            digest = hashlib.sha256(name.encode()).digest()
            rank = self.rank if index is not None else 0
            one = Matrix(codes, decoder(layout.quantised[name]), rank, layout.dtype, int.from_bytes(digest[:6], "big"))
            matrices[name] = one
            if one.why_not:
                notes.append(f"steps of {layout.quantised[name].name('scale')} stay as they were: {one.why_not}")
        offsets = {f"{norm.name}.gain": norm.offset for norm in layout.anatomy.norms if norm.offset}
        wholes = {}
        for name, tensor in block.weights.items():
            if tensor.dim() == 1 or (index is None and tensor.numel() <= TABLE):
                dtype = layout.dtype if name in offsets else tensor.dtype
                wholes[name] = Whole(tensor, dtype, offsets.get(name, 0.0))
            elif index is None:
                notes.append(f"{name} stays as it was: it has {tensor.numel():,} numbers in full precision")
        made = readings(layout, list(block.codes), dict(block.extras))
        return Lesson(block, matrices, wholes, {name: one.passed for name, one in made.items()}, tuple(notes))
