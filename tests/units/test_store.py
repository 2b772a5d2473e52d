"""Stores as plain tensors: what is appended is what is held, whatever happens in between."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from regauge.runtime.store.growing import ROOM, Growing, Sliding


def tokens(count: int, seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Keys and values (B, 3, count, 5)."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, count, 5, generator=draw), torch.randn(batch, 3, count, 5, generator=draw)


def test_what_is_appended_is_held_and_room_is_made_in_steps() -> None:
    store, (keys, values) = Growing(), tokens(700)
    first = store.append(keys[:, :, :300], values[:, :, :300])
    stamp, room = store.stamp, store.room
    assert first[0].equal(keys[:, :, :300])
    for at in range(300, room):
        found = store.append(keys[:, :, at : at + 1], values[:, :, at : at + 1])
    assert store.stamp == stamp, "a token is written in place"
    assert found[0].equal(keys[:, :, :room])
    assert found[1].equal(values[:, :, :room])
    store.append(keys[:, :, room : room + 1], values[:, :, room : room + 1])
    assert store.stamp != stamp
    assert store.room % ROOM == 0
    assert store.bytes == 2 * 2 * 3 * store.room * 5 * 4


def test_tokens_are_taken_back_without_a_copy() -> None:
    store, (keys, values) = Growing(), tokens(9)
    store.append(keys, values)
    stamp = store.stamp
    store.keep(4)
    assert (store.length, store.stamp) == (4, stamp)
    assert store.values is not None
    assert store.values.equal(values[:, :, :4])
    for wrong in (5, -1):
        with pytest.raises(ValueError, match=f"tokens 0 to 4 cannot go back to {wrong}"):
            store.keep(wrong)


def test_sequences_are_reordered_and_the_memory_is_another() -> None:
    store, (keys, values) = Growing(), tokens(6, batch=3)
    store.append(keys, values)
    stamp, room = store.stamp, store.room
    store.reorder(torch.tensor([2, 0, 0]))
    assert store.keys is not None
    assert store.keys.equal(keys[[2, 0, 0]])
    assert store.room == room
    assert store.stamp != stamp
    more = tokens(1, 1, batch=3)
    assert store.append(*more)[1].equal(torch.cat((values[[2, 0, 0]], more[1]), 2))


def test_a_window_shows_what_it_looks_back_to_and_no_more() -> None:
    store, (keys, values) = Sliding(4), tokens(9)
    store.append(keys[:, :, :8], values[:, :, :8])
    seen, _ = store.append(keys[:, :, 8:], values[:, :, 8:])
    assert seen.equal(keys[:, :, 5:9])
    assert store.origin > 0
    with pytest.raises(RuntimeError, match="cannot be taken back from a window of 4"):
        store.keep(2)


def test_the_runtime_needs_no_model_library() -> None:
    code = (
        "import sys, regauge.runtime.step.program, regauge.runtime.step.running, regauge.runtime.step.signature\n"
        "import regauge.runtime.store.growing, regauge.runtime.window.build, regauge.runtime.matrices.modules\n"
        "print([m for m in ('transformers', 'regauge.hosts', 'regauge.artifact') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
