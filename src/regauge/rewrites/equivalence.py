"""Equivalence that is learnt: a scale a channel, and a shift where there are biases, trained with the rounding itself.

OmniQuant (arXiv 2308.13137, section 3.3, its LET): y′ = (y − z) / s on what norms give, on values into o, and one scale
for each rotary pair of queries and keys; s and z begin at what statistics say and are then trained by the error of the
block's output, together with whatever else is learnt there. What comes out are ordinary moves, certified as all are.
Legend: C channels of a stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy, Stream, Weights
from regauge.anatomy.moves import Move
from regauge.anatomy.values import pairs
from regauge.errors import RecipeError
from regauge.formats.base import OBJECTIVE
from regauge.rewrites.base import NOTHING, TRAINED, Moved, Objective, Statistics
from regauge.rewrites.reading import by_sets
from regauge.rewrites.shifting import centred, shiftable
from regauge.rewrites.smoothing import STREAMS, columns, levelled, strength

QK, NONE = "qk", "none"
SCALE, SHIFT, MATRIX = "scale", "shift", "matrix"


@dataclass(frozen=True)
class LearntEquivalence:
    """Scales and shifts of a block's streams, trained by the error of its output (OmniQuant, arXiv 2308.13137).

    Training begins where Outlier Suppression+ puts the middle of each channel and SmoothQuant its scale (`alpha`), or
    with `alpha: none` where the rewrites before have left the model. Trained are the logarithm of every scale and every
    shift in units of its stream's size, together with what is learnt of weights and inputs; the best by the error over
    all calibration text are kept, so the start is never lost. `matrix: true` gives the values of a block one matrix
    (D, D) for all its heads in place of scales (FlatQuant, arXiv 2410.09426, its P_v), which o takes back.

    Differs: the released code trains s itself and has it for q, k, v, o and the first of the feed-forward; here its
    logarithm, and `ffn` (up into down) may be named too. Streams without biases are scaled alone (see `gain-biases`).

    Cost: one pass over calibration text for the start, and in each training step a pass over the block's weights; none
    at run time where biases are there already.

    Attributes:
        rate: learning rate, the published 0.005.
        alpha: of the scales that training begins at, 0 … 1; `none`: at 1, and no shift.
        streams: `norm`, `value`, `ffn` and `qk`, by +.
        shift: whether shifts are learnt where they add no tensor.
        matrix: whether values are mixed.
    """

    rate: float = 0.005
    alpha: float | str = 0.5
    streams: str = "norm+value+qk"
    shift: bool = True
    matrix: bool = False
    scope: ClassVar[str] = "block"
    search: ClassVar[Mapping[str, tuple[float, ...]]] = NOTHING

    def __post_init__(self) -> None:
        if not self.rate >= 0:
            raise RecipeError(f"learnt-equivalence: a learning rate is 0 or more, not {self.rate}")
        if isinstance(self.alpha, str) and self.alpha != NONE:
            raise RecipeError(f"learnt-equivalence: alpha is a number or {NONE!r}, not {self.alpha!r}")
        for kind in self._kinds:
            if kind not in (*STREAMS, QK):
                every = ", ".join((*STREAMS, QK))
                raise RecipeError(f"learnt-equivalence: {kind!r} is no kind of stream that it moves ({every})")

    @property
    def needs(self) -> frozenset[str]:
        seen = () if self.alpha == NONE else ("minimum", "maximum", "count")
        return frozenset({*seen, OBJECTIVE, TRAINED})

    @property
    def _kinds(self) -> list[str]:
        return self.streams.split("+")

    def __call__(
        self,
        anatomy: Anatomy,
        weights: Weights,
        stats: Statistics,
        objective: Objective | None = None,
        block: int | None = None,
    ) -> Moved:
        """Where training begins."""
        if self.alpha == NONE:
            return anatomy, []
        alpha, who = float(self.alpha), "learnt-equivalence"
        here = [s for s in anatomy.streams if s.block == block and s.kind in STREAMS and s.kind in self._kinds]

        def choose(anatomy: Anatomy, weights: Weights, of: Sequence[Stream]) -> tuple[list[Move], list[str]]:
            ranges = {s.name: centred(s, anatomy, stats, self.shift, who) for s in of}
            scales = {s.name: strength(ranges[s.name][1], columns(s, weights), alpha) for s in of}
            readers = {s.name: s.readers[0].tensor for s in of}
            shifts = [Move(SHIFT, name, -z_C) for name, (z_C, _) in ranges.items() if bool(z_C.any())]
            return [*shifts, *levelled(scales, readers)], []

        after, moves, notes = by_sets((anatomy, weights), here, stats, who, choose)
        return after.with_(notes=(*after.notes, *dict.fromkeys(notes))), moves

    def rates(self, anatomy: Anatomy, block: int) -> dict[str, float | None]:
        """What is trained in a block."""
        return {name: self.rate for name, _, _ in self._trained(anatomy, block)}

    def init(self, anatomy: Anatomy, block: int) -> dict[str, Tensor]:
        """Zeros: nothing is moved beyond the start."""
        shapes = {name: shape for name, _, shape in self._trained(anatomy, block)}
        return {name: torch.zeros(shape, dtype=torch.float32, device="cpu") for name, shape in shapes.items()}

    def moves(self, parameters: Mapping[str, Tensor], anatomy: Anatomy, weights: Weights, block: int) -> list[Move]:
        """The moves under these parameters, differentiable in them; shifts first, as the start has them."""
        made = []
        for name, streams, _ in self._trained(anatomy, block):
            value = parameters[name]
            for stream in streams:
                if name.endswith(SHIFT):
                    made.append(Move(SHIFT, stream.name, value * size_of(stream, weights)))
                elif name.endswith(MATRIX):
                    eye = torch.eye(stream.size, dtype=value.dtype, device=value.device)
                    made.append(Move("affine", stream.name, eye + value))
                else:
                    made.append(Move(SCALE, stream.name, torch.exp(-value)[_shared(stream, anatomy)]))
        return made

    def _trained(self, anatomy: Anatomy, block: int) -> Iterator[tuple[str, tuple[Stream, ...], tuple[int, ...]]]:
        """Name, streams and shape of each parameter: shifts, matrices, scales."""
        here = [s for s in anatomy.streams if s.block == block and s.kind in self._kinds and s.writers]
        mixed = [s for s in here if self.matrix and s.kind == "value" and "affine" in s.admits]
        for stream in here:
            if self.shift and shiftable(stream, anatomy):
                yield f"{stream.name} {SHIFT}", (stream,), (stream.size,)
        if mixed:
            yield f"blocks.{block}.value {MATRIX}", tuple(mixed), (mixed[0].size, mixed[0].size)
        for stream in here:
            if SCALE in stream.admits and stream not in mixed:
                yield f"{stream.name} {SCALE}", (stream,), (int(_shared(stream, anatomy).max()) + 1,)


def _shared(stream: Stream, anatomy: Anatomy) -> Tensor:
    """The number of each channel's scale: rotary pairs share theirs."""
    found = torch.arange(stream.size, dtype=torch.int64, device="cpu")
    if stream.admits[SCALE] == "pairs":
        first, second = pairs(anatomy.plumbing)
        found[first] = found[second] = torch.arange(len(first), dtype=torch.int64, device="cpu")
        found[2 * len(first) :] -= len(first)
    return found


def size_of(stream: Stream, weights: Weights) -> float:
    """About how large the stream's channels are: its gains, or the norms of the rows that write it."""
    sizes = []
    for port in stream.writers:
        if not port.tensor.endswith(".bias"):
            part = weights[port.tensor].detach().narrow(port.axis, port.start, stream.size * port.width)
            sizes.append(float(part.abs().mean() if part.dim() == 1 else part.norm(dim=1 - port.axis).mean()))
    return sum(sizes) / len(sizes) if sizes else 1.0
