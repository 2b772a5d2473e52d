"""What a search may choose from, where the user says so: only what a runtime loads, only some presets' formats.

A preset's option is the point that its recipe gives a matrix, fallbacks taken. What it leaves whole stays whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from regauge.anatomy.model import Anatomy
from regauge.artifact.codec.schemes import Scheme
from regauge.artifact.codec.targets import Target, target_of
from regauge.errors import RecipeError
from regauge.parts import CACHE, INPUTS, PLACES, SHAPE, WEIGHTS, Point, Spec
from regauge.plan import Plan, load, presets
from regauge.plan.learnable import learnt
from regauge.plan.resolution import resolve
from regauge.search.options import FULL, Option, SiteGroup, menu, site_groups
from regauge.search.stores import store_groups

SYMMETRIC = "-sym"
"""Behind the name of an option of integers without a zero point."""

BESIDE = {INPUTS: "rounds activations", CACHE: "rounds the cache", SHAPE: "takes units out"}
"""What a recipe says of other places than the weights."""


@dataclass(frozen=True)
class Menu:
    """What the user allows.

    Attributes:
        target: the runtime that must load what comes out; None: ours does.
        methods: presets, recipe files or methods of the published list; empty: what the table of parts offers.
        contexts: tokens at which the cache counts, the largest first; none: it is left as it is.
    """

    target: str | None = None
    methods: tuple[str, ...] = ()
    contexts: tuple[int, ...] = ()

    @property
    def wire(self) -> str | None:
        """The format that the artifact must be written in."""
        return None if self.target is None else target_of(self.target).wire

    @property
    def caches(self) -> bool:
        """Whether what comes out can say what is kept of the past: not where others load it, nor beside methods that
        are named, which are all that is chosen from."""
        return self.wire is None and not self.methods

    @property
    def record(self) -> dict[str, object]:
        """As a search's record has it."""
        found: dict[str, object] = {"target": self.target, "methods": list(self.methods)}
        return found | ({"contexts": list(self.contexts)} if self.contexts else {})


def parse(target: str | None, methods: str | Sequence[str] | None) -> Menu:
    """`vllm` and `gptq-w4g128,rtn-w8` → a menu.

    Raises:
        SettingError, RecipeError: there is no such runtime or method, or none was named.
    """
    if target is not None:
        target_of(target)
    words = methods.split(",") if isinstance(methods, str) else list(methods or ())
    named = tuple(dict.fromkeys(word.strip() for word in words if word.strip()))
    if methods is not None and not named:
        raise RecipeError("--methods names none; give presets with commas between them, such as gptq-w4g128,rtn-w8")
    _plans(named)
    return Menu(target, named)


def groups_of(anatomy: Anatomy, allowed: Menu = Menu()) -> tuple[SiteGroup, ...]:  # frozen
    """Every choice that the search makes. Matrices that only full precision is left to are none.

    Raises:
        RecipeError: nothing is left to choose from; says why.
    """
    if allowed.contexts:
        return groups_of(anatomy, replace(allowed, contexts=())) + store_groups(anatomy, allowed.contexts)
    if allowed == Menu():
        return site_groups(anatomy)
    target = target_of(allowed.target or "regauge")
    plans = {name: _choices(plan, anatomy, target) for name, plan in _plans(allowed.methods).items()}
    found, why = list[SiteGroup](), dict[str, None]()
    for group in site_groups(anatomy, fuse=target.fuses):
        offered = _of_methods(group, plans) if plans else _of_table(group, target)
        said = {option: target.scheme(group.sites[0], point, anatomy) for option, point in _points(offered)}
        why |= {scheme: None for scheme in said.values() if type(scheme) is str}
        options = [option for option, scheme in said.items() if type(scheme) is not str]
        if options:
            found.append(replace(group, options=tuple(options)))
    found, dropped = _one_loader(found, anatomy, target)
    why |= dropped
    if not found:
        reasons = "; ".join(why) or "none of these methods gives a matrix of this model a format"
        asked = " and ".join(
            [f"--for {target.name}"] * (allowed.target is not None)
            + [f"--methods {','.join(allowed.methods)}"] * bool(allowed.methods)
        )
        verb = "leave" if " and " in asked else "leaves"
        raise RecipeError(f"{asked} {verb} nothing to choose from: {reasons}.")
    return tuple(replace(one, options=(*_by_bits(one.options), Option(FULL, None))) for one in found)


def _by_bits(options: Sequence[Option]) -> list[Option]:
    return sorted(options, key=lambda option: option.bits)


def _points(options: Sequence[Option]) -> list[tuple[Option, Point]]:
    return [(option, option.choice) for option in options if option.choice is not None]


def _of_table(group: SiteGroup, target: Target) -> list[Option]:
    """What the table of parts offers; for others without zero points, which they read where all formats are one."""
    offered = [option for option, _ in _points(menu(group.sites[0], full=False))]
    if target.wire is None:
        return [option for option in offered if option in group.options]
    found = []
    for option, point in _points(offered):
        grid = point.name("grid")
        plain = grid.removesuffix("-asym")
        name = option.name if plain == grid else f"{option.name}{SYMMETRIC}"
        found.append(Option(name, point.but(grid=Spec(plain), scale=Spec("bf16"))))
    return found


def _of_methods(group: SiteGroup, plans: dict[str, dict[str, Point | None]]) -> list[Option]:
    found: dict[Point, Option] = {}
    for name, choices in plans.items():
        points = {choices[site.name] for site in group.sites}
        point = points.pop()
        if point is not None and not points:  # where they share a choice, all of them have it
            found.setdefault(point, Option(name, point))
    return list(found.values())


def _one_loader(found: list[SiteGroup], anatomy: Anatomy, target: Target) -> tuple[list[SiteGroup], dict[str, None]]:
    """Zero points are read by loaders of others only where one format is all there is, so among several they go."""
    schemes = {
        scheme
        for group in found
        for _, point in _points(group.options)
        if type(scheme := target.scheme(group.sites[0], point, anatomy)) is Scheme
    }
    if len(schemes) < 2 or all(scheme.symmetric for scheme in schemes):
        return found, {}
    left = []
    for group in found:
        options = tuple(
            option
            for option, point in _points(group.options)
            if type(scheme := target.scheme(group.sites[0], point, anatomy)) is Scheme and scheme.symmetric
        )
        if options:
            left.append(replace(group, options=options))
    return left, {f"{target.name} reads zero points only where every quantised matrix has the same format": None}


def _choices(plan: Plan, anatomy: Anatomy, target: Target) -> dict[str, Point | None]:
    return resolve(plan, anatomy, alike=target.wire is not None).choices


def _plans(names: Sequence[str]) -> dict[str, Plan]:
    """Name → plan, of presets, recipe files and published methods.

    Raises:
        RecipeError: there is no such method; or it is more than a format of each matrix, so `fit` cannot choose it.
    """
    rows: dict[str, list[str]] = {}
    known = presets()
    for name in known if any(word not in known for word in names) else ():
        rows.setdefault(load(name).row, []).append(name)
    found: dict[str, Plan] = {}
    for word in names:
        if word not in known and word in rows:
            some = {name: plan for name in rows[word] if not _more(plan := load(name))}
            if not some:
                raise RecipeError(_refused(word, load(rows[word][0])))
            found |= some
            continue
        plan = load(word)
        if _more(plan):
            raise RecipeError(_refused(word, plan))
        found[plan.name] = plan
    return found


def _refused(word: str, plan: Plan) -> str:
    return (
        f"--methods {word}: fit chooses a format for each matrix, and {word} also {_more(plan)}; "
        f"use 'regauge apply {plan.name}'"
    )


def _more(plan: Plan) -> str:
    """What a plan does beside giving each matrix a format that can be compared alone; "" where nothing."""
    if plan.rewrites:
        return "rewrites the model before it is rounded"
    others = [BESIDE[place] for place in PLACES if place != WEIGHTS and plan.of(place)]
    if others:
        return " and ".join(others)
    points = [rule.point for rule in plan.of(WEIGHTS) if rule.point is not None]
    if any(learnt(point) for point in points):
        return "learns by the error of whole blocks"
    if any(point.name("compensator") not in ("", "none") for point in points):
        return "adds a correction beside each matrix"
    return "" if points else "rounds no matrix"
