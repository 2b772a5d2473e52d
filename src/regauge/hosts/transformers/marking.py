"""Caches that remember by which member of a family they were filled, so that no other reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regauge.elastic.subnet import Subnet
from regauge.errors import SettingError
from regauge.hosts.transformers.owned import method

MARK = "regauge_subnet"
"""The attribute of a cache that says by which member it was filled."""
WHOLE = Subnet()


@dataclass(frozen=True)
class Alone:
    """What a model has of members that is one of them and no more.

    Attributes:
        active: which.
    """

    active: Subnet

    def running(self) -> tuple[Subnet, None]:
        """Always itself."""
        return self.active, None


def running(model: Any) -> Any:
    """The modules that run here and now: those of a member, or the model itself."""
    found = vars(model).get("regauge")
    return (None if found is None else found.running()[1]) or model


@dataclass(frozen=True)
class Marked:
    """`forward` of one member: caches are its own.

    Attributes:
        before: what would be `forward`; None: the class's.
    """

    subnet: Subnet
    before: Callable[..., Any] | None

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if cache is not None:
            check(cache, self.subnet)
        found = (
            method(model, "forward")(*args, **kwargs) if self.before is None else self.before(model, *args, **kwargs)
        )
        made = getattr(found, "past_key_values", None) if cache is None else cache
        if made is not None and getattr(made, MARK, None) is not self.subnet:
            setattr(made, MARK, self.subnet)
        return found


def check(cache: Any, subnet: Subnet) -> None:
    """
    Raises:
        SettingError: another member filled the cache.
    """
    before = getattr(cache, MARK, None)
    if before is subnet or before == subnet:
        return
    length = getattr(cache, "get_seq_length", None)
    if length is None or not length() or (before is None and subnet.full):
        return
    raise SettingError(
        f"this cache was filled by the member {before or WHOLE}, and {subnet} runs now, whose keys and values are "
        "others: begin with a new cache, or let one pass over the text fill it: rg.refill(model, ids, subnet)"
    )
