"""The figure for memory as the user gives it, and how much memory there is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from regauge import amounts
from regauge.errors import BudgetError

CONTEXT = 1024
"""Tokens whose cache and activations the figure has room for, where the user says nothing."""
CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""What bounds a container's memory; psutil tells the machine's alone."""
V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


@dataclass(frozen=True)
class Figure:
    """An upper bound on memory.

    Attributes:
        amount: bytes; a ratio to the model's bytes as bf16 where `relative`.
        context: tokens whose cache and activations it has room for.
        text: what the user wrote.
    """

    amount: float
    relative: bool
    context: int
    text: str

    def bytes(self, bytes_bf16: int) -> int:
        """The bound in bytes for a model of this size."""
        return math.floor(self.amount * bytes_bf16) if self.relative else math.floor(self.amount)


def read_figure(memory: str | int, device: str = "cpu") -> Figure:
    """`"2GB"`, `"500MB@4k"` (room for a context of 4096 tokens), `"0.5x"`, or bytes.

    Raises:
        BudgetError: it is none of these, more than the machine has, or meant for an accelerator.
    """
    if not str(device).startswith("cpu"):
        raise BudgetError(f"memory= keeps a window in the memory of the CPU, and device={device!r} was asked for.")
    figure = _read(memory)
    if not figure.relative:
        check_exists(figure, figure.bytes(0))
    return figure


def _read(memory: str | int) -> Figure:
    if isinstance(memory, int):
        if isinstance(memory, bool) or memory <= 0:
            raise BudgetError(f"memory={memory} is not an amount; write bytes as a positive integer, or such as '2GB'.")
        return Figure(memory, False, CONTEXT, f"memory={memory}")
    text = f"memory={memory}"
    value, at, context = memory.partition("@")
    number, unit = amounts.amount(value.strip(), text)
    relative = unit == "x"
    if not relative:
        number *= amounts.factor(unit, text)
    return Figure(number, relative, amounts.context(context.strip(), text) if at else CONTEXT, text)


def machine_memory() -> tuple[int, int]:
    """Bytes of memory (all, available) for this process: the machine's, or less where a cgroup limits it.

    Clean pages of files count as available, for the kernel gives them up.
    """
    found = psutil.virtual_memory()
    total, available = int(found.total), int(found.available)
    for limit, used in _limits(CGROUPS, OWN):
        total, available = min(total, limit), min(available, max(limit - used, 0))
    return total, available


def _limits(root: Path, own: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use less file pages) of every memory cgroup that this process is in, v1 and v2."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            top, names = root, V2
        elif "memory" in controllers.split(","):
            top, names = root / "memory", V1
        else:
            continue
        folder = top / path.lstrip("/")
        while True:
            limit = _limit(folder, *names)
            if limit is not None:
                yield limit
            if folder == top or top not in folder.parents:
                break
            folder = folder.parent


def _limit(folder: Path, most: str, now: str, files: tuple[str, ...]) -> tuple[int, int] | None:
    try:
        limit = (folder / most).read_text(encoding="utf-8").strip()
        used = int((folder / now).read_text(encoding="utf-8"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return None
    if not limit.isdigit():
        return None  # `max`
    return int(limit), max(used - sum(int(stat.get(name, 0)) for name in files), 0)


def check_exists(figure: Figure, size: int) -> None:
    """Refuses a figure of more bytes than the machine has, whether or not the model needs them."""
    total, _ = machine_memory()
    if size > total:
        raise BudgetError(
            f"{figure.text} is more than the {amounts.told(total)} of memory that this process may use; give less."
        )


def check_room(what: str, needed: int, hint: bool = True) -> None:
    """Refuses to load `what` where it needs more bytes than are available.

    Args:
        hint: whether `memory=` would help.
    """
    _, available = machine_memory()
    if needed > available:
        todo = (
            f"give memory='{_round(available)}' to keep only a window of its blocks in memory" if hint else "give less"
        )
        raise BudgetError(
            f"{what} needs {amounts.told(needed)} of memory and {amounts.told(available)} are available; {todo}."
        )


def _round(available: int) -> str:
    """About four fifths of what is available, as it would be typed."""
    size = max(available * 4 // 5, 1)
    unit = next((unit for unit in ("GB", "MB", "kB") if size >= amounts.UNITS[unit]), "B")
    return f"{size / amounts.UNITS[unit]:.1f}{unit}"
