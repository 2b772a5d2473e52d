"""A loaded family while it is trained: its numbers in float32, and every member over them.

A member's parameters are views of the family's, and so are their gradients: a backward pass through a member adds to
the family's gradient in place, and nothing is copied between members.

Legend: B windows, T tokens.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regauge.anatomy.members import first
from regauge.anatomy.model import Anatomy, Weights
from regauge.artifact.statistics import batch_normed
from regauge.elastic.family import Family
from regauge.elastic.subnet import TOKEN, Subnet
from regauge.errors import ModelError
from regauge.hosts.regauge.lessons import Lessons, ids_of_images
from regauge.hosts.teaching import Numbers
from regauge.hosts.transformers.gated import counted, layers_of, missed
from regauge.hosts.transformers.load import load
from regauge.hosts.transformers.norming import by_batch
from regauge.hosts.transformers.switching import Members, members_of
from regauge.learn.distillers import Read

LAYOUT = "grad and param do not obey the gradient layout contract"
"""What torch says of a gradient that is a view; it adds to it all the same."""


class Original:
    """A model that teaches and is not trained, a family or none.

    Args:
        blocks: its own, where what lies before each is looked at.
    """

    def __init__(self, model: Any, parameters: Mapping[str, Tensor], blocks: Sequence[int] = ()) -> None:
        self._model = model
        self._parameters = {key: value.clone() for key, value in parameters.items()}
        self._blocks = blocks

    def read(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Read:
        with torch.no_grad():
            given = said(self._model, ids_BT, mask_BT)
            out = torch.func.functional_call(self._model, self._parameters, (), given, tie_weights=True)
        return read_of(out, mask_BT, self._blocks)


class Raised(Numbers, ABC):
    """A loaded family while something of it is trained, and every member over it.

    Attributes:
        parameters: key → the numbers that are trained; what a member computes with.
        gradients: key → what backward passes have added up.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._members: Members = members_of(model)
        self.parameters: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    @property
    def family(self) -> Family:
        return self._members.family

    @property
    def anatomy(self) -> Anatomy:
        return self._members.anatomy

    def read(self, subnet: Subnet, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Read:
        """What a member makes of some text; its backward pass adds to the gradients of what is trained."""
        tree = self._model if subnet.full else self._tree(subnet)
        blocks = self._members.cut(self._members.settled(subnet)).blocks
        return read_of(tree(**said(tree, ids_BT, mask_BT)), mask_BT, blocks)

    def embedded(self, ids_BT: Tensor) -> Tensor:
        """The whole's embeddings of a text."""
        with torch.no_grad():
            found: Tensor = self._model.get_input_embeddings()(ids_BT)
        return found

    @abstractmethod
    def _tree(self, subnet: Subnet) -> Any:
        """A member whose backward passes add to `gradients`."""


class Trainee(Raised):
    """A family whose weights are trained, as `hosts.teaching.Trainee`.

    Args:
        held: kinds of sites that stay as they are.
    """

    def __init__(self, model: Any, held: Sequence[str] = ()) -> None:
        super().__init__(model)
        stays = {site.weight.key for site in self.anatomy.sites if site.kind in held}
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(key not in stays)
            if key in stays:
                continue
            parameter.grad = torch.zeros_like(parameter)
            self.parameters[key], self.gradients[key] = parameter.detach(), parameter.grad
        self._of = {id(one): key for key, one in model.named_parameters(remove_duplicate=False)}

    @property
    def bits(self) -> tuple[int, ...]:
        """Nothing of it is in codes."""
        return ()

    def narrowed(self, ids_BT: Tensor, shares: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        """What each share of each feed-forward layer misses, a token."""
        members = self._members
        trees = [members.tree(members.settled(Subnet(ffn=share)), self._model) for share in shares]
        with torch.no_grad():
            paths = layers_of(self.anatomy, members.cut(Subnet()).paths)
            return missed(self._model, [self._model if one is None else one for one in trees], paths, ids_BT)

    def gated(self, gates: Mapping[int, Tensor], ids_BT: Tensor) -> tuple[Read, Tensor]:
        """What the family makes of a text through gates, and what tokens ran through."""
        members = self._members
        if members.learnt.gates is not gates:
            members.learnt = replace(members.learnt, gates=gates)
            members.forget()
        with torch.no_grad():
            tree = members.tree(members.settled(Subnet(ffn=TOKEN)), self._model)
            with counted(tree) as ran:
                read = read_of(tree(**said(tree, ids_BT, None)), None)
        return read, torch.stack(ran)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """While it lasts, torch does not remark on gradients that are views."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=LAYOUT)
            yield

    def statistics(
        self, subnets: Sequence[Subnet], batches: Sequence[Tensor]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Weights]]:
        """Statistics of batch norms taken anew on some images: of the whole by the module's key, and of each member by
        canonical tensor. Nothing where there are no batch norms."""
        members = self._members
        if not batch_normed(self.anatomy):
            return {}, {}
        found = {str(one): members.recalibrate(one, self._model, batches) for one in subnets}
        slots = {f"{norm.name}.{word}": slot for norm in self.anatomy.norms for word, slot in norm.slots.items()}
        whole = members.recalibrate(Subnet(), self._model, batches)
        return {slots[name].key: tensor for name, tensor in whole.items()}, found

    def stored(self, learnt: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Nothing lies beside the tensors."""
        return {}

    def original(self) -> Original:
        """The whole as it is now, apart: a teacher that stays."""
        return Original(self._model, self.parameters, range(self.anatomy.blocks))

    def _tree(self, subnet: Subnet) -> Any:
        tree = self._members.tree(self._members.settled(subnet), self._model)
        if getattr(tree, "regauge_trained", None) is not self:
            keys = self._members.cut(self._members.settled(subnet)).key
            for key, parameter in tree.named_parameters(remove_duplicate=False):
                if id(parameter) not in self._of and (whole := self._gradient(keys(key))) is not None:
                    parameter.requires_grad_(True)
                    parameter.grad = first(whole, parameter.shape)
            tree.regauge_trained = self
        return tree

    def _gradient(self, key: str) -> Tensor | None:
        """The gradient of a parameter by any of its names; None where it stays."""
        found: Tensor | None = self._model.get_parameter(key).grad
        return found


def trainee(path: str | Path, device: str = "cpu", held: Sequence[str] = ()) -> Trainee | Lessons:
    """A family of an artifact's directory, to be trained where `device` says; `held` are kinds of sites that stay.

    Raises:
        ModelError: matrices of it are in codes, which stay.
        SettingError: it is no family, or there is no such device.
    """
    model = opened(path, device)
    members = members_of(model)
    return Lessons(model, members.family, members.anatomy) if members.anatomy.plumbing.scales else Trainee(model, held)


def opened(path: str | Path, device: str) -> Any:
    """A model of an artifact's directory in float32.

    Raises:
        ModelError: matrices of it are in codes.
        SettingError: there is no such device.
    """
    model: Any = load(path, device, torch.float32)
    if any(name.endswith("matrix") or "packed" in name for name, _ in model.named_modules()):
        raise ModelError("a family is trained in full precision, and matrices of this one are in codes")
    model.eval()
    by_batch(model)
    return model


def coded(folder: str | Path, x_NChw: Tensor, y_N: Tensor, seed: int | None) -> Tensor:
    """(N, T): class and tokens of images, as a model that draws by scales reads them."""
    return ids_of_images(load(folder, dtype=torch.float32), x_NChw, y_N, seed)


def said(tree: Any, ids_BT: Tensor, mask_BT: Tensor | None) -> dict[str, Any]:
    """What a model is called with on some text while it is trained."""
    found: dict[str, Any] = {tree.main_input_name: ids_BT, "output_hidden_states": True}
    if mask_BT is not None:
        found["attention_mask"] = mask_BT
    if tree.can_generate():
        found["use_cache"] = False
    return found


def read_of(out: Any, mask_BT: Tensor | None, blocks: Sequence[int] = ()) -> Read:
    """What a model made of it.

    Args:
        blocks: of the whole, that ran.
    """
    states = out.hidden_states
    fronts = dict(zip(blocks, states, strict=False)) if len(states) == len(blocks) + 1 else {}
    return Read(states[-1], getattr(out, "logits", None), mask_BT, fronts)
