"""Packed matrices in the panels of the C++ kernels: how they are held and multiplied.

Weights are always the ones that the codes stand for (`matrix.decode` is `Format.decode` to the bit, but for `nv`, whose
steps are one float32 rounding away, and for values of code 0 that steps keep, which are a term of their own: `beside`).
Activations are rounded (`operators.few`): against exact products the error is about 2e-5 of the output's size with 16
bits and 6e-3 with 8.

Legend: O output channels, I input channels, N groups along a row, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from regauge.formats.base import LOW, Codes, Format, Grid
from regauge.formats.nested import SUPER
from regauge.formats.planes import LEVELS, level_step
from regauge.formats.prefixes import FEWEST
from regauge.formats.readings import Reading
from regauge.kernels.cpu import matrix
from regauge.kernels.cpu.interface import has
from regauge.kernels.cpu.layout import MOST_APART, Value, cut_at, cuts_of, group_of, meta_of, stride_of, unit
from regauge.runtime.matrices import operators
from regauge.runtime.matrices.codes import alone, codes_of
from regauge.runtime.matrices.multiply import Held, Way

NAME = "panels"
Meta = tuple[int, ...]
"""The integers of `matrix.META`, and the stride of a matrix in runs or of the first part of one."""
Steps = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Steps, zero points, a multiplier a row."""


def value_of(grid: Grid) -> Value | None:
    """What the codes of a grid stand for; None where panels cannot say it. Codes that are never written count as 0."""
    return _value_of(grid)  # type: ignore[arg-type]  # grids are frozen


@lru_cache(maxsize=64)
def _value_of(grid: Grid) -> Value | None:
    table, bits, paths = grid.table, grid.bits, grid.paths
    if paths is not None:
        values = (*table.tolist(), paths.unit)
        return Value(matrix.TRELLIS, offset=128, table=values, mantissa=paths.window, bias=paths.plain)
    if torch.equal(table, torch.arange(1 << bits, dtype=torch.int64, device="cpu") + table[0]):
        offset = -int(table[0]) if grid.symmetric else 0
        return Value(matrix.INT, offset=offset)
    if not grid.symmetric or len(table) > 1 << bits:
        return None
    if bits <= 4:
        return Value(matrix.TABLE, table=tuple(table.nan_to_num(0.0).tolist()))
    for mantissa in range(1, bits - 1):
        if len(table) == 1 << bits and (least := float(table[1])) > 0:
            bias = 1 - mantissa - round(math.log2(least))
            seen = ~table.isnan()
            if torch.equal(floats(bits, mantissa, bias)[seen], table[seen]):
                return Value(matrix.FLOAT, mantissa=mantissa, bias=bias)
    return None


def _held_as(fmt: Format) -> Value | None:
    """What codes stand for in panels: beside values of code 0 they are counted from the middle of the grid, so that
    little of the product is taken back."""
    value = value_of(fmt.grid)
    return value if value is None or _middle(fmt) is None else replace(value, offset=1 << (fmt.grid.bits - 1))


def _middle(fmt: Format) -> float | None:
    """The grid value from which panels count codes where steps keep the value of code 0; None where they do not."""
    return None if fmt.grid.symmetric or fmt.scale.low is None else fmt.grid.low + (1 << (fmt.grid.bits - 1))


def floats(bits: int, mantissa: int, bias: int) -> Tensor:
    """The value of every code of a small float, float64 as it may pass float32."""
    code = torch.arange(1 << (bits - 1), dtype=torch.int64, device="cpu")
    exponent, fraction = code >> mantissa, (code & ((1 << mantissa) - 1)).double() / (1 << mantissa)
    size = torch.where(
        exponent > 0, (1 + fraction) * torch.exp2((exponent - bias).double()), fraction * 2.0 ** (1 - bias)
    )
    return torch.cat([size, -size]).float()


def meta_of_codes(codes: Codes, fmt: Format, whole: int | None = None, widths: Sequence[int] = ()) -> Meta:
    """`matrix.META` of a matrix in panels, and its stride where it lies in runs. The capability table says which
    matrices fit.

    Args:
        whole: inputs of the matrix of which this is the first ones; its groups are then that one's.
        widths: numbers of its first inputs that are used alone too.
    """
    rows, columns = shape = (codes.codes_OI.shape[0], codes.codes_OI.shape[1])
    wide = max(columns, whole or 0)
    value, group = _held_as(fmt), group_of(wide, fmt.grid.bits, fmt.grain.span((rows, wide)), fmt.grid.run)
    if value is None or not group:
        raise ValueError(f"panels cannot say {fmt.grid.name} in {fmt.grain.name} on {rows} x {columns}")
    value = _apart(value, fmt, (rows, wide), group, columns)
    scale_ON, zero_ON, _ = _steps(codes, fmt, group, wide)
    meta = meta_of(shape, fmt.grid.bits, value, group, scale_ON, zero_ON is not None)
    stride = stride_of(rows, columns, group, cuts_of(widths, columns, group))
    return (*meta, stride) if stride else meta


def _apart(value: Value, fmt: Format, shape: tuple[int, int], group: int, columns: int) -> Value:
    """What codes stand for, with their bits apart where they may be read at fewer and the kernels know that."""
    fits = fmt.grid.coarsest is not None and fmt.grain.span(shape) < shape[1] and not group % unit(1)
    if not fits or group > MOST_APART or fmt.scale.low is None or not has("rg_has_planes"):
        return value
    return replace(value, mantissa=fmt.grid.bits, bias=-(-columns // group))


def panels(
    fmt: Format,
    meta: Meta,
    inputs: Reading | None = None,
    activations: str | None = None,
    allocate: Callable[[int], Tensor] | None = None,
    whole: int | None = None,
) -> Way:
    """The way of a matrix in panels.

    Args:
        inputs: how inputs are read that the kernels take as codes.
        activations: a name of `matrix.ACTIVATIONS`; None: as `operators.few` says.
        allocate: memory for the panels.
        whole: as `meta_of_codes` says.
    """

    def hold(codes: Codes) -> Held:
        said, value = dict(zip(matrix.META, meta, strict=False)), _held_as(fmt)
        group, wide = said["group"], max(codes.codes_OI.shape[1], whole or 0)
        assert value is not None, "there is a meta of it"
        if value.kind == matrix.INT and said["bias"]:
            value = replace(value, mantissa=said["mantissa"], bias=said["bias"])
            steps: Steps = (_steps_apart(codes, fmt, group, wide), None, None)
        else:
            steps = _steps(codes, fmt, group, wide)
        cuts = cut_at(*meta[len(matrix.META) :])
        made = matrix.pack(codes.codes_OI, fmt.grid.bits, value, group, *steps, allocate, cuts)
        held = {"panels": made.panels, "row_scale": made.row_scale_O, "table": made.table}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    number = operators.AUTOMATIC if activations is None else matrix.ACTIVATIONS[activations]
    return _way(meta, hold, inputs, number)


def _steps(codes: Codes, fmt: Format, group: int, wide: int) -> Steps:
    """Steps and zero points of every group of the panels, and a float32 multiplier a row."""
    rows, columns = shape = (codes.codes_OI.shape[0], codes.codes_OI.shape[1])
    across, one = math.ceil(columns / group), fmt.grain.groups(shape)[0] == 1

    def spread(field_G: Tensor) -> Tensor:
        """(G,) or (G, 1) → (O, N)."""
        field_ON = field_G.reshape(1, 1).expand(rows, 1) if one else field_G.reshape(rows, -1)
        return field_ON.repeat_interleave(across // field_ON.shape[1], dim=1)

    fields, zero_G1 = codes.step.fields, None if fmt.scale.low is not None else codes.step.zero_G1
    zero_ON = None if zero_G1 is None else spread((zero_G1 - fmt.grid.low).to(torch.uint8))
    if fmt.grain.span((rows, wide)) >= wide:  # one step a row, or one for all
        return None, zero_ON, codes.step.scale_G1.float().reshape(-1).expand(rows)
    stored, names = fields["scale"], fields.keys() - {"zero"}
    if names == {"scale", "row_scale"}:  # m2: powers of two below the row's largest
        return spread(127 - stored), zero_ON, fields["row_scale"].float().reshape(-1).expand(rows)
    if names == {"scale", "global_scale"}:  # nv
        scale_ON = spread(stored.view(torch.uint8)).view(torch.float8_e4m3fn)
        return scale_ON, zero_ON, (1.0 / fields["global_scale"].float()).reshape(-1).expand(rows)
    if SUPER in names:  # whose products with codes float16 has
        return spread(codes.step.scale_G1.half()), zero_ON, None
    if names - {LOW, LEVELS} == {"scale"} and stored.dtype in matrix.STEPS and stored.dtype != torch.float8_e4m3fn:
        return spread(stored), zero_ON, None
    return spread(codes.step.scale_G1.float()), zero_ON, None


def _steps_apart(codes: Codes, fmt: Format, group: int, wide: int) -> Tensor:
    """(levels, O, N): steps of every level, of fewest bits first."""
    found = []
    for bits in range(FEWEST, fmt.grid.bits + 1):
        step = codes.step if bits == fmt.grid.bits else level_step(codes.step, fmt, bits)
        one = replace(codes, step=replace(step, fields={"scale": step.fields["scale"]}))
        scale_ON, _, _ = _steps(one, fmt, group, wide)
        assert scale_ON is not None, "groups are shorter than rows"
        found.append(scale_ON)
    return torch.stack(found)


def at_level(meta: Meta, bits: int) -> Meta:
    """The same bytes read at fewer bits."""
    said = dict(zip(matrix.META, meta, strict=False)) | {"bits": bits, "offset": 1 << (bits - 1)}
    return (*said.values(), *meta[len(matrix.META) :])


def beside(codes: Codes, fmt: Format) -> Tensor | None:
    """(O, N): the values of the middle code where steps keep those of code 0, which panels do not read; None where they
    do not."""
    zero_G1, rows, middle = codes.step.zero_G1, codes.codes_OI.shape[0], _middle(fmt)
    if zero_G1 is None or middle is None:
        return None
    low_G1 = (middle - zero_G1) * codes.step.scale_G1
    return low_G1.expand(rows, 1) if low_G1.numel() == 1 else low_G1.reshape(rows, -1)


def _way(meta: Meta, hold: Callable[[Codes], Held], inputs: Reading | None, activations: int) -> Way:
    arguments = list(meta)

    def rows(held: Mapping[str, Tensor], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return operators.rows(held, arguments, start, stop, dtype)

    def take(held: Mapping[str, Tensor], index: Tensor, dtype: torch.dtype) -> Tensor:
        return operators.take(index, held, arguments, dtype)

    def product(x_TI: Tensor, held: Mapping[str, Tensor]) -> Tensor:
        return operators.linear(x_TI, held, arguments, activations)

    if inputs is None:
        return Way(NAME, hold, rows, take, product, device="cpu")
    bits = inputs.bits or 0

    def integers(x_TI: Tensor, held: Mapping[str, Tensor]) -> Tensor:
        return operators.integers(x_TI, held, arguments, bits)

    def coded(x_TI: Tensor, held: Mapping[str, Tensor]) -> Tensor:
        if not len(x_TI):
            return x_TI.new_empty(0, meta[0])
        return operators.codes(codes_of(inputs, x_TI), held, arguments, x_TI.dtype)

    return Way(f"{NAME}, {inputs.name} inputs", hold, rows, take, integers if alone(inputs) else coded, device="cpu")
