"""Blocks that attend otherwise: by the map of an earlier block, or with heads that see a window only.

`form_modules` gives the attention modules of a skeleton what an artifact says of them: a block that leads a group
attends by `attention`, which computes its probabilities and lays them down for the others of the group; these become
`Echoed`, which have values and an output and nothing else. Importing this registers nothing; the function is registered
when the first such model is made, under a name that looks like none of transformers' own.

Legend: B sequences, H query heads, K KV heads, Q new tokens, T tokens held, E size of a value, D hidden.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from regauge.anatomy.model import Anatomy
from regauge.artifact.codec.base import Layout
from regauge.attention.base import Local
from regauge.attention.maps import causal, probabilities, shown
from regauge.errors import ModelError
from regauge.hosts.base import MAPS
from regauge.hosts.transformers.local import LAYER, LocalLayer, attended, localise, prompted
from regauge.hosts.transformers.values import values_only
from regauge.plan.forms import of_points
from regauge.runtime.modules import put

FORM = "regauge_form"
UNREAD = ("s_aux", "position_bias")
"""What a family hands its attention function beside the mask, and a map is not computed with: sinks that are numbers of
the model, and biases by distance."""
See = Callable[[Tensor, Tensor, Tensor], None]
_seeing: ContextVar[See | None] = ContextVar("regauge_seeing", default=None)


class Maps:
    """Probabilities of leading blocks in the forward that is running, of each thread its own."""

    def __init__(self) -> None:
        self._held = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> Maps:
        return memo.setdefault(id(self), Maps())  # type: ignore[no-any-return]  # one for all modules of the copy

    def __reduce__(self) -> tuple[Any, ...]:
        return Maps, ()

    def lay(self, block: int, p_BHQT: Tensor, readers: int) -> None:
        """Holds a map until so many blocks have taken it."""
        vars(self._held)[str(block)] = [p_BHQT, readers]

    def take(self, block: int) -> Tensor:
        """The map of a block, for one of those that take it.

        Raises:
            ModelError: the block has not run before.
        """
        held = vars(self._held).get(str(block))
        if held is None:
            raise ModelError(
                f"block {block} computes the attention map that this one takes, and it has not run: run the whole model"
            )
        held[1] -= 1
        if not held[1]:
            del vars(self._held)[str(block)]
        found: Tensor = held[0]
        return found


@dataclass(frozen=True, eq=False)
class Form:
    """How an attention module attends.

    Attributes:
        block: its number.
        readers: how many blocks take its map.
        local: which of its heads see how little; None: all see everything.
    """

    maps: Maps
    block: int
    readers: int = 0
    local: Local | None = None


class Echoed(nn.Module):
    """Attention by another block's probabilities: out = o(p · v). Its cache keeps values only.

    Args:
        old: the module that it stands in for, of which it keeps values and output.
        names: of those two, in the old module.
        heads: query heads to a KV head, and the size of a value.
    """

    def __init__(self, old: Any, names: tuple[str, str], heads: tuple[int, int], maps: Maps, leader: int) -> None:
        super().__init__()
        self.names, self.maps, self.leader = names, maps, leader
        self.groups, self.size = heads
        self.layer_idx, self.config = old.layer_idx, old.config
        for name in names:
            self.add_module(name, getattr(old, name))

    def forward(
        self, hidden_states: Tensor, *_: Any, past_key_values: Any = None, **__: Any
    ) -> tuple[Tensor, Tensor | None]:
        value, out = (getattr(self, name) for name in self.names)
        shape = hidden_states.shape[:-1]
        value_BKTE = value(hidden_states).view(*shape, -1, self.size).transpose(1, 2)
        if past_key_values is not None:
            value_BKTE = values_only(past_key_values, value_BKTE, self.layer_idx)
        p_BHQT = self.maps.take(self.leader)
        found_BHQE = p_BHQT @ repeat_kv(value_BKTE, self.groups)
        return out(found_BHQE.transpose(1, 2).reshape(*shape, -1)), p_BHQT


def form_modules(model: Any, layout: Layout) -> None:
    """Gives the attention modules of a model, in place, the forms that its layout says.

    Raises:
        ModelError: modules of its family cannot attend so.
    """
    if not layout.attention:
        return
    register()
    forms, maps = of_points(layout.attention, layout.anatomy), Maps()
    for block in sorted(forms.leaders.keys() | forms.windows.keys()):
        path = _module(layout.anatomy, block)
        module = model.get_submodule(path)
        _able(model, module, path)
        module.config = copy.copy(module.config)
        module.config._attn_implementation = MAPS
        readers, local, sizes = forms.leaders.get(block, 0), forms.windows.get(block), layout.anatomy.attention(block)
        setattr(module, FORM, Form(maps, block, readers, local))
        if local is not None and not readers and sizes is not None:  # a map is of all tokens, and taken as it is
            localise(module, local, sizes.kv_heads)
    for block, leader in forms.shared.items():
        path = _module(layout.anatomy, block)
        module = model.get_submodule(path)
        _able(model, module, path)
        sites = {site.kind: site for site in layout.anatomy.in_block(block)}
        _only(model, module, path, [sites[kind].module for kind in "qkvo"])
        sizes = layout.anatomy.attention(block)
        assert sizes is not None, "a block whose map is shared has heads"
        names = tuple(sites[kind].module.rpartition(".")[2] for kind in "vo")
        heads = (sizes.heads // sizes.kv_heads, sizes.value_dim)
        put(model, path, Echoed(module, names, heads, maps, leader))  # type: ignore[arg-type]  # two of them
    model.regauge_forms = "blocks take another's attention map, or their heads see a window"


def _module(anatomy: Anatomy, block: int) -> str:
    """The path of a block's attention module."""
    return next(site.module for site in anatomy.in_block(block) if site.kind == "o").rpartition(".")[0]


def _able(model: Any, module: Any, path: str) -> None:
    if not hasattr(module, "layer_idx") or not hasattr(module, "config") or not model._supports_attention_backend:
        raise ModelError(
            f"{path} of a {model.config.model_type} has an attention of its own, which takes no other form; leave "
            "'attention' out of the recipe"
        )


def _only(model: Any, module: Any, path: str, known: list[str]) -> None:
    """Nothing but queries, keys, values, the output and norms of the first two lies in the module."""
    own = {f"{path}.{name}" for name, child in module.named_children() if any(True for _ in child.parameters())}
    more = sorted(own - set(known) - {f"{path}.q_norm", f"{path}.k_norm"})
    if more or any(True for _ in module.parameters(recurse=False)):
        raise ModelError(
            f"attention of a {model.config.model_type} has more in it than queries, keys, values and an output "
            f"({', '.join(more) or 'numbers of its own'}), so it cannot take another block's map"
        )


def register() -> None:
    """Lets transformers find `attention`. Safe to repeat."""
    AttentionInterface.register(MAPS, attention)
    AttentionMaskInterface.register(MAPS, sdpa_mask)


@contextmanager
def watching(see: See) -> Iterator[None]:
    """While it lasts, modules that attend by `MAPS` show (p_BHQT, query_BHQD, key_BKTD) to `see`."""
    register()
    token = _seeing.set(see)
    try:
        yield
    finally:
        _seeing.reset(token)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers asks of an attention function, with a window for each head, and maps that others take.

    Args:
        query: (B, H, Q, D); key, value: (B, K, T, D), the new tokens last.
        attention_mask: of the text, (B, 1, Q, T or more); None: causal.
    """
    form: Form | None = getattr(module, FORM, None)
    see = _seeing.get()
    layer: LocalLayer | None = getattr(key, LAYER, None)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        found: Tensor = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **rest)[0]
        return found

    apart = None if layer is None else attended(layer, query, attention_mask, attend)
    if apart is None and attention_mask is None and see is None and form is not None and not form.readers:
        apart = None if form.local is None else prompted(form.local, query, key, value, attend)
    if apart is not None:
        return apart, None
    mask = attention_mask
    if form is not None and form.local is not None:
        mask = windowed(mask, form.local, query, key)
    if see is None and (form is None or not form.readers):
        found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, mask, scaling=scaling, **rest
        )
        return found
    if any(rest.get(name) is not None for name in UNREAD):
        raise ModelError(
            "this family's attention adds sinks or biases of its own to what queries and keys make, and a map without "
            "them is not what it computes; leave 'attention' out of the recipe"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    p_BHQT = probabilities(query, key, mask, scale, rest.get("softcap") or 0.0)
    if see is not None:
        see(p_BHQT, query, key)
    if form is not None and form.readers:
        form.maps.lay(form.block, p_BHQT, form.readers)
    out_BHQE = p_BHQT @ repeat_kv(value, query.shape[1] // key.shape[1])
    return out_BHQE.transpose(1, 2).contiguous(), p_BHQT


def windowed(mask: Tensor | None, local: Local, query: Tensor, key: Tensor) -> Tensor:
    """(B, H, Q, T): the mask of the text, and of the heads that are named the window only. Windows and sinks are
    counted from the first and last tokens that each sequence's mask shows."""
    (heads, queries), (kv_heads, keys), device = query.shape[1:3], key.shape[1:3], query.device
    seen = causal(queries, keys, device)[None, None] if mask is None else mask[..., :keys]
    plain = shown(seen)
    own_Q1 = keys - queries + torch.arange(queries, dtype=torch.int64, device=device)[:, None]
    place_T = torch.arange(keys, dtype=torch.int64, device=device)
    first = plain.to(torch.int8).argmax(-1, keepdim=True)  # the first token that a query sees: behind the padding
    near = (place_T > own_Q1 - local.tokens) | (place_T < first + local.sinks)
    whole_H = torch.ones(heads, dtype=torch.bool, device=device)
    for number in local.numbers(kv_heads):
        whole_H[number * (heads // kv_heads) : (number + 1) * (heads // kv_heads)] = False
    kept = near | whole_H[:, None, None]
    if seen.dtype == torch.bool:
        return seen & kept
    return seen.masked_fill(~kept, torch.finfo(seen.dtype).min)
