"""A loaded model behaves like a transformers model, or says in a sentence where not: pickled, freed, cast, resized,
adapted, trained, restored from a state. Tests walk every way that a matrix is held in, or families of every kind."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import regauge as rg
from artifacts import make
from pico import batches, pico, save
from regauge.errors import FallbackWarning, ModelError
from regauge.kernels.cpu.library import available
from regauge.runtime import capabilities
from regauge.runtime.matrices.modules import PackedLinear, PackedMatrix
from units.test_packed import EIGHT, FORMS, ROUNDING, SIXTEEN, matrix, random

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FAMILIES = ("llama", "llama-tied", "gpt2", "gemma3", "mixtral", "bert-mlm", "vit")
native = pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices in panels, and those that torch's own kernels multiply or that are decoded."""
    if request.param == "torch":
        monkeypatch.setattr(capabilities, "available", lambda: False)


def loaded(folder: Path, name: str = "llama", form: str = "int8") -> Any:
    """A packed model, its tables too."""
    path = save(pico(name), folder / "source")
    return rg.load(make(path, folder / "out", lambda site: FORMS[form], prefer="regauge").path)


def given(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(x)[0]
    return found.double()


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("form", FORMS)
def test_a_matrix_comes_back_from_pickle(form: str, kernels: None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        packed, _ = matrix(FORMS[form], 48, 64, dtype)
        x = random(3, 64).to(dtype)
        again = pickle.loads(pickle.dumps(packed))
        assert again(x).equal(packed(x))
        assert again.way.name == packed.way.name


def test_a_state_is_whole_and_goes_into_nothing_that_reads_it_otherwise(kernels: None) -> None:
    made = {form: matrix(FORMS[form], 48, 64, torch.bfloat16)[0] for form in FORMS}
    states = {form: {k: v.clone() for k, v in packed.state_dict().items()} for form, packed in made.items()}
    x = random(3, 64).bfloat16()
    for form, packed in made.items():
        wanted = packed(x)
        for buffer in packed.buffers():
            (buffer.view(torch.uint8) if buffer.itemsize == 1 else buffer).zero_()
        assert not packed(x).equal(wanted)
        packed.load_state_dict(states[form])
        assert packed(x).equal(wanted)
        for other in FORMS.keys() - {form}:
            with pytest.raises(RuntimeError, match=r"of this state_dict holds 48 x 64|in state_dict"):
                packed.load_state_dict(states[other])
            packed.load_state_dict(states[form])


@pytest.mark.parametrize("form", FORMS)
def test_a_matrix_follows_every_cast(form: str, kernels: None) -> None:
    how = FORMS[form]
    for made in FLOATS[:2]:
        packed, w_OI = matrix(how, 48, 64, made)
        for dtype in (*FLOATS, *FLOATS[:2]):
            packed = packed.to(dtype)
            for tokens in (2, 40):
                x = random(tokens, 64, seed=1).to(dtype)
                seen = x if how.activations is None else how.activations.simulate(x)
                y = packed(x)
                assert y.dtype == packed.dtype == packed.take(torch.tensor([1])).dtype == dtype
                error = apart(y, seen.double() @ w_OI.double().T)
                coarse = 8e-3 * packed.way.name.startswith("int")  # torch's kernels hold steps in bfloat16
                near = 3 * ROUNDING[dtype] + (EIGHT if dtype.itemsize == 2 else SIXTEEN)
                assert error < near + coarse


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_decoded_weights(form: str, kernels: None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        packed, w_OI = matrix(FORMS[form], 48, 64, dtype)
        x, dy = random(3, 64).to(dtype).requires_grad_(), random(3, 48, seed=2).to(dtype)
        y = packed(x)
        assert y.equal(packed(x.detach()))
        y.backward(dy)
        assert x.grad is not None
        rounded = 8e-3 * packed.way.name.startswith("int")  # torch's kernels hold steps in bfloat16
        assert apart(x.grad, dy.double() @ w_OI.double()) < 4 * ROUNDING[dtype] + rounded


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_pickled_copied_and_freed(name: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, name)
    x = batches(model)[0]
    wanted = given(model, x)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert given(again, x).equal(wanted)
        assert type(again).__name__ == type(model).__name__
        if hasattr(model, "regauge_step"):
            kept = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
            assert again.generate(x, **kept).tolist() == model.generate(x, **kept).tolist()
            assert again.regauge_step.steps >= 3
    buffers = [weakref.ref(tensor) for tensor in model.buffers()]
    gc.collect()
    gc.disable()
    try:
        del model, again
        if name != "gemma3":  # whose own code keeps a plain model too, once it has run
            assert not [ref for ref in buffers if ref() is not None]
    finally:
        gc.enable()


@native
def test_what_load_returns_generates_though_nothing_keeps_it(tmp_path: Path) -> None:
    path = save(pico("llama"), tmp_path / "source")
    out = make(path, tmp_path / "out", lambda site: FORMS["int8"], prefer="regauge").path
    ids, how = torch.tensor([[3, 1, 4]]), {"max_new_tokens": 3, "do_sample": False}
    model = rg.load(out)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert isinstance(model, LlamaForCausalLM)
    wanted = model.generate(ids, **how)
    assert rg.load(out).generate(ids, **how).equal(wanted)
    assert copy.deepcopy(model).generate(ids, **how).equal(wanted)
    assert pickle.loads(pickle.dumps(model)).generate(ids, **how).equal(wanted)
    assert inspect.signature(model.generate) == inspect.signature(pico("llama").generate)


def test_a_forward_outlives_no_model(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    forward = model.forward
    assert inspect.signature(forward) == inspect.signature(type(model).forward.__get__(model))
    del model
    with pytest.raises(ModelError, match=r"the model of this forward\(\) is gone"):
        forward()


def test_the_state_of_a_model_is_whole_and_never_mixed(tmp_path: Path) -> None:
    one, two = loaded(tmp_path / "one"), loaded(tmp_path / "two")
    x = batches(one)[0]
    for parameter in one.buffers():
        if parameter.dtype == torch.uint8:
            parameter.copy_(torch.randint_like(parameter, 256))
    assert apart(given(one, x), given(two, x)) > 1e-2
    two.load_state_dict(one.state_dict())
    assert given(one, x).equal(given(two, x))
    other = loaded(tmp_path / "other", form="int4 channel")
    with pytest.raises(RuntimeError, match="load the artifact that it came from"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        one.load_state_dict(pico("llama").state_dict())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt", "gpt_neox", "bert-mlm"])
def test_a_model_with_packed_tables_follows_every_cast(name: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, name)
    x = batches(model)[0]
    wanted = given(model, x)
    for cast, dtype in (("double", torch.float64), ("bfloat16", torch.bfloat16), ("half", torch.float16)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            found = getattr(model, cast)()
            assert found is model
            assert model.dtype == model(x)[0].dtype == dtype
            assert apart(given(model, x), wanted) < 0.1
    assert apart(given(model.float(), x), wanted) < 0.1


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert-mlm"])
def test_packed_tables_are_not_resized(name: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, name)
    x = batches(model)[0]
    wanted = given(model, x)
    with pytest.raises(ModelError, match=r"packed and have 53 rows, so they cannot be resized to 61"):
        model.resize_token_embeddings(61)
    with pytest.raises(ModelError, match="cannot be resized to 56"):
        model.base_model.resize_token_embeddings(pad_to_multiple_of=8)
    assert model.resize_token_embeddings(53) is model.get_input_embeddings()
    assert given(model, x).equal(wanted)


@native
def test_a_table_in_full_precision_is_resized(tmp_path: Path) -> None:
    path = save(pico("llama"), tmp_path / "source")
    made = make(path, tmp_path / "out", lambda site: None if site.kind in ("embed", "head") else FORMS["int8"])
    model = rg.load(made.path)
    model.resize_token_embeddings(61, mean_resizing=False)
    assert model(torch.tensor([[60]])).logits.shape == (1, 1, 61)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_weight_is_drawn_anew(name: str, tmp_path: Path) -> None:
    """transformers' `init_weights` leaves what was read; without that word, tables in full precision became random."""
    path = save(pico(name), tmp_path / "source")
    made = make(path, tmp_path / "out", lambda site: None if site.kind in ("embed", "head") else FORMS["int8"])
    model = rg.load(made.path)
    before = {key: copy.deepcopy(value) for key, value in model.state_dict().items()}
    model.init_weights()
    model.post_init()
    after = model.state_dict()
    assert [key for key, value in before.items() if isinstance(value, Tensor) and not value.equal(after[key])] == []


def test_a_packed_layer_is_a_linear_layer_to_whoever_adapts_it(tmp_path: Path) -> None:
    """What PEFT asks of one: its class, sizes, and the dtype and device of its weight, which none computes with."""
    model = loaded(tmp_path)
    layer = model.model.layers[0].self_attn.q_proj
    assert type(layer) is PackedLinear
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (42, 60)
    assert (layer.weight.dtype, layer.weight.device.type) == (torch.float32, "cpu")
    with pytest.raises(ModelError, match=r"no weight to compute with \(add_ was asked of it\)"):
        layer.weight.data += 1.0


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft asks transformers so
@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning")
def test_lora_trains_saves_and_reloads(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="pip install peft accelerate: tools of others, which we only plug into")
    model = loaded(tmp_path, form="int4 channel")
    ids = torch.arange(3, 19).unsqueeze(0)
    kinds = ["q_proj", "down_proj", "embed_tokens", "lm_head"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=kinds, task_type="CAUSAL_LM"))
    some = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(8):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        some.step()
        some.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    adapted.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(rg.load(tmp_path / "out"), tmp_path / "adapter")
    assert given(again, ids).equal(given(adapted, ids))
    with pytest.raises(ModelError, match="merge or edit the source"):
        adapted.merge_and_unload()


def test_the_trainer_refuses_before_it_trains(tmp_path: Path) -> None:
    from transformers.trainer_utils import validate_quantization_for_training

    model = loaded(tmp_path)
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        validate_quantization_for_training(model)
    assert model.hf_quantizer.is_trainable  # through adapters


@pytest.mark.parametrize("name", ["llama", "bert-mlm"])
def test_what_float16_cannot_hold_is_said_once(name: str, tmp_path: Path) -> None:
    source = pico(name)
    for key, parameter in source.named_parameters():
        if "down_proj.weight" in key or "output.dense.weight" in key:
            parameter.data.mul_(3e4)
    path = save(source, tmp_path / "source")
    made = make(path, tmp_path / "out", lambda site: FORMS["int8"], prefer="regauge")
    x = batches(source)[0]
    model = rg.load(made.path, dtype="float16")
    with pytest.warns(RuntimeWarning, match="in float16, values above 65,504 overflow"):
        model(x)
    model(x)  # warnings are errors here
    wide = rg.load(made.path, dtype="bfloat16")
    assert wide(x)[0].isfinite().all()
    with pytest.warns(RuntimeWarning, match="in float16"):
        wide.half()(x)


def test_packed_matrices_hold_nothing_of_their_loading() -> None:
    """The functions that multiply keep no codes, and no memory but the matrix's own."""
    packed, _ = matrix(FORMS["int4"], 48, 64, torch.float32)
    assert isinstance(packed, PackedMatrix)
    assert "way" not in packed.__getstate__()
