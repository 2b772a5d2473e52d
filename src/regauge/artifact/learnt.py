"""What was trained beside the tensors of a family, each in a file of its own: adapters, a router, gates, statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from regauge.anatomy.model import Anatomy, Weights
from regauge.artifact.adapters import Adapters, read_adapters
from regauge.artifact.gates import read_gates
from regauge.artifact.router import Router, read_router
from regauge.artifact.statistics import read_statistics
from regauge.elastic.family import Family


@dataclass(frozen=True, eq=False)
class Learnt:
    """What a family learnt beside its tensors.

    Attributes:
        adapters: bits → site → what is added to weights that are read at those bits.
        router: chooses a member for a prompt.
        gates: block → what chooses neurons for a token.
        statistics: subnet → tensor of the whole → what the member's batch norms have in its place; added to.
    """

    adapters: Adapters = field(default_factory=dict)
    router: Router | None = None
    gates: Mapping[int, Tensor] = field(default_factory=dict)
    statistics: dict[str, Weights] = field(default_factory=dict)


def read_learnt(folder: Path, family: Family, anatomy: Anatomy) -> Learnt:
    """What lies beside the tensors of a family.

    Raises:
        ArtifactError: a file is damaged or of another family.
    """
    router, gates = read_router(folder, family, anatomy), read_gates(folder, family, anatomy)
    return Learnt(read_adapters(folder, anatomy), router, gates, read_statistics(folder, anatomy))
