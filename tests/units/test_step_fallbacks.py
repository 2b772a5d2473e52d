"""What the native step cannot serve goes to transformers, which is said once; and the step serves again afterwards."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regauge.errors import FallbackWarning
from regauge.formats.base import Format
from regauge.formats.grains import Token
from regauge.formats.grids import Int
from regauge.formats.rangers import Dynamic
from regauge.formats.readings import Reading
from regauge.formats.scales import Float32
from regauge.hosts.transformers.inputs import Inputs
from regauge.hosts.transformers.program import Reads, build
from regauge.kernels.cpu.library import available
from regauge.runtime.step.sites import Unservable
from units.test_step import forced, loaded, padded

pytestmark = pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """A packed llama that rounds no activations."""
    return loaded(tmp_path, "llama")


class Scaled(nn.Module):
    """What an adapter library puts in the place of a layer."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = 1.5 * self.inner(x)
        return found


def said(model: Any, ids_BT: Tensor, mask_BT: Tensor, **more: Any) -> tuple[list[str], Tensor, Tensor]:
    """What is said while two texts are made token by token, and their logits beside eager's."""
    from transformers import DynamicCache

    def call(forward: Any) -> Tensor:
        cache, found = DynamicCache(config=model.config), []
        with torch.no_grad():
            forward(input_ids=ids_BT[:, :5], attention_mask=mask_BT[:, :5], past_key_values=cache)
            for t in range(5, 9):
                kwargs = {"attention_mask": mask_BT[:, : t + 1], "past_key_values": cache} | more
                found.append(forward(input_ids=ids_BT[:, t : t + 1], **kwargs).logits)
        return torch.stack(found)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = call(model)
        call(model)
    return (
        [str(one.message) for one in caught if one.category is FallbackWarning],
        ours,
        call(model.forward.__wrapped__),
    )


def falls_back(model: Any, words: str, batch: int = 1, mask: Tensor | None = None, **more: Any) -> None:
    """Eager's logits, and one sentence."""
    ids_BT, mask_BT = padded(batch, 9)
    before = model.regauge_step.steps
    sentences, ours, theirs = said(model, ids_BT, mask_BT if mask is None else mask, **more)
    assert model.regauge_step.steps == before
    assert len(sentences) == 1, sentences
    assert words in sentences[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def serves(model: Any) -> None:
    ids_BT, mask_BT = padded(1, 9)
    before = model.regauge_step.steps
    sentences, ours, theirs = said(model, ids_BT, mask_BT)
    assert not sentences
    assert model.regauge_step.steps == before + 8
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_attentions_are_eagers(model: Any) -> None:
    falls_back(model, "output_attentions=True", output_attentions=True)
    falls_back(model, "output_hidden_states=True", output_hidden_states=True)
    serves(model)


def test_a_config_that_asks_for_more(model: Any) -> None:
    model.config.output_hidden_states = True
    falls_back(model, "the config asks")
    model.config.output_hidden_states = False
    serves(model)


def test_padding_on_the_right_is_eagers(model: Any) -> None:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 3:5] = 0
    falls_back(model, "not one of padding on the left", batch=2, mask=mask)


def test_nothing_shown_is_eagers(model: Any) -> None:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1] = 0
    falls_back(model, "not one of padding on the left", batch=2, mask=mask)


def test_more_sequences_than_the_step_takes(model: Any) -> None:
    mask = torch.ones(65, 9, dtype=torch.long)
    falls_back(model, "more than 64 sequences", batch=65, mask=mask)
    assert forced(model, model, *padded(3, 9), 5).shape == (4, 3, 53)
    ids = torch.randint(3, 50, (64, 9))
    mask = torch.ones_like(ids)
    ours, theirs = (forced(forward, model, ids, mask, 5) for forward in (model, model.forward.__wrapped__))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert model.regauge_step.steps == 8


def test_a_hook_is_called_and_then_forgotten(model: Any) -> None:
    calls = []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    falls_back(model, "hooks")
    assert len(calls) == 15
    handle.remove()
    serves(model)
    assert len(calls) == 15
    handle = nn.modules.module.register_module_forward_pre_hook(lambda *_: calls.append(1))
    assert not said(model, *padded(1, 9))[0]  # it was said before
    handle.remove()
    assert len(calls) > 100
    serves(model)


def test_a_replaced_layer_is_called(model: Any) -> None:
    place, name = model.model.layers[0].self_attn, "o_proj"
    old = getattr(place, name)
    setattr(place, name, Scaled(old))
    falls_back(model, "model.layers.0.self_attn.o_proj")
    setattr(place, name, old)
    serves(model)


def test_a_patched_forward_is_called(model: Any) -> None:
    norm = model.model.norm
    norm.forward = lambda x: 2 * type(norm).forward(norm, x)
    falls_back(model, "model.norm")
    del norm.forward
    serves(model)


def test_new_weights_are_seen(model: Any) -> None:
    serves(model)
    model.model.norm.weight.mul_(-2.0)
    serves(model)


def test_training_is_eagers(model: Any) -> None:
    serves(model)
    before = model.regauge_step.steps
    model.train()
    said(model, *padded(1, 9))
    assert model.regauge_step.steps == before
    model.eval()
    serves(model)


def test_other_caches_are_eagers(model: Any) -> None:
    from transformers import StaticCache

    ids = padded(1, 9)[0]
    caches = [StaticCache(config=model.config, max_cache_len=20) for _ in range(2)]
    with pytest.warns(FallbackWarning, match="StaticCache"):
        ours = forced(model, model, ids, torch.ones_like(ids), 5, caches[0])
    assert ours.equal(forced(model.forward.__wrapped__, model, ids, torch.ones_like(ids), 5, caches[1]))
    assert model.regauge_step.steps == 0


def test_a_four_dimensional_mask_is_eagers(model: Any) -> None:
    from transformers import DynamicCache

    ids, found = padded(1, 6)[0], []
    mask = torch.zeros(1, 1, 1, 6)
    mask[..., 2] = torch.finfo(torch.float32).min

    def call(forward: Any) -> None:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids[:, :5], past_key_values=cache)
            found.append(forward(input_ids=ids[:, 5:], attention_mask=mask, past_key_values=cache).logits)

    with pytest.warns(FallbackWarning, match="mask"):
        call(model)
    call(model.forward.__wrapped__)
    assert found[0].equal(found[1])
    assert model.regauge_step.steps == 0


def test_embeddings_of_the_caller_are_eagers(model: Any) -> None:
    from transformers import DynamicCache

    ids, found = padded(1, 6)[0], []
    with torch.no_grad():
        for forward in (model, model.forward.__wrapped__):
            cache = DynamicCache(config=model.config)
            forward(input_ids=ids[:, :5], past_key_values=cache)
            embedded = model.model.embed_tokens(ids[:, 5:]) * 2
            found.append(forward(inputs_embeds=embedded, past_key_values=cache).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert model.regauge_step.steps == 0


def test_sites_that_read_one_activation_in_two_ways_are_eagers(tmp_path: Path) -> None:
    """As artifacts of the first format may."""
    model = loaded(tmp_path, "llama", "int8")
    mlp = model.model.layers[1].mlp
    for layer, bits in ((mlp.gate_proj, 8), (mlp.up_proj, 6)):
        reading = Reading(Format(Int(bits), Token(), Dynamic(), Float32()))
        layer.parts[0].reading = reading
    reads = Reads()
    widths = Inputs(model, reads).widths()
    with pytest.raises(Unservable, match="one activation in several ways"):
        build(model, model.regauge_step.anatomy, widths, reads)


def test_wrong_calls_fail_as_in_eager(model: Any) -> None:
    from transformers import DynamicCache

    cache, ids = DynamicCache(config=model.config), padded(1, 6)[0]
    with torch.no_grad():
        model(input_ids=ids[:, :5], past_key_values=cache)
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[53]]), past_key_values=cache)
        with pytest.warns(FallbackWarning, match="another shape"), pytest.raises(RuntimeError):
            model(input_ids=torch.ones(2, 1, dtype=torch.long), past_key_values=cache)
