"""The wires of an artifact. They know transformers' keys, so they live with the host; engines find them here."""

from __future__ import annotations

from regauge.hosts.transformers.wire.base import COMPRESSED_TENSORS, REGAUGE, WIRES, Layout, Wire
from regauge.hosts.transformers.wire.choose import Chosen, choose

__all__ = ["COMPRESSED_TENSORS", "REGAUGE", "WIRES", "Chosen", "Layout", "Wire", "choose"]
