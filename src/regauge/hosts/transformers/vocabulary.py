"""Resizing the tables of a vocabulary, where they are packed: refused before anything is changed."""

from __future__ import annotations

from typing import Any

from regauge.errors import ModelError
from regauge.hosts.transformers.owned import method, own
from regauge.runtime.matrices.modules import PackedLinear, PackedLookup

RESIZE = "resize_token_embeddings"


def guard(model: Any) -> None:
    """Puts a check before `resize_token_embeddings` of a model and of the models in it."""
    for module in model.modules():
        if hasattr(type(module), RESIZE):
            own(module, RESIZE, _resize)


def _resize(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
) -> Any:
    """As transformers does it.

    Raises:
        ModelError: the table, or the head, is packed, and its rows would change.
    """
    tables = [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]
    packed = [table for table in tables if isinstance(table, (PackedLookup, PackedLinear))]
    if packed and (new_num_tokens is not None or pad_to_multiple_of):
        now = int(packed[0].weight.shape[0])
        step = pad_to_multiple_of or 1
        asked = -(-(new_num_tokens or now) // step) * step
        if asked != now:
            raise ModelError(
                f"the vocabulary's tables of this model are packed and have {now} rows, so they cannot be resized to "
                f"{asked}: resize the source's and compress that, or leave `embed` and `head` out of the recipe."
            )
    return method(model, RESIZE)(new_num_tokens, pad_to_multiple_of, mean_resizing)
