"""A cache in a file: what comes back goes on as the one that was saved, and what is not its own is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import StaticCache

import regauge as rg
from pico import pico
from regauge.artifact import disk
from regauge.cache.scheme import CachePlan, Scheme
from regauge.errors import ArtifactError, ModelError, OutputError, SettingError
from regauge.formats.grains import Time, Token
from regauge.hosts.transformers import saved
from regauge.hosts.transformers.packed import cache_of
from regauge.hosts.transformers.saved import identity, load, save
from stores import asymmetric, kivi, plan_of, symmetric

SCHEMES = {
    "kivi-2": kivi(2, window=8),
    "kv8": Scheme(symmetric(8, Token()), symmetric(8, Token())),
    "balanced": Scheme(asymmetric(4, Time(32)), asymmetric(2, Time(32)), 3, hadamard=True, balance=2),
}
HEADS = {"head_dim": 16, "max_position_embeddings": 512}


def begun(model: Any, plan: CachePlan, tokens: int = 70) -> tuple[Any, torch.Tensor]:
    cache = cache_of(plan, model)
    ids = torch.randint(3, 50, (2, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    return cache, ids


def next_logits(model: Any, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([[7], [9]]), past_key_values=cache).logits
    return found


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("tokens", [1, 70])
def test_what_was_saved_goes_on(name: str, tokens: int, tmp_path: Path) -> None:
    model, plan = pico("llama", **HEADS), plan_of(SCHEMES[name], 2)
    cache, _ = begun(model, plan, tokens)
    cache.layers[1].beside["mass"] = torch.arange(2.0)
    path = save(model, cache, tmp_path / "a.safetensors")
    size = sum(layer.bytes for layer in cache.layers)
    assert path.stat().st_size < size + 6000
    loaded = load(model, path, plan)
    assert loaded.layers[1].beside["mass"].tolist() == [0.0, 1.0]
    assert loaded.get_seq_length() == tokens
    assert next_logits(model, loaded).equal(next_logits(model, cache))
    loaded.crop(-1)
    cache.crop(-1)
    assert loaded.layers[0].keys.equal(cache.layers[0].keys)


def test_evicted_and_sliding_blocks_are_saved_too(tmp_path: Path) -> None:
    model = pico("gemma3", **HEADS)
    plan = CachePlan("half", (None, plan_of(kivi(4, window=8), 2).blocks[1]))
    cache, _ = begun(model, plan)
    rows = torch.arange(32)
    kept = [[rows if (b + h) % 2 else rows[:0] for h in range(3)] for b in range(2)]
    cache.layers[1].evict(kept)
    loaded = load(model, save(model, cache, tmp_path / "a"), plan)
    assert loaded.layers[1].held.equal(cache.layers[1].held)
    assert loaded.layers[1].keys.equal(cache.layers[1].keys)
    assert loaded.layers[0].get_mask_sizes(1) == cache.layers[0].get_mask_sizes(1)
    with pytest.raises(RuntimeError, match="a policy has let go"):
        loaded.layers[1].crop(-60)


def test_what_is_not_its_own_is_refused(tmp_path: Path) -> None:
    model, plan = pico("llama", **HEADS), plan_of(SCHEMES["kivi-2"], 2)
    cache, _ = begun(model, plan)
    path = save(model, cache, tmp_path / "a")
    with pytest.raises(OutputError, match="does not replace it"):
        save(model, cache, path)
    with pytest.raises(ArtifactError, match="of another model, or of this one otherwise compressed"):
        load(pico("llama", seed=1, **HEADS), path, plan)
    with pytest.raises(ArtifactError, match="differs from 'test' of this model"):
        load(model, path, plan_of(SCHEMES["kv8"], 2))
    with pytest.raises(ArtifactError, match="this model has no such cache"):
        load(model, path)
    for name, wrong in (("version", 2), ("layout", 0), ("numbers", 3), ("numbers", [{"length": -1}] * 2)):
        changed = rewritten(path, tmp_path / f"{name}{wrong}"[:20], {name: wrong})
        with pytest.raises(ArtifactError, match=r"puts tokens away otherwise|what is no sense"):
            load(model, changed, plan)
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-40])
    (tmp_path / "text").write_text("no cache")
    for name in ("cut", "text", "absent"):
        with pytest.raises(ArtifactError, match="cannot be read as a saved cache"):
            load(model, tmp_path / name, plan)
    save_file({"0.keys": torch.zeros(1)}, tmp_path / "plain")
    with pytest.raises(ArtifactError, match="says whose tokens these are"):
        load(model, tmp_path / "plain", plan)


def test_a_cache_of_transformers_own_is_saved_by_its_public_name(tmp_path: Path) -> None:
    """Blocks behind a window among them; it comes back as the same kind and goes on as the one that was saved."""
    model = pico("gemma3", **HEADS)
    with torch.no_grad():
        cache = model(torch.arange(3, 33).repeat(2, 1), use_cache=True).past_key_values
    kinds = [type(layer) for layer in cache.layers]
    loaded = rg.cache.load(model, rg.cache.save(model, cache, tmp_path / "a"))
    assert [type(layer) for layer in cache.layers] == kinds
    assert type(loaded) is type(cache)
    assert loaded.get_seq_length() == 30
    assert next_logits(model, loaded).equal(next_logits(model, cache))
    with pytest.raises(ModelError, match="a StaticCache is not saved"):
        rg.cache.save(model, StaticCache(config=model.config, max_cache_len=16), tmp_path / "b")
    with pytest.raises(SettingError, match=r"that rg.load did not load keeps no 'kivi-4'"):
        rg.cache.load(model, tmp_path / "a", "kivi-4")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = pico("llama", **HEADS), plan_of(SCHEMES["kivi-2"], 2)
    cache, _ = begun(model, plan)

    def half(tensors: Any, path: Path, *about: Any) -> None:
        path.write_bytes(bytes(100))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saved, "save_file", half)
        with pytest.raises(OutputError, match=r"cannot be written, and nothing is left there: .*No space left"):
            save(model, cache, tmp_path / "a")
        patch.setattr(disk, "free_bytes", lambda out: 10)
        with pytest.raises(OutputError, match="its disk has 10 B free"):
            save(model, cache, tmp_path / "a")
    with pytest.raises(OutputError, match="cannot be written"):
        save(model, cache, tmp_path / "absent" / "a")
    assert not [*tmp_path.iterdir()]
    assert next_logits(model, load(model, save(model, cache, tmp_path / "a"), plan)).equal(next_logits(model, cache))


def test_a_file_of_another_model_is_refused_before_its_tensors_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan = pico("llama", **HEADS), plan_of(SCHEMES["kivi-2"], 2)
    path = save(model, begun(model, plan)[0], tmp_path / "a")
    monkeypatch.setattr(saved, "safe_open", Header)
    with pytest.raises(ArtifactError, match="of another model"):
        load(pico("llama", seed=1, **HEADS), path, plan)


class Header:
    """A file of which nothing but what it says of itself can be read."""

    def __init__(self, path: Path, framework: str) -> None:
        with safe_open(path, framework) as file:
            self.about: dict[str, str] = file.metadata()

    def __enter__(self) -> Header:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def metadata(self) -> dict[str, str]:
        return self.about


@pytest.mark.parametrize(
    ("name", "tensor", "why"),
    [
        ("0.keys", torch.zeros(2, 3, 5, 16), "holds 5 of them"),
        ("0.keys", torch.zeros(2), "have 4 axes, and 1 axes was found"),
        ("1.counts", torch.ones(1, 1, dtype=torch.int64), "counts blocks of heads"),
        ("1.counts", torch.full((2, 3), 9), "54 blocks of this kind are"),
        ("1.key_blocks", torch.zeros(6, 3, dtype=torch.uint8), "6 blocks of this kind are"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name: str, tensor: Any, why: str, tmp_path: Path) -> None:
    model, plan = pico("llama", **HEADS), plan_of(SCHEMES["kivi-2"], 2)
    path = save(model, begun(model, plan)[0], tmp_path / "a")
    with pytest.raises(ArtifactError, match=why):
        load(model, rewritten(path, tmp_path / "b", {}, {name: tensor}), plan)


def rewritten(path: Path, to: Path, about: dict[str, Any], tensors: dict[str, Any] | None = None) -> Path:
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["regauge_cache"]) | about
    save_file(load_file(path) | (tensors or {}), to, {"regauge_cache": json.dumps(told)})
    return to


def test_a_model_s_identity_is_its_own() -> None:
    model = pico("llama", **HEADS)
    assert identity(model) == identity(pico("llama", **HEADS)) != identity(pico("llama", seed=2, **HEADS))
    before = identity(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 3] += 1
    assert identity(model) != before
    with pytest.raises(ModelError, match="not in memory"):
        identity(model.to("meta"))


@pytest.mark.slow
def test_another_process_goes_on(tmp_path: Path) -> None:
    model, plan = pico("llama", **HEADS), plan_of(SCHEMES["kivi-2"], 2)
    cache, _ = begun(model, plan)
    path = save(model, cache, tmp_path / "a")
    code = (
        "import sys; sys.path[:0] = ['tests', '.']\n"
        "from test_cache_saved import *\n"
        "model = pico('llama', **HEADS)\n"
        f"cache = load(model, {str(path)!r}, plan_of(SCHEMES['kivi-2'], 2))\n"
        "print(next_logits(model, cache).double().sum().item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": "tests/units:tests", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(next_logits(model, cache).double().sum().item(), abs=1e-6)
