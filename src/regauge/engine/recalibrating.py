"""Statistics of a member's batch norms on a user's images, before it is written: `regauge extract --calibration`."""

from __future__ import annotations

from pathlib import Path

import torch

from regauge.anatomy.members import Member
from regauge.anatomy.model import Weights
from regauge.artifact.statistics import batch_normed
from regauge.elastic.subnet import Subnet
from regauge.errors import SettingError, TextError
from regauge.hosts import host_of
from regauge.learn.loop import order
from regauge.text.arrays import named
from regauge.text.calibration import Calibration, images

MOST, TOGETHER = 4000, 250
"""Images that statistics are taken on at most, in an order by lot, and of them at once."""


def opened(folder: Path, member: Member, given: str | Path) -> Calibration:
    """The images that statistics of a member are taken on.

    Raises:
        SettingError: it has no batch norms.
        TextError: there are no images in the file.
    """
    if not batch_normed(member.anatomy):
        raise SettingError(
            f"calibration takes statistics of batch norms anew, and this {member.anatomy.family} has none: leave it out"
        )
    path, image = Path(given).expanduser(), host_of(folder).facts(folder).image
    if image is None or not named(path):
        raise TextError(f"{given} holds no images: give --calibration an .npz with 'x' (N, H, W, C) of uint8.")
    return images(path, MOST, (image.channels, image.side), (image.mean, image.spread))


def taken(folder: Path, subnet: Subnet, found: Calibration) -> Weights:
    """What a member's norms see of them, by the names of the whole."""
    model = host_of(folder).load(folder, dtype=torch.float32)
    rows = order(0, 0, len(found.inputs))
    made: Weights = model.regauge.recalibrate(subnet, model, torch.split(found.inputs[rows], TOGETHER))
    return made
