"""Several processes that train one model on one text: each a part of every batch, gradients added up between them.

`torchrun --nproc-per-node 2 -m regauge learn …` starts them; without it there is one. Every process draws the same
members and holds the same numbers, and the first alone writes. What one process cannot do, all report: a lost worker
is an error in one sentence, and the run goes on from what was kept when it is started again.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from regauge.errors import BudgetError
from regauge.learn.base import finite

PATIENCE = 1800.0  # seconds that a process waits for another: the first makes the family that the others read
TRANSPORTS = ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
"""What a message says of which another process is the reason."""
GONE = (
    "another process of this training has ended, so this one stops; what was kept stays, and the same command goes on "
    "from there"
)
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LostError(BudgetError):
    """Another process of this training is gone."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a training.

    Attributes:
        own: the number of this one; count: how many there are.
        sharded: whether each holds a part of every tensor (`shards.py`), and so has to run whatever another one runs.
    """

    own: int = 0
    count: int = 1
    sharded: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.own == 0

    def place(self, device: str) -> str:
        """The device of this process: where no number is named, each takes one, in turn where there are fewer."""
        if self.count == 1 or device != "cuda" or not torch.cuda.device_count():
            return device
        return f"cuda:{int(os.environ.get('LOCAL_RANK', self.own)) % torch.cuda.device_count()}"

    def part(self, rows: Tensor) -> Tensor:
        """The rows of a batch that this process computes."""
        return rows[self.own :: self.count]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Adds tensors up over all processes, in place."""
        if self.count == 1:
            return
        flat = torch.cat([one.reshape(-1) for one in tensors])
        with told():
            torch.distributed.all_reduce(flat)
        for one, piece in zip(tensors, torch.split(flat, [one.numel() for one in tensors]), strict=True):
            one.copy_(piece.view(one.shape))

    def total(self, gradients: Sequence[Tensor], loss: Tensor) -> None:
        """Adds a loss and its gradients up over all processes, in place; parts of gradients are added up already."""
        if not self.sharded:
            return self.add([*gradients, loss])
        if not finite(gradients):
            loss.fill_(torch.nan)  # the others see no part of it
        return self.add([loss])

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of a gradient, of which each process may have a part."""
        found: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(one) for one in gradients]))
        if not self.sharded:
            return found
        found = found.square()
        self.add([found])
        return found.sqrt()

    def turns(self, count: int) -> list[tuple[int, int]]:
        """Which of some batches this process reads, each with how often it counts: once, or not at all where it is read
        because the others read something."""
        own = [(index, 1) for index in range(self.own, count, self.count)]
        return own + [(0, 0)] * (self.sharded and len(own) < -(-count // self.count))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what all processes have to run at the same time where each holds a part.

        Raises:
            LostError: another one is gone.
        """
        try:
            yield
        except RuntimeError as error:
            if not (self.sharded and any(word in str(error) for word in TRANSPORTS)):
                raise
            raise LostError(GONE) from error

    def any(self, found: bool) -> bool:
        """Whether it is so in any process."""
        if self.count == 1:
            return found
        flag = torch.tensor([float(found)], dtype=torch.float32, device="cpu")
        self.add([flag])
        return bool(flag.item() > 0)

    def same(self, value: Any) -> Any:
        """What the first process has."""
        if self.count == 1:
            return value
        held = [value if self.first else None]
        with told():
            torch.distributed.broadcast_object_list(held)
        return held[0]

    def each(self, value: Any) -> list[Any]:
        """What every process has, in their order."""
        if self.count == 1:
            return [value]
        held = [None] * self.count
        with told():
            torch.distributed.all_gather_object(held, value)
        return held


ALONE = Ranks()


@contextmanager
def told() -> Iterator[None]:
    """Says in a sentence that another process is gone.

    Raises:
        LostError: it is.
    """
    try:
        yield
    except RuntimeError as error:  # what torch.distributed raises, by whatever name
        raise LostError(GONE) from error


def processes() -> int:
    """How many torchrun started, this one among them."""
    return int(os.environ["WORLD_SIZE"]) if all(os.environ.get(name) for name in VARIABLES) else 1


def writes() -> bool:
    """Whether this process is the one that writes, as torchrun numbers them."""
    return os.environ.get("RANK", "0") == "0" or not all(os.environ.get(name) for name in VARIABLES)


@contextmanager
def ranks(sharded: bool = False) -> Iterator[Ranks]:
    """The processes that torchrun started, joined to each other; this one alone where it did not.

    Args:
        sharded: whether each holds a part of every tensor.

    Raises:
        LostError: another one did not come, or this one was stopped because another is gone.
    """
    found = [os.environ.get(name) for name in VARIABLES]
    if processes() < 2:
        yield ALONE
        return
    before = signal.signal(signal.SIGTERM, _stopped)
    try:
        with told():
            torch.distributed.init_process_group(_backend(), timeout=timedelta(seconds=PATIENCE))
        try:
            yield Ranks(int(str(found[0])), int(str(found[1])), sharded)
        finally:
            torch.distributed.destroy_process_group()
    finally:
        signal.signal(signal.SIGTERM, before)


def _backend() -> str:
    """NCCL between GPUs where every process of this machine has one of its own, else gloo."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    own = torch.cuda.device_count() >= here and torch.distributed.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if own else "gloo"


def _stopped(*_: object) -> None:
    raise LostError(
        "this training was stopped by whoever started its processes, as when one of them is gone; what was kept stays, "
        "and the same command goes on from there"
    )
