"""What outputs of a member are multiplied by, in a file beside its tensors: `regauge/gains.safetensors`.

A member that lost neurons or blocks adds less, or otherwise, to the residual than the whole does. A number for each
output channel of its matrices, fitted by least squares to the whole's states, makes up for a part of it: kilobytes a
member, the matrices stay shared. Beside a member that was taken out stand its own, under the name `full`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from regauge.anatomy.members import Member
from regauge.anatomy.model import Anatomy
from regauge.artifact import files
from regauge.elastic.subnet import FULL
from regauge.errors import ArtifactError

FILE = "regauge/gains.safetensors"
BETWEEN = "|"
Gains = Mapping[str, Tensor]
"""Site → a number for each of its outputs, float32."""


def gains_bytes(gains: Mapping[str, Gains]) -> bytes:
    """Subnet → its gains, as their file has them."""
    found: bytes = save({f"{subnet}{BETWEEN}{site}": g for subnet, some in gains.items() for site, g in some.items()})
    return found


def read_gains(folder: Path, anatomy: Anatomy) -> dict[str, dict[str, Tensor]]:
    """Subnet → its gains; empty where there are none.

    Raises:
        ArtifactError: the file is damaged or does not fit the model.
    """
    path, kept = folder / FILE, files.beside(folder, FILE) or {}
    sites = {site.name: site.shape[0] for site in anatomy.sites}
    found: dict[str, dict[str, Tensor]] = {}
    for key, gain_O in kept.items():
        subnet, _, name = key.rpartition(BETWEEN)
        fits = subnet and gain_O.dtype is torch.float32 and gain_O.ndim == 1 and len(gain_O) <= sites.get(name, 0)
        if not fits or not len(gain_O) or not bool(gain_O.isfinite().all()):
            raise ArtifactError(f"{path} does not fit the model: {key[:80]!r}; fetch or build the artifact again.")
        found.setdefault(subnet, {})[name] = gain_O
    return found


def of_member(gains: Gains, member: Member) -> dict[str, Tensor]:
    """Gains by the member's own names of its sites."""
    return {new: gain_O for name, gain_O in gains.items() if (new := member.name(name)) is not None}


def taken_out(folder: Path, subnet: str, member: Member) -> bytes | None:
    """The file of a member by itself; None where it has no gains."""
    gains = read_gains(folder, member.whole).get(subnet)
    return None if gains is None else gains_bytes({FULL: of_member(gains, member)})
