"""Packed modules: they stand where transformers' linear layers, embeddings and expert stacks stood, and hold bytes.

None of them has a weight parameter. `weight` is a property that gives a placeholder of the right shape, dtype and
device, because transformers and PEFT ask layers for those of theirs; computing with it is refused in a sentence.

Legend: O output channels, I input channels, T tokens, R rank, V vocabulary.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from regauge.anatomy.members import first
from regauge.runtime.matrices.held import FullMatrix, PackedMatrix, after
from regauge.runtime.matrices.placeholder import weight_of

__all__ = ["FullMatrix", "PackedExperts", "PackedLinear", "PackedLookup", "PackedMatrix", "pack_parameter"]


class PackedLinear(nn.Linear):
    """A linear layer of one or more matrices, whose outputs stand in the order of the module it replaces.

    It is an `nn.Linear` to whoever looks for linear layers, as PEFT does, and has its two sizes.

    Args:
        parts: matrices, in any order.
        order: the row of the whole of each output of the parts, one after another; None: as they come.
        bias: of the whole.
    """

    def __init__(
        self, parts: Sequence[nn.Module], order: Tensor | None, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)  # there is no weight to make
        self.parts = nn.ModuleList(parts)
        shapes = [cast(tuple[int, int], part.shape) for part in parts]
        self.in_features, self.out_features = shapes[0][1], sum(rows for rows, _ in shapes)
        self.dtype = dtype
        own = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        self.register_parameter("bias", own)
        place = (
            None
            if order is None or torch.equal(order, torch.arange(len(order), dtype=torch.int64, device="cpu"))
            else torch.argsort(order)
        )
        self.register_buffer("place", place)
        self.place: Tensor | None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # bytes are no parameter
        """A placeholder: for code that asks for dtype, shape or device."""
        return weight_of((self.out_features, self.in_features), self.dtype, next(self.parts.buffers()).device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        self.dtype = after(fn, self.dtype)
        return self

    def forward(self, input: Tensor) -> Tensor:
        ys = [part(input) for part in self.parts]
        y = ys[0] if len(ys) == 1 else torch.cat(ys, dim=-1)
        if self.place is not None:
            y = y[..., self.place]
        return y if self.bias is None else y.add_(self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Made(type):
    """Classes that are made as a model is loaded, each once a process; pickle makes them again, from what they name.

    They are in a cycle with themselves, as all classes are, and so hold no matrix.
    """

    made: tuple[Any, ...]


def _make_again(made: Made) -> tuple[Any, ...]:
    make, *arguments = made.made
    return make, tuple(arguments)


copyreg.pickle(Made, _make_again)


class PackedLookup(nn.Embedding):
    """An embedding whose table is packed. `pack` turns an embedding into one, of its own class or of a subclass of it,
    so that what the subclass does around the look-up (a scale, an offset) stays."""

    matrix: PackedMatrix

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a table of bytes has no parameter
        """A placeholder: for code that asks for dtype, shape or device."""
        return weight_of(self.matrix.shape, self.matrix.dtype, next(self.matrix.buffers()).device)

    def forward(self, input: Tensor) -> Tensor:
        return self.matrix.take(input.reshape(-1)).view(*input.shape, self.matrix.shape[1])

    @staticmethod
    def pack(module: Any, matrix: PackedMatrix) -> None:
        """Makes an embedding (any subclass) a packed one, in place."""
        del module._parameters["weight"]
        old = type(module)
        module.__class__ = PackedLookup if old is nn.Embedding else _lookup_class(cast(Hashable, old))
        module.matrix = matrix


@cache
def _lookup_class(old: Hashable) -> type:
    """A look-up that is a subclass of a class of embeddings."""
    assert isinstance(old, type), "a class"
    return Made(f"Packed{old.__name__}", (old, PackedLookup), {"made": (_lookup_class, old)})


def pack_parameter(module: Any, name: str, matrix: PackedMatrix) -> None:
    """Makes one parameter of a module of any class packed, in place: it is decoded whenever the module's own code asks
    for it, or the part of it whose shape is `part_of_…`. Slow, and right: for convolutions, tables, routers."""
    setattr(module, f"shape_of_{name}", tuple(module._parameters.pop(name).shape))
    module.__class__ = _parameter_class(cast(Hashable, type(module)), name)
    module.add_module(f"packed_{name}", matrix)


@cache
def _parameter_class(old: Hashable, name: str) -> type:
    """A class of the same name, one of whose parameters is decoded from the module's own matrix."""
    assert isinstance(old, type), "a class"

    def decoded(module: Any) -> Tensor:
        matrix = module._modules[f"packed_{name}"]
        found: Tensor = matrix.rows(0, matrix.shape[0]).reshape(getattr(module, f"shape_of_{name}"))
        return first(found, vars(module).get(f"part_of_{name}", found.shape))

    own = {name: property(decoded), "made": (_parameter_class, old, name), "__module__": old.__module__}
    return Made(old.__name__, (old,), own)


class PackedExperts(nn.Module):
    """A stack of gated experts, each with packed matrices; the sums of transformers' own eager form.

    Args:
        combine: what the experts make of gate and up.
    """

    def __init__(self, experts: Sequence[Mapping[str, nn.Module]], combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict(dict(expert)) for expert in experts)
        self.combine = combine

    def give_bias(self, number: int, kind: str, bias: Tensor) -> None:
        """Lets one expert add a bias (O,) behind one of its matrices."""
        self.register_buffer(f"bias_{number}_{kind}", bias)

    def forward(self, hidden: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None) -> Tensor:
        if top_k_index is None or top_k_weights is None:  # all tokens for each expert, one's after another's
            parts = hidden.chunk(len(self.experts))
            return torch.cat([self._expert(number, x_TI) for number, x_TI in enumerate(parts)])
        out = torch.zeros_like(hidden)
        for number in range(len(self.experts)):
            tokens, position = torch.where(top_k_index == number)
            if tokens.numel():
                y_TO = self._expert(number, hidden[tokens]) * top_k_weights[tokens, position, None]
                out.index_add_(0, tokens, y_TO.to(out.dtype))
        return out

    def _expert(self, number: int, x_TI: Tensor) -> Tensor:
        inner = self.combine(self._product(number, "gate", x_TI), self._product(number, "up", x_TI))
        return self._product(number, "down", inner)

    def _product(self, number: int, kind: str, x_TI: Tensor) -> Tensor:
        y_TO: Tensor = cast(nn.ModuleDict, self.experts[number])[kind](x_TI)
        bias = self._buffers.get(f"bias_{number}_{kind}")
        return y_TO if bias is None else y_TO + bias
