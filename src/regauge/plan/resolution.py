"""From a plan and an anatomy to one choice a site, or every reason why not, at once and before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from regauge import parts
from regauge.anatomy.model import Anatomy, Site
from regauge.errors import RecipeError
from regauge.parts import Choice, Spec
from regauge.plan.model import Plan
from regauge.plan.select import SPECIAL, matches


@dataclass(frozen=True)
class Resolution:
    """What each site gets.

    Attributes:
        choices: every site of the anatomy by name; None: full precision. Grains are those that apply, fallbacks taken.
        notes: what a reader must know, a sentence each.
        fallbacks: site → which grain was taken instead, and why.
        kept: site in full precision → why.
    """

    choices: dict[str, Choice | None]
    notes: list[str]
    fallbacks: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)


def resolve(plan: Plan, anatomy: Anatomy) -> Resolution:
    """Match every rule, take every fallback, and check that each site can hold what it got."""
    reasons = _reasons_of_parts(plan)
    winners: dict[str, tuple[int, Choice | None]] = {}
    touched = []
    for index, rule in enumerate(plan.rules):
        try:
            hits = [site.name for site in anatomy.sites if matches(rule.select, site)]
        except RecipeError as error:
            reasons.append(str(error))
            hits = [""]
        touched.append(hits)
        if not hits:
            reasons.append(f"selector {rule.select!r} matches nothing{_sample(anatomy, rule.select)}")
        winners |= dict.fromkeys(hits, (index, rule.choice))
    winning = {index for index, _ in winners.values()}
    for index, hits in enumerate(touched):
        if hits and index not in winning:
            reasons.append(f"rule {plan.rules[index].select!r} has no effect: later rules take all that it matches")
    if reasons:
        raise _error(plan, reasons)

    choices: dict[str, Choice | None] = {}
    fallbacks: dict[str, str] = {}
    kept: dict[str, str] = {}
    grouped: dict[str, list[str]] = {}
    for site in anatomy.sites:
        choice = winners[site.name][1] if site.name in winners else None
        if choice is None:
            kept[site.name] = _why_kept(site, site.name in winners)
        else:
            choice, why = _grain(choice, site)
            if why:
                fallbacks[site.name] = why
            for reason in _refusals(choice, site):
                grouped.setdefault(reason, []).append(site.name)
        choices[site.name] = choice
    reasons = [f"{reason}: {_names(names)}" for reason, names in grouped.items()]
    reasons += _tied(anatomy, choices, kept)
    if reasons:
        raise _error(plan, reasons)
    return Resolution(choices, _notes(anatomy, fallbacks, kept), fallbacks, kept)


def _error(plan: Plan, reasons: list[str]) -> RecipeError:
    return RecipeError(f"recipe {plan.name!r} does not fit this model: " + "; ".join(reasons))


def _reasons_of_parts(plan: Plan) -> list[str]:
    """Parts that contradict each other or cannot be built, each once."""
    wanted: dict[tuple[str, Spec], None] = {("rewrite", spec): None for spec in plan.rewrites}
    for rule in plan.rules:
        if rule.choice is not None:
            choice = rule.choice
            wanted |= {(axis, getattr(choice, axis)): None for axis in ("grid", "grain", "ranger", "scale", "rounder")}
            wanted |= {("compensator", spec): None for spec in [choice.compensator] if spec is not None}
            wanted |= {("grid", spec): None for spec in [choice.activations] if spec is not None}
    reasons = _contradictions(plan)
    for axis, spec in wanted:
        try:
            parts.build(axis, spec)
        except RecipeError as error:
            reasons.append(str(error))
    return reasons


def _contradictions(plan: Plan) -> list[str]:
    """Parts that cannot do their work beside each other."""
    reasons: dict[str, None] = {}
    for choice in (rule.choice for rule in plan.rules if rule.choice is not None):
        for axis in ("rounder", "ranger", "scale"):
            name = getattr(choice, axis).part
            for other, allowed in parts.part(axis, name).wants.items():
                seen = getattr(choice, other).part
                if seen not in allowed and not parts.foreign(seen):
                    reasons[f"{axis} {name!r} works through {other} {' or '.join(allowed)}, and {seen!r} is set"] = None
    return list(reasons)


def _sample(anatomy: Anatomy, selector: str) -> str:
    special = [site.name for site in anatomy.sites if site.kind in SPECIAL and matches(f"kind:{site.kind}", site)]
    plain = [site.name for site in anatomy.sites if site.kind not in SPECIAL]
    if selector in ("*", "embed.*") or not plain:
        return f" (wildcards leave out {', '.join(special[:3])}: name them)"
    return f" (a site is called {plain[0]!r}; 'regauge inspect' lists them)"


def _grain(choice: Choice, site: Site) -> tuple[Choice, str]:
    """The first grain of `a else b else c` that can cut the site, and why the earlier ones cannot."""
    why = []
    spec = choice.grain
    while dict(spec.options).get(parts.OTHERWISE) is not None:
        options = dict(spec.options)
        after = parts.read("grain", str(options.pop(parts.OTHERWISE)))
        spec = Spec(spec.part, tuple(sorted(options.items())))
        refusal = parts.build("grain", spec).refuses(site.shape)
        if refusal is None:
            break
        why.append(str(refusal))
        spec = after
    taken = parts.spell("grain", spec) or spec.part
    return replace(choice, grain=spec), f"{'; '.join(why)}: {taken} instead" if why else ""


def _refusals(choice: Choice, site: Site) -> list[str]:
    reasons = []
    fmt = parts.format_of(choice)
    refusal = fmt.grain.refuses(site.shape)
    if refusal is not None:
        spelt = parts.spell("grain", choice.grain) or choice.grain.part
        reasons.append(f"{refusal} (write '{spelt} else channel', or a size that divides)")
    if site.tap is None:
        needs = sorted(parts.rounder_of(choice).needs)
        if needs:
            name = choice.rounder.part
            reasons.append(f"rounder {name!r} needs {needs[0]} of an input, and a table looked up by index has none")
        if choice.activations is not None:
            reasons.append("activations cannot be quantised before a table that is looked up by index")
    return reasons


def _why_kept(site: Site, named: bool) -> str:
    if named:
        return "a rule says full"
    return f"no rule names this {site.kind}" if site.kind in SPECIAL else "no rule matches it"


def _tied(anatomy: Anatomy, choices: dict[str, Choice | None], kept: dict[str, str]) -> list[str]:
    """A tied head has the embedding's bytes, so it cannot be chosen apart from it."""
    if not anatomy.tied or "head" not in choices:
        return []
    head, embed = choices["head"], choices.get("embed")
    if head is not None and head != embed:
        return ["head is tied to embed: one matrix cannot hold two formats; name 'embed' only, for both"]
    choices["head"] = None
    kept["head"] = "tied to embed: it has the embedding's bytes"
    return []


def _notes(anatomy: Anatomy, fallbacks: Mapping[str, str], kept: Mapping[str, str]) -> list[str]:
    notes = list(anatomy.notes)
    for told in (fallbacks, kept):
        grouped: dict[str, list[str]] = {}
        for name, why in told.items():
            grouped.setdefault(why, []).append(name)
        verb = "fell back" if told is fallbacks else "kept in full precision"
        notes += [f"{_names(names)} {verb}: {why}" for why, names in grouped.items()]
    return notes


def _names(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-1]} ({len(names)} sites)"
