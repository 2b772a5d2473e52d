"""Budgets as the user writes them, and one clear sentence for each way to write them wrong."""

from __future__ import annotations

import pytest

from regauge.errors import BudgetError
from regauge.search.budgets import parse, parse_floor, parse_one


@pytest.mark.parametrize(
    ("text", "resource", "amount", "relative", "context"),
    [
        ("memory=0.30x", "memory", 0.30, True, None),
        ("memory=2GB", "memory", 2e9, False, None),
        ("memory=500MB", "memory", 5e8, False, None),
        ("memory=1.5GiB", "memory", 1.5 * 2**30, False, None),
        ("memory=64MiB", "memory", 2**26, False, None),
        ("memory = 12 kB", "memory", 12e3, False, None),
        ("memory@32k=0.5x", "memory", 0.5, True, 32768),
        ("memory@4096=3GB", "memory", 3e9, False, 4096),
        ("decode=1.5x", "decode", 1.5, True, None),
        ("prefill=.9x", "prefill", 0.9, True, None),
    ],
)
def test_written_and_read(text: str, resource: str, amount: float, relative: bool, context: int | None) -> None:
    budget = parse_one(text)
    assert (budget.resource, budget.amount, budget.relative, budget.context) == (resource, amount, relative, context)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memory", "is not a budget; write NAME=AMOUNT"),
        ("", "is not a budget"),
        ("memry=0.3x", "did you mean 'memory'"),
        ("speed=2x", "known: decode, memory, prefill"),
        ("memory=-0.3x", "is negative"),
        ("memory=0x", "is zero"),
        ("memory=lots", "'lots' in 'memory=lots' is not an amount"),
        ("memory=0.3", "has no unit"),
        ("memory=2Gb", "did you mean 'GB'"),
        ("memory=", "is not an amount"),
        ("memory=nanx", "is not an amount"),
        ("decode=100", "a speed is a ratio"),
        ("decode=2GB", "a speed is a ratio"),
        ("decode@4k=2x", "only memory takes a context"),
        ("memory@=2GB", "is not a context"),
        ("memory@0=2GB", "is not a context"),
        ("memory@lots=2GB", "is not a context"),
    ],
)
def test_one_clear_sentence(text: str, message: str) -> None:
    with pytest.raises(BudgetError) as caught:
        parse_one(text)
    assert message in str(caught.value)


def test_twice_is_a_contradiction_but_two_contexts_are_not() -> None:
    with pytest.raises(BudgetError, match=r"given twice: 'memory=0\.3x' and 'memory=2GB'"):
        parse(["memory=0.3x", "memory=2GB"])
    assert [budget.key for budget in parse(["memory=0.3x", "memory@32k=2GB", "decode=1.5x"])] == [
        "memory",
        "memory@32768",
        "decode",
    ]


def test_bytes_count_the_source_as_bf16() -> None:
    assert parse_one("memory=0.30x").bytes(1000) == 300
    assert parse_one("memory=2kB").bytes(1000) == 2000


def test_floors() -> None:
    assert parse_floor("kl=0.05") == {"kl": 0.05}
    assert parse_floor("kl = 1e-3") == {"kl": 0.001}
    assert parse_floor({"kl": 0.1}) == {"kl": 0.1}
    assert parse_floor(None) == {}
    for text, message in [
        ("kl", "write kl=0.05"),
        ("kl=x", "write kl=0.05"),
        ("kl=0.05x", "write kl=0.05"),
        ("ppl=3", "'ppl' is not a floor"),
        ("kl=-1", "leaves nothing"),
        ("kl=0", "leaves nothing"),
    ]:
        with pytest.raises(BudgetError, match=message):
            parse_floor(text)
