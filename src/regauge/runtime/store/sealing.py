"""From the newest tokens of a head to blocks of bytes, by the one quantiser of `formats/`.

Legend: N blocks, T tokens of a block, D channels of a head, B bytes of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.cache.scheme import HADAMARD, Scheme
from regauge.errors import RecipeError
from regauge.formats.balance import token_spreads
from regauge.formats.base import LOW, Format
from regauge.kernels.blocks import BlockLayout

STEPS = {"f16": torch.float16, "bf16": torch.bfloat16}
"""Scales that a block can keep → dtype of its steps."""


@dataclass(frozen=True, eq=False)
class Coding:
    """How the tokens of one role of one block's heads are put away.

    Attributes:
        format: None: as they come.
        balance: rounds of evening tokens out first; 0: none, and there are no multipliers.
    """

    layout: BlockLayout
    format: Format | None
    balance: int = 0

    def seal(self, x_NTD: Tensor) -> tuple[Tensor, Tensor | None]:
        """(blocks_NB, multipliers_NT or None) of some whole blocks."""
        if self.format is None:
            return self.layout.rows(x_NTD), None
        count, tokens, channels = x_NTD.shape
        x_NTD = x_NTD.float()
        spread_NT = token_spreads(x_NTD, self.balance) if self.balance else None
        if spread_NT is not None:
            x_NTD = x_NTD / spread_NT[..., None]
        codes = self.format.encode(x_NTD.reshape(count * tokens, channels))
        lows_NG = None
        if self.layout.low:
            zero_G1 = codes.step.zero_G1
            assert zero_G1 is not None
            low_G1 = codes.step.fields.get(LOW, (self.format.grid.low - zero_G1) * codes.step.scale_G1)
            lows_NG = low_G1.float().reshape(count, -1)
        steps_NG = codes.step.scale_G1.reshape(count, -1)
        return self.layout.pack(codes.codes_OI.reshape(count, tokens, channels), steps_NG, lows_NG), spread_NT

    def open(self, blocks_NB: Tensor, rows_NT: Tensor | None) -> Tensor:
        """(N, T, D), float32: what some blocks stand for."""
        found_NTD = self.layout.decode(blocks_NB)
        return found_NTD if rows_NT is None else found_NTD * rows_NT[..., None]


def coding(role: str, fmt: Format | None, shape: tuple[int, int], dtype: torch.dtype, balance: int) -> Coding:
    """How heads of one role are put away.

    Args:
        shape: (T, D) of a block.
        dtype: of rows that are kept as they come.

    Raises:
        RecipeError: no block holds that format.
    """
    tokens, channels = shape
    if fmt is None:
        return Coding(BlockLayout(role, tokens, channels, 16, dtype=dtype), None)
    if reason := fmt.grain.refuses(shape):
        raise RecipeError(f"{role} of a cache: {reason}, which a head has here")
    if fmt.scale.name not in STEPS:
        raise RecipeError(f"{role} of a cache keep steps as {' or '.join(STEPS)}, not {fmt.scale.name}")
    if fmt.grid.kind != "integer" and fmt.grid.cast is not torch.float8_e4m3fn:
        raise RecipeError(
            f"{role} of a cache are integers of 1 to 8 bits or fp8, which attention reads; not {fmt.grid.name}"
        )
    in_time = fmt.grain.span(shape) == 1
    if balance and not in_time:
        raise RecipeError(
            f"balance keeps one number a token beside steps that are a channel's, and {role} by {fmt.grain.name} have "
            "none; write time:32 or another group in time"
        )
    layout = BlockLayout(
        role,
        tokens,
        channels,
        fmt.grid.bits,
        axis="time" if in_time else "channels",
        group=fmt.grain.groups(shape)[1] if in_time else fmt.grain.span(shape),
        low=not fmt.grid.symmetric,
        offset=fmt.grid.offset,
        dtype=STEPS[fmt.scale.name],
        grid="integers" if fmt.grid.kind == "integer" else "e4m3",
    )
    return Coding(layout, fmt, balance)


def codings(scheme: Scheme, keys_BHTD: Tensor, values_BHTD: Tensor) -> tuple[Coding, Coding]:
    """How heads like these are put away by a scheme, keys and values.

    Raises:
        RecipeError: no block holds its formats.
    """
    keys, values = (
        coding(role, fmt, (scheme.tokens, like.shape[3]), like.dtype, scheme.balance)
        for role, fmt, like in zip(("keys", "values"), scheme.formats, (keys_BHTD, values_BHTD), strict=True)
    )
    return keys, values


def turned(channels: int) -> Callable[[Tensor], Tensor]:
    """x (..., D) → x with every run of D's largest power of two turned by a Hadamard of that size; its own inverse.

    Raises:
        RecipeError: that power is less than 8.
    """
    size = channels & -channels
    if size < HADAMARD:
        raise RecipeError(
            f"heads of {channels} channels have no Hadamard of {HADAMARD} or more: leave `transform: hadamard` out"
        )

    def turn(x: Tensor) -> Tensor:
        y, half = x.float(), 1
        while half < size:  # as the native step does it: the same sums whatever the shape of x
            low, high = y.reshape(*y.shape[:-1], -1, 2, half).unbind(-2)
            y, half = torch.stack((low + high, low - high), -2).flatten(-3), 2 * half
        return (y * (1.0 / math.sqrt(size))).to(x.dtype)

    return turn
