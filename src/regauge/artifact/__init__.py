"""Artifacts: what bytes on disk mean. Written atomically (`staging`), read strictly (`files`, `header`, `codec`).

    found = regauge.artifact.open("OUT")      # layout, recipe, receipt
    for block in found.blocks(): ...          # weights and codes, without a module

Importing this loads neither torch nor a model library; `open` is there once it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regauge.artifact.reader import open_artifact as open

__all__ = ["open"]


def __getattr__(name: str) -> object:
    if name == "open":
        from regauge.artifact.reader import open_artifact

        return open_artifact
    raise AttributeError(f"module 'regauge.artifact' has no attribute {name!r}")
