"""Regauge: the cheapest network that still does the job, measured on your own machine.

    import regauge as rg

    receipt = rg.apply("gptq-w4g128", "path/or/hub-id", out="OUT", calibration=texts)
    model = rg.load("OUT")

Importing this does nothing but define names; each is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from regauge.version import __version__ as __version__

if TYPE_CHECKING:
    from regauge import errors, measure, report
    from regauge.artifact.receipt import Receipt
    from regauge.engine import apply, dry_run
    from regauge.hosts.transformers.load import load
    from regauge.hosts.transformers.stream import stream
    from regauge.plan import Plan
    from regauge.report.explanation import explain
    from regauge.report.inspection import inspect
    from regauge.report.methods import methods
    from regauge.search.fit import fit, pick

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
    "methods",
    "pick",
    "report",
    "stream",
]

_HOMES = {
    "Plan": "plan",
    "Receipt": "artifact.receipt",
    "apply": "engine",
    "dry_run": "engine",
    "explain": "report.explanation",
    "fit": "search.fit",
    "inspect": "report.inspection",
    "methods": "report.methods",
    "load": "hosts.transformers.load",
    "pick": "search.fit",
    "stream": "hosts.transformers.stream",
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
