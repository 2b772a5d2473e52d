"""Certificates of exact moves, taken while the model is streamed: embeddings, every block, the logits at the end.

Two float64 copies of the model run on a few fixed tokens: the source, and the moved model. On each block the moved
form is fed the source's own state in the new gauge, so an error is laid at the door of the block that made it; the
moved model also runs on from its own states, and its logits are compared at the end.
Cost: five forward passes of a block on two dozen tokens, with two copies of the block in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from regauge.anatomy.certificate import EXACT, TOLERANCE, certify
from regauge.anatomy.moves import Move, boundary
from regauge.artifact.receipt import MoveReceipt
from regauge.engine.block import Moved
from regauge.engine.job import Job
from regauge.hosts.states import States


class Prover:
    """Walks two float64 copies of the model side by side.

    Attributes:
        before: states of the source; after: states of the moved model.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        with job.host.precise():
            self._source = job.host.runner(job.source, dtype=torch.float64)
            self._moved = job.host.runner(job.source, anatomy=job.whole, dtype=torch.float64)
        self._enter, self._leave = boundary(job.moves)
        self.before: States
        self.after: States

    def begin(self, outer: Moved) -> MoveReceipt:
        """Embeddings."""
        inputs = self.job.host.probe(self.job.source)
        with self.job.host.precise(), torch.no_grad():
            self.before = self._source.begin(inputs, outer.source)
            self.after = self._moved.begin(inputs, outer.exact)
            stored = self._moved.begin(inputs, outer.stored)
            return self._receipt(None, self.before, self.after, stored, outer.moves)

    def block(self, index: int, moved: Moved) -> MoveReceipt:
        """One block; both copies go on to the next."""
        with self.job.host.precise(), torch.no_grad():
            entered = self.after.with_hidden([self._enter(x_BTD) for x_BTD in self.before.hidden])
            self.before = self._source.block(index, moved.source, self.before)
            found = self._moved.block(index, moved.exact, entered)
            stored = self._moved.block(index, moved.stored, entered)
            self.after = self._moved.block(index, moved.exact, self.after)
            return self._receipt(index, self.before, found, stored, moved.moves)

    def logits(self, outer: Moved) -> float:
        """The moved model's logits against the source's, relative maximum."""
        with self.job.host.precise(), torch.no_grad():
            expected = torch.cat(list(self._source.tail(outer.source, self.before)))
            found = torch.cat(list(self._moved.tail(outer.exact, self.after)))
        return certify(found, expected, EXACT, f"the whole model after {self._names()}")

    def keep(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {"prover.before": self.before.hidden[0], "prover.after": self.after.hidden[0]}

    def resume(self, outer: Moved, kept: Mapping[str, Tensor]) -> None:
        """Goes on from kept states; the arguments of the layers are recorded anew."""
        self.begin(outer)
        self.before = self.before.with_hidden([kept["prover.before"]])
        self.after = self.after.with_hidden([kept["prover.after"]])

    def _names(self) -> str:
        return ", ".join(recast.name for recast in self.job.recasts)

    def _receipt(
        self, block: int | None, source: States, exact: States, stored: States, moves: Sequence[Move]
    ) -> MoveReceipt:
        streams = tuple(dict.fromkeys(move.stream for move in moves if _touches(move.stream, block)))
        where = "the embeddings" if block is None else f"block {block}"
        what = f"{self._names()} on {', '.join(streams[:3]) or 'nothing'}{' …' if len(streams) > 3 else ''} of {where}"
        limit = TOLERANCE[self.job.source.dtype]

        def error(states: States, most: float) -> float:
            pairs = zip(states.hidden, source.hidden, strict=True)
            return max(certify(self._leave(y), self._leave(self._enter(x)), most, what) for y, x in pairs)

        return MoveReceipt(
            rewrite=self._names(),
            block=block,
            streams=streams,
            exact=error(exact, EXACT),
            stored=error(stored, limit),
            tolerance=EXACT,
            tolerance_stored=limit,
        )


def _touches(stream: str, block: int | None) -> bool:
    if stream == "residual":
        return True
    return (
        stream == "head.in" or stream.startswith("embed.") if block is None else stream.startswith(f"blocks.{block}.")
    )
