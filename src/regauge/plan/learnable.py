"""What of a recipe is learnt, and what cannot be at the scope at which it trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from regauge import parts
from regauge.anatomy.inner import ATTENDED, RESIDUAL, word_of
from regauge.formats.base import JOINED, OBJECTIVE
from regauge.learn.settings import BLOCK, MODEL
from regauge.parts import Point
from regauge.plan.model import Plan
from regauge.rewrites.base import TRAINED


def learnt(point: Point | None, other: str = "rounder") -> tuple[str, ...]:
    """The axes of a site's point whose parts are trained by the error of its block: none of most."""
    axes = () if point is None else ("ranger", other)
    return tuple(a for a in axes if point and point[a] and OBJECTIVE in parts.build(a, point.spec(a)).needs)


def learnt_of_tap(point: Point | None) -> tuple[str, ...]:
    """The axes of a tap's point whose parts are trained so: its transform, the range of its values."""
    return learnt(point, "transform")


def learnt_step(point: Point | None) -> tuple[str, ...]:
    """As `learnt_of_tap`: its ranger, where a step is trained that is known before the call."""
    if point is None or not point["ranger"]:
        return ()
    return ("ranger",) if JOINED in parts.build("ranger", point.spec("ranger")).needs else ()


def static_taps(inputs: Mapping[str, Point]) -> dict[str, Point]:
    """The taps whose static step is trained."""
    return {tap: point for tap, point in inputs.items() if learnt_step(point)}


def scope_of(plan: Plan) -> str:
    """What is trained together."""
    return str(plan.learning.get("scope", BLOCK))


def teaches(plan: Plan, choices: Iterable[Point | None], inputs: Iterable[Point]) -> bool:
    """Whether anything in a recipe is learnt."""
    taps = list(inputs)
    found = [*map(learnt, choices), *map(learnt_of_tap, taps), *map(learnt_step, taps)]
    return any(found) or bool(_needing(plan, JOINED) or _needing(plan, TRAINED))


def out_of_scope(plan: Plan, choices: Mapping[str, Point], inputs: Mapping[str, Point]) -> list[str]:
    """What cannot be learnt at the scope that the recipe says, a sentence each."""
    scales = _needing(plan, JOINED)
    if scope_of(plan) != MODEL:
        inner = [tap for tap, point in inputs.items() if learnt_step(point) and word_of(tap) in (*ATTENDED, RESIDUAL)]
        outer = [tap for tap, point in inputs.items() if learnt_step(point) and not tap.startswith("blocks.")]
        told = [f"rewrite {name!r}" for name in scales] + [f"the step of {tap}" for tap in [*inner, *outer][:1]]
        return [f"{what} is learnt by the whole model's output: write 'learning: {{scope: model}}'" for what in told]
    found = [f"rounder {point.name('rounder')!r}" for point in choices.values() if "rounder" in learnt(point)]
    found += [f"{axis} {point.name(axis)!r}" for point in inputs.values() for axis in learnt_of_tap(point)]
    found += [f"rewrite {name!r}" for name in _needing(plan, TRAINED)]
    moved = [point.name("transform") for point in inputs.values() if point.name("transform") not in ("", "identity")]
    if scales and moved:
        return [f"rewrite {scales[0]!r} scales the channels that {moved[0]!r} mixes: leave one of them out"]
    reason = "is learnt block by block, and this recipe trains at the scope of the model: leave one of them out"
    return [f"{what} {reason}" for what in dict.fromkeys(found)]


def _needing(plan: Plan, what: str) -> list[str]:
    """Rewrites whose moves are learnt so."""
    return [spec.part for spec in plan.rewrites if what in parts.build("rewrite", spec).needs]
