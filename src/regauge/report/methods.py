"""Every published method and every part that we carry: paper, place, cost, and the figure measured, read off the table.

    regauge methods gptq        # those with the word in their name, title, place or paper

A preset is one file of `presets/`, which may stand for several names that differ in numbers alone. What was measured
stands in `presets/measured.json`, which `benchmarks/rows.py` printed, and of what trains in `trained.json`; where
nothing was measured the row says so.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any

from regauge import parts
from regauge.artifact.codec.base import REGAUGE as OURS
from regauge.artifact.codec.targets import TARGETS, target_of
from regauge.errors import RecipeError, nearest
from regauge.parts import CACHE, TABLE, WEIGHTS
from regauge.plan import Plan, load, patterns
from regauge.plan.keeping import bits_of, told
from regauge.report import speeds, trained
from regauge.report.explanation import facts, spread, uses
from regauge.report.explanation_text import SHAPE
from regauge.report.standing import HAD

PRESET, OF_CACHE, STANDING = "preset", "cache preset", "without a recipe"
UNMEASURED = "not measured"
SHOWN = 3
"""Figures of a preset file that are shown; the others are in `Method.figures`."""


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        name: as a recipe or `apply` takes it; of a preset with numbers, its pattern.
        kind: `preset`, `cache preset` where it is about nothing else, `without a recipe` where a command or every
            loaded model has it, or the axis that a part is on.
        what: what it does, in a line.
        row: the method of the published list that a preset implements; "" for a part, or where there is none.
        check: the tests of this repository that fail where a preset's idea is taken out.
        paper: arXiv ids or addresses.
        places: what it acts on.
        cost: what it reads, stores and takes.
        measured: the figure that a command printed, or that nothing was measured; of many presets, those in 4 bits.
        names: every name that a preset file stands for.
        figures: name → its row of `presets/measured.json`, of all of them that were measured.
    """

    name: str
    kind: str
    what: str
    row: str
    paper: tuple[str, ...]
    places: tuple[str, ...]
    cost: str
    measured: str
    names: tuple[str, ...] = ()
    check: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)


def methods(
    word: str | None = None, bits: int | None = None, loads_in: str | None = None, paper: bool = False
) -> tuple[Method, ...]:
    """Every preset file, then what needs none, then every part of each axis.

    Args:
        word: only rows that have it in their name, title, row, place, kind or paper.
        bits: only presets whose weights take so many bits, steps apart, or keys or values of a cache; their names are
            those alone.
        loads_in: only presets that this reads: `transformers`, `vllm`, `sglang` or `regauge`.
        paper: only what a paper describes.

    Raises:
        RecipeError: no row is left; names the nearest.
        SettingError: there is no such runtime; names the nearest.
    """
    found: tuple[Method, ...] = (*_presets(), *_standing(), *_parts())
    if bits is not None or loads_in is not None:
        found = tuple(one for method in found if (one := _narrowed(method, bits, loads_in)) is not None)
    if paper:
        found = tuple(method for method in found if method.paper)
    if not found:
        raise RecipeError(f"no preset has {bits} bits{'' if loads_in is None else f' and loads in {loads_in}'}")
    if word is None:
        return found
    wanted = word.strip().lower()
    chosen = tuple(method for method in found if wanted in _words(method))
    if not chosen:
        names = {method.name for method in found} | {name for method in found for name in (*method.names, method.row)}
        raise RecipeError(f"no method has {word!r} in it{_near(wanted, names)}; 'regauge methods' lists them all")
    return chosen


def _narrowed(method: Method, bits: int | None, loads_in: str | None) -> Method | None:
    """A preset with those of its names that fit; None where none does, or where it is no preset."""
    if loads_in is not None:
        target_of(loads_in)
    names = tuple(name for name in method.names if _fits(name, bits, loads_in))
    if not names:
        return None
    shown = method.name if names == method.names else ", ".join(names)
    return replace(method, name=shown, names=names, measured=_measured(names), figures=_figures(names))


@cache
def _fits(name: str, bits: int | None, loads_in: str | None) -> bool:
    points = [rule.point for rule in load(name).of(WEIGHTS) if rule.point is not None]
    if not points and load(name).of(CACHE):
        kept = [rule.point for rule in load(name).of(CACHE) if rule.point is not None]
        return loads_in in (None, OURS) and (bits is None or bits in {bit for point in kept for bit in bits_of(point)})
    if bits is not None and {parts.format_of(point).grid.width for point in points} != {bits}:
        return False
    target = TARGETS[loads_in or OURS]
    return target.wire is None or (bool(points) and _stock(name) and not any(map(target.kernel, points)))


def _stock(name: str) -> bool:
    """Whether what reads compressed-tensors reads what a preset makes of ordinary shapes. `apply --dry-run` says it of
    a model."""
    rules: Any = facts(name)[0]["rules"]
    return all(str(row["stored"]).startswith("compressed-tensors") for row in rules if "stored" in row)


@cache
def kept() -> dict[str, Any]:
    """What `benchmarks/rows.py` kept: how it was measured, and preset → figures."""
    found: dict[str, Any] = json.loads((files("regauge") / "presets" / "measured.json").read_text(encoding="utf-8"))
    return found


def _words(method: Method) -> str:
    return " ".join(str(value) for name, value in asdict(method).items() if name != "figures").lower()


def _near(word: str, names: set[str]) -> str:
    hint = nearest(word, names)
    return hint if "did you mean" in hint else ""


def _presets() -> tuple[Method, ...]:
    found = []
    for pattern in patterns():
        names = tuple(pattern.points())
        plans = {name: load(name) for name in names}
        plan = plans[names[0]]
        found.append(
            Method(
                name=spread(pattern.name, pattern.where),
                kind=OF_CACHE if set(plan.places) == {CACHE} else PRESET,
                what=spread(pattern.title, pattern.where),
                row="" if plan.row.startswith("none") else plan.row,
                paper=plan.cite,
                places=(*(["rewrites"] * bool(plan.rewrites)), *(["family"] * (plan.family is not None)), *plan.places),
                cost=_cost(plans),
                measured=_measured(names),
                names=names,
                check=plan.check,
                figures=_figures(names),
            )
        )
    return tuple(found)


def _standing() -> tuple[Method, ...]:
    return tuple(
        Method(
            name=name,
            kind=STANDING,
            what=one.title,
            row=name,
            paper=one.cite,
            places=(one.what,),
            cost="no recipe",
            measured=UNMEASURED if "benchmarks/" not in one.text else "'regauge explain' says by what",
            check=one.check,
        )
        for name, one in HAD.items()
    )


def _cost(plans: dict[str, Plan]) -> str:
    """Bits a weight, and the text that is read."""
    bits = sorted(
        parts.bytes_of(rule.point, SHAPE) * 8 / (SHAPE[0] * SHAPE[1])
        for plan in plans.values()
        for rule in plan.of(WEIGHTS)
        if rule.point is not None
    )
    first = next(iter(plans.values()))
    if set(first.places) == {CACHE}:
        return "; ".join(["reads no text", *(_of_cache(name, plan) for name, plan in plans.items())])
    size = first.calibration
    told = [f"reads {size['tokens']} tokens of text" if "tokens" in size else "reads no text"]
    if bits:
        ends = f"{bits[0]:.2f}" if bits[-1] - bits[0] < 0.005 else f"{bits[0]:.2f} to {bits[-1]:.2f}"
        told.append(f"{ends} bits a weight")
    return ", ".join(told)


def _figures(names: tuple[str, ...]) -> dict[str, Any]:
    rows: dict[str, Any] = kept()["rows"]
    return {name: rows[name] for name in names if name in rows}


def _of_cache(name: str, plan: Plan) -> str:
    """Bytes of a token by the first rule, which is of most blocks."""
    point = next(rule.point for rule in plan.of(CACHE) if rule.point is not None)
    return f"{name}: {told(point)}"


def _measured(names: tuple[str, ...]) -> str:
    """A figure each; of more than `SHOWN` names those whose weights take the bits nearest to 4."""
    rows = _figures(names)
    near = sorted(rows, key=lambda name: abs(int(rows[name]["bits"]) - 4))[:SHOWN]
    told = [f"{name}: {_told(rows[name])}" for name in rows if name in near]
    more = len(rows) - len(told)
    fast = [f"{name}: a token {said}" for name in names if (said := speeds.told(name))]
    gained = [f"{name}: {said} ({trained.how(name)})" for name in names if (said := trained.told(name))]
    return "; ".join([*told, *([f"{more} more with --json"] if more else []), *fast, *gained]) or UNMEASURED


def _told(row: dict[str, Any]) -> str:
    against = f", {row.get('null', 'nearest')} {row['null_kl'][0]:.2g} ({row['verdict']})" if "null_kl" in row else ""
    fitted = f"; {row['as']}" if "as" in row else ""
    return f"KL {row['kl'][0]:.2g}{against}{fitted}"


def _parts() -> tuple[Method, ...]:
    return tuple(
        Method(
            name=name,
            kind=axis,
            what=part.what,
            row="",
            paper=(f"arXiv:{part.cite}",) if part.cite[:1].isdigit() else (part.cite,) if part.cite else (),
            places=part.places,
            cost=part.cost,
            measured=_through(axis, name),
        )
        for axis, table in TABLE.items()
        for name, part in table.items()
    )


@cache
def _through(axis: str, name: str) -> str:
    """The measured presets that use a part, since a part alone is no method."""
    using = [preset for preset in kept()["rows"] if uses(load(preset), axis, name)]
    return f"in {', '.join(using)}" if using else UNMEASURED
