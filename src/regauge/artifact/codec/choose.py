"""Which wire: compressed-tensors where it can say everything, else regauge's own."""

from __future__ import annotations

from dataclasses import dataclass

from regauge.artifact.codec.base import COMPRESSED_TENSORS, REGAUGE, WIRES, Layout, Wire
from regauge.artifact.codec.compressed import CompressedTensors
from regauge.artifact.codec.packed import Packed
from regauge.artifact.codec.schemes import refusals, remarks
from regauge.errors import RefusedError, nearest


@dataclass(frozen=True)
class Chosen:
    """The wire, and every reason why it is not compressed-tensors (empty where it is, or was not asked).

    Attributes:
        notes: what a reader must know who serves the artifact by another runtime, a sentence each.
    """

    wire: Wire
    refusals: tuple[str, ...]
    notes: tuple[str, ...] = ()


def choose(layout: Layout, prefer: str | None = None) -> Chosen:
    """compressed-tensors where the layout can be said in it, else regauge's packed format.

    Raises:
        RefusedError: `prefer` is `compressed-tensors` and it cannot say the layout; carries every reason.
    """
    if prefer is not None and prefer not in WIRES:
        raise RefusedError(prefer, [f"there is no such format{nearest(prefer, WIRES)}"])
    reasons = tuple(refusals(layout))
    if prefer == COMPRESSED_TENSORS and reasons:
        raise RefusedError(COMPRESSED_TENSORS, reasons)
    if prefer == REGAUGE or reasons:
        return Chosen(Packed(layout), reasons)
    return Chosen(CompressedTensors(layout), (), tuple(remarks(layout)))
