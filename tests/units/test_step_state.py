"""The native step follows the model as it is: whatever number in it changes, decoding gives what one forward gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regauge as rg
from pico import FAMILIES, pico, save
from regauge.kernels.cpu.library import available
from units.test_step import DECODERS, EXACT, difference, forced, loaded, padded

pytestmark = pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")

PLAIN = [name for name in DECODERS if name in FAMILIES]
CHANGED = {bool: lambda now: not now, int: lambda now: now - 1, float: lambda now: now * 1.5 + 0.01}
"""Another value of the same kind; what is fewer by one (a window, the experts that are used) is still allowed."""


def near(model: Any) -> None:
    assert difference(model, tokens=10, prompt=7) < EXACT


def logits(model: Any) -> Tensor:
    return forced(model, model, *padded(1, 10), 7)


@pytest.mark.parametrize("name", PLAIN)
def test_every_attribute_that_the_step_reads_may_change(name: str, tmp_path: Path) -> None:
    """Each once for each kind of module: scaling, epsilon, window, soft-caps, experts, parallel residuals."""
    model = loaded(tmp_path, name)
    near(model)
    read = {
        (type(thing), attribute): (thing, attribute, now)
        for thing, attribute, now in model.regauge_step._reads.seen
        if type(now) in CHANGED and attribute != "use_bidirectional_attention"  # with which it does not serve
    }
    assert {"eps", "variance_epsilon"} & {attribute for _, attribute in read}
    for thing, attribute, now in read.values():
        before = logits(model)
        setattr(thing, attribute, CHANGED[type(now)](now))
        near(model)
        told = f"{type(thing).__name__}.{attribute}"
        assert attribute == "sliding_window" or not logits(model).equal(before), told
        setattr(thing, attribute, now)
        assert logits(model).equal(before), told


@pytest.mark.parametrize("name", PLAIN)
def test_every_tensor_may_change_without_a_mark(name: str, tmp_path: Path) -> None:
    """By `.data`, which tells nobody: gains, biases, tables, frequencies, and the steps of packed matrices."""
    model = loaded(tmp_path, name)
    near(model)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    kinds = {path.rpartition(".")[2] + path.split(".")[-2]: tensor for path, tensor in tensors}
    for tensor in kinds.values():
        if tensor.is_floating_point():
            tensor.data.mul_(1.25)
    near(model)
    for module in model.modules():
        if "attention_scaling" in vars(module):
            module.attention_scaling *= 1.5
    near(model)


def test_a_cache_that_the_step_has_not_seen_begins_a_text(tmp_path: Path) -> None:
    """A prompt's cache that is kept and copied: few tokens come first, and the model changed in between."""
    from transformers import DynamicCache

    model, ids_BT = loaded(tmp_path, "llama"), padded(1, 12)[0]
    kept = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids_BT[:, :9], past_key_values=kept)
        model.model.norm.weight.data.mul_(3.0)
        ours, theirs = (
            forward(input_ids=ids_BT[:, 9:], past_key_values=copy.deepcopy(kept)).logits
            for forward in (model, model.forward.__wrapped__)
        )
    assert model.regauge_step.steps == 3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *(
            (name, {"rope_parameters": {"partial_rotary_factor": 0.5}})
            for name in DECODERS
            if name.partition("-")[0] not in ("gpt2", "opt")
        ),
        *((name, {"head_dim": 4}) for name in ("gpt2", "opt", "gpt_neox")),
    ],
)
def test_sizes_come_from_the_modules_and_not_from_a_config_that_they_ignore(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = copy.deepcopy(pico(name).config)
    if "rope_parameters" in changes:
        kinds = [value for value in config.rope_parameters.values() if isinstance(value, dict)]
        for parameters in kinds or [config.rope_parameters]:
            parameters |= changes["rope_parameters"]
    else:
        config.head_dim = changes["head_dim"]
    torch.manual_seed(0)
    path = save(type(pico(name))(config).eval(), tmp_path / "source")
    rg.apply("rtn-w8", path, tmp_path / "out", wire="regauge")
    near(rg.load(tmp_path / "out", dtype=torch.float32, activations="float32"))


def test_a_function_that_the_config_does_not_name_is_not_computed(tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama")
    model.config.hidden_act = "relu"  # which transformers reads once, when it makes the module
    near(model)


def test_no_cache_by_config_is_said_when_it_is_loaded(tmp_path: Path) -> None:
    model = pico("llama")
    model = copy.deepcopy(model)
    model.config.use_cache = model.generation_config.use_cache = False
    path = save(model, tmp_path / "source")
    rg.apply("rtn-w8", path, tmp_path / "out", wire="regauge")
    with pytest.warns(rg.errors.FallbackWarning, match="use_cache is false"):
        rg.load(tmp_path / "out")


def test_what_generate_keeps_for_itself_leaves_the_step_alone(tmp_path: Path) -> None:
    """Stop strings want the tokenizer, which `generate` also hands to `forward`."""
    model = loaded(tmp_path, "llama")
    model.generate(padded(1, 7)[0], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    for name in ("tokenizer", "assistant_tokenizer"):
        before = model.regauge_step.steps
        ids = padded(1, 7)[0]
        model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0, **{name: object()})
        assert model.regauge_step.steps == before + 3, name
