"""Statistics of batch norms that members of a family have for themselves, in a file beside its tensors:
`regauge/statistics.safetensors`.

A member with fewer channels or blocks gives its norms other numbers than the whole does, so means and variances are
taken anew on it (arXiv 1908.09791, section 4.2): kilobytes a member, everything else stays shared. A member that is
taken out has its own where the whole's stood.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from regauge.anatomy.members import Member
from regauge.anatomy.model import Anatomy, Weights
from regauge.artifact import files
from regauge.errors import ArtifactError

FILE = "regauge/statistics.safetensors"
BETWEEN = "|"
WORDS = ("mean", "var")


def batch_normed(anatomy: Anatomy) -> bool:
    """Whether a model has batch norms, which keep statistics."""
    return any(norm.mean is not None for norm in anatomy.norms)


def statistics_bytes(found: Mapping[str, Weights]) -> bytes:
    """Subnet → canonical tensor of the whole → the member's own, as their file has them."""
    flat = {
        f"{subnet}{BETWEEN}{name}": tensor.float() for subnet, some in found.items() for name, tensor in some.items()
    }
    made: bytes = save(flat)
    return made


def read_statistics(folder: Path, anatomy: Anatomy) -> dict[str, Weights]:
    """Subnet → its statistics; empty where there are none.

    Raises:
        ArtifactError: the file is damaged or does not fit the model.
    """
    path, kept = folder / FILE, files.beside(folder, FILE) or {}
    sizes = {f"{norm.name}.{word}": norm.size for norm in anatomy.norms for word in norm.slots if word in WORDS}
    found: dict[str, Weights] = {}
    for key, tensor in kept.items():
        subnet, _, name = key.rpartition(BETWEEN)
        fits = subnet and tensor.dtype is torch.float32 and tensor.ndim == 1 and 0 < len(tensor) <= sizes.get(name, 0)
        if not fits or not bool(tensor.isfinite().all()) or (name.endswith("var") and bool((tensor < 0).any())):
            raise ArtifactError(f"{path} does not fit the model: {key[:80]!r}; fetch or build the artifact again.")
        found.setdefault(subnet, {})[name] = tensor
    return found


def own(found: Weights, member: Member) -> Weights:
    """Statistics by the member's own names of its tensors.

    Raises:
        ArtifactError: they are of another number of channels than it has.
    """
    made: Weights = {}
    for name, tensor in found.items():
        new = member.name(name)
        if new is None:
            continue
        if len(tensor) != member.anatomy.norm(new.rpartition(".")[0]).size:
            raise ArtifactError(f"statistics of {name} are of {len(tensor)} channels, and the member has others.")
        made[new] = tensor
    return made
