"""The original's states at the border of every block, on the calibration text: what every later pass begins from.

With them a block can be run on its own, whenever something of it is wanted: gradients, the inputs of its sites. They
are made when they are first asked for, and can be let go; where they are large they lie in mapped files.
Cost: a forward pass. Memory or disk: a state a token a block, in the dtype of the products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from regauge.hosts.base import Inputs
from regauge.hosts.states import SPILL, States
from regauge.kernels.cpu.machine import trim
from regauge.search.subject import Subject

STATES = "states"
Say = Callable[[str, float], None]


@dataclass(frozen=True, eq=False)
class Borders:
    """States before each block, and after the last.

    Attributes:
        inputs: token ids (B, T) of each batch, or arguments with images.
        folder: where large states go, in a folder of their own.
    """

    subject: Subject
    inputs: Inputs
    folder: Path
    say: Say = lambda _, __: None
    _made: list[States] = field(default_factory=list, repr=False)

    def before(self, block: int) -> States:
        """States before a block; those of `subject.blocks` are behind the last."""
        if not self._made:
            self._made.extend(self._run())
        return self._made[block]

    def drop(self) -> None:
        """Lets them go; they are made again where they are asked for."""
        self._made.clear()

    @torch.no_grad()
    def _run(self) -> list[States]:
        subject = self.subject
        states = subject.quick.begin(self.inputs, subject.read(None))
        if (subject.blocks + 1) * sum(hidden.nbytes for hidden in states.hidden) > SPILL:
            (self.folder / STATES).mkdir(parents=True, exist_ok=True)
            states = states.spill(self.folder / STATES)
        found = [states]
        for block in range(subject.blocks):
            self.say("forward", block / subject.blocks)
            found.append(subject.quick.block(block, subject.read(block), found[-1]))
            trim()
        return found


def state_bytes(blocks: int, tokens: int, hidden: int, itemsize: int) -> int:
    """Bytes of the states at every border."""
    return (blocks + 1) * tokens * hidden * itemsize
