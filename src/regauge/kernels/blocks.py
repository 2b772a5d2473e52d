"""Older tokens of a cache as blocks of bytes: how the codes of keys and values lie, and what decodes them.

A block is one run of bytes, read once from front to back: [steps][lows][codes], or rows of floats at 16 bits. Codes
lie as those of packed weights do (`cpu/native/codes.h`), in pieces of 64 bytes that are one operand of a 4-way byte
dot product: of keys 16 tokens × 4 channels, token r in bytes 4r … 4r + 3, so that one product gives 16 tokens a part
of their scores and nothing is summed across; of values 16 channels × 4 tokens. Planes of 4, 2 and 1 bits pack 2, 4
and 8 pieces into one (3 bits lie otherwise). So the channels of keys are padded to 32 at an odd number of bits, to 16
at 2 and 6, to 8 at 4, to 4 at 8 bits; the tokens of values likewise; the channels of values and of steps along time
to 16. `bytes` counts the padding: it is nothing for heads and blocks of a multiple of 32.

Legend: N blocks, T tokens of a block, D channels of a head, G groups, B sequences, H KV heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.errors import nearest

LANES, FOUR = 16, 4
"""Tokens (of keys) or channels (of values) side by side in a piece of 64 bytes, and bytes of each."""
ROLES, AXES, GRIDS = ("keys", "values"), ("time", "channels"), ("integers", "e4m3")
ROW_TYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_TOKENS, MOST_CHANNELS = 512, 1024
"""Of a block: what the kernels keep on their stack."""


@dataclass(frozen=True)
class BlockLayout:
    """What a block of `tokens` tokens of one head holds, and where.

    value = step · code + low (`low`), or step · (code − offset); of the grid `e4m3` step · the float8 that the code is.

    Attributes:
        role: `keys` or `values`: which way codes lie.
        tokens: T, a multiple of 16.
        channels: D.
        bits: 1 to 8 of a code; or 16: rows of `dtype`, no codes and no steps.
        axis: `time`: one step a channel for `group` tokens. `channels`: one step a token for `group` channels.
        group: divides `tokens` or `channels`. Of no account at 16 bits.
        low: a second number beside every step, the value of code 0.
        offset: the code of value 0, where `low` is not.
        dtype: of steps and lows, float16 or bfloat16; of rows at 16 bits, those or float32.
        grid: `integers`, or `e4m3` of 8 bits.

    Raises:
        ValueError: there is no such block.
    """

    role: str
    tokens: int
    channels: int
    bits: int
    axis: str = "channels"
    group: int = 0
    low: bool = False
    offset: int = 0
    dtype: torch.dtype = torch.float16
    grid: str = "integers"

    def __post_init__(self) -> None:
        for what, name, known in (("role", self.role, ROLES), ("axis", self.axis, AXES), ("grid", self.grid, GRIDS)):
            if name not in known:
                raise ValueError(f"{name!r} is no {what} of a block{nearest(str(name), known)}")
        if not 1 <= self.channels <= MOST_CHANNELS or not 1 <= self.tokens <= MOST_TOKENS or self.tokens % LANES:
            raise ValueError(
                f"a block holds a multiple of {LANES} tokens, {MOST_TOKENS} at most, of 1 to {MOST_CHANNELS} channels, "
                f"not {self.tokens} of {self.channels}"
            )
        if self.dtype not in (ROW_TYPES if self.bits == 16 else ROW_TYPES[:2]):
            raise ValueError(
                f"a block's steps are float16 or bfloat16, and its rows those or float32, not {self.dtype}"
            )
        if self.bits != 16:
            self._check_codes()

    def _check_codes(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"codes of a block have 1 to 8 bits, or it holds rows of floats (16), not {self.bits}")
        span = self.tokens if self.axis == "time" else self.channels
        if self.group < 1 or span % self.group:
            raise ValueError(f"groups of {self.group} do not divide the {span} {self._grouped} of a block")
        if not 0 <= self.offset <= 1 << self.bits or (self.offset and self.low):
            raise ValueError(f"an offset of {self.offset} is not of a code of {self.bits} bits, or stands beside lows")
        if self.grid == "e4m3" and (self.bits != 8 or self.low or self.offset):
            raise ValueError("floats of the grid e4m3 have 8 bits, and neither lows nor an offset")

    @property
    def _grouped(self) -> str:
        return "tokens" if self.axis == "time" else "channels"

    @property
    def groups(self) -> int:
        """G, steps of a block: (tokens / group, channels) or (tokens, channels / group) of them; 0 at 16 bits."""
        return 0 if self.bits == 16 else self.tokens * self.channels // self.group

    @property
    def lanes(self) -> int:
        """Tokens (of keys) or channels (of values), padded."""
        return _padded(self.tokens if self.role == "keys" else self.channels, LANES)

    @property
    def depth(self) -> int:
        """Channels (of keys) or tokens (of values), padded to whole planes."""
        return _padded(self.channels if self.role == "keys" else self.tokens, FOUR * _pieces(self.bits))

    @property
    def _steps(self) -> tuple[int, int]:
        """Of a block as stored: groups, and what lies side by side in each."""
        if self.axis == "time":
            return self.tokens // self.group, _padded(self.channels, LANES)
        return self.channels // self.group, self.tokens

    @property
    def step_bytes(self) -> int:
        """Of the steps of a block, and of its lows where it has them."""
        groups, side = self._steps
        return groups * side * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Of one block."""
        if self.bits == 16:
            return self.tokens * self.channels * self.dtype.itemsize
        return self.step_bytes * (1 + self.low) + self.lanes * self.depth * self.bits // 8

    def rows(self, x_NTD: Tensor) -> Tensor:
        """Blocks (N, bytes) of floats as they are, at 16 bits."""
        self._held("rows", x_NTD, (self.tokens, self.channels))
        return x_NTD.to(self.dtype).reshape(x_NTD.shape[0], self.tokens * self.channels).view(torch.uint8)

    def pack(self, codes_NTD: Tensor, steps_NG: Tensor, lows_NG: Tensor | None = None) -> Tensor:
        """Blocks (N, bytes), uint8.

        Args:
            codes_NTD: uint8, each below 2^bits.
            steps_NG, lows_NG: (N, G), rounded to `dtype` here. G is (T / group, D) flattened along time, (T, D / group)
                along channels.

        Raises:
            ValueError: shapes do not fit, or lows are missing or too many.
        """
        if self.bits == 16 or self.low != (lows_NG is not None):
            raise ValueError("codes come with steps, and with lows where the layout has them; 16 bits have neither")
        self._held("codes", codes_NTD, (self.tokens, self.channels))
        stored = [self._pack_steps(steps_NG), *([] if lows_NG is None else [self._pack_steps(lows_NG)])]
        return torch.cat([*stored, self._pack_codes(codes_NTD)], 1)

    def unpack(self, blocks_NB: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(codes_NTD uint8, steps_NG float32, lows_NG float32 or None) of what `pack` made."""
        if self.bits == 16:
            raise ValueError("a block of 16 bits holds rows of floats, not codes: decode it")
        self._held("blocks", blocks_NB, (self.bytes,))
        size = self.step_bytes
        steps_NG = self._unpack_steps(blocks_NB[:, :size])
        lows_NG = self._unpack_steps(blocks_NB[:, size : 2 * size]) if self.low else None
        return self._unpack_codes(blocks_NB[:, size * (1 + self.low) :]), steps_NG, lows_NG

    def decode(self, blocks_NB: Tensor) -> Tensor:
        """(N, T, D), float32: what the blocks stand for."""
        if self.bits == 16:
            self._held("blocks", blocks_NB, (self.bytes,))
            rows = blocks_NB.contiguous().view(self.dtype)
            return rows.reshape(blocks_NB.shape[0], self.tokens, self.channels).float()
        codes_NTD, steps_NG, lows_NG = self.unpack(blocks_NB)
        values = codes_NTD.view(torch.float8_e4m3fn).float() if self.grid == "e4m3" else codes_NTD.float() - self.offset
        values = values * self._spread(steps_NG)
        return values if lows_NG is None else values + self._spread(lows_NG)

    def _held(self, what: str, given: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(given.shape[1:]) != shape:
            raise ValueError(f"{what} of a block are (N, {', '.join(map(str, shape))}), not {tuple(given.shape)}")

    def _spread(self, steps_NG: Tensor) -> Tensor:
        """A step for every number (N, T, D)."""
        if self.axis == "time":
            return steps_NG.view(-1, self.tokens // self.group, self.channels).repeat_interleave(self.group, 1)
        return steps_NG.view(-1, self.tokens, self.channels // self.group).repeat_interleave(self.group, 2)

    def _pack_steps(self, steps_NG: Tensor) -> Tensor:
        self._held("steps and lows", steps_NG, (self.groups,))
        count, (groups, side) = steps_NG.shape[0], self._steps
        if self.axis == "time":
            steps = steps_NG.reshape(count, groups, self.channels)
            steps = torch.nn.functional.pad(steps, (0, side - self.channels))
        else:
            steps = steps_NG.reshape(count, side, groups).transpose(1, 2)
        return steps.to(self.dtype).reshape(count, groups * side).view(torch.uint8)

    def _unpack_steps(self, bytes_NB: Tensor) -> Tensor:
        count, (groups, side) = bytes_NB.shape[0], self._steps
        steps = bytes_NB.contiguous().view(self.dtype).reshape(count, groups, side).float()
        steps = steps[..., : self.channels] if self.axis == "time" else steps.transpose(1, 2)
        return steps.reshape(count, self.groups)

    def _pack_codes(self, codes_NTD: Tensor) -> Tensor:
        count = codes_NTD.shape[0]
        codes = codes_NTD if self.role == "keys" else codes_NTD.transpose(1, 2)
        codes = torch.nn.functional.pad(codes, (0, self.depth - codes.shape[2], 0, self.lanes - codes.shape[1]))
        pieces = _pieces(self.bits)
        panels, runs = self._shape(count)[1:3]
        codes = codes.reshape(count, panels, LANES, runs, pieces, FOUR).permute(0, 1, 3, 4, 2, 5)
        planes = codes.reshape(-1, pieces, LANES * FOUR)
        return _pack_planes(planes, self.bits).reshape(count, self.bytes - self.step_bytes * (1 + self.low))

    def _shape(self, count: int) -> tuple[int, int, int, int]:
        """Blocks, panels of lanes, runs of whole planes and pieces of each."""
        pieces = _pieces(self.bits)
        return count, self.lanes // LANES, self.depth // (FOUR * pieces), pieces

    def _unpack_codes(self, bytes_NB: Tensor) -> Tensor:
        count, pieces = bytes_NB.shape[0], _pieces(self.bits)
        planes = bytes_NB.reshape(-1, pieces * self.bits // 8, LANES * FOUR)
        codes = _unpack_planes(planes, self.bits).view(*self._shape(count), LANES, FOUR)
        codes = codes.permute(0, 1, 4, 2, 3, 5).reshape(count, self.lanes, self.depth)
        codes = codes if self.role == "keys" else codes.transpose(1, 2)
        return codes[:, : self.tokens, : self.channels].contiguous()


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pieces(bits: int) -> int:
    """Pieces of 64 codes in the smallest run of whole bytes of every plane."""
    return 8 if bits & 1 else 4 if bits & 2 else 2 if bits & 4 else 1


def _places(bits: int) -> list[tuple[int, int, int, int, int]]:
    """Where bits of each piece lie: (piece, first bit of the code, how many, 64 bytes, first bit of the byte)."""
    if bits == 3:
        whole = [(piece, 0, 3, piece // 2, piece % 2 * 3) for piece in range(6)]
        return [*whole, *((6 + i, 0, 2, i, 6) for i in range(2)), *((6 + i, 2, 1, 2, 6 + i) for i in range(2))]
    found, at, pieces = [], 0, _pieces(bits)
    for plane in (8, 4, 2, 1):
        if bits & plane:
            lower = bits & (plane - 1)
            found += [(i, lower, plane, at + i * plane // 8, i * plane % 8) for i in range(pieces)]
            at += pieces * plane // 8
    return found


def _pack_planes(codes: Tensor, bits: int) -> Tensor:
    """(M, pieces, 64) of codes as (M, pieces · bits / 8, 64) of bytes."""
    if bits == 8:
        return codes
    packed = torch.zeros(codes.shape[0], codes.shape[1] * bits // 8, 64, dtype=torch.uint8, device=codes.device)
    for piece, first, count, place, shift in _places(bits):
        packed[:, place] |= ((codes[:, piece] >> first) & ((1 << count) - 1)) << shift
    return packed


def _unpack_planes(packed: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return packed
    codes = torch.zeros(packed.shape[0], _pieces(bits), 64, dtype=torch.uint8, device=packed.device)
    for piece, first, count, place, shift in _places(bits):
        codes[:, piece] |= ((packed[:, place] >> shift) & ((1 << count) - 1)) << first
    return codes
