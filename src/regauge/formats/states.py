"""Keys and values as codes: the one quantiser on each head's (tokens, channels), in the rows that attention reads.

Legend: S sequences, K key/value heads, C tokens, D channels of a head, B bytes of a packed row, N groups along a row.
"""

from __future__ import annotations

from torch import Tensor

from regauge.formats.base import Format
from regauge.kernels.attention import PackedStates
from regauge.kernels.reference import pack


def packed_states(states_SKCD: Tensor, fmt: Format) -> PackedStates:
    """Keys or values packed as `kernels.attention` reads them.

    Args:
        states_SKCD: any float dtype.
        fmt: integers, with steps along the channels of a token: `token`, `group:N`.

    Raises:
        ValueError: the format has other numbers, steps over several tokens, or groups that do not divide.
    """
    sequences, heads, room, channels = states_SKCD.shape
    rows = (sequences * heads * room, channels)
    if fmt.grid.kind != "integer":
        raise ValueError(f"attention reads packed integers, not {fmt.grid.name}")
    if reason := fmt.grain.refuses(rows):
        raise ValueError(reason)
    groups, _ = fmt.grain.groups(rows)
    across = channels // fmt.grain.span(rows)
    if groups != rows[0] * across:
        raise ValueError(f"attention reads steps of one token each, not {fmt.grain.name}")
    codes = fmt.encode(states_SKCD.reshape(rows))
    zero_G1 = codes.step.zero_G1
    shape = (sequences, heads, room, across)
    return PackedStates(
        packed_SKCB=pack(codes.codes_OI, fmt.grid.bits).view(sequences, heads, room, -1),
        scale_SKCN=codes.step.scale_G1.view(shape),
        zero_SKCN=None if zero_G1 is None else zero_G1.view(shape),
        bits=fmt.grid.bits,
        channels=channels,
    )
