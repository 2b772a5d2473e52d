"""A family that several processes hold together while it is trained: none of them has all of it at any time.

A unit is a block, gathered while it runs forward and again while it runs backward; what lies outside of blocks is a
unit that is whole for a pass. The modules of the family and its members hold shapes alone (tensors without memory), and
are lent views of what is gathered, so a number that nobody gathered is an error and never a wrong result.

Legend: B windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from regauge.anatomy.members import first
from regauge.elastic.subnet import Subnet
from regauge.errors import ModelError
from regauge.hosts.teaching import Ungated
from regauge.hosts.transformers.owned import method, own
from regauge.hosts.transformers.trainee import Raised, opened, read_of, said
from regauge.learn.distillers import Read
from regauge.learn.shards import Unit, divided, gradients, parts, run, whole
from regauge.runtime.device import placed
from regauge.runtime.rows import CPU, CUDA


@dataclass(frozen=True, eq=False)
class Place:
    """A parameter of one module.

    Attributes:
        key: of the family's tensor of which it is the first part.
        empty: its shape, without memory.
    """

    module: nn.Module
    name: str
    key: str
    empty: nn.Parameter


@dataclass(frozen=True, eq=False)
class Lender:
    """Lends modules their parts of whole tensors, for a time."""

    places: Sequence[Place]

    @contextmanager
    def __call__(self, held: Mapping[str, Tensor]) -> Iterator[None]:
        for one in self.places:
            one.module._parameters[one.name] = first(held[one.key], one.empty.shape)  # type: ignore[assignment]
        try:
            yield
        finally:
            for one in self.places:
                one.module._parameters[one.name] = one.empty


@dataclass(eq=False)
class Stage:
    """Whose numbers modules are lent: those that are trained, or the teacher's."""

    root: Unit


@dataclass(frozen=True, eq=False)
class Through:
    """`forward` of one block, inside of its unit."""

    stage: Stage
    block: int
    lender: Lender

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        unit: Any = self.stage.root.inside[self.block]
        return run(unit, method(module, "forward"), self.lender, *args, **kwargs)


@dataclass(frozen=True, eq=False)
class Apart:
    """The whole as it was: a teacher that stays, divided as well."""

    stage: Stage
    root: Unit
    reader: Callable[..., Read]

    def read(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Read:
        trained, self.stage.root = self.stage.root, self.root
        try:
            with torch.no_grad():
                return self.reader(Subnet(), ids_BT, mask_BT)
        finally:
            self.stage.root = trained


class Sharded(Ungated, Raised):
    """A family whose weights are trained by several processes, as `hosts.teaching.Trainee`.

    Attributes:
        parameters, gradients: key → the rows of it that lie here.
    """

    why: ClassVar[str] = "gates are trained by a process that holds the whole: leave --shard or gates out"

    def __init__(self, model: Any, where: torch.device) -> None:
        super().__init__(model)
        self._keys = _canonical(model)
        values = {key: model.get_parameter(key).detach() for key in self._keys.values()}
        paths = self._members.cut(Subnet()).paths
        self._units = [[key for key in values if key.startswith(f"{path}.")] for path in paths]
        inside = {key for keys in self._units for key in keys}
        self._rest = [key for key in values if key not in inside]
        _emptied(model, where)

        def there(keys: Sequence[str]) -> dict[str, Tensor]:
            return {key: values.pop(key).to(where).requires_grad_() for key in keys}

        self._stage = Stage(divided(map(there, self._units), there(self._rest)))
        self.parameters, self.gradients = parts(self._stage.root), gradients(self._stage.root)
        self._whole = self._instrumented(model, Subnet())

    @property
    def bits(self) -> tuple[int, ...]:
        """Nothing of it is in codes."""
        return ()

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Nothing needs to be said here."""
        yield

    def read(self, subnet: Subnet, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Read:
        """What a member makes of some text. All processes read at the same time, each its own text."""
        tree = self._model if subnet.full else self._tree(subnet)

        def answer(**given: Any) -> tuple[Tensor, Tensor | None]:
            found = read_of(tree(**given), mask_BT)
            return found.hidden_BTD, found.logits_BTV

        lender = self._whole if subnet.full else tree.regauge_lender
        hidden_BTD, logits_BTV = run(self._stage.root, answer, lender, **said(tree, ids_BT, mask_BT))
        return Read(hidden_BTD, logits_BTV, mask_BT)

    def embedded(self, ids_BT: Tensor) -> NoReturn:
        """
        Raises:
            ModelError: always.
        """
        raise ModelError("a router is trained by a process that holds the whole: leave --shard or route out")

    def original(self) -> Apart:
        """The whole as it is now, apart: a teacher that stays."""
        root = self._stage.root
        with whole(root) as held:
            rest = {key: one.detach().clone() for key, one in held.items()}
        return Apart(self._stage, divided(map(_copied, root.inside), rest), self.read)

    def stored(self, learnt: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Nothing lies beside the tensors."""
        return {}

    def _tree(self, subnet: Subnet) -> Any:
        legal = self._members.settled(subnet)
        tree = self._members.tree(legal, self._model)
        if getattr(tree, "regauge_trained", None) is not self:
            tree.regauge_lender, tree.regauge_trained = self._instrumented(tree, legal), self
        return tree

    def _instrumented(self, tree: Any, subnet: Subnet) -> Lender:
        """Has every block of a member run inside of its unit; gives what lends the rest."""
        member = self._members.cut(subnet)
        places = [
            Place(module, name, self._keys[member.key(f"{path}.{name}" if path else name)], value)
            for path, module in tree.named_modules()
            for name, value in module._parameters.items()
            if value is not None
        ]
        for number, block in enumerate(member.blocks):
            module, own_keys = tree.get_submodule(member.paths[number]), set(self._units[block])
            inside = {id(one) for one in module.modules()}
            lent = Lender([one for one in places if id(one.module) in inside and one.key in own_keys])
            own(module, "forward", Through(self._stage, block, lent))
        rest = set(self._rest)
        return Lender([one for one in places if one.key in rest])


def sharded(path: str | Path, device: str) -> Sharded:
    """A family of an artifact's directory, divided over all processes. Each reads it whole once, on the CPU.

    Raises:
        ModelError: matrices of it are in codes, which stay.
        SettingError: it is no family, or there is no such device.
    """
    where = placed(device).where
    if where.type == CUDA:
        torch.cuda.set_device(where)
    return Sharded(opened(path, CPU), where)


def _copied(unit: Any) -> dict[str, Tensor]:
    with whole(unit) as held:
        return {key: one.detach().clone() for key, one in held.items()}


def _canonical(model: Any) -> dict[str, str]:
    """Any name of a parameter → the first one, of those that modules share."""
    known: dict[int, str] = {}
    return {name: known.setdefault(id(one), name) for name, one in model.named_parameters(remove_duplicate=False)}


def _emptied(model: Any, where: torch.device) -> None:
    """Leaves modules the shapes of their parameters, without memory; other tensors go where they are computed with."""
    for module in model.modules():
        for name, value in module._buffers.items():
            module._buffers[name] = None if value is None else value.to(where)
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)
