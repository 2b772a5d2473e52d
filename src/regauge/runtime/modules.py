"""Replacing modules in a tree of torch modules."""

from __future__ import annotations

from typing import Any

from torch import nn


def put(model: Any, path: str, new: nn.Module) -> None:
    """Puts a module in the place of another, in place."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
