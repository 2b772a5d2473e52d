"""Which rule wins at each place of an anatomy, and what is wrong with rules that win nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from regauge.anatomy.model import Anatomy
from regauge.errors import RecipeError, nearest
from regauge.parts import CACHE, INPUTS, PLACES, WEIGHTS, Point
from regauge.plan.model import Plan
from regauge.plan.select import AT_END, READ_BY, Spot, alternatives, named, spots, taken


@dataclass(frozen=True)
class Match:
    """The rule that won a place.

    Attributes:
        index: which rule of its place.
        point: what it says; None: leave it as it is.
        notes: what a reader must know of it.
    """

    index: int
    point: Point | None
    notes: tuple[str, ...] = ()


def match(plan: Plan, place: str, anatomy: Anatomy, reasons: list[str]) -> dict[str, Match]:
    """Name → what won it, for one place; every reason against goes to `reasons`."""
    known, rules = spots(anatomy, place), plan.of(place)
    won: dict[str, Match] = {}
    touched: list[list[str]] = []
    for index, rule in enumerate(rules):
        try:
            hits = [spot for spot in known if taken(rule.select, spot)]
        except RecipeError as error:
            reasons.append(str(error))
            return {}
        touched.append([spot.name for spot in hits])
        if not hits:
            reasons += _nothing(rule.select, rule.point, place, anatomy, known)
        won |= {spot.name: Match(index, rule.point) for spot in hits}
    for index, names in enumerate(touched):
        if names and all(won[name].index != index for name in names):
            if all(_at_an_end(rules[won[name].index].select) for name in names):  # of a model of few blocks
                note = f"rule {rules[index].select!r} has no effect: the ends are all of its {anatomy.blocks} blocks"
                won |= {name: replace(won[name], notes=(*won[name].notes, note)) for name in names}
                continue
            same = place == INPUTS and all(won[name].point == rules[index].point for name in names)
            if not same:
                reasons.append(f"rule {rules[index].select!r} has no effect: later rules take all that it matches")
    if place == INPUTS:
        return {name: _shared(plan, name, found, known, reasons) for name, found in won.items()}
    return won


def _at_an_end(selector: str) -> bool:
    """Whether a selector says which blocks by how far from an end they are."""
    return all(AT_END.fullmatch(piece) for piece in alternatives(selector))


def _shared(plan: Plan, name: str, found: Match, known: tuple[Spot, ...], reasons: list[str]) -> Match:
    """A tap that was named through some of its sites: the others read it too, and no rule may want it otherwise."""
    spot = next(spot for spot in known if spot.name == name)
    rules = plan.of(INPUTS)
    winner = rules[found.index]
    through = {site.name for site in named(winner.select, spot)}
    others = [site.name for site in spot.sites if site.name not in through]
    if not others:
        return found
    for rule in rules[: found.index]:
        wanted = [site.name for site in named(rule.select, spot) if site.name in others]
        if wanted and rule.point != found.point:
            reasons.append(
                f"{name} is read by {wanted[0]} as rule {rule.select!r} has it and by {sorted(through)[0]} as "
                f"{winner.select!r} does: an activation belongs to its tap, so say it once, of {name!r}"
            )
            return found
    if found.point is None:
        return found
    return Match(found.index, found.point, (f"{name} is rounded for {', '.join(others)} too, which read it",))


def _nothing(select: str, point: Point | None, place: str, anatomy: Anatomy, known: tuple[Spot, ...]) -> list[str]:
    """Why a selector matched nothing."""
    through = [piece.removeprefix(READ_BY) for piece in alternatives(select) if piece.startswith(READ_BY)]
    if through:
        sites = [spot for spot in spots(anatomy, WEIGHTS) if any(taken(piece, spot) for piece in through)]
        if sites and point is None:
            return []
        if sites:
            return [
                "activations cannot be quantised before a table that is looked up by index: "
                + ", ".join(spot.name for spot in sites)
            ]
    return [f"selector {select!r} matches nothing{_sample(anatomy, place, select, known)}"]


def _sample(anatomy: Anatomy, place: str, select: str, known: tuple[Spot, ...]) -> str:
    declared = PLACES[place]
    if not known and place == CACHE:
        return f" (this {anatomy.family} model keeps no keys and values of its past)"
    if not known:
        return f" (this {anatomy.family} model has no {declared.of[1]})"
    special = [spot.name for spot in known if spot.tail and taken(f"kind:{spot.kind}", spot)]
    plain = [spot.name for spot in known if not spot.tail]
    if select in ("*", "embed.*") or not plain:
        return f" (wildcards leave out {', '.join(special[:3])}: name them)"
    if place == WEIGHTS:
        return f" (a site is called {plain[0]!r}; 'regauge inspect' lists them)"
    hint = nearest(select, [*plain, *special])
    hint = hint if "did you mean" in hint else ""
    return f"{hint} (a {declared.of[0]} is called {plain[0]!r})"
