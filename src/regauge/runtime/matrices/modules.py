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
from regauge.formats.activations import simulate
from regauge.formats.base import Codes, Format, Grid
from regauge.kernels.cpu.matrix import Matrix
from regauge.runtime.matrices.choose import choose


class PackedMatrix(nn.Module):
    """A matrix of one format: its bytes as buffers, and how to multiply by it.

    Attributes:
        shape: (O, I).
        dtype: of the activations it is made for.
        format: what its codes stand for.
        way: how it is held and multiplied, as the capability table says.
        inputs: grid of the quantised input, or None.
        activations: how panels round activations, a name of `matrix.ACTIVATIONS`; None: as `operators.few` says.
        meta: `matrix.META` of panels; None where another way holds the matrix.
    """

    def __init__(
        self,
        codes: Codes,
        fmt: Format,
        dtype: torch.dtype,
        device: str = "cpu",
        inputs: Grid | None = None,
        activations: str | None = None,
        allocate: Callable[[int], Tensor] | None = None,
    ) -> None:
        super().__init__()
        rows, columns = codes.codes_OI.shape
        self.shape, self.dtype = (rows, columns), dtype
        self.inputs, self.activations = inputs, activations
        self.way, self.meta = choose(codes, fmt, dtype, device, inputs, activations, allocate)
        self.format = fmt
        for name, tensor in self.way.hold(codes).items():
            self.register_buffer(name, tensor, persistent=False)
        self.held = tuple(self._buffers)
        self.register_buffer("left_OR", _owned(codes.extra.get("left"), dtype), persistent=False)
        self.register_buffer("right_RI", _owned(codes.extra.get("right"), dtype), persistent=False)
        self.left_OR: Tensor | None
        self.right_RI: Tensor | None

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

    def rows(self, start: int, stop: int) -> Tensor:
        """Weights of some rows, with what a compensator adds."""
        found = self.way.rows(self._bytes(), start, stop, self.dtype)
        if self.left_OR is not None and self.right_RI is not None:
            found = found + self.left_OR[start:stop] @ self.right_RI
        return found

    def take(self, index: Tensor) -> Tensor:
        """Rows by number, (n, I)."""
        found = self.way.take(self._bytes(), index, self.dtype)
        if self.left_OR is not None and self.right_RI is not None:
            found = found + self.left_OR[index] @ self.right_RI
        return found

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ; any leading dimensions."""
        x_TI = x.reshape(-1, self.shape[1])
        y_TO = self.way.product(x_TI, self._bytes())
        left_OR, right_RI = (
            self._buffers["left_OR"],
            self._buffers["right_RI"],
        )  # an attribute takes three times as long
        if left_OR is not None and right_RI is not None:
            # The site's input is what is quantised, so the low rank reads it quantised too, as calibration did.
            x_TI = x_TI if self.inputs is None else simulate(x_TI, self.inputs)
            y_TO = torch.addmm(y_TO, x_TI @ right_RI.t(), left_OR.t())
        return y_TO.view(*x.shape[:-1], self.shape[0])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedMatrix:
        """Panels stay on the CPU, and their float32 steps and tables float32."""
        if self.meta is None:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
            return self
        where = fn(torch.empty(0, dtype=torch.uint8)).device
        if where.type not in ("cpu", "meta"):
            raise ModelError(
                f"a model that was loaded for the CPU holds its weights as its kernels want them, and cannot go to "
                f"{where}; load it there: rg.load(path, device='{where}')."
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


def _owned(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


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
        place = None if order is None or torch.equal(order, torch.arange(len(order))) else torch.argsort(order)
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
