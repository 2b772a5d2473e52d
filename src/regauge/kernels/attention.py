"""The definition of attention over a cache: packed parts of older tokens, and a window of the newest ones as they are.

Keys carry their rotation already, so the order of a part's tokens is of no account. Whether the cache is in coordinates
turned by a Hadamard matrix is the caller's: queries then come turned, and who turned them turns the output back.

Legend: B sequences, Q new tokens of each, H query heads, K KV heads (H a multiple), D channels of keys, E of values,
T rows of a window, M tokens of a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.kernels.blocks import BlockLayout


@dataclass(frozen=True, eq=False)
class Part:
    """What attention reads of the older tokens: for each sequence and KV head a run of whole blocks, of keys and of
    values of the same tokens. Lengths differ from head to head. The caller owns the memory.

    Attributes:
        keys, values: how blocks lie; of the same number of tokens.
        key_blocks, value_blocks: uint8, flat.
        key_offsets_BK, value_offsets_BK: int64, bytes to the first block of each head; its others lie behind.
        lengths_BK: int32, tokens: whole blocks.
        firsts_BK: int32, the first token of the part that counts (left padding); None: all count.
        key_rows, value_rows: float32, a multiplier for each token; either may be None.
        row_offsets_BK: int64, numbers to the first multiplier of each head; None where there are none.

    Raises:
        ValueError: the parts of it do not fit together, or name memory that is not there.
    """

    keys: BlockLayout
    values: BlockLayout
    key_blocks: Tensor
    value_blocks: Tensor
    key_offsets_BK: Tensor
    value_offsets_BK: Tensor
    lengths_BK: Tensor
    firsts_BK: Tensor | None = None
    key_rows: Tensor | None = None
    value_rows: Tensor | None = None
    row_offsets_BK: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.keys.role, self.values.role) != ("keys", "values") or self.keys.tokens != self.values.tokens:
            raise ValueError("a part has blocks of keys and blocks of values, of as many tokens each")
        shape = tuple(self.lengths_BK.shape)
        if len(shape) != 2:
            raise ValueError(f"lengths of a part are of (sequence, KV head), not of shape {shape}")
        wanted = (
            ("key offsets", self.key_offsets_BK, torch.int64),
            ("value offsets", self.value_offsets_BK, torch.int64),
            ("lengths", self.lengths_BK, torch.int32),
            ("first tokens", self.firsts_BK, torch.int32),
            ("offsets of multipliers", self.row_offsets_BK, torch.int64),
        )
        for what, given, dtype in wanted:
            if given is not None and (tuple(given.shape) != shape or given.dtype != dtype):
                raise ValueError(f"{what} of a part are {dtype} {shape}, not {given.dtype} {tuple(given.shape)}")
        self._within(shape)

    def _within(self, shape: tuple[int, ...]) -> None:
        """That every head's tokens are there."""
        if not self.lengths_BK.numel():
            return
        least, most = (int(found) for found in self.lengths_BK.aminmax())
        if least < 0 or bool((self.lengths_BK % self.keys.tokens).any()):
            raise ValueError(f"heads of a part hold whole blocks of {self.keys.tokens} tokens, not {least} to {most}")
        firsts = self.firsts_BK
        if firsts is not None and bool(((firsts < 0) | (firsts > self.lengths_BK)).any()):
            raise ValueError("the first token that counts of a head lies within its part")
        blocks_BK = (self.lengths_BK // self.keys.tokens).long()
        for what, layout, memory, offsets in (
            ("keys", self.keys, self.key_blocks, self.key_offsets_BK),
            ("values", self.values, self.value_blocks, self.value_offsets_BK),
        ):
            if memory.dtype != torch.uint8 or memory.ndim != 1 or not memory.is_contiguous():
                raise ValueError(f"blocks of {what} are bytes in one piece, not {memory.dtype} {tuple(memory.shape)}")
            _reaches(f"blocks of {what}", offsets, blocks_BK * layout.bytes, memory.numel())
        for rows in (self.key_rows, self.value_rows):
            if rows is None:
                continue
            if self.row_offsets_BK is None or rows.dtype != torch.float32 or rows.ndim != 1 or not rows.is_contiguous():
                raise ValueError("multipliers of tokens are float32 in one piece, with an offset for each head")
            _reaches("multipliers", self.row_offsets_BK, self.lengths_BK.long(), rows.numel())

    def read(self, sequence: int, head: int) -> tuple[Tensor, Tensor]:
        """(keys_MD, values_ME), float32, of the tokens of one head that count."""
        length = int(self.lengths_BK[sequence, head])
        first = 0 if self.firsts_BK is None else int(self.firsts_BK[sequence, head])
        read = []
        for layout, memory, offsets, rows in (
            (self.keys, self.key_blocks, self.key_offsets_BK, self.key_rows),
            (self.values, self.value_blocks, self.value_offsets_BK, self.value_rows),
        ):
            start, blocks = int(offsets[sequence, head]), length // layout.tokens
            found = layout.decode(memory[start : start + blocks * layout.bytes].view(blocks, layout.bytes))
            found = found.reshape(length, layout.channels)
            if rows is not None:
                assert self.row_offsets_BK is not None
                at = int(self.row_offsets_BK[sequence, head])
                found = found * rows[at : at + length, None]
            read.append(found[first:])
        return read[0], read[1]


def _reaches(what: str, offsets: Tensor, sizes: Tensor, available: int) -> None:
    if bool((offsets < 0).any()) or bool((offsets + sizes > available).any()):
        raise ValueError(f"{what} of a head reach past the {available} that there are")


@dataclass(frozen=True, eq=False)
class Window:
    """The newest tokens in full precision, the new ones among them, last.

    Attributes:
        keys_BKTD, values_BKTE: a row a token.
        lengths_BK: int32, rows held of each head, the new ones too; None: all T.
        firsts_BK: int32, the first row that counts (left padding); None: row 0.
        look_back: tokens that attention looks back, itself included; 0: all.
    """

    keys_BKTD: Tensor
    values_BKTE: Tensor
    lengths_BK: Tensor | None = None
    firsts_BK: Tensor | None = None
    look_back: int = 0


def attend(
    q_BQHD: Tensor, parts: Sequence[Part], window: Window, scale: float, softcap: float = 0.0, causal: bool = True
) -> Tensor:
    """Attention (B, Q, H, E) of new tokens over all that counts of the parts and the window, in q's dtype; 0 where
    nothing counts. New token j of Q sees the window's rows up to its own, which is the (Q − j)-th from the end, and
    every token of every part.

    Args:
        q_BQHD: queries, rotated, not scaled.
        scale: of scores.
        softcap: c · tanh(score / c) where it is above 0.
        causal: False: every new token sees the whole window.

    Computed in float32 (float64 where q is). Reference: the definition that kernels are tested against.

    Raises:
        ValueError: a window that looks back only so far stands behind parts, whose tokens' places nobody knows.
    """
    if parts and window.look_back:
        raise ValueError("attention that looks back only so far reads a window alone, not the parts before it")
    batch, new, heads, _ = q_BQHD.shape
    kv_heads, rows, size = window.keys_BKTD.shape[1], window.keys_BKTD.shape[2], window.values_BKTE.shape[3]
    exact = torch.float64 if q_BQHD.dtype == torch.float64 else torch.float32
    out = torch.zeros(batch, new, heads, size, dtype=exact, device=q_BQHD.device)
    group = heads // kv_heads
    for sequence in range(batch):
        for head in range(kv_heads):
            own = slice(head * group, (head + 1) * group)
            held = rows if window.lengths_BK is None else int(window.lengths_BK[sequence, head])
            first = 0 if window.firsts_BK is None else int(window.firsts_BK[sequence, head])
            read = [part.read(sequence, head) for part in parts]
            whole = window.keys_BKTD[sequence, head, :held], window.values_BKTE[sequence, head, :held]
            keys, values = (torch.cat([*(pair[i].to(exact) for pair in read), whole[i].to(exact)]) for i in (0, 1))
            older = keys.shape[0] - held
            shown_QT = _shown(new, held, first, window.look_back, causal, q_BQHD.device)
            shown_QT = torch.nn.functional.pad(shown_QT, (older, 0), value=True)
            scores = torch.einsum("qhd,td->hqt", q_BQHD[sequence, :, own].to(exact), keys) * scale
            if softcap > 0:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~shown_QT, -torch.inf)
            chances = torch.softmax(scores, -1).masked_fill(~shown_QT.any(-1)[:, None], 0.0)
            out[sequence, :, own] = torch.einsum("hqt,te->qhe", chances, values)
    return out.to(q_BQHD.dtype)


def _shown(new: int, held: int, first: int, look_back: int, causal: bool, device: torch.device) -> Tensor:
    """(Q, T): which rows of a window each new token sees."""
    row_T = torch.arange(held, dtype=torch.int64, device=device)
    own_Q = held - new + torch.arange(new, dtype=torch.int64, device=device)
    shown_QT = (row_T >= first).expand(new, held)
    if causal:
        shown_QT = shown_QT & (row_T <= own_Q[:, None])
    if look_back:
        shown_QT = shown_QT & (row_T > own_Q[:, None] - look_back)
    return shown_QT
