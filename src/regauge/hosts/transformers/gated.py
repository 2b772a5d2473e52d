"""Feed-forward layers of which each token runs through as many neurons as its gate says: `rg.use(model, "ffn=token")`.

What a token runs through is the layer of the member of that share, over the same memory. Cost: the layers of the shares
that tokens chose, each on its tokens alone, and a product of the layer's input by a handful of rows.

Legend: T tokens, D channels, K shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regauge.anatomy.members import Member
from regauge.anatomy.model import Anatomy
from regauge.errors import SettingError
from regauge.runtime.modules import put


class TokenLayer(nn.Module):
    """One feed-forward layer.

    Attributes:
        layers: those of the shares, the whole first.
        gate_KD: weights and bias (K, D + 1) of the shares' scores.
    """

    gate_KD: Tensor

    def __init__(self, layers: Sequence[nn.Module], gate_KD: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.register_buffer("gate_KD", gate_KD)

    def forward(self, hidden: Tensor) -> Tensor:
        x_TD = hidden.reshape(-1, hidden.shape[-1])
        chosen_T = chosen(self.gate_KD, x_TD)
        y_TD = torch.empty_like(x_TD)
        for number, layer in enumerate(self.layers):
            tokens = torch.nonzero(chosen_T == number)[:, 0]
            if len(tokens):
                y_TD[tokens] = layer(x_TD[tokens][None])[0]
        return y_TD.view(hidden.shape)


def chosen(gate_KD: Tensor, x_TD: Tensor) -> Tensor:
    """(T,): which share each token runs through."""
    return (x_TD.to(gate_KD) @ gate_KD[:, :-1].T + gate_KD[:, -1]).argmax(1)


def gate(tree: Any, member: Member, narrower: Sequence[Any], gates: Mapping[int, Tensor]) -> None:
    """Gives the tree of a member, in place, layers that each token chooses from.

    Args:
        narrower: trees of the same member with fewer neurons, the shares behind the whole.

    Raises:
        SettingError: the family has no gates, or something in the model does not come apart.
    """
    if not gates:
        raise SettingError(
            "this family has no gates that could choose neurons for a token: train them with "
            "'regauge learn adaptive-computation MODEL -o OUT', or give ffn a share"
        )
    if member.anatomy.hidden != member.whole.hidden:
        raise SettingError("gates read every channel of the residual, so ffn=token goes with no width")
    for number, path in enumerate(layers_of(member.anatomy, member.paths)):
        layers = [one.get_submodule(path) for one in (tree, *narrower)]
        put(tree, path, TokenLayer(layers, gates[member.blocks[number]].to(next(_tensors(tree)).device)))


def layers_of(anatomy: Anatomy, paths: Sequence[str]) -> list[str]:
    """Path of the feed-forward layer of each block.

    Raises:
        SettingError: it is no module by itself.
    """
    found = []
    for block in range(anatomy.blocks):
        modules = {site.module for site in anatomy.sites if site.block == block and site.kind in ("up", "down")}
        parents = {path.rpartition(".")[0] for path in modules}
        path = next(iter(parents), "")
        if len(parents) != 1 or not path.startswith(f"{paths[block]}."):
            raise SettingError(
                "a feed-forward layer of this model is no module by itself, so tokens cannot choose in it"
            )
        found.append(path)
    return found


@contextmanager
def counted(tree: Any) -> Iterator[list[Tensor]]:
    """While it lasts, how many tokens run through each share, a tensor for each layer as it runs."""
    found: list[Tensor] = []

    def see(layer: Any, inputs: tuple[Any, ...]) -> None:
        x_TD = inputs[0].reshape(-1, inputs[0].shape[-1])
        found.append(torch.bincount(chosen(layer.gate_KD, x_TD), minlength=len(layer.layers)))

    handles = [one.register_forward_pre_hook(see) for one in tree.modules() if isinstance(one, TokenLayer)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def missed(model: Any, trees: Sequence[Any], paths: Sequence[str], ids_BT: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each block what its layer reads (T, D), and what the layers of other trees miss of what it gives (T, K), in
    units of the mean square of that."""
    found: list[tuple[Tensor, Tensor]] = []

    def see(path: str, _module: Any, inputs: tuple[Any, ...], y_BTD: Tensor) -> None:
        x_BTD: Tensor = inputs[0]
        unit = y_BTD.square().sum(-1).mean().clamp_min(1e-12)
        each = [(one.get_submodule(path).forward(x_BTD) - y_BTD).square().sum(-1) / unit for one in trees]
        found.append((x_BTD.flatten(0, 1), torch.stack(each, -1).flatten(0, 1)))

    handles = [model.get_submodule(path).register_forward_hook(partial(see, path)) for path in paths]
    try:
        model.forward(input_ids=ids_BT)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _tensors(tree: Any) -> Any:
    yield from tree.parameters()
    yield from tree.buffers()
