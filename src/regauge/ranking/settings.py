"""Settings, `w4a16` or `w4a4kv4`: bits of weights, of inputs, of what is kept of the past; and the presets at each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from regauge import parts
from regauge.errors import RecipeError, nearest
from regauge.parts import ATTENTION, CACHE, INPUTS, SHAPE, WEIGHTS
from regauge.plan import Plan, load, patterns, presets
from regauge.plan.combining import BETWEEN
from regauge.plan.keeping import bits_of

FULL = 16
ALL = "all"
_WRITTEN = re.compile(r"w(\d+)a(\d+)(?:kv(\d+))?")


@dataclass(frozen=True, order=True)
class Setting:
    """Bits of a code: of weights in the blocks, of their inputs, of keys and values; 16 where nothing is rounded."""

    weights: int
    inputs: int = FULL
    kept: int = FULL

    def __str__(self) -> str:
        return f"w{self.weights}a{self.inputs}" + (f"kv{self.kept}" if self.kept != FULL else "")

    @staticmethod
    def read(text: str) -> Setting:
        """`w4a16` → the setting.

        Raises:
            RecipeError: it is written otherwise.
        """
        found = _WRITTEN.fullmatch(text.strip().lower())
        if found is None:
            raise RecipeError(f"--at {text!r} is no setting: write bits of weights and inputs, w4a16 or w4a4kv4")
        return Setting(int(found[1]), int(found[2]), int(found[3] or FULL))


@dataclass(frozen=True)
class Entry:
    """A recipe that takes part."""

    name: str
    plan: Plan
    setting: Setting


def setting_of(plan: Plan) -> Setting | None:
    """The setting of a recipe; None where it rounds no weights, rounds them to several numbers of bits, or also prunes
    or changes attention."""
    weights = {parts.format_of(r.point).grid.width for r in plan.of(WEIGHTS) if r.point is not None}
    inputs = {_bits(rule.point) for rule in plan.of(INPUTS) if rule.point is not None} or {FULL}
    kept = {bit for rule in plan.of(CACHE) if rule.point is not None for bit in bits_of(rule.point)} or {FULL}
    if len(weights) != 1 or len(inputs) != 1 or len(kept) != 1 or plan.of(SHAPE) or plan.of(ATTENTION):
        return None
    return Setting(weights.pop(), inputs.pop(), kept.pop())


def _bits(point: parts.Point) -> int:
    bits: float = parts.build("grid", point.spec("grid")).bits
    return round(bits)


@cache
def known() -> tuple[Entry, ...]:
    """Every preset that has a setting."""
    found = ((name, load(name)) for name in presets())
    return tuple(Entry(n, plan, at) for n, plan in found if (at := setting_of(plan)) is not None)


def chosen(methods: str | Sequence[str], at: str | Sequence[str] | None) -> tuple[Entry, ...]:
    """The recipes that are compared, by setting and then in the order given.

    Args:
        methods: `all`, or names of presets, of preset files (`gptq`: each of its numbers), of published rows
            (`smoothquant`), presets together (`quarot-w4a4+kivi-4`), or recipe files; several with commas, or a list.
        at: settings; None: every one that the methods have.

    Raises:
        RecipeError: there is no such method or setting, or no method is at one of the settings.
    """
    wanted = [Setting.read(text) for text in _split(at)] if at is not None else []
    words = _split(methods)
    everything = words == [ALL]
    entries = list(known()) if everything else _unique(entry for word in words for entry in _named(word))
    if not wanted:
        return tuple(sorted(entries, key=lambda entry: entry.setting))
    for setting in wanted:
        if not any(entry.setting == setting for entry in entries):
            have = ", ".join(dict.fromkeys(str(entry.setting) for entry in sorted(entries, key=lambda e: e.setting)))
            raise RecipeError(f"none of the methods is at {setting}; they are at {have}")
    if not everything:
        for word in words:
            if not any(entry.setting in wanted for entry in _named(word)):
                has = ", ".join(dict.fromkeys(str(entry.setting) for entry in _named(word)))
                raise RecipeError(f"{word} is at {has}, and --at asks for {', '.join(map(str, wanted))}")
    return tuple(entry for setting in dict.fromkeys(wanted) for entry in entries if entry.setting == setting)


def _split(text: str | Sequence[str]) -> list[str]:
    words = text.split(",") if isinstance(text, str) else list(text)
    found = [word.strip() for word in words if word.strip()]
    if not found:
        raise RecipeError("there is nothing to compare: name methods, or 'all'")
    return found


def _unique(entries: Iterable[Entry]) -> list[Entry]:
    return list({entry.name: entry for entry in entries}.values())


def _named(word: str) -> tuple[Entry, ...]:
    """The recipes that one word stands for."""
    exact = tuple(entry for entry in known() if entry.name == word)
    if exact:
        return exact
    stems = {name for p in patterns() if p.file.removesuffix(".yaml") == word for name in p.points()}
    several = tuple(entry for entry in known() if entry.name in stems or entry.plan.row == word)
    if several:
        return several
    if word in presets() or BETWEEN in word or word.endswith((".yaml", ".yml")):
        plan = load(word)
        at = setting_of(plan)
        if at is None:
            raise RecipeError(f"{word} cannot be compared: it does not round every matrix to one number of bits")
        return (Entry(plan.name or word, plan, at),)
    names = {entry.name for entry in known()} | {entry.plan.row for entry in known() if " " not in entry.plan.row}
    hint = nearest(word, names)
    raise RecipeError(f"no method is called {word!r}{hint if len(hint) < 100 else ''}; 'regauge methods' lists them")
