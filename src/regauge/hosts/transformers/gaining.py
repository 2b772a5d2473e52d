"""Gains of a member: fitted to the states of the whole, and given to its modules.

Legend: B sequences, T tokens, H channels of the residual, O output channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from regauge.anatomy.members import Member
from regauge.anatomy.model import Anatomy
from regauge.errors import SettingError
from regauge.runtime.matrices.held import PackedMatrix
from regauge.runtime.matrices.modules import PackedLinear
from regauge.runtime.modules import put

SCALED = "down"
"""The kind of site whose outputs have gains: what a block adds last."""
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
    """Site of the whole → its gains in a member: for each channel the number by which what the block's last matrix adds
    comes nearest, in the mean square over a text, to the state that the whole hands to the next block which stays.

    Block after block, each on what those before it have made of the text with their gains; one pass over the text.
    """
    before: dict[int, Tensor] = {}
    with _watched(model, member.paths, lambda block, out: before.__setitem__(block, out)):
        model(input_ids=ids_BT, use_cache=False)
    wanted = [*(block - 1 for block in member.blocks[1:]), member.whole.blocks - 1]
    sites = {site.block: site for site in member.anatomy.sites if site.kind == SCALED and site.expert is None}
    added, found = dict[int, Tensor](), dict[str, Tensor]()
    handles = [
        tree.get_submodule(site.module).register_forward_hook(
            lambda _module, _inputs, out, block=block: added.__setitem__(block, out)
        )
        for block, site in sites.items()
    ]

    def fit(block: int, out_BTH: Tensor) -> Tensor | None:
        y_BTO = added.pop(block, None)
        if y_BTO is None:
            return None
        target_BTH = before[wanted[block]][..., : out_BTH.shape[-1]]
        y_NO, rest_NO = y_BTO.flatten(0, 1).double(), (target_BTH - out_BTH + y_BTO).flatten(0, 1).double()
        gain_O = ((rest_NO * y_NO).sum(0) / y_NO.pow(2).sum(0).clamp_min(LEAST)).float()
        found[member.origin(sites[block].name)] = gain_O
        return out_BTH + (gain_O - 1) * y_BTO

    try:
        with _watched(tree, member.paths[: len(member.blocks)], fit):
            tree.forward(input_ids=ids_BT, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def _watched(model: Any, paths: tuple[str, ...], see: Any) -> Iterator[None]:
    """Shows what each block gives; what `see` returns is handed on in its place."""

    def hook(block: int) -> Any:
        def shown(_module: Any, _inputs: Any, out: Any) -> Any:
            new = see(block, out[0] if isinstance(out, tuple) else out)
            return None if new is None else (new, *out[1:]) if isinstance(out, tuple) else new

        return shown

    handles = [model.get_submodule(path).register_forward_hook(hook(block)) for block, path in enumerate(paths)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
