"""The native decode step under a transformers model: `plug` puts it in, `stream` is the thin loop over it."""

from regauge.hosts.transformers.step.plug import plug
from regauge.hosts.transformers.step.stream import stream

__all__ = ["plug", "stream"]
