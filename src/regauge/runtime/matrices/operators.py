"""The products of the C++ kernels as operators of torch, so that `torch.compile` and `torch.export` see through them.

They are registered on import. A matrix comes as its tensors and the integers of its `rg_matrix`; the C view of it is
built once and kept by the addresses that it holds, so a copied or moved matrix gets a view of its own.

Legend: O output channels, I input channels, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regauge.kernels.cpu import coded, matrix
from regauge.kernels.cpu.coded import Tokens
from regauge.kernels.cpu.interface import Struct, struct_of
from regauge.kernels.cpu.library import level
from regauge.runtime.capabilities import whole

AUTOMATIC = 3
"""Of activations, beside `matrix.ACTIVATIONS`: the model's dtype, the bits and the tokens decide."""
Held = Mapping[str, Tensor]
"""`panels`, and `row_scale` and `table` where there are any."""
BLOCK = 1 << 18
"""Weights decoded at a time, which a core's second-level cache holds."""
VIEWS = 1 << 16
"""C views kept before all are dropped: some 200 bytes each."""
LEAST = torch.finfo(torch.float32).eps * torch.finfo(torch.float32).tiny ** 0.5
"""Least step of a token, as `rangers.Dynamic` has it."""
NUMBERED = tuple(matrix.DTYPES)
_STRIDE = len(matrix.META)
"""Where the integers of a matrix that is the first rows and inputs of a larger one have its stride, which ends them."""
_BITS, _VALUE = matrix.META.index("bits"), matrix.META.index("value")

_views: dict[tuple[int, ...], Struct] = {}
_library: Any = torch.library.Library("regauge", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch's own
_MATRIX = "Tensor panels, Tensor? row_scale, Tensor? table, int[] meta"
_library.define(f"packed_linear(Tensor x, {_MATRIX}, int activations) -> Tensor")
_library.define(f"packed_integers(Tensor x, {_MATRIX}, int bits) -> Tensor")
_library.define(f"packed_codes(Tensor z, Tensor scale, Tensor? zero, {_MATRIX}, int dtype) -> Tensor")
_library.define(f"packed_rows({_MATRIX}, SymInt start, SymInt stop, int dtype) -> Tensor")
_library.define(f"packed_take(Tensor index, {_MATRIX}, int dtype) -> Tensor")


def view(panels: Tensor, row_scale: Tensor | None, table: Tensor | None, meta: Sequence[int]) -> Struct:
    """The C view of a matrix. A view is nothing but the addresses and integers that it is found by."""
    key = (
        panels.data_ptr(),
        0 if row_scale is None else row_scale.data_ptr(),
        0 if table is None else table.data_ptr(),
        *meta,
    )
    found = _views.get(key)
    if found is None:
        if len(_views) >= VIEWS:
            _views.clear()
        found = _views[key] = struct_of(panels, row_scale, table, tuple(meta[:_STRIDE]), *meta[_STRIDE:])
    return found


def few(bits: int, dtype: torch.dtype, activations: int) -> int:
    """How the activations of a few tokens are rounded: a number of `matrix.ACTIVATIONS`.

    Automatic: 16 bits, whose error is below that of bfloat16; 8 for weights of 4 bits and fewer, whose own error is
    far larger, in models of 16-bit floats.
    """
    if activations != AUTOMATIC:
        return activations
    return matrix.ACTIVATIONS["int8" if bits <= 4 and dtype != torch.float32 else "int16"]


def held_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights are decoded for another one: float32, which has them all, where kernels lack it."""
    return dtype if dtype in matrix.DTYPES else torch.float32


def _by_bytes(struct: Struct, dtype: torch.dtype, activations: int, table: Tensor | None) -> bool:
    """Whether many tokens are rounded to 8 bits and multiplied by the blocked product, which is asked for or faster."""
    if struct.value == matrix.FLOAT or (struct.value == matrix.TABLE and table is not None and not whole(table)):
        return False
    automatic = activations == AUTOMATIC and dtype != torch.float32 and struct.bits <= 4 and level() == "vnni"
    return automatic or activations == matrix.ACTIVATIONS["int8"]


def _linear(
    x_TI: Tensor, panels: Tensor, row_scale: Tensor | None, table: Tensor | None, meta: Sequence[int], activations: int
) -> Tensor:
    struct = view(panels, row_scale, table, meta)
    exact = x_TI.dtype not in matrix.DTYPES  # float64: whoever asks for it wants no rounding of inputs
    if x_TI.shape[0] <= matrix.FEW and not exact:
        return matrix.linear_of(x_TI, struct, few(struct.bits, x_TI.dtype, activations))
    if not exact and _by_bytes(struct, x_TI.dtype, activations, table):
        return matrix.blocked_of(x_TI, struct)
    y_TO = x_TI.new_empty(x_TI.shape[0], struct.rows)
    step = max(matrix.PANEL, BLOCK // struct.columns // matrix.PANEL * matrix.PANEL)
    for start in range(0, struct.rows, step):
        stop = min(start + step, struct.rows)
        w_OI = matrix.decode_of(struct, start, stop, None, held_in(x_TI.dtype)).to(x_TI.dtype)
        y_TO[:, start:stop] = torch.nn.functional.linear(x_TI, w_OI)
    return y_TO


def _integers(
    x_TI: Tensor, panels: Tensor, row_scale: Tensor | None, table: Tensor | None, meta: Sequence[int], bits: int
) -> Tensor:
    if x_TI.dtype not in matrix.DTYPES:  # inputs are rounded in float32, whatever their dtype
        return _integers(x_TI.float(), panels, row_scale, table, meta, bits).to(x_TI.dtype)
    struct = view(panels, row_scale, table, meta)
    if x_TI.shape[0] <= matrix.ONCE:
        return matrix.linear_of(x_TI, struct, matrix.TOKEN + bits)
    x, top = x_TI.float(), (1 << (bits - 1)) - 1
    # `Reading.codes` on a symmetric grid with a step a token, in half as many operations.
    scale_T1 = torch.linalg.vector_norm(x, torch.inf, -1, True).div_(top + 0.5).clamp_(min=LEAST)
    z_TI = (x / scale_T1).round_().clamp_(-top - 1, top).to(torch.int8)
    return matrix.blocked_integers_of(z_TI, scale_T1.view(-1), struct, x_TI.dtype)


def _codes(
    z_TI: Tensor,
    scale_TG: Tensor,
    zero_NG: Tensor | None,
    panels: Tensor,
    row_scale: Tensor | None,
    table: Tensor | None,
    meta: Sequence[int],
    dtype: int,
) -> Tensor:
    struct = view(panels, row_scale, table, meta)
    return coded.linear_of(coded.Tokens(z_TI, scale_TG, zero_NG), struct, NUMBERED[dtype])


def _codes_shape(
    z_TI: Tensor,
    scale_TG: Tensor,
    zero_NG: Tensor | None,
    panels: Tensor,
    row_scale: Tensor | None,
    table: Tensor | None,
    meta: Sequence[int],
    dtype: int,
) -> Tensor:
    return panels.new_empty(z_TI.shape[0], meta[0], dtype=NUMBERED[dtype])


def _rows(
    panels: Tensor,
    row_scale: Tensor | None,
    table: Tensor | None,
    meta: Sequence[int],
    start: int,
    stop: int,
    dtype: int,
) -> Tensor:
    return matrix.decode_of(view(panels, row_scale, table, meta), start, stop, None, NUMBERED[dtype])


def _take(
    index: Tensor, panels: Tensor, row_scale: Tensor | None, table: Tensor | None, meta: Sequence[int], dtype: int
) -> Tensor:
    struct = view(panels, row_scale, table, meta)
    return matrix.decode_of(struct, 0, index.numel(), index.long().contiguous(), NUMBERED[dtype])


def _linear_shape(
    x_TI: Tensor, panels: Tensor, row_scale: Tensor | None, table: Tensor | None, meta: Sequence[int], activations: int
) -> Tensor:
    return x_TI.new_empty(x_TI.shape[0], meta[0])


def _rows_shape(
    panels: Tensor,
    row_scale: Tensor | None,
    table: Tensor | None,
    meta: Sequence[int],
    start: int,
    stop: int,
    dtype: int,
) -> Tensor:
    return panels.new_empty(stop - start, meta[1], dtype=NUMBERED[dtype])


def _take_shape(
    index: Tensor, panels: Tensor, row_scale: Tensor | None, table: Tensor | None, meta: Sequence[int], dtype: int
) -> Tensor:
    return panels.new_empty(index.shape[0], meta[1], dtype=NUMBERED[dtype])


def _gradient(context: Any, y_TO: Tensor) -> tuple[Tensor | None, ...]:
    """Of x alone: dy W, through rounded activations straight."""
    panels, row_scale, table = context.saved_tensors
    meta, dtype = context.meta, matrix.DTYPES[held_in(y_TO.dtype)]
    w_OI = torch.ops.regauge.packed_rows(panels, row_scale, table, meta, 0, meta[0], dtype)
    return (y_TO @ w_OI.to(y_TO.dtype), None, None, None, None, None)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, panels, row_scale, table, meta, _ = inputs
    ctx.save_for_backward(panels, row_scale, table)
    ctx.meta = meta


for _name, _compute, _shape in (
    ("packed_linear", _linear, _linear_shape),
    ("packed_integers", _integers, _linear_shape),
    ("packed_codes", _codes, _codes_shape),
    ("packed_rows", _rows, _rows_shape),
    ("packed_take", _take, _take_shape),
):
    _library.impl(_name, _compute, "CPU")
    torch.library.register_fake(f"regauge::{_name}", _shape, lib=_library)
for _name in ("packed_linear", "packed_integers"):
    torch.library.register_autograd(f"regauge::{_name}", _gradient, setup_context=_remember, lib=_library)


def plain(x_TI: Tensor) -> bool:
    """Whether the kernels may be called at once, past torch's dispatcher: nothing traces, nothing wants a gradient."""
    return (
        type(x_TI) is Tensor
        and x_TI.is_cpu
        and not torch.compiler.is_compiling()
        and not (x_TI.requires_grad and torch.is_grad_enabled())
        and not torch._C._len_torch_dispatch_stack()  # a mode that looks on sees operators alone
    )


def linear(x_TI: Tensor, held: Held, meta: list[int], activations: int) -> Tensor:
    """x Wᵀ (T, O)."""
    product = _linear if plain(x_TI) else torch.ops.regauge.packed_linear
    found: Tensor = product(x_TI, held["panels"], held.get("row_scale"), held.get("table"), meta, activations)
    return found


def integers(x_TI: Tensor, held: Held, meta: list[int], bits: int) -> Tensor:
    """x Wᵀ (T, O), each token of x rounded to signed integers of so many bits; sums of integers are exact."""
    product = _integers if plain(x_TI) else torch.ops.regauge.packed_integers
    found: Tensor = product(x_TI, held["panels"], held.get("row_scale"), held.get("table"), meta, bits)
    return found


def codes(x: Tokens, held: Held, meta: list[int], dtype: torch.dtype) -> Tensor:
    """x Wᵀ (T, O) of tokens that are codes already; sums of integers are exact."""
    product = _codes if plain(x.z_TI) else torch.ops.regauge.packed_codes
    tensors = held["panels"], held.get("row_scale"), held.get("table")
    found: Tensor = product(x.z_TI, x.scale_TG, x.zero_NG, *tensors, meta, matrix.DTYPES[held_in(dtype)])
    return found.to(dtype)


def rows(held: Held, meta: list[int], start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Weights of rows [start, stop)."""
    tensors = held["panels"], held.get("row_scale"), held.get("table")
    found: Tensor = torch.ops.regauge.packed_rows(*tensors, meta, start, stop, matrix.DTYPES[held_in(dtype)])
    return found.to(dtype)


def take(index: Tensor, held: Held, meta: list[int], dtype: torch.dtype) -> Tensor:
    """Weights of rows by number."""
    tensors = held["panels"], held.get("row_scale"), held.get("table")
    found: Tensor = torch.ops.regauge.packed_take(index, *tensors, meta, matrix.DTYPES[held_in(dtype)])
    return found.to(dtype)
