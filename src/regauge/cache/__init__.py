"""What a cache keeps: which tokens matter, how many each head keeps, what becomes of the others, what layers share.

One part an axis; see `base.py` for the contracts. All are pure functions of tensors; stores and models are elsewhere.
What a user calls by this name, `rg.cache.edit` and the like, is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Edit": "cache.edits",
    "Edited": "hosts.transformers.editing",
    "changes": "cache.edits",
    "edit": "hosts.transformers.editing",
    "load": "hosts.transformers.saved",
    "save": "hosts.transformers.saved",
    "share": "hosts.transformers.branching",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"regauge.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'regauge.cache' has no attribute {name!r}")
