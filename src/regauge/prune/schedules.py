"""Schedules: in how many steps units go."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Once:
    """All at once."""

    def __call__(self, units: int, kept: int) -> tuple[int, ...]:
        return (kept,)
