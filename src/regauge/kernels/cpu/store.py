"""What one block of a transformer keeps of the past, as kernels read it; and attention of one layer over it.

`native/regauge.h` says what every field means.

Legend: B sequences, Q new tokens of each, H query heads, K KV heads, C rows that a window has room for, D head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.kernels.attention import Part
from regauge.kernels.blocks import AXES, MOST_CHANNELS, BlockLayout
from regauge.kernels.cpu import checks
from regauge.kernels.cpu.checks import DTYPES
from regauge.kernels.cpu.interface import kernels
from regauge.kernels.cpu.layout import FLOAT, INT
from regauge.kernels.cpu.pieces import address
from regauge.kernels.cpu.structs import CAttention, CBlocks, CPart, CStore

REFUSALS = {
    2: "the {} was given matrices or a cache whose shapes do not fit together",
    3: "a cache holds packed keys or values of a block that looks back only so far, which the {} does not read",
    4: "a cache has let go of tokens that attention still reads",
    5: "a cache has no room for the new tokens",
}
"""What `rg_step` and `rg_attend` answer, as sentences; 0 is done and 1 is no memory."""


@dataclass(frozen=True, eq=False)
class Store:
    """What one block keeps of the past: packed parts, and a window of the newest tokens in full precision.

    Attributes:
        keys_BKCD, values_BKCD: the window, a row a token, contiguous, each of its own dtype (float32, bfloat16,
            float16). The caller owns them.
        origin: tokens seen that the window holds no more: row 0 is token `origin`.
        lengths_BK: int32, rows of the window held of each head; None: tokens seen less `origin`.
        firsts_BK: int32, the first row of each head that counts; None: as the call's `starts` say.
        parts: older tokens, all of which a new token sees but those before each part's `firsts_BK`.
        hadamard: whether keys, and whether values, of window and parts lie turned by the normalised Hadamard matrix of
            the head's size, in Sylvester's order: the decode step turns new ones, queries and outputs by itself.

    Raises:
        ValueError: keys and values are not of one shape, or not in one piece in this CPU's memory; a part is of other
            heads; a Hadamard matrix is asked for of a size that is no power of two.
    """

    keys_BKCD: Tensor
    values_BKCD: Tensor
    origin: int = 0
    lengths_BK: Tensor | None = None
    firsts_BK: Tensor | None = None
    parts: tuple[Part, ...] = ()
    hadamard: tuple[bool, bool] = (False, False)

    def __post_init__(self) -> None:
        checks.tensor("keys of a store", self.keys_BKCD, DTYPES, (None,) * 4)
        checks.tensor("values of a store", self.values_BKCD, DTYPES, tuple(self.keys_BKCD.shape))
        for what, given in (("lengths of a store", self.lengths_BK), ("first rows of a store", self.firsts_BK)):
            checks.optional(what, given, (torch.int32,), tuple(self.keys_BKCD.shape[:2]))
        checks.integers("origin and room of a store", (self.origin, self.keys_BKCD.shape[2]), 0)
        size = self.keys_BKCD.shape[3]
        if any(self.hadamard) and size & (size - 1):
            raise ValueError(
                f"a head of {size} channels has no Hadamard matrix of Sylvester's: that is no power of two"
            )
        for part in self.parts:
            self._check(part)

    def _check(self, part: Part) -> None:
        heads, size = tuple(self.keys_BKCD.shape[:2]), self.keys_BKCD.shape[3]
        for what, given, dtypes in (
            ("lengths of a part", part.lengths_BK, (torch.int32,)),
            ("key offsets of a part", part.key_offsets_BK, (torch.int64,)),
            ("value offsets of a part", part.value_offsets_BK, (torch.int64,)),
        ):
            checks.tensor(what, given, dtypes, heads)
        checks.optional("first tokens of a part", part.firsts_BK, (torch.int32,), heads)
        checks.optional("offsets of multipliers", part.row_offsets_BK, (torch.int64,), heads)
        for memory in (part.key_blocks, part.value_blocks):
            checks.tensor("blocks of a part", memory, (torch.uint8,), (None,))
        for rows in (part.key_rows, part.value_rows):
            checks.optional("multipliers of a part", rows, (torch.float32,), (None,))
        if {part.keys.channels, part.values.channels} != {size}:
            raise ValueError(
                f"a part of heads of {part.keys.channels} and {part.values.channels} channels stands before a window "
                f"of heads of {size}"
            )

    def struct(self) -> CStore:
        """The C view; this store must outlive it."""
        tensors = self.keys_BKCD, self.values_BKCD, self.lengths_BK, self.firsts_BK
        dtypes = DTYPES[self.keys_BKCD.dtype], DTYPES[self.values_BKCD.dtype]
        parts = (CPart * len(self.parts))(*map(_part, self.parts)) if self.parts else None
        turned = self.hadamard[0] + 2 * self.hadamard[1]
        return CStore(
            *map(address, tensors), parts, len(self.parts), *dtypes, self.keys_BKCD.shape[2], self.origin, turned
        )


def _part(part: Part) -> CPart:
    keys = _blocks(part.keys, part.key_blocks, part.key_offsets_BK, part.key_rows)
    values = _blocks(part.values, part.value_blocks, part.value_offsets_BK, part.value_rows)
    tables = map(address, (part.lengths_BK, part.firsts_BK, part.row_offsets_BK))
    return CPart(keys, values, *tables, part.keys.tokens)


def _blocks(layout: BlockLayout, memory: Tensor, offsets: Tensor, rows: Tensor | None) -> CBlocks:
    meta = layout.bits, AXES.index(layout.axis), layout.group, int(layout.low), layout.offset, DTYPES[layout.dtype]
    # of no head is an address asked for that torch does not give to empty memory
    place = memory.data_ptr() or offsets.data_ptr()
    return CBlocks(place, offsets.data_ptr(), address(rows), *meta, FLOAT if layout.grid == "e4m3" else INT)


@dataclass(frozen=True)
class Reading:
    """How attention of a layer reads.

    Attributes:
        scale, softcap: of scores; softcap 0: none.
        look_back: tokens that it looks back, itself included; 0: all.
        causal: False: new tokens see those after them too.
    """

    scale: float
    softcap: float = 0.0
    look_back: int = 0
    causal: bool = True


def attend(q_BQHD: Tensor, store: Store, reading: Reading, seen: int, starts: Sequence[int] = ()) -> Tensor:
    """Attention (B, Q, H, D) of new tokens over a store whose window holds them already, as its last rows, in q's
    dtype. The definition is `kernels.attention.attend`.

    Args:
        q_BQHD: rotated, not scaled, contiguous; turned where the store's keys are. The answer is turned where
            its values are.
        seen: tokens seen, the new ones too (where the store has no `lengths_BK`).
        starts: first token seen of each sequence that counts; (): 0.

    Raises:
        ValueError: shapes do not fit, or the store cannot be read so.
    """
    batch, kv_heads, _, size = store.keys_BKCD.shape
    checks.tensor("queries", q_BQHD, DTYPES, (batch, None, None, size))
    new, heads = q_BQHD.shape[1:3]
    if not new or not heads or heads % kv_heads or not size <= MOST_CHANNELS or len(starts) not in (0, batch):
        raise ValueError(f"queries of {tuple(q_BQHD.shape)} do not fit {kv_heads} KV heads, or {len(starts)} starts")
    rows = seen - store.origin
    checks.integers("tokens seen, and rows and sizes of attention", (seen, rows, new, heads, reading.look_back), 0)
    checks.integers("first tokens", starts, 0)
    out_BQHD = torch.empty_like(q_BQHD)
    struct = store.struct()
    first = (ctypes.c_int32 * batch)(*starts)
    sizes = batch, new, heads, kv_heads, size, DTYPES[q_BQHD.dtype], rows, reading.look_back, int(not reading.causal)
    call = CAttention(
        q_BQHD.data_ptr(), out_BQHD.data_ptr(), ctypes.pointer(struct), first, *sizes, reading.scale, reading.softcap
    )
    if not batch:
        return out_BQHD
    refused = kernels().rg_attend(ctypes.byref(call), torch.get_num_threads())
    if refused == 1:
        raise MemoryError("attention could not have the memory that it works in")
    if refused:
        raise ValueError(REFUSALS[refused].format("attention"))
    return out_BQHD
