"""Regauge: the cheapest network that still does the job, measured on your own machine.

    import regauge as rg

    receipt = rg.apply("gptq-w4g128", "path/or/hub-id", out="OUT", calibration=texts)
    model = rg.load("OUT")

Importing this does nothing but define names; each is loaded when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from regauge.version import __version__ as __version__

if TYPE_CHECKING:
    from regauge import cache, errors
    from regauge.api import apply, compare, dry_run, fit, measure, pick, report
    from regauge.artifact.receipt import Receipt
    from regauge.cli.training import recover, subnets, train
    from regauge.elastic.subnet import Subnet
    from regauge.engine.extracting import extract
    from regauge.engine.tracing import trace
    from regauge.hosts.transformers.grouping import shared_prefix
    from regauge.hosts.transformers.load import load
    from regauge.hosts.transformers.stream import stream
    from regauge.hosts.transformers.switching import refill, use
    from regauge.plan import Plan
    from regauge.report.drawing import sample
    from regauge.report.explanation import explain
    from regauge.report.inspection import inspect
    from regauge.report.methods import methods

__all__ = [
    "Plan",
    "Receipt",
    "Subnet",
    "apply",
    "cache",
    "compare",
    "dry_run",
    "errors",
    "explain",
    "extract",
    "fit",
    "inspect",
    "load",
    "measure",
    "methods",
    "pick",
    "recover",
    "refill",
    "report",
    "sample",
    "shared_prefix",
    "stream",
    "subnets",
    "trace",
    "train",
    "use",
]

_HOMES = {
    "Plan": "plan",
    "Receipt": "artifact.receipt",
    "apply": "api",
    "compare": "api",
    "dry_run": "api",
    "Subnet": "elastic.subnet",
    "explain": "report.explanation",
    "extract": "engine.extracting",
    "subnets": "cli.training",
    "fit": "api",
    "inspect": "report.inspection",
    "methods": "report.methods",
    "load": "hosts.transformers.load",
    "pick": "api",
    "recover": "cli.training",
    "refill": "hosts.transformers.switching",
    "sample": "report.drawing",
    "shared_prefix": "hosts.transformers.grouping",
    "stream": "hosts.transformers.stream",
    "trace": "engine.tracing",
    "train": "cli.training",
    "use": "hosts.transformers.switching",
}
_MODULES = ("cache", "errors", "measure", "parts", "plan", "report")


class _Callable(ModuleType):
    """A part of the house whose name is that of a command too: `rg.measure(…)` beside `regauge.measure.cost`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        command = getattr(importlib.import_module("regauge.api"), self.__name__.rpartition(".")[2])
        return command(*args, **options)


class _Package(ModuleType):
    """This package: the two parts that share a name with a command can be called."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _BOTH and type(value) is ModuleType:
            value.__class__ = _Callable
        super().__setattr__(name, value)


_BOTH = ("measure", "report")
sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f"regauge.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"regauge.{name}")
    raise AttributeError(f"module 'regauge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
