"""A loaded model keeps its past as its artifact says, as the user says, or as one request asks."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

import regauge as rg
from pico import pico, save
from regauge.errors import FallbackWarning, RecipeError, SettingError
from regauge.hosts import host_of
from regauge.hosts.transformers import ways
from regauge.hosts.transformers.caching import fresh
from regauge.hosts.transformers.packed import PackedCache
from regauge.measure.quality import compare
from regauge.plan import load
from regauge.text.windows import Windows

SIZES = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.arange(1, 9, dtype=torch.int64).reshape(1, 8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(pico("llama", **SIZES), tmp_path_factory.mktemp("keeping") / "model")


@pytest.fixture(scope="module", params=["rtn-w4g32+kivi-4", "nf4+kivi-4", "kivi-4"])
def artifact(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In compressed-tensors, in our own format, and with nothing rounded but the cache."""
    out = tmp_path_factory.mktemp("artifact") / "out"
    receipt = rg.apply(request.param, source, out, quiet=True)
    assert [store.name for store in receipt.caches] == ["blocks.0.cache", "blocks.1.cache"]
    assert receipt.caches[0].bytes_before == 2 * 2 * 32
    return out


def used(model: Any, **options: Any) -> Any:
    """The cache that `generate` used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)  # whether the native step reads it is told elsewhere
        found = model.generate(IDS, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, **options)
    return found.past_key_values


def scheme(model: Any) -> Any:
    return model.regauge_cache.blocks[0].scheme


def test_an_artifact_says_what_is_kept(artifact: Path) -> None:
    model = rg.load(artifact)
    assert scheme(model).keys.grid.name == "int4-asym"
    assert type(used(model)) is PackedCache
    assert type(fresh(model)) is PackedCache
    assert "The cache of 2 blocks is kept as `keys int4-asym/time:32" in (artifact / "README.md").read_text()
    assert load(artifact).of("cache") == load("kivi-4").of("cache")


def test_a_user_says_otherwise(artifact: Path) -> None:
    assert scheme(rg.load(artifact, cache="kv8")).keys.grid.name == "int8"
    whole = rg.load(artifact, cache="none")
    assert whole.regauge_cache is None
    assert type(used(whole)) is DynamicCache


def test_a_plain_model_is_given_one(source: Path, tmp_path: Path) -> None:
    assert rg.load(source).regauge_cache is None
    assert type(used(rg.load(source))) is DynamicCache
    model = rg.load(source, cache={"keys": "int8/token", "values": "int4-asym/token"})
    assert scheme(model).values.grid.name == "int4-asym"
    assert type(used(model)) is PackedCache
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("cache: {'*': {keys: int4/token}}")
    assert scheme(rg.load(source, cache=recipe)).keys.grid.name == "int4"


def test_one_request_asks(artifact: Path) -> None:
    model = rg.load(artifact, cache="none")
    assert type(used(model, regauge_cache="kivi-4")) is PackedCache
    assert type(used(model)) is DynamicCache
    assert type(used(rg.load(artifact), regauge_cache="none")) is DynamicCache
    asked = GenerationConfig(**json.loads('{"max_new_tokens": 2, "regauge_cache": {"keys": "int8/token"}}'))
    assert type(used(model, generation_config=asked)) is PackedCache


def test_a_request_names_no_file_and_no_code(artifact: Path, tmp_path: Path) -> None:
    model = rg.load(artifact)
    (tmp_path / "mine.yaml").write_text("cache: {'*': {keys: int4/token}}")
    for request, error, message in (
        (str(tmp_path / "mine.yaml"), RecipeError, "there is no preset of a cache called"),
        ({"keys": "my.pkg:Grid/token"}, RecipeError, "is code of another package"),
        ("kivi-3", RecipeError, "there is no preset of a cache called 'kivi-3' (did you mean 'kivi-"),
        (4, SettingError, "regauge_cache='4' is no cache: give a preset's name, 'none', or a rule as a mapping"),
        ({"keys": "int4/group:7"}, RecipeError, "groups of 7 do not divide a width of 16"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            used(model, regauge_cache=request)
    with pytest.raises(SettingError, match="are two caches: give one of them"):
        used(model, regauge_cache="kv8", past_key_values=fresh(model))
    with pytest.raises(SettingError, match="are two caches: give one of them"):
        used(model, regauge_cache="kv8", cache_implementation="static")


def test_a_cache_of_the_users_own_is_taken(artifact: Path) -> None:
    model = rg.load(artifact)
    mine = DynamicCache(config=model.config)
    assert used(model, past_key_values=mine) is mine
    with pytest.warns(FallbackWarning) as caught:
        model.generate(IDS, max_new_tokens=2, cache_implementation="static")
    assert any("so the cache is transformers' own and not out" in str(one.message) for one in caught)


def test_a_forward_that_asks_for_a_cache_begins_one(artifact: Path) -> None:
    model = rg.load(artifact)
    assert type(model(IDS, use_cache=True).past_key_values) is PackedCache
    assert model(IDS, use_cache=False).past_key_values is None
    assert type(next(iter([fresh(model, "none")]))) is DynamicCache


def test_continuous_batching_is_refused_in_a_sentence(artifact: Path) -> None:
    model = rg.load(artifact)
    with pytest.raises(SettingError, match="continuous batching pages its own cache in full precision"):
        model.generate_batch([[1, 2, 3]])


def test_a_cache_that_does_not_fit_is_refused_before_a_tensor_is_read(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="groups of 7 do not divide a width of 16"):
        rg.load(artifact, cache={"keys": "int4/group:7"})
    with pytest.raises(RecipeError, match="'rtn-w4g32' says nothing of a cache"):
        rg.load(artifact, cache="rtn-w4g32")
    bert = save(pico("bert"), tmp_path / "bert")
    with pytest.raises(RecipeError, match="keeps no keys and values of its past"):
        rg.load(bert, cache="kivi-4")


def test_nothing_to_change_is_said(tmp_path: Path) -> None:
    slides = save(pico("mistral"), tmp_path / "mistral")
    with pytest.warns(FallbackWarning, match="kivi-4 changes no block's cache of this model"):
        model = rg.load(slides, cache="kivi-4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(used(model)) is DynamicCache


def test_a_stored_cache_is_data(artifact: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    beside, inside = copy / "regauge" / "cache.json", copy / "config.json"
    path = beside if beside.exists() else inside
    text = path.read_text()
    assert "int4-asym/time:32" in text
    for other, message in (
        ("os/path.py:join", "of another package"),
        ("int4-asym/time:24", "blocks have a multiple of 16 tokens"),
        ("int9/token", "there is no grid 'int9'"),
    ):
        path.write_text(text.replace("int4-asym/time:32", other))
        with pytest.raises(rg.errors.ArtifactError, match=re.escape(message)):
            rg.load(copy)


def test_quality_is_read_with_the_cache(source: Path) -> None:
    host = host_of(source)
    ids_BT = torch.randint(0, 53, (1, 129), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    batches = [{"input_ids": ids_BT}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        whole, wide, coarse = (
            torch.cat(list(host.outputs(source, batches, cache)()))
            for cache in (None, {"keys": "int8/token", "window": 129}, {"keys": "int2/token", "values": "int2/token"})
        )
    assert whole.shape == coarse.shape == (1, 129, 53)
    torch.testing.assert_close(wide, whole, rtol=1e-4, atol=1e-5)  # nothing has left the window
    torch.testing.assert_close(coarse[:, :64], whole[:, :64], rtol=1e-4, atol=1e-5)  # read at once
    assert (coarse[:, 70:] - whole[:, 70:]).abs().max() > 1e-3
    assert host.facts(source, "kivi-4").keeps == "kivi-4"
    assert host.facts(source).keeps == ""


def test_quality_is_read_as_decoding_reads(source: Path) -> None:
    """In pieces, and to the last digit as token by token: what a block of the cache holds in codes is read so. All at
    once, tokens would read each other's as they came."""
    model = rg.load(source, dtype="float32", cache={"keys": "int4-asym/token", "values": "int4-asym/token"})
    ids_BT = torch.randint(0, 53, (1, 128), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    apart = {}
    with torch.no_grad():
        (found_BTV,) = ways.outputs_of_model(lambda: model, [{"input_ids": ids_BT}])()
        for size in (1, 64):
            cache, parts = fresh(model), []
            for piece_BT in (ids_BT[:, :64], *torch.split(ids_BT[:, 64:], size, 1)):
                parts.append(model(piece_BT, past_key_values=cache, use_cache=True).logits)
            apart[size] = float((torch.cat(parts, 1) - found_BTV).abs().max())
    assert apart[1] < 1e-5
    assert apart[64] > 1e-3


def test_scores_begin_in_the_middle_of_a_window() -> None:
    halved = Windows((torch.arange(10), torch.arange(3)), (0, 1), (20, 6), halved=True)
    assert halved.predicted == 5 + 2
    logits = [torch.randn(1, 10, 11), torch.randn(1, 3, 11)]
    assert [batch.halved for batch in halved.batches(1)] == [True, True]
    found = compare(halved, logits, [one.clone() for one in logits], 1)
    assert len(found.kl_N) == 7
    logits[0][:, :4] += torch.randn(1, 4, 11)  # what is not scored
    assert compare(halved, logits, logits, 1).kl_N.sum() == 0
