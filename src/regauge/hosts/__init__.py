"""Model libraries. The engine asks `host_of(model)` and speaks to it as `base.Host`; it knows none of them by name."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regauge.hosts.base import Host

HOSTS = ("regauge.hosts.transformers.host",)
"""Modules with a `HOST` each, in the order in which they are asked."""


@cache
def _host(module: str) -> Host:
    found: Host = importlib.import_module(module).HOST
    return found


def host_of(model: str | Path) -> Host:
    """The host of a model's directory or hub id: the one library there is today reads them all."""
    return _host(HOSTS[0])


def from_pretrained(auto: str, path: str | Path, **options: Any) -> Any:
    """What the loader inside an artifact calls for `AutoModel….from_pretrained`; the name is part of artifacts.

    Args:
        auto: name of the Auto class.
        options: of `from_pretrained`; what cannot be honoured is refused by name.
    """
    return host_of(path).from_pretrained(auto, path, **options)
