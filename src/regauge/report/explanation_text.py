"""The facts of a preset or a part as text: what `regauge explain NAME` prints."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from regauge.parts import WEIGHTS
from regauge.report import speeds, trained
from regauge.report.columns import Facts, columns, facts_of, link, listed, pairs, rows_of

SHAPE = (4096, 4096)
"""The matrix on which bits a weight are counted."""


def standing_text(found: Facts) -> str:
    """Of what needs no recipe."""
    about = {
        "paper": ", ".join(link(cite) for cite in listed(found["cite"])),
        "check": ", ".join(map(str, listed(found["check"]))),
        "here": str(found["what"]),
    }
    return "\n".join([f"{found['name']}: {found['title']}", "", *pairs(about), "", *str(found["text"]).splitlines()])


def plan_text(found: Facts) -> str:
    """Of a preset."""
    lines = [f"{found['name']}: {found['title']}" if found["title"] else str(found["name"]), ""]
    told = {
        "paper": ", ".join(link(cite) for cite in listed(found["cite"])),
        "check": ", ".join(map(str, listed(found["check"]))),
        "text": _text_needed(found),
        "differs": str(found["differs"]),
        "keeps": str(found["kept"]),
        "speed": _speed(str(found["speed"])),
        "gained": _gained(str(found["name"]), str(found["trained"])),
    }
    lines += pairs(told)
    if rewrites := rows_of(found["rewrites"]):
        lines += ["", "rewrites, in order; each keeps the function"]
        lines += columns([[row["name"], row["what"]] for row in rewrites])
    for rule in facts_of(found["rules"]):
        if rule["keeps"]:
            lines += ["", f"{rule['place']} of {rule['select']}: full precision"]
            continue
        if rule["others"]:
            others = ", ".join(str(name) for name in listed(rule["others"]))
            lines += ["", f"{rule['place']} of {rule['select']}: bits and cost are those that {others} decides"]
        elif rule["place"] == WEIGHTS:
            told_bits = f"{rule['bits']:.2f} bits a weight on {SHAPE[0]} × {SHAPE[1]}"
            lines += ["", f"{WEIGHTS} of {rule['select']}: {told_bits}"]
            told_runs = dict(rule["runs"]) if isinstance(rule["runs"], Mapping) else {}
            for said in (f"stored as {rule['stored']}", *(f"on {device}: {how}" for device, how in told_runs.items())):
                lines += textwrap.wrap(said, 100, initial_indent="  ", subsequent_indent="    ")
        else:
            takes = f": {rule['takes']}" if "takes" in rule else ""
            lines += ["", f"{rule['place']} of {rule['select']}{takes}"]
            where = rule.get("runs")
            lines += [f"  on {device}: {how}" for device, how in where.items()] if isinstance(where, Mapping) else []
        lines += columns([[row["axis"], row["name"], row["what"]] for row in rows_of(rule["parts"])])
    return "\n".join([*lines, "", "as a recipe", *(f"  {line}" for line in str(found["recipe"]).splitlines())])


def _speed(said: str) -> str:
    """Of a row of caches that was measured, with where."""
    kept = speeds.kept()
    return f"a token is {said} ({kept['model']}, batch 1, {kept['machine']}; {kept['command']})" if said else ""


def _gained(name: str, said: str) -> str:
    """Of a preset that trains and was measured, with how."""
    return f"{said} ({trained.how(name)})" if said else ""


def _text_needed(found: Facts) -> str:
    needs = ", ".join(str(need) for need in listed(found["needs"]))
    if not needs:
        return "none is read"
    size = found["calibration"] if isinstance(found["calibration"], Mapping) else {}
    tokens = f"; {size['tokens']} tokens" if "tokens" in size else ""
    tokens += f" in windows of {size['length']}" if "length" in size else ""
    return f"calibration text is read for {needs}{tokens}" + "".join(f"; {told}" for told in listed(found["searches"]))


def part_text(found: Facts) -> str:
    """Of a part."""
    lines = [f"{found['name']} ({found['kind']}): {found['what']}", ""]
    options = found["options"] if isinstance(found["options"], Mapping) else {}
    spelt = [f"{key} (needed)" if value is None else f"{key} = {value}" for key, value in options.items()]
    told = {
        "paper": ", ".join(link(cite) for cite in listed(found["cite"])),
        "options": ", ".join(spelt),
        "short": f"{found['name']}:VALUE sets {found['short']}" if found["short"] else "",
        "for": ", ".join(str(place) for place in listed(found["places"])),
        "cost": str(found["cost"]),
        "used by": ", ".join(str(name) for name in listed(found["used"])),
    }
    text = str(found["text"])
    return "\n".join([*lines, *pairs(told), *(["", *text.splitlines()] if text else [])])
