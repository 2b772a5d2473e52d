"""A model's caches by a plan: per block a scheme and a policy. And what a user may write where a cache is asked for.

    cache_plan(asked("kivi-4"), anatomy).blocks[3].scheme.bytes(16384, heads=4, sizes=(64, 64))

Pure: formats and parts are built, nothing of a model is read but its anatomy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from regauge.anatomy.model import Anatomy
from regauge.cache.scheme import CachePlan
from regauge.errors import RecipeError, nearest
from regauge.parts import AXES, CACHE, Point
from regauge.plan.model import Plan
from regauge.plan.presets import load, presets
from regauge.plan.resolution import inert, resolve
from regauge.plan.stores import block_cache, block_of
from regauge.plan.text import parse

Asked = str | Path | Mapping[str, object] | Plan
"""A preset's name, a recipe file, `none`, a recipe as a mapping, or its rule alone: `{"keys": "int4-asym/time:32"}`."""
NONE = "none"


def cache_plan(plan: Plan, anatomy: Anatomy) -> CachePlan:
    """Per block what a plan keeps there, by its rules of `cache`, whatever else it says.

    Raises:
        RecipeError: they do not fit the model, every reason at once.
    """
    alone = Plan(plan.name, {CACHE: plan.of(CACHE)})
    found = resolve(alone, anatomy)
    if reasons := inert(alone, found):
        raise RecipeError("; ".join(reasons))
    return of_points(plan.name, found.at(CACHE), anatomy, tuple(found.notes))


def of_points(name: str, points: Mapping[str, Point], anatomy: Anatomy, notes: tuple[str, ...] = ()) -> CachePlan:
    """The same from the points of stores, as a header holds them."""
    held = {block_of(store): point for store, point in points.items()}
    blocks = (
        block_cache(held[block], anatomy.attention(block)) if block in held else None for block in range(anatomy.blocks)
    )
    return CachePlan(name, tuple(blocks), notes)


def asked(cache: Asked, trusted: bool = True) -> Plan | None:
    """The plan that somebody asks a model's cache to be by; None: everything as it comes.

    Args:
        trusted: False for what comes with a request: only names of presets and mappings that name no code.

    Raises:
        RecipeError: it is no recipe, or says nothing of caches, or more than of caches.
    """
    plan = _read(cache, trusted)
    if plan is None:
        return None
    if not plan.of(CACHE):
        raise RecipeError(f"{plan.name!r} says nothing of a cache{_near(str(cache))}")
    more = [place for place in plan.places if place != CACHE] + ["rewrites"] * bool(plan.rewrites)
    if more:
        raise RecipeError(
            f"{plan.name!r} has rules for {' and '.join(more)} too, and a loaded model can only be given a cache; "
            "apply the whole recipe, or name its cache alone"
        )
    return plan


def _read(cache: Asked, trusted: bool) -> Plan | None:
    if isinstance(cache, Plan):
        return cache
    if isinstance(cache, Mapping):
        rule = cache if cache.keys() - set(AXES[CACHE]) else {CACHE: {"*": dict(cache)}}
        return parse(rule, "cache", trusted)
    if not isinstance(cache, str | Path) or not str(cache).strip():
        raise RecipeError(
            f"cache={cache!r} names no cache: give a preset's name such as 'kivi-4', a recipe file, or {NONE!r}"
        )
    if str(cache) == NONE:
        return None
    if not trusted and any(name.strip() not in presets() for name in str(cache).split("+")):
        raise RecipeError(f"there is no preset of a cache called {str(cache)[:60]!r}{_near(str(cache))}")
    return load(cache)


def with_cache(plan: Plan, cache: Asked | None) -> Plan:
    """The plan with the rules of another for its caches in place of its own; None: as it is.

    Raises:
        RecipeError: as of `asked`.
    """
    if cache is None:
        return plan
    found = asked(cache)
    rules = () if found is None else found.of(CACHE)
    name = plan.name if found is None else f"{plan.name}, cache {found.name}"
    return replace(plan, name=name, places={**plan.places, CACHE: rules})


def of_caches() -> list[str]:
    """Presets that say something of caches and nothing else."""
    return [name for name in presets() if set(load(name).places) == {CACHE}]


def _near(name: str) -> str:
    return nearest(name, of_caches())
