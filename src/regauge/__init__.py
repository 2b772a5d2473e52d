"""Regauge: the cheapest network that still does the job, measured on your own machine.

    import regauge as rg

    receipt = rg.apply("gptq-w4g128", "path/or/hub-id", out="OUT", calibration=texts)
    model = rg.load("OUT")

Importing this does nothing but define names; each is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regauge import errors, measure, report
    from regauge.engine import apply, dry_run
    from regauge.explanation import explain
    from regauge.hosts.transformers.loader import load
    from regauge.hosts.transformers.step.stream import stream
    from regauge.inspection import inspect
    from regauge.plan import Plan
    from regauge.receipt import Receipt
    from regauge.search.fit import fit, pick

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "Receipt",
    "apply",
    "dry_run",
    "errors",
    "explain",
    "fit",
    "inspect",
    "load",
    "measure",
    "pick",
    "report",
    "stream",
]

_HOMES = {
    "Plan": "plan",
    "Receipt": "receipt",
    "apply": "engine",
    "dry_run": "engine",
    "explain": "explanation",
    "fit": "search.fit",
    "inspect": "inspection",
    "load": "hosts.transformers.loader",
    "pick": "search.fit",
    "stream": "hosts.transformers.step.stream",
}
_MODULES = ("errors", "measure", "parts", "plan", "report")


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f"regauge.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"regauge.{name}")
    raise AttributeError(f"module 'regauge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
