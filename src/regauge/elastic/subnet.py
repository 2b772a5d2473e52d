"""A subnet: which part of an elastic model runs. A frozen value, equal to any other that says the same.

    Subnet.parse("depth=6,ffn=0.5") == Subnet(depth=6, ffn=0.5)
    str(Subnet(depth=6, ffn=0.5)) == "depth=6,ffn=0.5"

A number with a point is a share of the whole, without one a count; `ffn` is always a share. Several, with `/` between
them, are one for each block that runs, and of `depth` the blocks themselves. What is not said is whole: the empty text,
and `full`, are the whole model. What a family makes of a subnet, and which it refuses, stands in `family.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from math import isfinite

from regauge.amounts import several, whole
from regauge.errors import SettingError, nearest

Amount = int | float
"""A count, or a share of the whole."""
Several = Amount | tuple[Amount, ...]
FULL = "full"
LONGEST = 4096
"""Blocks that a subnet speaks of at most, and characters of one value."""
SHARES = ("ffn",)
"""Dimensions whose numbers are shares, 1 too."""
TOKEN = "token"
"""What `ffn` says where each token's own gate chooses its share."""
PARTLY = ("depth", "heads", "width")
"""Dimensions whose numbers are counts, or shares where they have a point."""


@dataclass(frozen=True)
class Subnet:
    """Which part of a model runs; what is None is whole.

    Attributes:
        depth: how many blocks, their share, or which.
        ffn: the share of each feed-forward layer's neurons, or `TOKEN`.
        heads: groups of heads (of keys and values), or their share.
        width: channels of the residual, or their share.
        experts: how many experts a token goes to.
        bits: of weights that hold several precisions.
        cache: what is kept of the past, a preset's name.
        kernel: side of the kernels of each block's convolutions, an odd number.
    """

    depth: Amount | tuple[int, ...] | None = None
    ffn: float | tuple[float, ...] | str | None = None
    heads: Several | None = None
    width: Amount | None = None
    experts: int | None = None
    bits: int | tuple[int, ...] | None = None
    cache: str | None = None
    kernel: int | tuple[int, ...] | None = None

    @staticmethod
    def parse(text: str | Subnet) -> Subnet:
        """The value of a text.

        Raises:
            SettingError: it is none, in a sentence.
        """
        if isinstance(text, Subnet):
            return _checked(text)
        if not isinstance(text, str):
            raise SettingError(f"a subnet is text such as 'depth=6,ffn=0.5', not {str(text)[:40]!r}")
        words = [word.strip() for word in text.split(",")] if text.strip() not in ("", FULL) else []
        found: dict[str, object] = {}
        for word in words:
            name, _, value = word.partition("=")
            name, value = name.strip(), value.strip()
            if name in NAMES and not value:
                raise SettingError(f"{name} of a subnet has no value: write {name}=…, as in 'depth=6,ffn=0.5'")
            if name not in NAMES:
                raise SettingError(
                    f"{word[:60]!r} is no part of a subnet{nearest(name, NAMES)}; write 'depth=6,ffn=0.5'"
                )
            if name in found:
                raise SettingError(f"the subnet {text[:60]!r} says {name} twice")
            found[name] = _value(name, value)
        return Subnet(**found)  # type: ignore[arg-type]  # each is of the kind that its reader gives

    @property
    def full(self) -> bool:
        """Whether it is the whole model."""
        return self == _WHOLE

    def said(self) -> Iterator[tuple[str, object]]:
        """Name and value of every dimension that is not whole, in their order."""
        return ((name, value) for name in NAMES if (value := getattr(self, name)) is not None)

    def __str__(self) -> str:
        return ",".join(f"{name}={_spelled(value)}" for name, value in self.said()) or FULL


NAMES = tuple(field.name for field in fields(Subnet))
_WHOLE = Subnet()


def _checked(subnet: Subnet) -> Subnet:
    """
    Raises:
        SettingError: it says what could not be written.
    """
    written = Subnet.parse(str(subnet))
    for name, value in subnet.said():
        meant = value[0] if isinstance(value, tuple) and len(value) == 1 else value
        if getattr(written, name) != meant:
            raise SettingError(f"{name} of a subnet is {getattr(written, name)!r}, a number, and not {value!r}")
    return subnet


def _spelled(value: object) -> str:
    if isinstance(value, tuple):
        return "/".join(_spelled(one) for one in value)
    return str(value)


def _value(name: str, text: str) -> object:
    """
    Raises:
        SettingError: it is no value of this dimension.
    """
    if len(text) > LONGEST:
        raise SettingError(f"{name} of a subnet has {len(text)} characters, and {LONGEST} are the most")
    if name == "cache" or (name == "ffn" and text == TOKEN):
        return text
    found = several(text, partial(_number, name))
    if name in ("width", "experts") and len(found) > 1:
        raise SettingError(f"{name} of a subnet is one number for all blocks, not {text[:60]!r}")
    if name == "depth" and len(found) > 1 and not all(isinstance(one, int) for one in found):
        raise SettingError(f"depth of a subnet lists blocks by their numbers, not {text[:60]!r}")
    return found[0] if len(found) == 1 else found


def _number(name: str, text: str) -> Amount:
    try:
        if name in SHARES or (name in PARTLY and not text.isdecimal()):
            share = float(text)
            if isfinite(share) and 0 < share <= 1:
                return share
            raise ValueError(text)
        if ((count := whole(text)) > 0 or name == "depth") and not (name == "kernel" and count % 2 == 0):
            return count
        raise ValueError(text)
    except ValueError:
        kind = {
            "ffn": "a share above 0 and at most 1",
            "depth": "a count, a share, or numbers of blocks with / between",
            "kernel": "an odd number, the side of a kernel that has a centre",
        }
        other = "a count, or a share such as 0.5" if name in ("heads", "width") else "a whole number above 0"
        raise SettingError(f"{name}={text[:40]} of a subnet is not {kind.get(name, other)}") from None
