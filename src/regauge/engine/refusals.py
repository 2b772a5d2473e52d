"""Every refusal of a job, found by independent checks and told together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from regauge.errors import RegaugeError

T = TypeVar("T")


class Refusals:
    """Collects errors of independent checks, so that a user sees all of them at once."""

    def __init__(self) -> None:
        self.errors: list[RegaugeError] = []

    def attempt(self, check: Callable[[], T], otherwise: T) -> T:
        """The value of a check, or `otherwise` with its error kept."""
        try:
            return check()
        except RegaugeError as error:
            self.errors.append(error)
            return otherwise

    def settle(self) -> None:
        """Raises the only error as it is, or one that lists them all."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            listed = " ".join(f"({number}) {error}" for number, error in enumerate(self.errors, 1))
            raise RegaugeError(f"{len(self.errors)} things stand in the way: {listed}")
