"""The engine: carries a plan out on a model, or says what it would do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regauge.engine.api import apply, dry_run
    from regauge.engine.estimate import DryRun

__all__ = ["DryRun", "apply", "dry_run"]

_WHERE = {"apply": "regauge.engine.api", "dry_run": "regauge.engine.api", "DryRun": "regauge.engine.estimate"}


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'regauge.engine' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
