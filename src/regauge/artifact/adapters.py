"""What is added to weights at each precision, in a file beside the tensors: `regauge/adapters.safetensors`.

Weights that hold several precisions share their first bits, and what makes up for the bits that are left out is another
matter at each: a low-rank term a matrix and precision, trained towards the uncompressed model (arXiv 2405.20202). The
whole has none. A member that is loaded alone or taken out has those of its own bits as ordinary low-rank terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from regauge.anatomy.members import Member
from regauge.anatomy.model import Anatomy, Site
from regauge.artifact import files
from regauge.errors import ArtifactError
from regauge.formats.terms import LOW_RANK, NAMES, LowRank

FILE = "regauge/adapters.safetensors"
BETWEEN = "|"
Adapters = Mapping[int, Mapping[str, LowRank]]
"""Bits → site of the whole → the term."""


def key_of(bits: int, site: str, factor: str) -> str:
    """The name of a factor in the file, and of the parameter while it is trained."""
    return BETWEEN.join((str(bits), site, factor))


def adapters_bytes(factors: Mapping[str, Tensor]) -> bytes:
    """Factors by `key_of`, as their file has them."""
    found: bytes = save({key: one.contiguous() for key, one in factors.items()})
    return found


def read_adapters(folder: Path, anatomy: Anatomy) -> dict[int, dict[str, LowRank]]:
    """Bits → site → the term; empty where there are none.

    Raises:
        ArtifactError: the file is damaged or does not fit the model.
    """
    path, kept = folder / FILE, files.beside(folder, FILE) or {}
    shapes = {site.name: site.shape for site in anatomy.sites if site.block is not None}
    factors: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, one in kept.items():
        bits, _, rest = key.partition(BETWEEN)
        site, _, factor = rest.partition(BETWEEN)
        fits = bits in map(str, range(1, 9)) and site in shapes and factor in NAMES[LOW_RANK] and one.ndim == 2
        if not fits or not one.is_floating_point() or not bool(one.isfinite().all()):
            raise _misfit(path, key)
        factors.setdefault((bits, site), {})[factor] = one
    found: dict[int, dict[str, LowRank]] = {}
    for (bits, site), both in factors.items():
        rows, columns = shapes[site]
        left, right = both.get("left"), both.get("right")
        if left is None or right is None or not left.shape[1] <= min(rows, columns):
            raise _misfit(path, f"{bits} bits of {site}")
        if (left.shape[0], right.shape[1]) != (rows, columns) or left.shape[1] != right.shape[0]:
            raise _misfit(path, f"{bits} bits of {site}")
        found.setdefault(int(bits), {})[site] = LowRank(left, right)
    return found


def adapter_of(adapters: Adapters, member: Member, site: Site) -> LowRank | None:
    """What is added to a matrix of a member: the first rows and inputs of the whole's; None for nothing."""
    bits = member.bits_of(site)
    found = None if bits is None else adapters.get(bits, {}).get(member.origin(site.name))
    if found is None:
        return None
    rows, columns = site.shape
    return LowRank(found.left_OR[:rows].contiguous(), found.right_RI[:, :columns].contiguous())


def _misfit(path: Path, what: str) -> ArtifactError:
    return ArtifactError(f"{path} does not fit the model: {what[:80]!r}; fetch or build the artifact again.")
