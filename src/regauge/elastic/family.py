"""A family: what may be chosen in one model, as plain data that a recipe or an artifact says.

A family says which values each dimension has; the whole is always one of them. What a subnet comes to in a model stands
in `legal.py`. Nothing here needs torch.

Legend: D blocks of the whole, d of a member.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from regauge.elastic.order import ORDERS
from regauge.elastic.subnet import NAMES, PARTLY, Amount, Subnet
from regauge.errors import SettingError, nearest

EQUIDISTANT, EXITS, LAST, RANKED, STAGES = "equidistant", "exits", "last", "ranked", "stages"
TAKEN = ("full", "route")
"""What no member can be called: the whole, and the one that a router chooses."""
LAYERS = (EQUIDISTANT, EXITS, LAST, RANKED, STAGES)
"""Which blocks a count of them means: spread over the whole, the first ones, the first and the last ones, the most
important ones, or the first ones of each stage, of a model whose states change their size between stages."""


@dataclass(frozen=True)
class Family:
    """What may be chosen.

    Attributes:
        depth, ffn, heads, width, experts, bits, cache, kernel: the choices of each dimension, beside the whole; empty:
            none.
        layers: which blocks a count of them means, of `LAYERS`.
        ranked: with `ranked`: every block, the most important first; a recipe may leave it to calibration.
        order: by what streams were sorted, a name of `order.ORDERS`.
        multiple: what numbers of neurons are rounded to; 0: 64, halved until it is an eighth of the layer or less.
        members: names of members → the subnet that each is.
    """

    depth: tuple[Amount, ...] = ()
    ffn: tuple[float, ...] = ()
    heads: tuple[Amount, ...] = ()
    width: tuple[Amount, ...] = ()
    experts: tuple[int, ...] = ()
    bits: tuple[int, ...] = ()
    cache: tuple[str, ...] = ()
    kernel: tuple[int, ...] = ()
    layers: str = EQUIDISTANT
    ranked: tuple[int, ...] = ()
    order: str = "activation"
    multiple: int = 0
    members: Mapping[str, Subnet] = field(default_factory=dict)

    def choices(self, name: str) -> tuple[Amount | str, ...]:
        """What a dimension offers beside the whole."""
        found: tuple[Amount | str, ...] = getattr(self, name)
        return found

    @property
    def offered(self) -> tuple[str, ...]:
        """Dimensions that have choices."""
        return tuple(name for name in NAMES if self.choices(name))

    def blocks(self, count: int, whole: int) -> tuple[int, ...]:
        """The d blocks that a count of them means, of D.

        `equidistant` keeps the first and the last, block ⌊i (D − 1) / (d − 1)⌋ for each i; `last` the first and the
        last d − 1.
        """
        if self.layers == RANKED and self.ranked:
            return tuple(sorted(self.ranked[:count]))
        if self.layers == EXITS:
            return tuple(range(count))
        if self.layers == LAST:
            return (0, *range(whole - count + 1, whole))
        return tuple(i * (whole - 1) // max(count - 1, 1) for i in range(count))


def unranked(family: Family | None) -> bool:
    """Whether the blocks of a family are still to be ranked, by what they do to calibration text."""
    return family is not None and family.layers == RANKED and not family.ranked


def in_any_order(family: Family, blocks: int) -> Family:
    """The family, with some order where its blocks are still to be ranked: members have the same sizes in each."""
    return replace(family, ranked=tuple(range(blocks))) if unranked(family) else family


PARTS = tuple(one.name for one in fields(Family))
MOST, LONGEST, WIDE = 256, 80, 1 << 24
"""Choices of a dimension, characters of a name, and what every count is below."""


def family_of(raw: Mapping[str, object]) -> Family:
    """A family from plain data: what a recipe or a file of an artifact says.

    Raises:
        ValueError: a key, a kind or a number is none, in a sentence.
    """
    found: dict[str, object] = {}
    for key, value in raw.items():
        if key not in PARTS:
            raise ValueError(f"unknown key {str(key)[:40]!r} in a family{nearest(str(key), PARTS)}")
        if key in NAMES or key == "ranked":
            found[key] = _choices(key, value)
        elif key == "members":
            found[key] = _members(value)
        elif key == "multiple":
            if type(value) is not int or not 0 <= value < WIDE:
                raise ValueError(f"multiple is a whole number, not {_short(value)}")
            found[key] = value
        else:
            known = LAYERS if key == "layers" else tuple(ORDERS)
            if not isinstance(value, str) or value not in known:
                raise ValueError(f"{key} is none of {', '.join(known)}, but {_short(value)}")
            found[key] = value
    made = Family(**found)  # type: ignore[arg-type]  # each was checked
    if not made.offered:
        raise ValueError(f"a family offers nothing: give choices of {', '.join(NAMES)}")
    return made


def _choices(key: str, value: Any) -> tuple[Amount | str, ...]:
    some = value if isinstance(value, list | tuple) else [value]
    if not some or len(some) > (MOST if key != "ranked" else WIDE):
        raise ValueError(f"{key} has {len(some)} choices, and 1 to {MOST} are taken")
    if key == "cache":
        if any(not isinstance(one, str) or not 0 < len(one) <= LONGEST for one in some):
            raise ValueError(f"cache lists names of presets, not {_short(some)}")
        return tuple(dict.fromkeys(some))
    return tuple(dict.fromkeys(_choice(key, one) for one in some))


def _choice(key: str, one: Any) -> Amount:
    """One number of a dimension.

    Raises:
        ValueError: it is none of its kind.
    """
    shares = key == "ffn" or (key in PARTLY and type(one) is float)
    if shares and type(one) in (int, float) and 0 < one <= 1:
        return float(one)
    if key == "kernel" and type(one) is int and one % 2 == 0:
        raise ValueError(f"kernel lists sides of kernels with a centre, odd numbers, and {one} is none")
    if not shares and type(one) is int and (0 if key == "ranked" else 1) <= one < WIDE:
        return int(one)
    kind = "shares above 0 and at most 1" if key == "ffn" else "whole numbers above 0"
    raise ValueError(f"{key} lists {kind}{' or shares' if key in PARTLY else ''}, and {_short(one)} is none")


def _members(value: object) -> dict[str, Subnet]:
    if not isinstance(value, Mapping) or len(value) > MOST:
        raise ValueError(f"members is a mapping of names to subnets, {MOST} at most")
    found = {}
    for name, text in value.items():
        if not isinstance(name, str) or not 0 < len(name) <= LONGEST or "=" in name or "," in name or name in TAKEN:
            raise ValueError(f"{_short(name)} is no name of a member")
        if not isinstance(text, str):
            raise ValueError(f"the member {name!r} is text such as 'depth=6,ffn=0.5', not {_short(text)}")
        try:
            found[name] = Subnet.parse(text)
        except SettingError as error:
            raise ValueError(f"the member {name!r}: {error}") from error
    return found


def told(family: Family) -> dict[str, object]:
    """A family as plain data, without what it leaves open; `family_of` reads it back."""
    found: dict[str, object] = {}
    for part in fields(Family):
        value = getattr(family, part.name)
        if value != getattr(_NONE, part.name):
            found[part.name] = list(value) if isinstance(value, tuple) else value
    if family.members:
        found["members"] = {name: str(member) for name, member in family.members.items()}
    return found


_NONE = Family()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
