"""What a rule of `cache` comes to at one block, and why it cannot be had there, in a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from regauge import parts
from regauge.anatomy.model import Anatomy, Attention
from regauge.cache.budgets import Tokens
from regauge.cache.disposals import Drop
from regauge.cache.scheme import AFTER_PREFILL, HADAMARD, LEAST, MOST, BlockCache, Policy, Scheme, in_time, tokens_of
from regauge.cache.triggers import check_tokens
from regauge.errors import BudgetError
from regauge.formats.base import Format
from regauge.parts import Point, axis_of

STORED = ("keys", "values")
"""The axes that are formats."""
CHOSEN = ("score", "budget", "disposal", "trigger")
"""The axes of what is let go."""
LONG = 1 << 20
"""Tokens of a text of which every share holds what must stay."""


@dataclass
class Found:
    """The stores of a model under a plan.

    Attributes:
        points: store → its point; those that stay whole are absent.
        reasons: why not → the stores of which that holds.
        kept: store → why it stays whole all the same.
        fallbacks: store → which grain was taken instead, and why.
    """

    points: dict[str, Point] = field(default_factory=dict)
    reasons: dict[str, list[str]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)


def stores(anatomy: Anatomy, points: Mapping[str, Point]) -> Found:
    """Checks the points of some stores against the sizes of their heads."""
    found = Found()
    for name, point in points.items():
        block = block_of(name)
        sizes = anatomy.attention(block)
        for reason in list(_of_numbers(point)) or list(_of_sizes(point, sizes)):
            found.reasons.setdefault(reason, []).append(name)
        if block in anatomy.plumbing.sliding:
            found.kept[name] = "a window of the past, or none of its own, is all that is kept there"
            continue
        found.points[name] = point
        if sizes is not None and not found.reasons:
            why = _fell(point, sizes)
            found.fallbacks |= {name: why} if why else {}
    return found


def block_of(store: str) -> int:
    """`blocks.3.cache` → 3."""
    return int(store.split(".")[1])


def block_cache(point: Point, sizes: Attention | None) -> BlockCache:
    """What a block keeps by its point, which `stores` has passed; `sizes` None: fallbacks of grains are not taken."""
    keys, values = (_format(point, axis) for axis in STORED)
    if sizes is not None:
        length = tokens_of(*(_taken(fmt, (LEAST, 1)) for fmt in (keys, values)))
        keys, values = _taken(keys, (length, sizes.head_dim)), _taken(values, (length, sizes.value_dim))
    balance = None if point["balance"] is None else parts.build("balance", point.spec("balance"))
    scheme = Scheme(
        keys=keys,
        values=values,
        window=_window(point),
        hadamard=point.name("transform") == "hadamard",
        balance=0 if balance is None else balance.rounds,
    )
    return BlockCache(scheme, _policy(point), _built(point, "merge"))


def _policy(point: Point) -> Policy | None:
    if point["budget"] is None:
        return None
    budget = point.spec("budget")
    number = parts.numeric(axis_of(point.place, "budget"), budget)
    return Policy(
        score=_built(point, "score"),
        budget=Tokens(int(budget.part)) if number else parts.build("budget", budget),
        disposal=_built(point, "disposal") or Drop(),
        trigger=_built(point, "trigger") or AFTER_PREFILL,
    )


def _built(point: Point, axis: str) -> Any:
    spec = point[axis]
    return None if spec is None else parts.build(axis_of(point.place, axis).parts, spec)


def _format(point: Point, axis: str) -> Format | None:
    found: Format | None = _built(point, axis)
    return found


def _taken(fmt: Format | None, shape: tuple[int, int]) -> Format | None:
    return None if fmt is None else replace(fmt, grain=fmt.grain.taken(shape))


def _window(point: Point) -> int:
    spec = point["window"]
    return int(spec.part) if spec is not None and _whole(spec.part, 0) else 0


def _whole(text: str, least: int) -> bool:
    return text.isdecimal() and int(text) >= least


def _of_numbers(point: Point) -> Iterator[str]:
    """What no model could keep."""
    window, budget = point["window"], point["budget"]
    if window is not None and not _whole(window.part, 0):
        yield f"a window counts the last tokens, 0 or more of them, and {window.part} is no such number"
        return
    rounded = any(point[axis] is not None for axis in STORED)
    for axis in ("transform", "balance"):
        if point[axis] is not None and not rounded:
            yield f"{axis} {point.name(axis)!r} is for keys and values that are rounded: give them formats"
    formats = [_format(point, axis) for axis in STORED]
    if point["balance"] is not None and any(fmt is None or in_time(fmt) == 1 for fmt in formats):
        yield (
            f"balance {point.name('balance')!r} keeps what evens channels out in steps of channels, so keys and values "
            "both need groups in time, such as int4-asym/time:128"
        )
    if not rounded and window is not None and budget is None and point["merge"] is None:
        yield "a window keeps the last tokens whole, and nothing is done to the others: give keys and values formats"
    for axis in CHOSEN:
        if point[axis] is None and budget is not None and axis not in ("trigger", "disposal"):
            yield f"a budget says how many tokens stay and not which: add a {axis}, such as window-attention"
        if point[axis] is not None and budget is None:
            yield f"{axis} {point.name(axis)!r} lets tokens go, and nothing says how many stay: add a budget"
    if budget is not None and point["merge"] is not None:
        yield "a budget keeps other tokens in each block, and a merge needs the same in two of them: leave one out"
    if budget is not None and parts.numeric(axis_of(point.place, "budget"), budget) and not _whole(budget.part, 1):
        yield f"a budget counts tokens, and {budget.part} is no such number; a share is written uniform:{budget.part}"


def _of_sizes(point: Point, sizes: Attention | None) -> Iterator[str]:
    """What heads of this size cannot hold."""
    if sizes is None:
        return
    tokens = tokens_of(*(_taken(_format(point, axis), (LEAST, 1)) for axis in STORED))
    if tokens % LEAST or tokens > MOST:
        yield f"blocks have a multiple of {LEAST} tokens, {MOST} at most, and groups in time make {tokens}"
        return
    for axis, size in zip(STORED, (sizes.head_dim, sizes.value_dim), strict=True):
        fmt = _format(point, axis)
        refusal = None if fmt is None else fmt.grain.refuses((tokens, size))
        if refusal is not None:
            spelt = parts.halves(point.name(axis))[1]
            grain = parts.spell("grain", spelt)
            yield f"{axis}: {refusal}, which a head has here (write '{grain} else token', or a size that divides)"
        if point.name("transform") == "hadamard" and size % HADAMARD:
            yield f"a head of {size} channels holds no Hadamard of {HADAMARD} or more: leave transform 'hadamard' out"
    policy = _policy(point)
    if policy is None:
        return
    at = policy.trigger.tokens if policy.trigger.kind == "at" else 0
    keep = int(policy.budget.keep) if policy.budget.keep > 1 else at or LONG
    try:
        check_tokens(keep, _window(point), policy.score.sinks, tokens, at if policy.budget.keep > 1 else 0)
    except BudgetError as error:
        yield str(error)


def _fell(point: Point, sizes: Attention) -> str:
    """Which grains were taken in place of those named first, and why."""
    made = block_cache(point, sizes).scheme
    told = []
    for axis, fmt, size in zip(STORED, made.formats, (sizes.head_dim, sizes.value_dim), strict=True):
        asked = _format(point, axis)
        first = "" if asked is None else asked.grain.name.partition(" else ")[0]
        if fmt is not None and fmt.grain.name != first:
            told.append(f"{axis} of heads of {size} take {fmt.grain.name} in place of {first}")
    return "; ".join(told)
