"""Which member of a family answers which prompt, in a file beside the tensors: `regauge/router.safetensors`.

A prompt is told by the mean of its embeddings. Each member has a number for each of their channels and one more; the
prompt goes to the member whose sum is the largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from regauge.anatomy.model import Anatomy
from regauge.artifact import files
from regauge.elastic.family import Family
from regauge.elastic.legal import settled
from regauge.elastic.subnet import Subnet
from regauge.errors import ArtifactError, SettingError

FILE = "regauge/router.safetensors"
MOST = 64
"""Members that a router knows."""


@dataclass(frozen=True, eq=False)
class Router:
    """What sends a prompt to a member.

    Attributes:
        subnets: K members.
        weight_KD, bias_K: of their scores.
    """

    subnets: tuple[Subnet, ...]
    weight_KD: Tensor
    bias_K: Tensor

    def __call__(self, embedded_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Scores of members (B, K) for prompts as the model embeds them."""
        return told_by(embedded_BTD, mask_BT) @ self.weight_KD.T + self.bias_K


def told_by(embedded_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """(B, D): what a router knows of prompts, the means of their embeddings."""
    found = embedded_BTD.float()
    if mask_BT is None:
        return found.mean(1).cpu()
    kept_BT1 = mask_BT[..., None].to(found)
    return ((found * kept_BT1).sum(1) / kept_BT1.sum(1).clamp_min(1)).cpu()


def router_bytes(rows: Mapping[str, Tensor]) -> bytes:
    """Subnet → weights and bias (D + 1), as their file has them."""
    found: bytes = save({name: row.float().contiguous() for name, row in rows.items()})
    return found


def read_router(folder: Path, family: Family, anatomy: Anatomy) -> Router | None:
    """The router of a family; None where it has none.

    Raises:
        ArtifactError: the file is damaged or of another family.
    """
    path, rows = folder / FILE, files.beside(folder, FILE)
    if rows is None:
        return None
    if not 2 <= len(rows) <= MOST:
        raise ArtifactError(f"{path} chooses between {len(rows)} members, and 2 to {MOST} are some; build it again.")
    found: dict[Subnet, Tensor] = {}
    for name, row in rows.items():
        fits = row.dtype is torch.float32 and row.shape == (anatomy.site("embed").shape[1] + 1,)
        try:
            subnet = settled(Subnet.parse(name), family, anatomy)
        except SettingError as error:
            raise ArtifactError(f"{path} is the router of another family: {error}; build it again.") from error
        if not fits or not bool(row.isfinite().all()):
            raise ArtifactError(f"{path} is the router of another model: {name[:60]!r} does not fit; build it again.")
        found[subnet] = row
    stacked = torch.stack(list(found.values()))
    return Router(tuple(found), stacked[:, :-1].contiguous(), stacked[:, -1].contiguous())
