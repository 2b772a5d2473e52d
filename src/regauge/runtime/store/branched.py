"""A store of several sequences that begin with the same tokens: those lie in memory once.

The prefix is a part of rows as they came, to whose blocks every sequence points; what comes behind it is a growing
store's memory. The native step reads both.

Legend: B sequences, H KV heads, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regauge.kernels.attention import Part
from regauge.kernels.blocks import BlockLayout
from regauge.runtime.store.growing import Growing, with_room

BLOCK = 32
"""Tokens of a block of the prefix; those left over lie with each sequence."""


class Branched(Growing):
    """A store whose first tokens are shared.

    Attributes:
        shared: keys and values (H, T, D) of the prefix, whole blocks.
    """

    def __init__(self) -> None:
        self.shared: tuple[Tensor, ...] = ()
        super().__init__()

    def branch(self, keys_HTD: Tensor, values_HTD: Tensor, sequences: int) -> None:
        """Begins anew, with a prefix and so many sequences behind it. The prefix is copied once."""
        whole = keys_HTD.shape[1] // BLOCK * BLOCK
        self.shared = tuple(memory[:, :whole].contiguous() for memory in (keys_HTD, values_HTD))
        left = (memory[None, :, whole:].expand(sequences, -1, -1, -1) for memory in (keys_HTD, values_HTD))
        self.house(*(with_room(memory, memory.shape[2]) for memory in left))
        self.origin, self.length = whole, keys_HTD.shape[1]

    @property
    def keys(self) -> Tensor | None:
        """(B, H, T, D) of all tokens: new memory. It can be set to None alone."""
        return self._whole(0)

    @keys.setter
    def keys(self, tensor: Tensor | None) -> None:
        self._forget(tensor)

    @property
    def values(self) -> Tensor | None:
        """(B, H, T, D) of all tokens: new memory. It can be set to None alone."""
        return self._whole(1)

    @values.setter
    def values(self, tensor: Tensor | None) -> None:
        self._forget(tensor)

    def _forget(self, tensor: Tensor | None) -> None:
        if tensor is not None:
            raise ValueError("a store whose sequences share a prefix cannot be set; append to it, or begin a new one")
        self.reset()

    def _whole(self, which: int) -> Tensor | None:
        memory = (self.keys_BHTD, self.values_BHTD)[which]
        if memory is None or not self.shared:
            return memory if memory is None else memory[:, :, : self.rows]
        return torch.cat((self.shared[which].expand(memory.shape[0], -1, -1, -1), memory[:, :, : self.rows]), 2)

    def append(self, keys_BHTD: Tensor, values_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Adds new tokens, and gives what the first of them looks back to, and theirs: new memory."""
        super().append(keys_BHTD, values_BHTD)
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        return keys, values

    def parts(self, starts: Sequence[int] = ()) -> tuple[Part, ...]:
        """The prefix, as every sequence sees it.

        Args:
            starts: the first token of each sequence that counts; a prefix that all share has no padding.
        """
        heads, tokens = self.shared[0].shape[:2] if self.shared else (0, 0)
        if not tokens or self.keys_BHTD is None:
            return ()
        sequences, offsets = self.keys_BHTD.shape[0], []
        keys, values = (
            BlockLayout(role, BLOCK, memory.shape[2], 16, dtype=memory.dtype)
            for role, memory in zip(("keys", "values"), self.shared, strict=True)
        )
        for layout in (keys, values):
            first_H = torch.arange(heads, dtype=torch.int64, device="cpu") * (tokens // BLOCK * layout.bytes)
            offsets.append(first_H.expand(sequences, -1).contiguous())
        lengths_BK = torch.full((sequences, heads), tokens, dtype=torch.int32, device="cpu")
        one, other = (memory.view(-1).view(torch.uint8) for memory in self.shared)
        return (Part(keys, values, one, other, offsets[0], offsets[1], lengths_BK),)

    def reset(self) -> None:
        """Forgets everything, the prefix too."""
        self.shared = ()
        super().reset()

    @property
    def bytes(self) -> int:
        """Of the memory, room and prefix included."""
        return super().bytes + sum(memory.numel() * memory.element_size() for memory in self.shared)
