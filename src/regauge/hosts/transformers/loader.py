"""The name under which the loaders inside artifacts of format 1 import `load`. Newer ones import it from `regauge`."""

from regauge.hosts.transformers.load import load

__all__ = ["load"]
