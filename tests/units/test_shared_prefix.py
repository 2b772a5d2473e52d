"""A prefix that is computed once: outputs and gradients are those of the batch in which each continuation brings it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import regauge as rg
from architectures import build
from pico import pico
from regauge.errors import ModelError, SettingError
from regauge.hosts.precise import precise
from regauge.hosts.transformers import grouping

LENGTHS = (3, 7, 1, 5)


def texts(model: Any, prefix: int = 11) -> tuple[Tensor, list[Tensor]]:
    draw = torch.Generator().manual_seed(0)
    some = [torch.randint(model.config.vocab_size, (count,), generator=draw) for count in (prefix, *LENGTHS)]
    return some[0], some[1:]


def plain(model: Any, prefix: Tensor, continuations: list[Tensor]) -> list[Tensor]:
    """(1 + S, V) of each, by a pass of its own."""
    return [model(torch.cat((prefix, one))[None]).logits[0, len(prefix) - 1 :] for one in continuations]


def loss(outputs: list[Tensor]) -> Tensor:
    return sum((rows.sin() * (1 + number)).sum() for number, rows in enumerate(outputs))  # type: ignore[return-value]


def gradients(model: Any) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


MODELS = {
    "llama": lambda: pico("llama", dtype=torch.float64),
    "gpt_neox": lambda: pico("gpt_neox", dtype=torch.float64),
    "mistral": lambda: pico("mistral", dtype=torch.float64),  # a window of 5: less than the prefix
    "gemma3": lambda: pico("gemma3", dtype=torch.float64),  # windows of some layers
    "gpt2": lambda: pico("gpt2", dtype=torch.float64),  # positions are learnt
    "qwen3_moe": lambda: pico("qwen3_moe", dtype=torch.float64),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("together", [4, 1024])
def test_outputs_and_gradients_are_those_of_the_plain_batch(
    name: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "AT_ONCE", together)
    model = MODELS[name]()
    prefix, continuations = texts(model)
    attention = model.config._attn_implementation
    with precise():
        wanted = plain(model, prefix, continuations)
        loss(wanted).backward()
    theirs = gradients(model)
    model.zero_grad()
    with precise(), rg.shared_prefix(model, prefix, continuations) as shared:
        assert shared.inputs["input_ids"].shape == (1, 11 + sum(LENGTHS))
        found = shared.split(model(**shared.inputs).logits)
        loss(found).backward()
    assert model.config._attn_implementation == attention
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert float((one - other).detach().norm() / other.detach().norm()) < 1e-12
    for ours, other in zip(gradients(model), theirs, strict=True):
        assert float((ours - other).norm()) <= 1e-12 * float(other.norm())


def test_eager_attention_with_a_soft_cap_and_float32() -> None:
    model = pico("gemma2")
    assert model.config._attn_implementation == "eager" or model.set_attn_implementation("eager") is None
    prefix, continuations = texts(model)
    with torch.no_grad(), rg.shared_prefix(model, prefix, continuations) as shared:
        found = shared.split(model(**shared.inputs).logits)
    with torch.no_grad():
        wanted = plain(model, prefix, continuations)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, wanted, strict=True))


def test_log_probs_are_of_the_continuations_tokens() -> None:
    model = pico("llama", dtype=torch.float64)
    prefix, continuations = texts(model)
    with torch.no_grad(), rg.shared_prefix(model, prefix, continuations) as shared:
        found = shared.log_probs(model(**shared.inputs).logits)
        whole = shared.log_probs(model(**{**shared.inputs, "logits_to_keep": 0}).logits)
    for ours, also, one in zip(found, whole, continuations, strict=True):
        text = torch.cat((prefix, one))
        with torch.no_grad():
            told = model(text[None], labels=text.masked_fill(torch.arange(len(text)) < len(prefix), -100)[None]).loss
        assert float(ours.mean()) == pytest.approx(-float(told))
        assert torch.allclose(ours, also)


@pytest.mark.parametrize("inside", [True, False])
def test_with_gradient_checkpointing_the_backward_pass_is_inside_or_refused(inside: bool) -> None:
    model = pico("llama", dtype=torch.float64)
    prefix, continuations = texts(model)
    loss(plain(model, prefix, continuations)).backward()
    theirs = gradients(model)
    model.zero_grad()
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    with rg.shared_prefix(model, prefix, continuations) as shared:
        told = loss(shared.split(model(**shared.inputs).logits))
        if inside:
            told.backward()
    if inside:
        for ours, other in zip(gradients(model), theirs, strict=True):
            assert float((ours - other).norm()) <= 1e-6 * float(other.norm())
    else:
        with pytest.raises(RuntimeError, match="number of tensors was saved"):
            told.backward()


def test_importing_registers_nothing_and_an_error_leaves_nothing_behind() -> None:
    model = pico("llama")
    before = model.config._attn_implementation
    prefix, continuations = texts(model)
    with pytest.raises(ZeroDivisionError), rg.shared_prefix(model, prefix, continuations):
        _ = 1 / 0
    assert model.config._attn_implementation == before
    assert not grouping._active
    with rg.shared_prefix(model, prefix, continuations):
        with pytest.raises(ModelError, match="shares a prefix already"):
            rg.shared_prefix(model, prefix, continuations).__enter__()
        with pytest.raises(ModelError, match=r"called with shared.inputs, without a cache"):
            model(prefix[None])


def test_what_is_refused() -> None:
    model = pico("llama")
    prefix, continuations = texts(model)
    for one, others, message in (
        (prefix, [], "no continuation"),
        (prefix[:0], continuations, r"not of shape \[0\]"),
        (prefix, [continuations[0][None]], r"not of shape \[1, 3\]"),
        (prefix, [[99]], "integers from 0 to 52"),
    ):
        with pytest.raises(SettingError, match=message), rg.shared_prefix(model, one, others):
            pass
    with rg.shared_prefix(model, prefix, continuations) as shared:
        with pytest.raises(ModelError, match="no attention ran through the shared prefix"):
            shared.split(torch.zeros(1, 17, 3))
        model(**shared.inputs)
        with pytest.raises(SettingError, match=r"outputs of shape \[1, 5, 3\] are not those of a row of 27"):
            shared.split(torch.zeros(1, 5, 3))
    for name in ("bloom", "lfm2", "mamba"):
        other = build(name)
        with pytest.raises(ModelError, match="is not chosen by its config alone"), rg.shared_prefix(other, [1], [[2]]):
            pass
