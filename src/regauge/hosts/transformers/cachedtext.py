"""A model on the cache of one text, which reads some tokens at a time and takes them back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regauge.hosts.transformers.adopting import adopt
from regauge.hosts.transformers.cache import GrowingLayer


class CachedText:
    """A model on the cache of one text.

    Args:
        mask: (1, T) of the prompt, which may begin with padding; None: it does not.

    Attributes:
        layers: of the cache, where they are ours; None where they are not.
    """

    def __init__(self, model: Any, cache: Any, mask: Tensor | None = None) -> None:
        self.model, self.cache = model, cache
        self.mask = None if mask is None or bool(mask.all()) else mask
        self.layers = self._found()
        cache.activate_past_recording()

    def _found(self) -> list[GrowingLayer] | None:
        """The layers of the cache, where they are ours."""
        anatomy = getattr(self.model, "regauge_anatomy", None)
        return None if anatomy is None else adopt(self.cache, anatomy.blocks)

    def step(self, ids: Sequence[int]) -> Tensor:
        """Logits (Q, V) of so many tokens more."""
        past, new = self.cache.get_seq_length(), len(ids)
        ids_1Q = torch.tensor([ids], dtype=torch.int64, device=self.model.device)
        more: dict[str, Any] = {}
        if self.mask is not None:
            shown = self.mask.new_ones(1, past + new - self.mask.shape[1])
            mask_1T = torch.cat((self.mask, shown), 1)
            positions = (mask_1T.cumsum(1) - 1)[:, past:]
            more = {"attention_mask": mask_1T, "position_ids": positions}
        with torch.no_grad():
            out = self.model(input_ids=ids_1Q, past_key_values=self.cache, use_cache=True, **more)
        logits_QV: Tensor = out.logits[0, -new:]
        return logits_QV

    def back(self, tokens: int) -> None:
        """Takes the last tokens back."""
        plain = self.layers is not None and all(type(layer) is GrowingLayer for layer in self.layers)
        if plain and self.layers is not None:
            for layer in self.layers if tokens else ():
                layer.keep(layer.length - tokens)
        else:
            self.cache.crop(-tokens)

    def together(self, most: int) -> int:
        """How many tokens may be read at once."""
        return min((layer.together(most) for layer in self.layers), default=most) if self.layers else most
