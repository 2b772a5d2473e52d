"""The native step against transformers' own forward of the same packed model, token for token."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regauge as rg
from artifacts import choice, make
from pico import CONFIGS, pico, save
from regauge.kernels.cpu.library import available

pytestmark = pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")

DECODERS = [name for name, (_, architecture, _) in CONFIGS.items() if "LM" in architecture and "bert" not in name]
FORMS = {
    "int4": choice("int4", "group:32 else channel", "f16"),
    "int2": choice("int2"),
    "asym": choice("int3-asym", ranger="minmax"),
    "nf4": choice("nf4"),
    "int8": choice("int8"),
    "w8a8": choice("int8", inputs="int8"),
}
UNPACKED = ("position", "router", "type")
MIXED = {"q": "int4", "k": "nf4", "v": None, "o": "asym", "gate": "int8", "up": "int2", "down": "w8a8", "head": "int8"}
EXACT = 3e-6
"""Relative difference of logits where neither side rounds activations: two orders of summation in float32."""
ROUNDED = 1e-3
"""With activations of 16 bits: an input on the edge between two codes may round either way, one part in 2¹⁵."""


def loaded(folder: Path, name: str, form: str = "int4", activations: str | None = "float32", **changes: Any) -> Any:
    """A packed model of one form, or `mixed`."""
    path = save(pico(name, **changes), folder / "source")

    def form_of(site: Any) -> Any:
        wanted = MIXED.get(site.kind) if form == "mixed" else form
        return None if wanted is None or site.kind in UNPACKED else FORMS[wanted]

    made = make(path, folder / "out", form_of, prefer="regauge")
    return rg.load(made.path, activations=activations)


def padded(batch: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids (B, T) and a mask with 0, 2, 4 ... tokens of padding on the left."""
    ids_BT = torch.randint(3, 50, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    mask_BT = torch.ones(batch, tokens, dtype=torch.long)
    for row in range(batch):
        mask_BT[row, : 2 * row] = 0
    return ids_BT, mask_BT


def forced(forward: Any, model: Any, ids_BT: Tensor, mask_BT: Tensor, prompt: int, cache: Any = None) -> Tensor:
    """Logits (T - prompt, B, V) of each token after the prompt, one call a token."""
    from transformers import DynamicCache

    cache = cache or DynamicCache(config=model.config)
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    found = []
    with torch.no_grad():
        for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, ids_BT.shape[1]))]:
            found.append(
                forward(
                    input_ids=ids_BT[:, start:stop],
                    attention_mask=mask_BT[:, :stop],
                    position_ids=positions_BT[:, start:stop],
                    past_key_values=cache,
                    use_cache=True,
                ).logits[:, -1]
            )
    return torch.stack(found[1:]).float()


def difference(model: Any, batch: int = 1, tokens: int = 41, prompt: int = 7) -> float:
    """Largest relative difference of any token's logits; every token must have gone through the step."""
    ids_BT, mask_BT = padded(batch, tokens)
    before = model.regauge_step.steps
    ours = forced(model, model, ids_BT, mask_BT, prompt)
    assert model.regauge_step.steps - before == tokens - prompt
    theirs = forced(model.forward.__wrapped__, model, ids_BT, mask_BT, prompt)
    assert model.regauge_step.steps - before == tokens - prompt
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())


@pytest.mark.parametrize("name", DECODERS)
def test_every_family_gives_the_logits_of_eager(name: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, name)
    assert difference(model) < EXACT
    assert difference(model, batch=3) < EXACT


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral", "opt"])
def test_rounded_activations_stay_near(name: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, name, activations=None)
    assert 0 < difference(model, batch=3) < ROUNDED


@pytest.mark.parametrize("form", ["int2", "asym", "nf4", "int8", "mixed"])
@pytest.mark.parametrize("name", ["llama-bias", "phi3", "gpt_neox", "qwen3_moe", "gemma2"])
def test_every_form_and_mixtures_of_them(form: str, name: str, tmp_path: Path) -> None:
    if form == "mixed":  # W8A8 rounds its input on both sides, so that one code may differ
        assert difference(loaded(tmp_path, name, form), batch=3) < 3e-2
    else:
        assert difference(loaded(tmp_path, name, form), batch=3) < EXACT


def test_integer_inputs_round_as_eager_rounds_them(tmp_path: Path) -> None:
    """Until one input falls on the edge between two codes, the sums are the same integers."""
    model = loaded(tmp_path, "llama", "w8a8", activations=None)
    ids_BT, mask_BT = padded(1, 9)
    ours, theirs = (forced(forward, model, ids_BT, mask_BT, 7) for forward in (model, model.forward.__wrapped__))
    assert ((ours[0] - theirs[0]).norm() / theirs[0].norm()) < 1e-5
    assert difference(model) < 3e-2


def test_a_tied_head_reads_the_table(tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama-tied", "int8")
    assert model.lm_head.parts[0] is model.model.embed_tokens.matrix
    assert difference(model, batch=2) < EXACT


@pytest.mark.parametrize("activations", ["int8", "int16", "float32"])
def test_the_caller_chooses_how_activations_are_rounded(activations: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama", activations=activations)
    sharp = rg.load(tmp_path / "out", activations="float32")
    ids_BT, mask_BT = padded(1, 12)
    a, b = (forced(some, some, ids_BT, mask_BT, 7) for some in (model, sharp))
    found = float((a - b).norm() / b.norm())
    low, high = {"int8": (1e-4, 5e-2), "int16": (1e-7, 5e-4), "float32": (-1.0, 1e-9)}[activations]
    assert low < found < high
    assert model.regauge_step.steps == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models(dtype: torch.dtype, tmp_path: Path) -> None:
    """The step adds up in float32, so it is nearer to the float32 model than eager is."""
    model = loaded(tmp_path, "qwen3", dtype=dtype)
    assert model.dtype == dtype
    assert difference(model, batch=2) < (4e-2 if dtype == torch.bfloat16 else 5e-3)


def test_hundreds_of_tokens(tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama", max_position_embeddings=512)
    assert difference(model, batch=2, tokens=450) < 2 * EXACT


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads: int, tmp_path: Path, one_thread: None) -> None:
    model = loaded(tmp_path, "mixtral")
    ids_BT, mask_BT = padded(3, 12)
    alone = forced(model, model, ids_BT, mask_BT, 7)
    torch.set_num_threads(threads)
    torch.testing.assert_close(forced(model, model, ids_BT, mask_BT, 7), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt", [3, 13])
def test_a_window_that_transformers_cut(prompt: int, tmp_path: Path) -> None:
    """A cache that transformers filled, keeping no more than its window, is taken over."""
    from transformers import DynamicCache

    model = loaded(tmp_path, "mistral")
    ids_BT, mask_BT = padded(2, 20)
    mask_BT[:] = 1
    mask_BT[1, :2] = 0
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    eager = model.forward.__wrapped__
    with torch.no_grad():
        for cache in caches:
            eager(input_ids=ids_BT[:, :prompt], attention_mask=mask_BT[:, :prompt], past_key_values=cache)
    assert caches[0].layers[0].keys.shape[2] == min(prompt, 4)
    rest = []
    for forward, cache in zip((model, eager), caches, strict=True):
        with torch.no_grad():
            for t in range(prompt, 20):
                kwargs = {"attention_mask": mask_BT[:, : t + 1], "position_ids": mask_BT[:, : t + 1].sum(1, True) - 1}
                rest.append(forward(input_ids=ids_BT[:, t : t + 1], past_key_values=cache, **kwargs).logits)
    half = len(rest) // 2
    assert model.regauge_step.steps == half
    torch.testing.assert_close(torch.stack(rest[:half]), torch.stack(rest[half:]), rtol=1e-4, atol=1e-5)


def test_two_models_take_turns_and_run_at_once(tmp_path: Path) -> None:
    models = [loaded(tmp_path / name, name) for name in ("llama", "gpt2")]
    ids_BT, mask_BT = padded(2, 24)
    alone = [forced(model, model, ids_BT, mask_BT, 7) for model in models]
    again = [forced(model, model, ids_BT, mask_BT, 7) for model in (*models, *models)]
    for found, wanted in zip(again, (*alone, *alone), strict=True):
        assert found.equal(wanted)
    at_once: dict[int, Tensor] = {}

    def run(number: int) -> None:
        at_once[number] = forced(models[number % 2], models[number % 2], ids_BT, mask_BT, 7)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]  # two for each model
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        torch.testing.assert_close(at_once[number], alone[number % 2], rtol=1e-5, atol=1e-5)


def test_every_dispatch_level(level: str, tmp_path: Path) -> None:
    for name in ("llama", "mixtral"):
        assert difference(loaded(tmp_path / name / "mixed", name, "mixed"), batch=2, tokens=12) < 3e-2
        assert difference(loaded(tmp_path / name / "asym", name, "asym"), batch=5, tokens=20, prompt=10) < EXACT
