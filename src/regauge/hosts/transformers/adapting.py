"""A family of several precisions whose codes stay: at each of its bits low-rank terms are trained (arXiv 2405.20202).

Members are what they will be, trees over the same packed weights, with factors beside each matrix that are the trained
ones themselves: a backward pass adds to their gradients in place. The whole has no adapter, so it stays as it is.

Legend: B windows, T tokens, O output channels, I input channels, R rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from regauge.artifact.adapters import key_of
from regauge.elastic.legal import member_in
from regauge.elastic.subnet import Subnet
from regauge.errors import ModelError
from regauge.formats.terms import LowRank
from regauge.hosts.teaching import Beside, Ungated
from regauge.hosts.transformers.levels import held
from regauge.hosts.transformers.load import load
from regauge.hosts.transformers.trainee import Original, Raised
from regauge.runtime.matrices.held import PackedMatrix
from regauge.runtime.matrices.terms import HeldTerm

ALL = 0
"""Where bits stand in a parameter's name: those of adapters that every precision shares."""


class Adapting(Ungated, Raised):
    """A family whose adapters are trained, as `hosts.teaching.Trainee`.

    Attributes:
        parameters: name of a factor → its numbers, float32.
        gradients: name → what backward passes have added up.
        bits: the precisions that have adapters, the most first.
    """

    why: ClassVar[str] = "gates are trained where weights are, and not beside adapters: leave rank or gates out"

    def __init__(self, model: Any, teacher: Original, how: Beside) -> None:
        super().__init__(model)
        self._teacher, self._how = teacher, how
        member = member_in(Subnet(), self.family, self.anatomy)
        matrices = {site.name: owner._modules[name] for site, owner, name in held(model, member)}
        levelled = {name: one for name, one in matrices.items() if one.format.grid.coarsest is not None}
        if taken := [name for name, one in levelled.items() if any(len(term.right) for term in one.added)]:
            raise ModelError(f"{taken[0]} has a low-rank term of its own, beside which adapters have no place")
        most = max((one.format.grid.bits for one in levelled.values()), default=0)
        self.bits = tuple(sorted((bits for bits in self.family.bits if bits < most), reverse=True))
        if not self.bits:
            raise ModelError(
                "adapters are trained for weights that hold several precisions, at fewer bits than the whole: say "
                "grid: nested:8 and family: {bits: [4, 3, 2]}"
            )
        self._held: dict[str, Tensor] = {}
        for bits in (ALL,) if how.shared else self.bits:
            for name, matrix in levelled.items():
                for factor, value in _begun(matrix, name, bits, how).items():
                    self._held[key_of(bits, name, factor)] = value.requires_grad_(True)
        for value in self._held.values():
            value.grad = torch.zeros_like(value)
        self.parameters |= {key: value.detach() for key, value in self._held.items()}
        self.gradients |= {key: _gradient(value) for key, value in self._held.items()}

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Nothing needs to be said here."""
        yield

    def original(self) -> Original:
        """The uncompressed model."""
        return self._teacher

    def stored(self, learnt: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Factors by their names in an artifact, each precision's own."""
        if not self._how.shared:
            return dict(learnt)
        found = dict[str, Tensor]()
        for key, value in learnt.items():
            rest = key.partition("|")[2]
            found |= {f"{bits}|{rest}": value.clone() for bits in self.bits}
        return found

    def _tree(self, subnet: Subnet) -> Any:
        legal = self._members.settled(subnet)
        tree, member = self._members.tree(legal, self._model), self._members.cut(legal)
        if getattr(tree, "regauge_adapted", None) is not self:
            for site, owner, name in held(tree, member):
                bits = ALL if self._how.shared else member.bits_of(site)
                keys = [key_of(bits or ALL, member.origin(site.name), factor) for factor in ("left", "right")]
                if keys[0] in self._held and member.bits_of(site) in self.bits:
                    left_OR, right_RI = (self._held[key] for key in keys)
                    owner._modules[name].terms.append(HeldTerm(LowRank(left_OR, right_RI), torch.float32))
            tree.regauge_adapted = self
        return tree


def adapting(path: str | Path, original: str | Path, how: Beside) -> Adapting:
    """A family of an artifact's directory, whose adapters are trained towards the model that it was made of.

    Raises:
        ModelError: no weights of it hold several precisions, or something lies beside them.
        SettingError: it is no family.
    """
    model: Any = load(path, dtype=torch.float32)
    taught: Any = load(original, dtype=torch.float32)
    for one in (model, taught):
        one.eval().requires_grad_(False)
    return Adapting(model, Original(taught, dict(taught.named_parameters())), how)


def _begun(matrix: PackedMatrix, name: str, bits: int, how: Beside) -> dict[str, Tensor]:
    """Where the factors of one matrix begin: their product is 0."""
    rows, columns = matrix.shape
    rank = min(how.rank, rows, columns)
    seed = int.from_bytes(hashlib.sha256(f"{how.seed} {bits} {name}".encode()).digest()[:6], "big")
    noise = torch.randn(
        (rank, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu"
    )
    return {"left": torch.zeros(rows, rank, dtype=torch.float32, device="cpu"), "right": noise / columns**0.5}


def _gradient(value: Tensor) -> Tensor:
    assert value.grad is not None, "it has just been made"
    return value.grad
