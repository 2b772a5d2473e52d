"""Packed modules: they stand where transformers' linear layers, embeddings and expert stacks stood, and hold bytes.

None of them has a weight parameter. `weight` is a property that gives an empty meta tensor of the right shape and
dtype, because transformers' code asks embeddings and layers for the dtype of theirs; computing with it fails at once.

Legend: O output channels, I input channels, T tokens, R rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from regauge.errors import ModelError
from regauge.formats.base import Codes, Format, Term
from regauge.formats.readings import Reading
from regauge.formats.terms import KINDS
from regauge.kernels.cpu.matrix import Matrix
from regauge.runtime.matrices.choose import choose

HOMES = {"cpu": "the CPU", "cuda": "a GPU"}
"""Where kernels run, in words."""


class HeldTerm(nn.Module):
    """A term beside the codes of a matrix, its tensors as buffers, so that it goes where the model goes."""

    def __init__(self, term: Term, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind = term.kind
        for name, tensor in term.tensors.items():
            self.register_buffer(name, tensor.to(dtype), persistent=False)

    @property
    def term(self) -> Term:
        """The term, of the buffers as they are now."""
        return KINDS[self.kind](cast(dict[str, Tensor], self._buffers))


class PackedMatrix(nn.Module):
    """A matrix of one format: its bytes as buffers, and how to multiply by it.

    Attributes:
        shape: (O, I).
        dtype: of the activations it is made for.
        format: what its codes stand for.
        way: how it is held and multiplied, as the capability table says.
        reading: how the input is read before it is multiplied; None: as it is.
        activations: how panels round activations, a name of `matrix.ACTIVATIONS`; None: as `operators.few` says.
        meta: `matrix.META` of panels; None where another way holds the matrix.
    """

    def __init__(
        self,
        codes: Codes,
        fmt: Format,
        dtype: torch.dtype,
        device: str = "cpu",
        reading: Reading | None = None,
        activations: str | None = None,
        allocate: Callable[[int], Tensor] | None = None,
    ) -> None:
        super().__init__()
        rows, columns = codes.codes_OI.shape
        self.shape, self.dtype = (rows, columns), dtype
        self.reading, self.activations = reading, activations
        self.way, self.meta = choose(codes, fmt, dtype, device, reading, activations, allocate)
        self.format = fmt
        for name, tensor in self.way.hold(codes).items():
            self.register_buffer(name, tensor, persistent=False)
        self.held = tuple(self._buffers)
        self.terms = nn.ModuleList(HeldTerm(term, dtype) for term in codes.terms)

    @property
    def native(self) -> Matrix | None:
        """The matrix as the C++ kernels see it; None where another way holds it. It shares the buffers."""
        if self.meta is None:
            return None
        held = self._bytes()
        return Matrix(held["panels"], held.get("row_scale"), held.get("table"), self.meta)

    def _bytes(self) -> Mapping[str, Tensor]:
        buffers = cast(dict[str, Tensor], self._buffers)
        return buffers if self.meta is not None else {name: buffers[name] for name in self.held}

    @property
    def added(self) -> list[Term]:
        """The terms beside the codes, in the dtype of the activations."""
        return [cast(HeldTerm, held).term for held in self.terms]

    def rows(self, start: int, stop: int) -> Tensor:
        """Weights of some rows: the sum of all terms."""
        return self._summed(self.way.rows(self._bytes(), start, stop, self.dtype), slice(start, stop))

    def take(self, index: Tensor) -> Tensor:
        """Rows by number, (n, I)."""
        return self._summed(self.way.take(self._bytes(), index, self.dtype), index)

    def _summed(self, found: Tensor, index: slice | Tensor) -> Tensor:
        for term in self.added:
            found = found + term.dense(index)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ; any leading dimensions."""
        x_TI = x.reshape(-1, self.shape[1])
        y_TO = self.way.product(x_TI, self._bytes())
        if len(self.terms):
            # The site's input is what is quantised, so every term reads it quantised, as calibration did.
            x_TI = x_TI if self.reading is None else self.reading.simulate(x_TI)
            for term in self.added:
                y_TO = term.apply(x_TI, y_TO)
        return y_TO.view(*x.shape[:-1], self.shape[0])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedMatrix:
        """What is held keeps its dtypes: float32 steps and tables stay so. Kernels of one device keep it there."""
        where = fn(torch.empty(0, dtype=torch.uint8, device="cpu")).device
        home, held = self.way.device, cast(Tensor, self._buffers[self.held[0]])
        if home and held.device.type == home and where.type not in (home, "meta"):
            raise ModelError(
                f"a model that was loaded for {HOMES[home]} holds its weights as its kernels want them, and cannot go "
                f"to {where}; load it there: rg.load(path, device='{where}')."
            )
        before = {name: self._buffers[name] for name in self.held}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        for name, tensor in before.items():
            now = self._buffers[name]
            if tensor is not None and now is not None and now.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(now.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}, {self.way.name}"


class FullMatrix(nn.Module):
    """A matrix in full precision, beside packed ones in a fused layer."""

    def __init__(self, weight_OI: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = (weight_OI.shape[0], weight_OI.shape[1])
        self.register_buffer("full_OI", weight_OI.to(dtype), persistent=False)
        self.full_OI: Tensor

    def rows(self, start: int, stop: int) -> Tensor:
        return self.full_OI[start:stop]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.full_OI)


class PackedLinear(nn.Module):
    """A linear layer of one or more matrices, whose outputs stand in the order of the module it replaces.

    Args:
        parts: matrices, in any order.
        order: the row of the whole of each output of the parts, one after another; None: as they come.
        bias: of the whole.
    """

    def __init__(
        self, parts: Sequence[nn.Module], order: Tensor | None, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        shapes = [cast(tuple[int, int], part.shape) for part in parts]
        self.in_features, self.out_features = shapes[0][1], sum(rows for rows, _ in shapes)
        self.dtype = dtype
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        place = (
            None
            if order is None or torch.equal(order, torch.arange(len(order), dtype=torch.int64, device="cpu"))
            else torch.argsort(order)
        )
        self.register_buffer("place", place, persistent=False)
        self.place: Tensor | None

    @property
    def weight(self) -> Tensor:
        """An empty meta tensor: for code that asks for dtype or shape."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        ys = [part(x) for part in self.parts]
        y = ys[0] if len(ys) == 1 else torch.cat(ys, dim=-1)
        if self.place is not None:
            y = y[..., self.place]
        return y if self.bias is None else y.add_(self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PackedLookup(nn.Embedding):
    """An embedding whose table is packed. `pack` turns an embedding into one, of its own class or of a subclass of it,
    so that what the subclass does around the look-up (a scale, an offset) stays."""

    matrix: PackedMatrix

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a table of bytes has no parameter
        """An empty meta tensor: for code that asks for dtype or shape."""
        return torch.empty(self.matrix.shape, dtype=self.matrix.dtype, device="meta")

    def forward(self, input: Tensor) -> Tensor:
        return self.matrix.take(input.reshape(-1)).view(*input.shape, self.matrix.shape[1])

    @staticmethod
    def pack(module: Any, matrix: PackedMatrix) -> None:
        """Makes an embedding (any subclass) a packed one, in place."""
        del module._parameters["weight"]
        old = type(module)
        module.__class__ = (
            PackedLookup if old is nn.Embedding else type(f"Packed{old.__name__}", (old, PackedLookup), {})
        )
        module.matrix = matrix


def pack_parameter(module: Any, name: str, matrix: PackedMatrix) -> None:
    """Makes one parameter of a module of any class packed, in place: it is decoded whenever the module's own code asks
    for it. Slow, and right: for convolutions of patches, position tables, routers."""
    shape = module._parameters.pop(name).shape

    def decoded(_: Any) -> Tensor:
        return matrix.rows(0, matrix.shape[0]).reshape(shape)

    old = type(module)
    module.__class__ = type(old.__name__, (old,), {name: property(decoded)})
    module.add_module(f"packed_{name}", matrix)


class PackedExperts(nn.Module):
    """A stack of gated experts, each with packed matrices; the sums of transformers' own eager form."""

    def __init__(self, experts: Sequence[Mapping[str, nn.Module]], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict(dict(expert)) for expert in experts)
        self.activation = activation

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            tokens, position = torch.where(top_k_index == number)
            if tokens.numel() == 0:
                continue
            x_TI = hidden[tokens]
            parts = cast(nn.ModuleDict, expert)
            inner = self.activation(parts["gate"](x_TI)) * parts["up"](x_TI)
            y_TO = parts["down"](inner) * top_k_weights[tokens, position, None]
            out.index_add_(0, tokens, y_TO.to(out.dtype))
        return out
