"""Plans: parse, check, print, compare, hash. Light: only `resolve` needs torch, and is loaded when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regauge.parts import Option, Point, Spec
from regauge.plan.model import Plan, Rule
from regauge.plan.presets import load, patterns, preset_text, presets
from regauge.plan.spelling import coordinates, diff, digest, dump
from regauge.plan.text import parse

if TYPE_CHECKING:
    from regauge.plan.resolution import Resolution, resolve

__all__ = [
    "Option",
    "Plan",
    "Point",
    "Resolution",
    "Rule",
    "Spec",
    "coordinates",
    "diff",
    "digest",
    "dump",
    "load",
    "parse",
    "patterns",
    "preset_text",
    "presets",
    "resolve",
]


def __getattr__(name: str) -> object:
    if name not in ("resolve", "Resolution"):
        raise AttributeError(f"module 'regauge.plan' has no attribute {name!r}")
    import importlib

    module = importlib.import_module("regauge.plan.resolution")
    return getattr(module, name)
