"""The growing stores of `runtime/store` as layers of transformers' dynamic cache, which the native step shares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from regauge.runtime.store.growing import Growing, Sliding


class GrowingLayer(Growing, DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """transformers' dynamic layer over memory with room."""

    def __init__(self) -> None:
        Growing.__init__(self)
        DynamicLayer.__init__(self)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Memory for what comes first."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends (B, H, T, D) of new tokens, and gives what the first of them looks back to, and theirs."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.append(key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.length

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.is_initialized = False

    def _take_back(self, tokens_to_remove: int) -> None:
        """What `crop` asks of a store that goes back by itself."""
        if tokens_to_remove > 0:
            raise ValueError(f"`crop` takes tokens away by a negative number, not {tokens_to_remove}.")
        self.keep(self.length + tokens_to_remove)


class OwnLayer(GrowingLayer):
    """A layer whose memory transformers cannot cut or index: the store goes back and picks sequences by itself."""

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back (a negative number), and settles the others.

        Raises:
            ValueError: the number is positive, or the store does not go back so far.
            RuntimeError: what would then be seen is held no more.
        """
        self._take_back(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The sequences in another order, as a beam search wants them."""
        self.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence so many times."""
        if self.keys_BHTD is not None:
            batch = self.keys_BHTD.shape[0]
            self.reorder(torch.arange(batch, dtype=torch.int64, device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the sequences, by number or by mask."""
        self.reorder(indices.nonzero()[:, 0] if indices.dtype is torch.bool else indices)


class SlidingLayer(Sliding, GrowingLayer):
    """transformers' layer behind a sliding window, over a window's memory."""

    is_sliding = True

    def __init__(self, sliding_window: int, **kwargs: Any) -> None:
        super().__init__(sliding_window)

    def activate_past_recording(self) -> None:
        """Until the next `crop` everything from here on can be taken back."""
        self.record()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that `update` will give, the first of them)."""
        visible = min(self.length, self.sliding_window - 1)
        return visible + query_length, self.length - visible

    def get_max_length(self) -> int:
        """Tokens that attention looks back."""
        return self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back (a negative number), and lets go of what the window has left behind.

        Raises:
            ValueError: the number is positive.
            RuntimeError: what the window would then show is held no more.
        """
        self._take_back(tokens_to_remove)
