"""What `regauge methods` and `regauge doctor` print for a person."""

from __future__ import annotations

from collections.abc import Sequence

from regauge.cli.show import line, table
from regauge.measure.products import SIMULATED, Trace
from regauge.report.doctor import BAD, Line
from regauge.report.methods import OF_CACHE, PRESET, Method, kept


def doctor(found: Sequence[Line]) -> None:
    """A line each, and below it what to do."""
    width = max(len(one.what) for one in found)
    for one in found:
        line(f"{one.verdict:<5} {one.what:<{width}}  {one.found}")
        if one.hint:
            line(f"{'':<5} {'':<{width}}  {one.hint}")
    bad = [one.what for one in found if one.verdict == BAD]
    line("To mend: " + ", ".join(bad) if bad else "Nothing stands in the way.")


def trace(found: Trace) -> None:
    """A line each product, and below them what holds of all."""
    table(
        ["product", "inputs", "weights", "runs", "why not of integers"],
        [[one.name, one.inputs, one.weights, one.runs, one.why] for one in found.products],
    )
    for name in found.unseen:
        line(f"{name}: no token reached it")
    line(f"{found}.")
    if SIMULATED in {one.runs for one in found.products}:
        line("Simulated: both factors are whole multiples of one step, and floats multiply them.")


def methods(found: Sequence[Method]) -> None:
    """A table a kind: presets first, then each axis."""
    for kind in dict.fromkeys(method.kind for method in found):
        rows = [method for method in found if method.kind == kind]
        heads = (
            ["row", "paper", "acts on", "cost", "measured"]
            if kind in (PRESET, OF_CACHE)
            else ["paper", "acts on", "cost"]
        )
        table(
            [kind, "what", *heads],
            [[one.name, one.what, *(_cell(one, head) for head in heads)] for one in rows],
        )
    if any(method.kind == PRESET for method in found):
        line(f"KL of {kept()['model']} to the original in nats a token, beside nearest rounding at the same bits.")
    if any(method.kind == OF_CACHE and method.figures for method in found):
        line(f"KL of {kept()['model']} behind a cache: {kept()['caches']}.")
    line("'regauge explain NAME' tells more of each.")


def _cell(method: Method, head: str) -> str:
    if head == "row":
        return method.row
    if head == "paper":
        return ", ".join(cite.removeprefix("arXiv:") for cite in method.paper)
    if head == "acts on":
        return ", ".join(method.places)
    return method.cost if head == "cost" else method.measured
