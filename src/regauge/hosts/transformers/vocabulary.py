"""Resizing the tables of a vocabulary, where they are packed: refused before anything is changed."""

from __future__ import annotations

from typing import Any

from regauge.errors import ModelError
from regauge.hosts.transformers.owned import method, own
from regauge.runtime.matrices.modules import PackedLinear, PackedLookup

RESIZE, TIE = "resize_token_embeddings", "tie_weights"


def guard(model: Any) -> None:
    """Puts a check before `resize_token_embeddings` and `tie_weights` of a model and of the models in it."""
    for module in model.modules():
        if hasattr(type(module), RESIZE):
            own(module, RESIZE, _resize)
            own(module, TIE, _tie)


def _packed(model: Any) -> list[Any]:
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return [table for table in tables if isinstance(table, (PackedLookup, PackedLinear))]


def _resize(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
) -> Any:
    """As transformers does it.

    Raises:
        ModelError: the table, or the head, is packed, and its rows would change.
    """
    packed = _packed(model)
    if not packed:
        return method(model, RESIZE)(new_num_tokens, pad_to_multiple_of, mean_resizing)
    now = int(packed[0].weight.shape[0])
    step = pad_to_multiple_of or 1
    asked = -(-(new_num_tokens or now) // step) * step
    if asked != now:
        raise ModelError(
            f"the vocabulary's tables of this model are packed and have {now} rows, so they cannot be resized to "
            f"{asked}: resize the source's and compress that, or leave `embed` and `head` out of the recipe."
        )
    return model.get_input_embeddings()


def _tie(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Packed tables that are tied are one since they were loaded."""
    return None if _packed(model) else method(model, TIE)(*args, **kwargs)
