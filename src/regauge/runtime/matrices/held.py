"""Matrices as modules: one of a format, held as bytes, or one in full precision beside such.

Everything that a matrix is lies in its buffers, which its `state_dict` has with a word on how they are to be read: so a
state is whole, and goes into a matrix that reads it the same way or is refused.

Legend: O output channels, I input channels, T tokens, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from regauge.errors import ModelError
from regauge.formats.base import LOW, Codes, Format, Step
from regauge.formats.planes import LEVELS, level, level_format, level_step
from regauge.formats.readings import Reading
from regauge.kernels.cpu.matrix import META, PANEL, Matrix
from regauge.runtime.matrices import gradients
from regauge.runtime.matrices.choose import Choice, choose, way_of
from regauge.runtime.matrices.native import at_level, beside
from regauge.runtime.matrices.terms import HeldLowRank, HeldTerm, held_terms

HOMES = {"cpu": "the CPU", "cuda": "a GPU"}
"""Where kernels run, in words."""
LEVELLED = ("scale", LOW, LEVELS)
"""Fields of the steps of a matrix that has levels: what its levels' are made of."""


def after(fn: Callable[[Tensor], Tensor], dtype: torch.dtype) -> torch.dtype:
    """What a move of a module's tensors makes of a dtype."""
    return fn(torch.empty(0, dtype=dtype, device="cpu")).dtype


def _small(held: Tensor | None) -> TypeGuard[Tensor]:
    return held is not None and held.is_floating_point() and held.itemsize == 1


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
        whole: int | None = None,
        widths: Sequence[int] = (),
    ) -> None:
        super().__init__()
        rows, columns = codes.codes_OI.shape
        self.shape, self.dtype = (rows, columns), dtype
        self.reading, self.activations = reading, activations
        self.choice = choose(codes, fmt, dtype, device, reading, activations, whole, widths)
        self.format, self.meta = fmt, self.choice.meta
        self.way = way_of(self.choice)
        for name, tensor in way_of(self.choice, allocate).hold(codes).items():
            self.register_buffer(name, tensor)
        self.held = tuple(self._buffers)
        if fmt.grid.coarsest is not None:
            for name in LEVELLED:
                self.register_buffer(f"level_{name}", codes.step.fields.get(name))
        lows_ON = None if self.meta is None else beside(codes, fmt)
        self.terms = nn.ModuleList(held_terms(codes.terms, lows_ON, columns, dtype))

    @property
    def native(self) -> Matrix | None:
        """The matrix as the C++ kernels see it; None where another way holds it. It shares the buffers."""
        if self.meta is None:
            return None
        held = self._bytes()
        whole, stride = self.meta[: len(META)], self.meta[len(META) :]
        return Matrix(held["panels"], held.get("row_scale"), held.get("table"), whole, *stride)

    def prefix(self, rows: int, columns: int) -> PackedMatrix:
        """The first rows and inputs as a matrix that shares the bytes; terms beside the codes are copied where inputs
        are left out.

        Raises:
            ModelError: this way of holding a matrix, reading its input or adding to it has no first part.
        """
        if (rows, columns) == self.shape:
            return self
        native = self.native
        if native is None:
            raise ModelError(f"a matrix that is held as {self.way.name} has no first rows and inputs to be used alone")
        if self.reading is not None and columns != self.shape[1] and not self.reading.closed(columns):
            raise ModelError(f"inputs read as {self.reading.name} are read together, and cannot lose their last ones")
        part = native.prefix(rows, columns)
        new = self._as(replace(self.choice, shape=(rows, columns), meta=(*part.meta, part.stride)), (rows, columns))
        new.terms = nn.ModuleList(term.prefix(rows, columns) for term in self.added)
        return new

    def level(self, bits: int) -> PackedMatrix:
        """The matrix at fewer bits: a view of the same bytes where their bits lie apart, else packed anew.

        Raises:
            ModelError: it has no such level.
        """
        grid = self.format.grid
        if grid.coarsest is None or not grid.coarsest <= bits <= grid.bits:
            raise ModelError(f"a matrix of {grid.name} codes cannot be read at {bits} bits")
        if bits == grid.bits:
            return self
        fields = {name: cast(Tensor, self._buffers[f"level_{name}"]) for name in LEVELLED}
        whole = self.format.load({name: tensor for name, tensor in fields.items() if tensor is not None})
        if self.meta is None or not dict(zip(META, self.meta, strict=False))["bias"]:
            if any(not isinstance(term, HeldLowRank) or len(term.right) for term in self.added):
                raise ModelError("a matrix with terms beside its codes has no levels where its bits do not lie apart")
            return self._anew(bits, whole)
        step, fmt = level_step(whole, self.format, bits), level_format(self.format, bits)
        meta = at_level(self.meta, bits)
        new = self._as(replace(self.choice, format=fmt, meta=meta), self.shape)
        new.format = fmt
        lows_ON = beside(Codes(torch.empty(self.shape[0], 0, dtype=torch.uint8, device="cpu"), step), fmt)
        assert lows_ON is not None, "the steps of a level have the value of code 0 beside them"
        new.terms = nn.ModuleList(
            term.with_lows(lows_ON) if isinstance(term, HeldLowRank) else term for term in self.added
        )
        return new

    def _anew(self, bits: int, step: Step) -> PackedMatrix:
        """A level whose codes are found again from the weights, and packed by themselves."""
        w_OI = self.way.rows(self._bytes(), 0, self.shape[0], torch.float32)
        if self.meta is not None:  # panels count codes from the middle, and hold what is missing beside them
            step_OI = self.format.grain.spread(step.scale_G1, self.shape)
            codes_OI = (w_OI / step_OI).round() + (1 << (self.format.grid.bits - 1))
        else:
            codes_OI = self.format.scaled(w_OI, step).round()
        found, fmt = level(
            Codes(codes_OI.clamp(0, 2**self.format.grid.bits - 1).to(torch.uint8), step), self.format, bits
        )
        device = str(cast(Tensor, self._buffers[self.held[0]]).device)
        how = self.dtype, device, self.reading, self.activations
        return PackedMatrix(found, fmt, *how, widths=self.choice.widths)

    def _as(self, choice: Choice, shape: tuple[int, int]) -> PackedMatrix:
        """The same bytes, read otherwise; terms are the caller's."""
        new = PackedMatrix.__new__(PackedMatrix)
        nn.Module.__init__(new)
        state = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        vars(new).update(state | {"shape": shape, "choice": choice, "meta": choice.meta})
        new.way = way_of(choice)
        for name in self.held:
            new.register_buffer(name, self._buffers[name])
        return new

    def scaled(self, gain_O: Tensor) -> PackedMatrix:
        """The same matrix with each row times a number: the codes are shared, a multiplier a row is its own, and a
        ModelError says where a way of holding has none."""
        if self.native is None:
            raise ModelError(f"a matrix that is held as {self.way.name} has no multiplier a row")
        new = PackedMatrix.__new__(PackedMatrix)
        nn.Module.__init__(new)
        vars(new).update({name: value for name, value in vars(self).items() if not name.startswith("_")})
        rows, known = self.shape[0], self._buffers.get("row_scale")
        ones = torch.ones(-(-rows // PANEL) * PANEL, dtype=torch.float32, device="cpu")
        own = ones if known is None else known.clone()
        own[:rows] *= gain_O.to(own)
        for name in self.held:
            new.register_buffer(name, self._buffers[name])
        new.register_buffer("row_scale", own)
        new.held = tuple(new._buffers)
        new.terms = nn.ModuleList(term.scaled(gain_O) for term in self.added)
        return new

    def _bytes(self) -> Mapping[str, Tensor]:
        buffers = cast(dict[str, Tensor], self._buffers)
        return buffers if self.meta is not None else {name: buffers[name] for name in self.held}

    @property
    def added(self) -> list[HeldTerm]:
        """The terms beside the codes."""
        return [cast(HeldTerm, held) for held in self.terms]

    def rows(self, start: int, stop: int) -> Tensor:
        """Weights of some rows: the sum of all terms."""
        return self._summed(self.way.rows(self._bytes(), start, stop, self.dtype), slice(start, stop))

    def take(self, index: Tensor) -> Tensor:
        """Rows by number, (n, I)."""
        return self._summed(self.way.take(self._bytes(), index, self.dtype), index)

    def _summed(self, found: Tensor, index: slice | Tensor) -> Tensor:
        for term in self.added:
            found = found + term.dense(self.dtype, index)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ; any leading dimensions."""
        x_TI = x.reshape(-1, self.shape[1])
        if gradients.wanted(x_TI) and not self.choice.differentiable:
            y_TO = gradients.product(x_TI, self._product, self._weights(x_TI.dtype), self.reading)
        else:
            y_TO = self._product(x_TI)
        if len(self.terms):
            # The site's input is what is quantised, so every term reads it quantised, as calibration did.
            x_TI = x_TI if self.reading is None else gradients.read(x_TI, self.reading)
            for term in self.added:
                y_TO = term.apply_to(x_TI, y_TO)
        return y_TO.view(*x.shape[:-1], self.shape[0])

    def _product(self, x_TI: Tensor) -> Tensor:
        return self.way.product(x_TI, self._bytes())

    def _weights(self, dtype: torch.dtype) -> gradients.Rows:
        return lambda start, stop: self.way.rows(self._bytes(), start, stop, dtype)

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and copies take: the way is found again from the choice. Eight-bit floats go as bytes, since
        pickle has no storage for them."""
        bytes_ = {name: held.view(torch.uint8) for name, held in self._buffers.items() if _small(held)}
        small = {name: self._buffers[name].dtype for name in bytes_}  # type: ignore[union-attr]  # they are there
        state = {name: value for name, value in vars(self).items() if name != "way"}
        return state | {"_buffers": dict(self._buffers) | bytes_, "small": small}

    def __setstate__(self, state: dict[str, Any]) -> None:
        small = state.pop("small")
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's own
        self._buffers.update({name: self._buffers[name].view(dtype) for name, dtype in small.items()})  # type: ignore[union-attr]  # they are there
        self.way = way_of(self.choice)

    def get_extra_state(self) -> Tensor:
        """How the bytes are to be read, as text: `_load_from_state_dict` compares it."""
        return torch.frombuffer(bytearray(self.choice.told.encode()), dtype=torch.uint8).clone()

    def set_extra_state(self, state: Any) -> None:
        """Nothing: it was compared."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Bytes of a matrix that is read otherwise are refused, whatever their shapes."""
        told = state_dict.get(f"{prefix}_extra_state")
        seen = bytes(told.tolist()).decode(errors="replace") if isinstance(told, Tensor) else None
        if seen is not None and seen != self.choice.told:
            rest[-1].append(
                f"{prefix.rstrip('.')} of this state_dict holds {seen[:200]}, and the model {self.choice.told}; load "
                "the artifact that it came from."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedMatrix:
        """What is held keeps its dtypes: float32 steps and tables stay so. Kernels of one device keep it there."""
        home, held = self.way.device, cast(Tensor, self._buffers[self.held[0]])
        where = fn(held[:0]).device
        if home and held.device.type == home and where.type not in (home, "meta"):
            raise ModelError(
                f"a model that was loaded for {HOMES[home]} holds its weights as its kernels want them, and cannot go "
                f"to {where}; load it there: rg.load(path, device='{where}')."
            )
        self.dtype = after(fn, self.dtype)
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
        self.register_buffer("full_OI", weight_OI.to(dtype))
        self.full_OI: Tensor

    def rows(self, start: int, stop: int) -> Tensor:
        return self.full_OI[start:stop]

    def prefix(self, rows: int, columns: int) -> FullMatrix:
        """The first rows and inputs, sharing memory."""
        return FullMatrix(self.full_OI[:rows, :columns], self.full_OI.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.full_OI)
