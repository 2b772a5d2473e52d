"""Whether every product of a model would be one of integers under a recipe that promises it: `products: integer`."""

from __future__ import annotations

from collections.abc import Mapping

from regauge import parts
from regauge.anatomy.inner import KEYS, PROBABILITIES, QUERIES, VALUES
from regauge.anatomy.model import Anatomy
from regauge.parts import Point
from regauge.plan.model import INTEGER

Points = Mapping[str, Point]


def broken(anatomy: Anatomy, choices: Mapping[str, Point | None], inputs: Points) -> dict[str, list[str]]:
    """Why not every product is of integers whose steps are known before the call → the places of which that holds.
    Empty where all are."""
    found: dict[str, list[str]] = {}
    norms = {stream.name for stream in anatomy.streams if stream.kind == "norm"}
    taps: dict[str, None] = {}
    for site in anatomy.sites:
        if site.tap is None:
            continue
        taps[site.tap] = None
        shared = site.name == "head" and anatomy.tied
        choice = choices.get("embed") if shared else choices.get(site.name)
        if choice is None:
            found.setdefault("weights stay in full precision", []).append(site.name)
        elif parts.build("grid", choice.spec("grid")).kind != INTEGER:
            found.setdefault("weights are no integers", []).append(site.name)
    for tap in taps:
        if why := _unlike(inputs.get(tap)):
            what = "a norm's output" if tap in norms else "what a matrix reads"
            found.setdefault(f"{what} {why}", []).append(tap)
    for block in range(anatomy.blocks):
        for word in (QUERIES, KEYS, PROBABILITIES, VALUES) if anatomy.attention(block) is not None else ():
            tap = f"blocks.{block}.attn.{word}"
            if why := _unlike(inputs.get(tap)):
                found.setdefault(f"what attention multiplies {why}", []).append(tap)
    return found


def _unlike(point: Point | None) -> str:
    """Why what is read so are not integers of one step that is known before, as a clause; "" where they are."""
    if point is None:
        return "has no reading"
    if point.name("transform") not in ("", "identity"):
        return "is turned in floats before it is rounded"
    fmt = parts.format_of(point)
    if fmt.grid.kind != INTEGER:
        return f"is read as {point.name('grid')}"
    if not fmt.ranger.needs:
        return "has a step of each call's own, and integers alone want a static one"
    return "" if fmt.grain.name == "tensor" else "has several static steps, and one product has one"
