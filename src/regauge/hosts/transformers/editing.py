"""Edits in the middle of a cached text, without reading it again: Positional Integrity Encoding (arXiv 2407.03157).

Legend: B sequences, T tokens, N tokens inserted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regauge.cache.edits import pieces
from regauge.errors import SettingError
from regauge.hosts.transformers.held import held_of
from regauge.hosts.transformers.moving import Editor, Stretch
from regauge.hosts.transformers.rotary import rotary_of
from regauge.runtime.step.running import first_tokens


class Edited(NamedTuple):
    """What an edit gives.

    Attributes:
        cache: a `DynamicCache` of the edited text, for `generate` or `forward`.
        ids: (B, T) of the edited text.
        attention_mask: (B, T), where one was given.
    """

    cache: Any
    ids: Tensor
    attention_mask: Tensor | None


def edit(
    model: Any,
    cache: Any,
    ids: Tensor | Sequence[int],
    edits: Sequence[Sequence[Any]],
    attention_mask: Tensor | None = None,
    approximate: bool = False,
) -> Edited:
    """Insertions, deletions and replacements in a text that a cache holds, without reading the text again.

        cache = model(ids, use_cache=True).past_key_values
        edited = rg.cache.edit(model, cache, ids, [(40, 3, new_ids), (900, 12)])
        model.generate(edited.ids, past_key_values=edited.cache)

    Keys behind an edit are turned to their new positions, values stay, and new tokens are read once, over the text
    before them. Tokens behind an edit keep the states that they had of the old text: this is what makes it fast, and
    why it is an approximation to reading the new text. docs/edit.md says how good a one.

    Args:
        model: of transformers or `rg.load`, with rotary positions.
        cache: a `DynamicCache` or a packed one that holds the first tokens of `ids`, or all. It stays as it is.
        ids: (B, T) or (T,), the old text.
        edits: `(at, remove, insert)`, counted in the old text, in any order; `rg.cache.changes(old, new)` makes them of
            two texts. `insert` is a list of ids or a tensor (N,) or (B, N), and may be left out.
        attention_mask: (B, T), where sequences are padded on the left; positions are then counted without the padding,
            as `generate` counts them.
        approximate: a packed cache is decoded, its keys are turned, and all is rounded again.

    Returns:
        A new cache, of the new text as far as the old one held the old text: without its last token where that would be
        all of it, since `generate` must have one to read, and without what is inserted behind the last cached token.
        One of 16 bits also has, as its `regauge_moved`, the moved keys as they were first cached: the next edit turns
        these, so that one edit after another adds no rounding. Set it to None to save their bytes.

    Raises:
        ModelError: the model has no rotary positions, or such as change with the length of the text.
        SettingError: an edit lies outside of the text or over another; the cache is of another kind or model, or does
            not hold this text; it is packed in codes and `approximate` is false; or a sliding window has let go of
            tokens that the new text must have.

    Reference: PIE, arXiv 2407.03157. Differs: keys turn from where they were first cached.
    """
    rotary = rotary_of(model)
    old_BT = torch.as_tensor(ids)
    old_BT = (old_BT.unsqueeze(0) if old_BT.ndim == 1 else old_BT).to(model.device)
    pads = _padding(old_BT, attention_mask)
    held = held_of(cache, old_BT, [turn.size for turn in rotary.turns], approximate)
    rows = model.get_input_embeddings().num_embeddings
    text = [
        (_ids([*piece.inserts], old_BT, rows), piece.start, piece.stop)
        for piece in pieces(edits, old_BT.shape[1], max(pads))
    ]
    new_BT = torch.cat([part for new, start, stop in text for part in (new, old_BT[:, start:stop])], 1)
    if new_BT.shape[1] <= max(pads):
        raise SettingError("the edits leave nothing of the text; begin with a new cache instead")
    pads_B1 = torch.tensor(pads, dtype=torch.int64, device=model.device).unsqueeze(1)
    mask_BT = None
    if attention_mask is not None:
        slots = torch.arange(new_BT.shape[1], dtype=torch.int64, device=model.device)
        mask_BT = (slots >= pads_B1).to(attention_mask.dtype)
    stretches = _stretches(text, held[0].length, new_BT.shape[1] - 1)
    editor = Editor(model, rotary, held, pads_B1 if any(pads) else pads_B1[:1], mask_BT)
    with torch.no_grad():
        return Edited(editor.build(cache, stretches), new_BT, mask_BT)


def _padding(ids_BT: Tensor, mask: Tensor | None) -> list[int]:
    """Tokens of padding before each sequence."""
    found = first_tokens(mask, *ids_BT.shape)
    if found is None:
        raise SettingError(f"an attention_mask is of the shape of the ids, {list(ids_BT.shape)}, and pads on the left")
    return found


def _ids(inserts: list[Any], like_BT: Tensor, rows: int) -> Tensor:
    """(B, N) of what is inserted at one place."""
    found = [torch.empty(len(like_BT), 0, dtype=like_BT.dtype, device=like_BT.device)]
    for insert in inserts:
        ids = torch.as_tensor(insert)
        ids = ids.expand(len(like_BT), -1) if ids.ndim == 1 else ids
        if not ids.numel():
            continue
        if ids.ndim != 2 or len(ids) != len(like_BT) or ids.is_floating_point():
            raise SettingError(
                f"what is inserted is a list of ids or one a sequence, not {list(ids.shape)} {ids.dtype}"
            )
        if int(ids.min()) < 0 or int(ids.max()) >= rows:
            raise SettingError(f"the ids inserted are integers from 0 to {rows - 1}, as the model's vocabulary is")
        found.append(ids.to(like_BT))
    return torch.cat(found, 1)


def _stretches(text: list[tuple[Tensor, int, int]], cached: int, most: int) -> list[Stretch]:
    """What the new cache holds, of a text of new ids and stretches of old ones: no more than `most` tokens, and nothing
    behind the last that was cached."""
    found, at = [], 0
    for insert, start, stop in text:
        at += insert.shape[1]
        stop = min(stop, cached, start + most - at)
        if stop > start:
            found.append(Stretch(insert, start, stop, at))
            at += stop - start
        elif start >= cached:
            break
    return found
