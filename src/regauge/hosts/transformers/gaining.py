"""Gains of a member: fitted to the states of the whole, and given to its modules.

Legend: B sequences, T tokens, H channels of the residual, O output channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from regauge.anatomy.members import Member
from regauge.anatomy.model import Anatomy, Site
from regauge.errors import SettingError
from regauge.runtime.matrices.held import PackedMatrix
from regauge.runtime.matrices.modules import PackedLinear
from regauge.runtime.modules import put

FIRST, LAST = "o", "down"
"""Kinds of sites whose outputs have gains: what attention adds, and what a block adds last."""
LEAST = 1e-12


def give(tree: Any, anatomy: Anatomy, gains: Mapping[str, Tensor]) -> None:
    """Multiplies the outputs of some sites, in place of their modules; what is packed stays shared.

    Raises:
        SettingError: a matrix is held in a way that has no multiplier a row.
    """
    for site in anatomy.sites:
        gain_O = gains.get(site.name)
        if gain_O is None:
            continue
        module = tree.get_submodule(site.module)
        if isinstance(module, PackedLinear) and len(module.parts) == 1:
            part = cast(PackedMatrix, module.parts[0])
            bias = None if module.bias is None else module.bias.detach()
            new = PackedLinear([part.scaled(gain_O)], None, bias, module.dtype)
            new.training = module.training
            put(tree, site.module, new)
        elif type(module) is nn.Linear and module.weight.shape == site.shape:
            scaled_OI = (module.weight.detach().float() * gain_O.to(module.weight.device)[:, None]).to(
                module.weight.dtype
            )
            module._parameters["weight"] = nn.Parameter(scaled_OI, requires_grad=False)
        else:
            raise SettingError(f"outputs of {site.name}, a {type(module).__name__}, cannot be multiplied by gains")


@torch.no_grad()
def fitted(model: Any, tree: Any, member: Member, ids_BT: Tensor) -> dict[str, Tensor]:
    """Site of the whole → its gains in a member: for each channel the number by which what attention adds is nearest,
    in the mean square over a text, to the state that the whole has behind its own; then what the block's last matrix
    adds, to the state that the whole hands to the next block which stays.

    Block after block, each on what those before it have made of the text with their gains; one pass over the text.
    """
    whole = _Seen(model, member.whole, member.paths)
    with whole.watched():
        model(input_ids=ids_BT, use_cache=False)
    wanted = [*(block - 1 for block in member.blocks[1:]), member.whole.blocks - 1]
    found: dict[str, Tensor] = {}

    def gain(name: str, y_BTO: Tensor, rest_BTH: Tensor) -> Tensor:
        y_NO, rest_NO = y_BTO.flatten(0, 1).double(), rest_BTH.flatten(0, 1).double()
        found[member.origin(name)] = ((rest_NO * y_NO).sum(0) / y_NO.pow(2).sum(0).clamp_min(LEAST)).float()
        return found[member.origin(name)]

    class Fitting(_Seen):
        def first(self, block: int, name: str, y_BTO: Tensor) -> Tensor | None:
            old, size = member.blocks[block], y_BTO.shape[-1]
            middle_BTH = (whole.begins[old] + whole.adds[old, FIRST])[..., :size]
            return y_BTO * gain(name, y_BTO, middle_BTH - self.begins[block])

        def ends(self, block: int, out_BTH: Tensor) -> Tensor | None:
            y_BTO, name = self.adds.get((block, LAST)), self.names.get((block, LAST), "")
            if y_BTO is None:
                return None
            target_BTH = whole.given[wanted[block]][..., : out_BTH.shape[-1]]
            return out_BTH + (gain(name, y_BTO, target_BTH - out_BTH + y_BTO) - 1) * y_BTO

    with Fitting(tree, member.anatomy, member.paths[: len(member.blocks)]).watched():
        tree.forward(input_ids=ids_BT, use_cache=False)
    return found


class _Seen:
    """What blocks read, give, and add by two of their matrices, as a text goes through.

    Attributes:
        begins, given: block → its input, its output.
        adds: (block, kind of site) → what the site gives.
    """

    def __init__(self, model: Any, anatomy: Anatomy, paths: tuple[str, ...]) -> None:
        self.model, self.paths = model, paths
        self.sites = [site for site in anatomy.sites if site.kind in (FIRST, LAST) and site.expert is None]
        self.names = {(site.block, site.kind): site.name for site in self.sites}
        self.begins, self.given = dict[int, Tensor](), dict[int, Tensor]()
        self.adds: dict[tuple[int | None, str], Tensor] = {}

    def first(self, block: int, name: str, y_BTO: Tensor) -> Tensor | None:
        """In place of what attention adds."""

    def ends(self, block: int, out_BTH: Tensor) -> Tensor | None:
        """In place of what a block gives."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Sees while it lasts."""
        handles = []
        for block, path in enumerate(self.paths):
            module = self.model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(partial(self._begin, block), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(self._end, block)))
        for site in self.sites:
            module = self.model.get_submodule(site.module)
            handles.append(module.register_forward_hook(partial(self._add, site)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, block: int, _module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.begins[block] = inputs[0] if inputs else named["hidden_states"]

    def _add(self, site: Site, _module: Any, _inputs: Any, out_BTO: Tensor) -> Tensor | None:
        self.adds[site.block, site.kind] = out_BTO
        return self.first(site.block or 0, site.name, out_BTO) if site.kind == FIRST else None

    def _end(self, block: int, _module: Any, _inputs: Any, out: Any) -> Any:
        out_BTH = out[0] if isinstance(out, tuple) else out
        self.given[block] = out_BTH
        new_BTH = self.ends(block, out_BTH)
        return None if new_BTH is None else (new_BTH, *out[1:]) if isinstance(out, tuple) else new_BTH
