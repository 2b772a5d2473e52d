"""Statistics of batch norms of members: taken anew on the calibration images before a member is measured, and written
beside the family for those that are chosen. Models without batch norms have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regauge.artifact.disk import put
from regauge.artifact.statistics import FILE, batch_normed, statistics_bytes
from regauge.elastic.subnet import Subnet
from regauge.search.pictures import Material, Pictures

IMAGES, BATCH = 256, 128
"""By which they are taken, and of a batch of them."""


def normed(model: Any, texts: Material) -> bool:
    """Whether members have statistics of their own."""
    return isinstance(texts, Pictures) and batch_normed(model.regauge.anatomy)


def anew(model: Any, subnet: Subnet, texts: Material) -> None:
    """Gives a member of a loaded family its statistics, where it has batch norms."""
    if subnet.full or not normed(model, texts) or not isinstance(texts, Pictures):
        return
    batches = [one["pixel_values"] for one in texts.batches(IMAGES, BATCH)]
    model.regauge.recalibrate(subnet, model, batches)


def kept(folder: Path, model: Any, subnets: Sequence[Subnet], texts: Material) -> None:
    """Writes the statistics of members beside the family that lies by itself."""
    if not normed(model, texts):
        return
    own = model.regauge.learnt.statistics
    found = {str(one): own[str(one)] for one in dict.fromkeys(subnets) if not one.full}
    if found:
        put(folder / FILE, statistics_bytes(found))
