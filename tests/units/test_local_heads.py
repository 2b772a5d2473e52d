"""Heads that see a window keep a window, and the first tokens: what comes out is what masks alone give."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import regauge
from regauge.engine import apply
from regauge.errors import FallbackWarning
from regauge.hosts.transformers import local
from regauge.hosts.transformers.local import LocalLayer
from regauge.plan.text import parse
from tests.pico import pico, save

IDS = torch.arange(60).view(2, 30) * 11 % 53
RULES = {
    "some": "blocks.*: {window: {part: local, heads: '0+2', tokens: 6, sinks: 2}}",
    "all": "blocks.*: {window: {part: local, heads: all, tokens: 5, sinks: 0}}",
}


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        yield


@pytest.fixture(scope="module", params=RULES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp(request.param)
    apply(parse(f"attention: {{{RULES[request.param]}}}"), save(pico("llama", 0), where / "source"), where / "out")
    return where / "out"


def masked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same model, whose caches keep everything."""
    model = regauge.load(folder, dtype="float64")
    monkeypatch.setattr(local, "_adopt", lambda cache, module: None)
    return model


def decoded(model: Any, mask: Tensor, pieces: tuple[int, ...]) -> tuple[Tensor, Any]:
    cache, found, at = DynamicCache(config=model.config), [], 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for size in pieces:
            stop = at + size
            seen = None if bool(mask.all()) else mask[:, :stop]
            more = {"position_ids": positions[:, at:stop]}
            found.append(model(IDS[:, at:stop], attention_mask=seen, past_key_values=cache, **more).logits)
            at = stop
    return torch.cat(found, 1), cache


@pytest.mark.parametrize("padded", [0, 3, 12])
@pytest.mark.parametrize("pieces", [(9, *[1] * 21), (1, 3, 7, 1, 8, 10), (30,)])
def test_it_is_what_masks_give(
    folder: Path, padded: int, pieces: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[1, :padded] = 0
    found, cache = decoded(regauge.load(folder, dtype="float64"), mask, pieces)
    assert {type(layer) for layer in cache.layers} == {LocalLayer}
    want, other = decoded(masked(folder, monkeypatch), mask, pieces)
    assert LocalLayer not in {type(layer) for layer in other.layers}
    torch.testing.assert_close(found[mask.bool()], want[mask.bool()], rtol=1e-10, atol=1e-10)


def test_beams_and_rollbacks_and_copies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = regauge.load(folder, dtype="float64")
    ask: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    beams = mine.generate(IDS, attention_mask=mask, num_beams=3, **ask)
    looked = mine.generate(IDS[:1], prompt_lookup_num_tokens=3, **ask)
    copied = copy.deepcopy(mine).generate(IDS, **ask)
    pickled = pickle.loads(pickle.dumps(mine)).generate(IDS, **ask)
    other = masked(folder, monkeypatch)
    assert torch.equal(beams, other.generate(IDS, attention_mask=mask, num_beams=3, **ask))
    assert torch.equal(looked, other.generate(IDS[:1], prompt_lookup_num_tokens=3, **ask))
    assert torch.equal(copied, other.generate(IDS, **ask))
    assert torch.equal(pickled, copied)


def test_what_a_window_has_left_behind_is_freed(folder: Path) -> None:
    """Bytes by the formula: a head that keeps everything T tokens, another its window (a quarter more, at least 16)."""
    model = regauge.load(folder, dtype="float32")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for start in range(0, 1024, 256):
            model(torch.arange(start, start + 256)[None] % 53, past_key_values=cache)
    layer: Any = cache.layers[0]
    assert layer.get_seq_length() == 1024
    row = 2 * 10 * 4  # keys and values, channels, bytes
    kept, tokens, sinks = len(layer.whole), layer.local.tokens, layer.local.sinks
    assert layer.window.rows == tokens - 1
    near = len(layer.near) * (sinks + layer.window.room) * row
    assert layer.window.room <= 256 + tokens + 2 * 16  # what one call of 256 brought
    assert layer.bytes == kept * layer.long.room * row + near
    assert layer.bytes < 0.65 * 3 * 1024 * row


def test_a_rollback_behind_the_window_is_refused_and_another_attention_function_is_noticed(folder: Path) -> None:
    model = regauge.load(folder, dtype="float32")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        model(IDS[:, :1], past_key_values=cache)
    with pytest.raises(RuntimeError, match="cannot be taken back from a window"):
        cache.crop(-9)
    layer: Any = cache.layers[0]
    key = torch.zeros(2, 3, 1, 10)
    layer.update(key, key)
    with pytest.raises(regauge.errors.ModelError, match="by another function"):
        layer.update(key, key)
    with pytest.raises(regauge.errors.ModelError, match="cannot be set"):
        layer.keys = key


def test_a_long_prompt_behind_a_window_is_read_in_bands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 4 queries, over prompts that they do and do not divide; and a short prompt by its mask."""
    monkeypatch.setattr(local, "CHUNK", 4)
    calls: list[int] = []

    def counted(query: Tensor, *rest: Any) -> Tensor:
        calls.append(query.shape[2])
        return banded(query, *rest)

    banded = local.banded
    monkeypatch.setattr(local, "banded", counted)
    model = regauge.load(folder, dtype="float64")
    with torch.no_grad():
        found = [model(IDS[:, :tokens], use_cache=cached).logits for tokens, cached in ((30, True), (23, False))]
        assert calls == [30, 30, 23, 23]
        short = model(IDS[:, :12]).logits
        assert len(calls) == 4
        monkeypatch.setattr(local, "CHUNK", 64)
        want = [model(IDS[:, :tokens], use_cache=False).logits for tokens in (30, 23)]
    assert len(calls) == 4
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(short, want[0][:, :12], rtol=1e-10, atol=1e-10)
