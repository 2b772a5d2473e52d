"""What a preset or a part does, what it costs, whose it is, and where we differ: read off the parts themselves."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

from regauge import parts
from regauge.errors import RecipeError, nearest
from regauge.parts import AXES, Choice, Spec
from regauge.plan import Plan, coordinates, dump, load, patterns, presets
from regauge.plan.text import axis_of

SHAPE = (4096, 4096)
"""The matrix on which bits a weight are counted."""

KEPT = (
    "embeddings, head, routers, norms and biases stay in full precision, as the publications have it; "
    "a recipe takes them in by naming them (embed, head)"
)

Facts = dict[str, object]


def listing() -> dict[str, list[dict[str, str]]]:
    """Every preset file and every part in a line: kind or axis → rows of name and what."""
    found = {
        "preset": [
            {"name": _spread(pattern.name, pattern.where), "what": _spread(pattern.title, pattern.where)}
            for pattern in patterns()
        ]
    }
    for axis, table in AXES.items():
        found[axis] = [{"name": name, "what": part.what} for name, part in table.items()]
    return found


def _spread(text: str, where: Mapping[str, tuple[int, ...]]) -> str:
    """`gptq-w$bits` → `gptq-w{2-8}`."""
    for key, values in where.items():
        run = values == tuple(range(values[0], values[-1] + 1)) and len(values) > 2
        told = f"{values[0]}-{values[-1]}" if run else ",".join(map(str, values))
        text = re.sub(rf"\$\{{{key}\}}|\${key}\b", f"{{{told}}}", text)
    return text


def facts(name: str) -> list[Facts]:
    """Everything that is known under a name: a preset or recipe file first, then parts of each axis that has it."""
    found: list[Facts] = []
    if name in presets() or Path(name).suffix in (".yaml", ".yml"):
        found.append(_of_plan(load(name)))
    found += [_of_part(axis, name) for axis, table in AXES.items() if name in table]
    if not found:
        known = [*presets(), *(part for table in AXES.values() for part in table)]
        hint = nearest(name, known)
        more = hint if "did you mean" in hint else ""
        raise RecipeError(f"nothing is called {name!r}{more}; 'regauge explain' without a name lists presets and parts")
    return found


def _of_plan(plan: Plan) -> Facts:
    needs = sorted({need for spec in plan.rewrites for need in parts.build("rewrite", spec).needs})
    rules: list[Facts] = []
    for rule in plan.rules:
        row: Facts = {"select": rule.select, "keeps": rule.choice is None}
        if rule.choice is not None:
            row["bits"] = bits(rule.choice)
            row["stored"] = stored(rule.choice)
            row["parts"] = [_line(axis_of(key), key, spec) for key, spec in _specs(rule.choice).items()]
            needs = sorted({*needs, *_needs(rule.choice)})
        rules.append(row)
    return {
        "kind": "preset",
        "name": plan.name,
        "title": plan.title,
        "cite": list(plan.cite),
        "differs": plan.differs,
        "needs": needs,
        "searches": [
            f"{spec.part} tries {len(values)} values of {option}, each a pass of the whole model"
            for spec in plan.rewrites
            for option, values in parts.build("rewrite", spec).search.items()
        ],
        "calibration": dict(plan.calibration),
        "rewrites": [_line("rewrite", "rewrite", spec) for spec in plan.rewrites],
        "rules": rules,
        "kept": KEPT,
        "recipe": dump(plan),
    }


def _specs(choice: Choice) -> dict[str, Spec]:
    found = {key: getattr(choice, key) for key in coordinates(choice)}
    return {key: spec for key, spec in found.items() if spec is not None}


def _needs(choice: Choice) -> set[str]:
    compensator = parts.compensator_of(choice)
    return set(parts.rounder_of(choice).needs) | (set(compensator.needs) if compensator is not None else set())


def _line(axis: str, role: str, spec: Spec) -> dict[str, str]:
    part = parts.part(axis, spec.part)
    spelt = parts.spell(axis, spec) or f"{spec.part} {', '.join(f'{key} {value}' for key, value in spec.options)}"
    return {"axis": role, "name": spelt, "what": part.what, "cite": part.cite}


def bits(choice: Choice, shape: tuple[int, int] = SHAPE) -> float:
    """Stored bits a weight on a matrix of this shape, steps and zero points included, added low rank too."""
    return parts.bytes_of(choice, shape) * 8 / (shape[0] * shape[1])


def stored(choice: Choice, shape: tuple[int, int] = SHAPE) -> str:
    """The format on disk of a matrix that every grain divides. What the rest of a model asks for may change it."""
    from regauge.artifact.codec.schemes import scheme_of

    scheme = scheme_of(choice, shape)
    return f"regauge's packed format: {scheme}" if isinstance(scheme, str) else f"compressed-tensors, {scheme.format}"


def _of_part(axis: str, name: str) -> Facts:
    part = parts.part(axis, name)
    made = parts.load(axis, name)
    return {
        "kind": axis,
        "name": name,
        "what": part.what,
        "cite": [part.cite] if part.cite else [],
        "options": {
            key: None if option.default is inspect.Parameter.empty else option.default
            for key, option in parts.options(axis, name).items()
        },
        "short": part.short,
        "used": [_spread(p.name, p.where) for p in patterns() if any(_uses(load(n), axis, name) for n in p.points())],
        "text": inspect.cleandoc(made.__doc__ or ""),
    }


def _uses(plan: Plan, axis: str, name: str) -> bool:
    if axis == "rewrite":
        return any(spec.part == name for spec in plan.rewrites)
    specs = [_specs(rule.choice) for rule in plan.rules if rule.choice is not None]
    return any(axis_of(key) == axis and spec.part == name for row in specs for key, spec in row.items())


def explain(name: str | None = None) -> str:
    """`explain("gptq-w4g128")`: what, paper, cost, parts, where we differ. Without a name: all presets and parts."""
    if name is None:
        return _listing_text()
    return "\n\n".join(_plan_text(found) if found["kind"] == "preset" else _part_text(found) for found in facts(name))


def _plan_text(found: Facts) -> str:
    lines = [f"{found['name']}: {found['title']}" if found["title"] else str(found["name"]), ""]
    told = {
        "paper": ", ".join(_link(cite) for cite in _list(found["cite"])),
        "text": _text_needed(found),
        "differs": str(found["differs"]),
        "keeps": str(found["kept"]),
    }
    lines += _pairs(told)
    rewrites = _rows(found["rewrites"])
    if rewrites:
        lines += ["", "rewrites, in order; each keeps the function"]
        lines += _columns([[row["name"], row["what"]] for row in rewrites])
    for rule in _facts(found["rules"]):
        if rule["keeps"]:
            lines += ["", f"{rule['select']}: full precision"]
            continue
        lines += ["", f"{rule['select']}: {rule['bits']:.2f} bits a weight on {SHAPE[0]} × {SHAPE[1]}"]
        lines += textwrap.wrap(f"stored as {rule['stored']}", 100, initial_indent="  ", subsequent_indent="    ")
        lines += _columns([[row["axis"], row["name"], row["what"]] for row in _rows(rule["parts"])])
    return "\n".join([*lines, "", "as a recipe", *(f"  {line}" for line in str(found["recipe"]).splitlines())])


def _text_needed(found: Facts) -> str:
    needs = ", ".join(str(need) for need in _list(found["needs"]))
    if not needs:
        return "none is read"
    size = found["calibration"]
    tokens = f"; {size['tokens']} tokens in windows of {size['length']}" if isinstance(size, Mapping) and size else ""
    searches = "".join(f"; {told}" for told in _list(found["searches"]))
    return f"calibration text is read for {needs}{tokens}{searches}"


def _part_text(found: Facts) -> str:
    lines = [f"{found['name']} ({found['kind']}): {found['what']}", ""]
    options = found["options"] if isinstance(found["options"], Mapping) else {}
    spelt = [f"{key} (needed)" if value is None else f"{key} = {value}" for key, value in options.items()]
    told = {
        "paper": ", ".join(_link(cite) for cite in _list(found["cite"])),
        "options": ", ".join(spelt),
        "short": f"{found['name']}:VALUE sets {found['short']}" if found["short"] else "",
        "used by": ", ".join(str(name) for name in _list(found["used"])),
    }
    text = str(found["text"])
    return "\n".join([*lines, *_pairs(told), *(["", *text.splitlines()] if text else [])])


def _listing_text() -> str:
    lines: list[str] = []
    for axis, rows in listing().items():
        lines += [f"{axis}s" if axis == "preset" else axis, *_columns([[row["name"], row["what"]] for row in rows]), ""]
    return "\n".join([*lines, "'regauge explain NAME' tells more of each."])


def _link(cite: object) -> str:
    """An arXiv id as an address."""
    told = str(cite).removeprefix("arXiv:")
    return f"https://arxiv.org/abs/{told}" if re.fullmatch(r"\d{4}\.\d{4,5}", told) else told


def _pairs(told: Mapping[str, str]) -> list[str]:
    """Label and wrapped text, labels in a column; empty texts are left out."""
    lines = []
    for label, text in told.items():
        if text:
            first, *rest = textwrap.wrap(text, 96, break_long_words=False, break_on_hyphens=False)
            lines += [f"  {label:<9}{first}", *(f"  {'':<9}{line}" for line in rest)]
    return lines


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return [
        "  " + "  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows
    ]


def _list(value: object) -> list[object]:
    return list(value) if isinstance(value, list) else []


def _rows(value: object) -> list[dict[str, str]]:
    return [dict(row) for row in _list(value) if isinstance(row, dict)]


def _facts(value: object) -> list[Facts]:
    return [dict(row) for row in _list(value) if isinstance(row, dict)]
