"""What the model as it was makes of the text that a family is trained on: computed once where the text is read again
and its states are few, else each time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from regauge.hosts.teaching import Taught
from regauge.learn.distillers import Read, of_states
from regauge.learn.training import FRONTS, PLUS

KEPT = 1 << 30
"""Bytes of a teacher's states that are kept; of a longer text none are."""


@dataclass(frozen=True, eq=False)
class Teaching:
    """A teacher that stays.

    Attributes:
        distiller: that compares members with it, as a recipe says.
        blocks: of members, whose fronts are compared where the distiller reads those.
        keeps: whether what it makes of a batch is kept.
    """

    teacher: Taught
    distiller: str
    blocks: frozenset[int]
    keeps: bool = False
    _kept: dict[int, Read] = field(default_factory=dict)

    def read(self, index: int, ids_BT: Tensor, mask_BT: Tensor | None) -> Read:
        """What it makes of the batch of this number."""
        if index in self._kept:
            return self._kept[index]
        read = self.teacher.read(ids_BT, mask_BT)
        fronts = self.blocks if FRONTS in self.distiller.split(PLUS) else frozenset()
        read = replace(read, fronts={block: one for block, one in read.fronts.items() if block in fronts})
        if self.keeps:
            self._kept[index] = replace(read, logits_BTV=None)
        return read


def kept_bytes(distiller: str, blocks: int, width: int, tokens: int) -> int:
    """Bytes of what is kept of so many tokens, of which `KEPT` are taken at most; 0: what is read is not kept at all.

    Args:
        blocks: of a member. width: of its teacher's states.
    """
    if not of_states(distiller):
        return 0
    states = max(blocks, 1) if FRONTS in distiller.split(PLUS) else 1
    size = 4 * states * width * tokens
    return size if size <= KEPT else 0
