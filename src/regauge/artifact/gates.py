"""How much of each feed-forward layer a token needs, in a file beside the tensors: `regauge/gates.safetensors`.

Each block has a number for each channel of what its feed-forward layer reads, and one more, for each share of neurons
that the family offers, the whole first: a token runs through the share whose sum is the largest (arXiv 2312.10193).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from regauge.anatomy.model import Anatomy
from regauge.artifact import files
from regauge.elastic.family import Family
from regauge.errors import ArtifactError

FILE = "regauge/gates.safetensors"
Gates = Mapping[int, Tensor]
"""Block → (K, D + 1), float32: weights and bias of each share's score."""


def widths(family: Family) -> tuple[float, ...]:
    """The shares that a token may run through, the whole first."""
    return (1.0, *sorted({one for one in family.ffn if one < 1}, reverse=True))


def gates_bytes(gates: Gates) -> bytes:
    """Gates as their file has them."""
    found: bytes = save({str(block): gate.float().contiguous() for block, gate in gates.items()})
    return found


def read_gates(folder: Path, family: Family, anatomy: Anatomy) -> dict[int, Tensor]:
    """Block → its gate; empty where there are none.

    Raises:
        ArtifactError: the file is damaged or of another family.
    """
    path, found = folder / FILE, files.beside(folder, FILE)
    if found is None:
        return {}
    shape = (len(widths(family)), anatomy.hidden + 1)
    if found.keys() != set(map(str, range(anatomy.blocks))):
        raise ArtifactError(f"{path} has no gate for each of the {anatomy.blocks} blocks; fetch or build it again.")
    for block, gate in found.items():
        if gate.dtype is not torch.float32 or gate.shape != shape or not bool(gate.isfinite().all()):
            raise ArtifactError(
                f"{path} is of another family: the gate of block {block} is none of {shape[0]} shares of a layer that "
                f"reads {anatomy.hidden} channels; fetch or build it again."
            )
    return {int(block): gate for block, gate in found.items()}
