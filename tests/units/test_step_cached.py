"""The native step over packed caches, beside transformers' own modules over the same cache."""

from __future__ import annotations

import copy
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regauge as rg
from artifacts import choice, make
from pico import pico, save
from regauge.cache.scheme import Scheme
from regauge.errors import FallbackWarning
from regauge.formats.grains import Time, Token
from regauge.hosts.transformers.packed import cache_of
from regauge.kernels.cpu.library import available
from stores import SCHEMES as ALL
from stores import asymmetric, kivi, plan_of, symmetric

pytestmark = pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")

SCHEMES = {
    "kivi-2": kivi(2, window=8),
    "kivi-4": kivi(4, window=40),
    "kv8": Scheme(symmetric(8, Token()), symmetric(8, Token())),
    "fp8": ALL["fp8"],
    "rotated-4": Scheme(asymmetric(4, Time(16)), asymmetric(4, Token()), 5, hadamard=True),
    "balanced": Scheme(asymmetric(4, Time(32)), asymmetric(2, Time(32)), 3, hadamard=True, balance=2),
    "keys alone": ALL["keys alone"],
}
CLOSE = 0.02
"""Of the spread of logits: the step rounds queries and probabilities to 8 bits where codes have 4 or fewer."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("cached")
    made = pico("llama", head_dim=16, max_position_embeddings=512)
    form = choice("int8", "channel", "f16")
    path = make(save(made, folder / "source"), folder / "out", lambda s: form if s.kind != "embed" else None).path
    return rg.load(path, activations="float32")


def padded(batch: int, count: int) -> tuple[Tensor, Tensor]:
    ids_BT = torch.randint(3, 50, (batch, count), generator=torch.Generator().manual_seed(batch))
    mask_BT = torch.ones(batch, count, dtype=torch.long)
    for row in range(1, batch):
        mask_BT[row, : 20 * row] = 0
    return ids_BT, mask_BT


def forced(model: Any, cache: Any, ids_BT: Tensor, mask_BT: Tensor, prompt: int, native: bool = True) -> Tensor:
    """Logits (T - prompt, B, V), one call a token."""
    forward = model.forward if native else type(model).forward.__get__(model)
    positions_BT, found = (mask_BT.cumsum(1) - 1).clamp(min=0), []
    with torch.no_grad():
        for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, ids_BT.shape[1]))]:
            found.append(
                forward(
                    input_ids=ids_BT[:, start:stop],
                    attention_mask=mask_BT[:, :stop],
                    position_ids=positions_BT[:, start:stop],
                    past_key_values=cache,
                ).logits[:, -1]
            )
    return torch.stack(found[1:])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", SCHEMES)
def test_it_computes_what_transformers_does(name: str, batch: int, model: Any) -> None:
    """With padding before the window's beginning, within it, and across blocks that are sealed on the way."""
    ids_BT, mask_BT = padded(batch, 120)
    plan, steps = plan_of(SCHEMES[name], 2), model.regauge_step.steps
    caches = [cache_of(plan, model) for _ in range(2)]
    found, wanted = (
        forced(model, cache, ids_BT, mask_BT, 70, native) for cache, native in zip(caches, (True, False), strict=True)
    )
    assert model.regauge_step.steps == steps + 50
    spread = wanted.std()
    assert (found - wanted).abs().max() < CLOSE * 5 * spread
    assert (found - wanted).square().mean().sqrt() < CLOSE * spread
    ours, theirs = caches[0].layers[0], caches[1].layers[0]
    assert (ours.length, ours.origin) == (theirs.length, theirs.origin)
    assert ours.origin == SCHEMES[name].sealed(120) > SCHEMES[name].sealed(70)


@pytest.mark.parametrize("name", ["kivi-4", "kv8", "rotated-4"])
def test_generation_goes_through_the_step(name: str, model: Any) -> None:
    """Greedy, beams, sampling, assisted and looked up: the tokens of the step, and none of them by a fall-back."""
    plan, (ids_BT, mask_BT) = plan_of(SCHEMES[name], 2), padded(1, 60)
    ids_BT = ids_BT[:, :9].repeat(1, 7)[:, :60]
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT, "pad_token_id": 0, "eos_token_id": None}
    greedy = model.generate(**inputs, past_key_values=cache_of(plan, model), max_new_tokens=40, do_sample=False)
    for how in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": copy.deepcopy(model)}):
        before, cache = model.regauge_step.steps, cache_of(plan, model)
        found = model.generate(**inputs, past_key_values=cache, max_new_tokens=40, do_sample=False, **how)
        assert found[:, :70].tolist() == greedy[:, :70].tolist()
        assert model.regauge_step.steps > before + 20
        assert cache.layers[0].origin == SCHEMES[name].sealed(cache.get_seq_length())
    for how in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}):
        before = model.regauge_step.steps
        model.generate(**inputs, past_key_values=cache_of(plan, model), max_new_tokens=40, min_new_tokens=40, **how)
        assert model.regauge_step.steps >= before + 39


def test_a_turned_head_that_is_no_power_of_two_falls_back(tmp_path: Path) -> None:
    made = pico("llama", head_dim=24, max_position_embeddings=512)
    form = choice("int8", "channel", "f16")
    path = make(save(made, tmp_path / "source"), tmp_path / "out", lambda s: form if s.kind != "embed" else None).path
    model = rg.load(path, activations="float32")
    scheme = Scheme(asymmetric(4, Time(16)), asymmetric(4, Token()), 5, hadamard=True)
    with pytest.warns(FallbackWarning, match="heads of 24 channels are no power of two"):
        forced(model, cache_of(plan_of(scheme, 2), model), *padded(1, 60), 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forced(model, cache_of(plan_of(kivi(4), 2), model), *padded(1, 60), 50)


def test_two_conversations_take_turns(model: Any) -> None:
    texts = [padded(1 + n, 110) for n in range(2)]
    plan = plan_of(SCHEMES["kivi-2"], 2)
    wanted = [forced(model, cache_of(plan, model), *text, 60) for text in texts]
    found: list[Any] = [None, None]

    def write(n: int) -> None:
        found[n] = forced(model, cache_of(plan, model), *texts[n], 60)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, wanted, strict=True):
        assert one.equal(other)
