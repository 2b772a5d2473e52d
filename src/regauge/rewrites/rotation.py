"""Rotation: streams turned by a randomised Hadamard, so that no channel stands out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from regauge.anatomy.model import Anatomy, Weights
from regauge.anatomy.moves import Move, transform
from regauge.errors import RecipeError
from regauge.formats.hadamard import rotation
from regauge.rewrites.base import NOTHING, Moved, Objective, Statistics

STREAMS = ("residual", "value")


@dataclass(frozen=True)
class RotateHadamard:
    """The residual, and each KV head's values, turned by a Hadamard matrix with random signs (QuaRot, 2404.00456).

    An outlier channel is spread over all channels, so ranges shrink towards those of a Gaussian. The function stays:
    a plain RMSNorm commutes with a rotation, and o undoes that of the values. The residual wants plain norms: put
    `layernorm-to-rms` (for LayerNorm) and `fold-norm` before this one.

    Where we differ from QuaRot: no online Hadamard before `down`, on keys or across heads, so nothing is paid at run
    time and those inputs keep their outliers. Signs are drawn for each stream from `seed` and its name.
    Cost: none at run time; the matrices are Kronecker products of small ones, n log n a row (`hadamard.py`).
    """

    streams: str = "residual+value"
    seed: int = 0
    scope: ClassVar[str] = "model"
    needs: ClassVar[frozenset[str]] = frozenset()
    search: ClassVar[Mapping[str, tuple[float, ...]]] = NOTHING

    def __post_init__(self) -> None:
        for kind in self.streams.split("+"):
            if kind not in STREAMS:
                raise RecipeError(f"rotate: {kind!r} is no kind of stream to rotate ({', '.join(STREAMS)})")

    def __call__(
        self,
        anatomy: Anatomy,
        weights: Weights,
        stats: Statistics,
        objective: Objective | None = None,
        block: int | None = None,
    ) -> Moved:
        kinds = self.streams.split("+")
        turns = {s.name: rotation(s.size, self._seed(s.name)) for s in anatomy.streams if s.kind in kinds}
        moves = [Move("rotate", name, fast=turn) for name, turn in turns.items()]
        after = transform(moves, anatomy)
        made = sorted({f"rotate: {anatomy.stream(name).kind} by a {turn.made}" for name, turn in turns.items()})
        return after.with_(notes=(*after.notes, *made)), moves

    def _seed(self, name: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:7])
