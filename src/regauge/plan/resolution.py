"""From a plan and an anatomy to one point a place, or every reason why not, at once and before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from regauge import parts
from regauge.anatomy.inner import inner_taps
from regauge.anatomy.model import Anatomy, Site
from regauge.errors import RecipeError
from regauge.formats.base import OBJECTIVE
from regauge.formats.runs import refusal as uneven
from regauge.parts import ATTENTION, CACHE, INPUTS, PLACES, WEIGHTS, Point, Spec
from regauge.plan import forms, integers
from regauge.plan.contradictions import reasons_of_parts
from regauge.plan.learnable import learnt, learnt_of_tap, out_of_scope, teaches
from regauge.plan.matching import Match, match
from regauge.plan.model import Plan
from regauge.plan.select import SPECIAL
from regauge.plan.stores import stores


@dataclass(frozen=True)
class Resolution:
    """What each place gets.

    Attributes:
        choices: every site of the anatomy by name; None: full precision. Grains are those that apply, fallbacks taken.
        notes: what a reader must know, a sentence each.
        fallbacks: site or tap → which grain was taken instead, and why.
        kept: site in full precision → why.
        points: place → name → its point, of the other places; names that stay as they are are absent.
        scales: the model draws images scale by scale.
    """

    choices: dict[str, Point | None]
    notes: list[str]
    fallbacks: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    points: Mapping[str, Mapping[str, Point]] = field(default_factory=dict)
    scales: bool = False

    @property
    def inputs(self) -> Mapping[str, Point]:
        """Tap → how it is rounded, for all sites that read it."""
        return self.at(INPUTS)

    def at(self, place: str) -> Mapping[str, Point]:
        """Name → point, of one place."""
        if place == WEIGHTS:
            return {name: point for name, point in self.choices.items() if point is not None}
        return self.points.get(place, {})


def resolve(plan: Plan, anatomy: Anatomy, alike: bool = False) -> Resolution:
    """Match every rule, take every fallback, and check that each place can hold what it got.

    Args:
        alike: where a rule's fallbacks leave its sites with groups of several sizes, all take the smallest.

    Raises:
        RecipeError: what does not fit, every reason at once.
    """
    broken, reasons = reasons_of_parts(plan), list[str]()
    found = {place: match(plan, place, anatomy, reasons) for place in plan.places}
    if broken:
        raise _error(plan, [*broken, *reasons])
    fallbacks: dict[str, str] = {}
    grouped: dict[str, list[str]] = {}
    choices, kept = _weights(anatomy, found.get(WEIGHTS, {}), fallbacks, grouped)
    if alike:
        _level(found.get(WEIGHTS, {}), choices, fallbacks)
    points = {place: _points(won) for place, won in found.items() if place != WEIGHTS}
    if INPUTS in points and not reasons:  # who reads a tap is not known where a selector is wrong
        points[INPUTS] = _inputs(anatomy, found[INPUTS], choices, fallbacks, grouped)
    if CACHE in points and not reasons:
        held = stores(anatomy, points[CACHE])
        points[CACHE] = held.points
        grouped |= held.reasons
        fallbacks |= held.fallbacks
        kept |= held.kept
    for why, name in forms.refusals(points.get(ATTENTION, {}), points.get(CACHE, {}), anatomy):
        grouped.setdefault(why, []).append(name)
    reasons += [f"{reason}: {_names(names)}" for reason, names in grouped.items()]
    reasons += _tied(anatomy, choices, kept)
    if plan.products and not reasons:
        unlike = integers.broken(anatomy, choices, points.get(INPUTS, {}))
        reasons += [f"products are to be of integers, and {why}: {_names(names)}" for why, names in unlike.items()]
    if reasons:
        raise _error(plan, reasons)
    notes = [*anatomy.notes, *_told(fallbacks, "fell back"), *_told(kept, "kept in full precision")]
    notes += [note for won in found.values() for one in won.values() for note in one.notes]
    points = {place: held for place, held in points.items() if held}
    return Resolution(choices, notes, fallbacks, kept, points, anatomy.plumbing.scales)


def inert(plan: Plan, resolution: Resolution) -> list[str]:
    """What the plan asks for and nothing can do yet, a sentence each: a recipe may say it, the engine refuses it."""
    reasons: dict[str, None] = {}
    if plan.learning and not teaches(plan, resolution.choices.values(), resolution.inputs.values()):
        reasons["'learning' says how to train, and nothing in this recipe is learnt"] = None
    reasons |= dict.fromkeys(out_of_scope(plan, resolution.at(WEIGHTS), resolution.inputs))
    for place, declared in PLACES.items():
        held = resolution.at(place)
        if held and not (declared.acts or (declared.scales and resolution.scales)):
            reasons[f"nothing acts on {declared.of[1]} yet ({place} of {_names(list(held), 'of them')})"] = None
        for point in held.values():
            for name, spec in point:
                axis = parts.axis_of(place, name)
                if parts.empty(axis.parts, place) and not parts.numeric(axis, spec):
                    reasons[f"no part acts on {place} {name} yet, so {spec.part!r} cannot be had"] = None
    return [f"recipe {plan.name!r}: {reason}" for reason in reasons]


def _error(plan: Plan, reasons: list[str]) -> RecipeError:
    return RecipeError(f"recipe {plan.name!r} does not fit this model: " + "; ".join(dict.fromkeys(reasons)))


def _points(won: Mapping[str, Match]) -> dict[str, Point]:
    return {name: one.point for name, one in won.items() if one.point is not None}


def _weights(
    anatomy: Anatomy, won: Mapping[str, Match], fallbacks: dict[str, str], grouped: dict[str, list[str]]
) -> tuple[dict[str, Point | None], dict[str, str]]:
    choices: dict[str, Point | None] = {}
    kept: dict[str, str] = {}
    for site in anatomy.sites:
        point = won[site.name].point if site.name in won else None
        if point is None:
            kept[site.name] = _why_kept(site, site.name in won)
        else:
            point, why = _grain(point, site.shape)
            if why:
                fallbacks[site.name] = why
            for reason in _refusals(point, site):
                grouped.setdefault(reason, []).append(site.name)
        choices[site.name] = point
    return choices, kept


def _level(won: Mapping[str, Match], choices: dict[str, Point | None], fallbacks: dict[str, str]) -> None:
    """Gives all sites of one rule the smallest group that one of them fell back to."""
    rules: dict[Point, dict[str, Point]] = {}
    for name, one in won.items():
        taken = choices[name]
        if one.point is not None and taken is not None:
            rules.setdefault(one.point, {})[name] = taken
    for held in rules.values():
        grains = {point.spec("grain") for point in held.values()}
        if len(grains) < 2 or any(grain.part != "group" for grain in grains):
            continue
        least = min(grains, key=lambda grain: int(str(dict(grain.options)["size"])))
        for name, point in held.items():
            if point.spec("grain") != least:
                choices[name] = point.but(grain=least)
                fallbacks[name] = f"{parts.spell('grain', least)} as elsewhere, so that one format says all"


def _inputs(
    anatomy: Anatomy,
    won: Mapping[str, Match],
    choices: Mapping[str, Point | None],
    fallbacks: dict[str, str],
    grouped: dict[str, list[str]],
) -> dict[str, Point]:
    """The points of taps, their grains settled; a tap is rounded for all that read it, or for none."""
    readers: dict[str, list[Site]] = {}
    for site in anatomy.sites:
        readers.setdefault(site.tap or "", []).append(site)
    found: dict[str, Point] = {}
    inner = inner_taps(anatomy)
    for tap, one in won.items():
        if one.point is None:
            continue
        if tap in inner:
            found[tap], why = _inner(one.point, inner[tap])
            if why:
                grouped.setdefault(why, []).append(tap)
            continue
        if readers[tap][0].window:
            why = "a convolution reads it, whose places share pixels: leave the tap full, and round weights alone"
            grouped.setdefault(why, []).append(tap)
        shape = (1, readers[tap][0].shape[1])
        found[tap], why = _grain(one.point, shape)
        if why:
            fallbacks[tap] = why
        refusal = parts.format_of(found[tap]).grain.refuses(shape)
        if refusal is not None:
            grouped.setdefault(_divide(refusal, found[tap], "token"), []).append(tap)
        full = [site for site in readers[tap] if choices[site.name] is None]
        whole = [site.name for site in full if not _shares(anatomy, site, choices)]
        if whole:
            reason = (
                "an activation is rounded for all that read it, and what reads it stays in full precision here: give "
                f"that weights too, or leave the tap full ({_names(whole)})"
            )
            grouped.setdefault(reason, []).append(tap)
    return found


MANY = 1 << 30  # more tokens than any text has


def _inner(point: Point, channels: int | None) -> tuple[Point, str]:
    """The point of a tap that no matrix reads, its grain settled; why it cannot be had, or ""."""
    if point.name("transform") not in ("", "identity"):
        return point, f"{point.name('transform')!r} is folded into the matrices that read a tap, and none reads it"
    if learnt_of_tap(point):
        return point, f"{point.name('ranger')!r} is learnt with the matrices that read a tap, and none reads it"
    point, _ = _grain(point, (1, channels or 1))
    grain = parts.format_of(point).grain
    if channels is None:
        why = "has as many channels as there are tokens, so a step is a token's or a tensor's"
        return point, why if grain.span((1, MANY)) < MANY else ""
    refusal = grain.refuses((1, channels))
    return point, "" if refusal is None else _divide(refusal, point, "token")


def _shares(anatomy: Anatomy, site: Site, choices: Mapping[str, Point | None]) -> bool:
    """Whether a site has another's bytes, and those are codes."""
    return site.name == "head" and anatomy.tied and choices.get("embed") is not None


def _grain(point: Point, shape: tuple[int, int]) -> tuple[Point, str]:
    """The first grain of `a else b else c` that can cut the shape, and why the earlier ones cannot."""
    why = []
    spec = point.spec("grain")
    while dict(spec.options).get(parts.OTHERWISE) is not None:
        options = dict(spec.options)
        after = parts.read("grain", str(options.pop(parts.OTHERWISE)), point.place)
        spec = Spec(spec.part, tuple(sorted(options.items())))
        refusal = parts.build("grain", spec).refuses(shape)
        if refusal is None:
            break
        why.append(str(refusal))
        spec = after
    taken = parts.spell("grain", spec) or spec.part
    return point.but(grain=spec), f"{'; '.join(why)}: {taken} instead" if why else ""


def _divide(refusal: str, point: Point, otherwise: str) -> str:
    spelt = parts.spell("grain", point.spec("grain")) or point.name("grain")
    return f"{refusal} (write '{spelt} else {otherwise}', or a size that divides)"


def _refusals(point: Point, site: Site) -> list[str]:
    reasons = []
    fmt = parts.format_of(point)
    refusal = fmt.grain.refuses(site.shape)
    if refusal is not None:
        reasons.append(_divide(refusal, point, "channel"))
    elif (uncut := uneven(fmt, site.shape)) is not None:
        reasons.append(f"{uncut}: give it another grid, or a grain of whole runs")
    if site.block is None:
        reasons += [
            f"{axis} {point.name(axis)!r} is learnt by the error of a block's output, and what lies in no block has "
            f"none: give it another {axis}"
            for axis in learnt(point)
        ]
    compensator = parts.compensator_of(point)
    seen = {"rounder": parts.rounder_of(point).needs, "compensator": compensator.needs if compensator else frozenset()}
    for axis, wanted in seen.items() if site.tap is None else ():
        needs = wanted - {OBJECTIVE}
        if needs:
            told = f"{axis} {point.name(axis)!r} needs {min(needs)} of an input"
            reasons.append(f"{told}, and a table looked up by index has none")
    return reasons


def _why_kept(site: Site, named: bool) -> str:
    if named:
        return "a rule says full"
    return f"no rule names this {site.kind}" if site.kind in SPECIAL else "no rule matches it"


def _tied(anatomy: Anatomy, choices: dict[str, Point | None], kept: dict[str, str]) -> list[str]:
    """A tied head has the embedding's bytes, so it cannot be chosen apart from it."""
    if not anatomy.tied or "head" not in choices:
        return []
    head, embed = choices["head"], choices.get("embed")
    if head is not None and head != embed:
        return ["head is tied to embed: one matrix cannot hold two formats; name 'embed' only, for both"]
    choices["head"] = None
    kept["head"] = "tied to embed: it has the embedding's bytes"
    return []


def _told(why: Mapping[str, str], verb: str) -> list[str]:
    grouped: dict[str, list[str]] = {}
    for name, reason in why.items():
        grouped.setdefault(reason, []).append(name)
    return [f"{_names(names)} {verb}: {reason}" for reason, names in grouped.items()]


def _names(names: list[str], noun: str = "sites") -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-1]} ({len(names)} {noun})"
