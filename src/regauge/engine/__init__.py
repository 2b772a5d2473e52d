"""The engine: carries a plan out on a model, or says what it would do; opens models and has them measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regauge.engine.api import apply, dry_run
    from regauge.engine.estimate import DryRun
    from regauge.engine.measuring import measure

__all__ = ["DryRun", "apply", "dry_run", "measure"]

_WHERE = {
    "apply": "regauge.engine.api",
    "dry_run": "regauge.engine.api",
    "DryRun": "regauge.engine.estimate",
    "measure": "regauge.engine.measuring",
}


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'regauge.engine' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
