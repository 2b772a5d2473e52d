"""A cache in a file: what comes back goes on as the one that was saved, and what is not its own is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pico import pico
from regauge.cache.scheme import CachePlan, Scheme
from regauge.errors import ArtifactError, ModelError, OutputError
from regauge.formats.grains import Time, Token
from regauge.hosts.transformers.packed import cache_of
from regauge.hosts.transformers.saved import identity, load_cache, save_cache
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
    path = save_cache(cache, tmp_path / "a.safetensors", model)
    size = sum(layer.bytes for layer in cache.layers)
    assert path.stat().st_size < size + 6000
    loaded = load_cache(path, model, plan)
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
    loaded = load_cache(save_cache(cache, tmp_path / "a", model), model, plan)
    assert loaded.layers[1].held.equal(cache.layers[1].held)
    assert loaded.layers[1].keys.equal(cache.layers[1].keys)
    assert loaded.layers[0].get_mask_sizes(1) == cache.layers[0].get_mask_sizes(1)
    with pytest.raises(RuntimeError, match="a policy has let go"):
        loaded.layers[1].crop(-60)


def test_what_is_not_its_own_is_refused(tmp_path: Path) -> None:
    model, plan = pico("llama", **HEADS), plan_of(SCHEMES["kivi-2"], 2)
    cache, _ = begun(model, plan)
    path = save_cache(cache, tmp_path / "a", model)
    with pytest.raises(OutputError, match="does not replace it"):
        save_cache(cache, path, model)
    with pytest.raises(ArtifactError, match="of another model, or of this one otherwise compressed"):
        load_cache(path, pico("llama", seed=1, **HEADS), plan)
    with pytest.raises(ArtifactError, match="differs from 'test' of this model"):
        load_cache(path, model, plan_of(SCHEMES["kv8"], 2))
    with pytest.raises(ArtifactError, match="this model has no such cache"):
        load_cache(path, model)
    for name, wrong in (("version", 2), ("layout", 0), ("numbers", 3), ("numbers", [{"length": -1}] * 2)):
        changed = rewritten(path, tmp_path / f"{name}{wrong}"[:20], {name: wrong})
        with pytest.raises(ArtifactError, match=r"puts tokens away otherwise|what is no sense"):
            load_cache(changed, model, plan)
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-40])
    (tmp_path / "text").write_text("no cache")
    for name in ("cut", "text", "absent"):
        with pytest.raises(ArtifactError, match="cannot be read as a saved cache"):
            load_cache(tmp_path / name, model, plan)
    save_file({"0.keys": torch.zeros(1)}, tmp_path / "plain")
    with pytest.raises(ArtifactError, match="says whose tokens these are"):
        load_cache(tmp_path / "plain", model, plan)


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
    path = save_cache(begun(model, plan)[0], tmp_path / "a", model)
    with pytest.raises(ArtifactError, match=why):
        load_cache(rewritten(path, tmp_path / "b", {}, {name: tensor}), model, plan)


def rewritten(path: Path, to: Path, about: dict[str, Any], tensors: dict[str, Any] | None = None) -> Path:
    from safetensors import safe_open

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
    path = save_cache(cache, tmp_path / "a", model)
    code = (
        "import sys; sys.path[:0] = ['tests', '.']\n"
        "from test_cache_saved import *\n"
        "model = pico('llama', **HEADS)\n"
        f"cache = load_cache({str(path)!r}, model, plan_of(SCHEMES['kivi-2'], 2))\n"
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
