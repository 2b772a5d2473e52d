"""The native step below generate, pipelines and compilers, and `rg.stream`."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regauge as rg
from artifacts import choice, make
from pico import pico, save
from regauge.errors import SettingError
from regauge.kernels.cpu.library import available
from units.test_step import forced, loaded, padded

pytestmark = pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """A packed llama that rounds no activations."""
    return loaded(tmp_path, "llama")


def both(model: Any, make_text: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
    """What the model makes with the step, which must have run, and without it."""
    before = model.regauge_step.steps
    ours = make_text(model)
    after = model.regauge_step.steps
    assert after > before
    plugged = model.forward
    model.forward = plugged.__wrapped__
    theirs = make_text(model)
    model.forward = plugged
    assert model.regauge_step.steps == after
    return ours, theirs


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams of two": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "sampled": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "many of one": {"do_sample": True, "num_return_sequences": 3},
    "penalised": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_generate_writes_what_eager_writes(name: str, setting: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, name)
    ids_BT, mask_BT = padded(2, 9)

    def text(model: Any) -> Tensor:
        torch.manual_seed(0)
        options = {"max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": None} | SETTINGS[setting]
        found: Tensor = model.generate(input_ids=ids_BT, attention_mask=mask_BT, **options)
        return found

    ours, theirs = both(model, text)
    assert ours.shape[1] == 29
    assert ours.equal(theirs)


def test_a_text_goes_on_from_a_cache_that_was_copied(model: Any) -> None:
    """One prefix, several ends, as transformers' guide to caches has it."""
    from transformers import DynamicCache

    prefix, kwargs = DynamicCache(config=model.config), {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    ids = padded(1, 9)[0]
    with torch.inference_mode():
        model(input_ids=ids[:, :5], past_key_values=prefix)
    alone = model.generate(ids, **kwargs)
    for _ in range(2):
        assert model.generate(ids, past_key_values=copy.deepcopy(prefix), **kwargs).equal(alone)
    assert prefix.get_seq_length() == 5


def test_a_cache_may_leave_inference_mode(model: Any) -> None:
    from transformers import DynamicCache

    cache, (ids, mask) = DynamicCache(config=model.config), padded(1, 12)
    with torch.inference_mode():
        model(input_ids=ids[:, :5], past_key_values=cache)
    with torch.no_grad():
        model.forward.__wrapped__(input_ids=ids[:, 5:8], past_key_values=cache)
        found = model(input_ids=ids[:, 8:9], past_key_values=cache).logits
        wanted = model(input_ids=ids[:, :9], attention_mask=mask[:, :9]).logits[:, -1:]
    assert model.regauge_step.steps == 1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_what_forward_gives_is_of_eagers_class(tmp_path: Path) -> None:
    from transformers import DynamicCache

    for name in ("llama", "mixtral"):
        model = loaded(tmp_path / name, name)
        cache, ids = DynamicCache(config=model.config), padded(1, 6)[0]
        with torch.no_grad():
            first = model(input_ids=ids[:, :5], past_key_values=cache)
            second = model(ids[:, 5:], past_key_values=cache)
        assert model.regauge_step.steps == 1
        assert type(second) is type(first)
        assert second.loss is None
        assert list(second) == ["logits", "past_key_values"]
        assert second["logits"] is second.logits is second[0]
        assert second.past_key_values is cache


def test_assisted_decoding_crops_the_cache(model: Any, tmp_path: Path) -> None:
    ids = padded(1, 9)[0]
    alone = model.generate(ids, max_new_tokens=20, eos_token_id=None, pad_token_id=0)
    prompted = model.generate(ids, max_new_tokens=20, eos_token_id=None, pad_token_id=0, prompt_lookup_num_tokens=3)
    assert prompted.equal(alone)


def served(model: Any) -> None:
    """The step and eager agree, and the step ran."""
    (ids, mask), before = padded(1, 9), model.regauge_step.steps
    ours, theirs = (forced(forward, model, ids, mask, 5) for forward in (model, model.forward.__wrapped__))
    assert model.regauge_step.steps == before + 4
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_copied_model_is_its_own(model: Any) -> None:
    served(model)
    other = copy.deepcopy(model)
    other.model.norm.weight.mul_(-2.0)
    steps = model.regauge_step.steps
    served(other)
    assert other.regauge_step.model is other
    assert model.regauge_step.steps == steps
    ids, mask = padded(1, 9)
    assert not forced(other, other, ids, mask, 5).equal(forced(model, model, ids, mask, 5))
    served(model)


def test_another_dtype_after_loading(model: Any) -> None:
    served(model)
    model.to(torch.bfloat16)
    ids, mask = padded(1, 9)
    ours, theirs = (forced(forward, model, ids, mask, 5) for forward in (model, model.forward.__wrapped__))
    assert float((ours - theirs).norm() / theirs.norm()) < 4e-2


def test_nothing_is_plugged_where_it_cannot_serve(tmp_path: Path) -> None:
    for name in ("bert", "bert-mlm", "vit", "llama-headless"):
        path = save(pico(name), tmp_path / name)
        found = rg.load(make(path, tmp_path / f"{name}-out", lambda site: choice("int4")).path)
        assert not hasattr(found, "regauge_step")
        assert "forward" not in vars(found)


def compiled() -> None:
    """A compiled model gives eager's logits. Called in a process of its own, without the checks of shapes."""
    with tempfile.TemporaryDirectory() as folder:
        model = loaded(Path(folder), "llama")
        ids = padded(1, 9)[0]
        with torch.no_grad():
            wanted = model(ids).logits
            found = torch.compile(model, backend="aot_eager")(ids).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_model_runs() -> None:
    code = "from units import test_step_hosts; test_step_hosts.compiled(); print('done')"
    here = Path(__file__).parent.parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.stdout.split() == ["done"], done.stderr[-3000:]


def streamed(model: Any, *args: Any, **kwargs: Any) -> list[int]:
    found: Iterator[int] = rg.stream(model, *args, **kwargs)
    return list(found)


def test_stream_is_greedy_generate(model: Any) -> None:
    ids = padded(1, 9)[0]
    wanted = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 9:].tolist()
    before = model.regauge_step.steps
    assert streamed(model, ids, max_new_tokens=20, stop=()) == wanted
    assert model.regauge_step.steps == before + 19
    assert streamed(model, ids[0].tolist(), max_new_tokens=1, stop=()) == wanted[:1]
    end = wanted[5]
    assert streamed(model, ids, stop=(end,)) == wanted[: wanted.index(end)]
    model.generation_config.eos_token_id = [end, 52]
    assert streamed(model, ids) == wanted[: wanted.index(end)]
    assert streamed(model, ids, max_new_tokens=3, choose=lambda logits_V: int(logits_V.argmin()), stop=()) != wanted[:3]


@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        ([], {}, "at least one token"),
        (torch.ones(2, 2, dtype=torch.long), {}, "one sequence"),
        ([1, 53], {}, "from 0 to 52"),
        ([-1], {}, "from 0 to 52"),
        (torch.tensor([0.5]), {}, "from 0 to 52"),
        ("text", {}, "tokenizer"),
        ([1] * 65, {}, "65 tokens and the model reads 64 at once"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_stream_refuses_at_once(model: Any, prompt: Any, settings: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        rg.stream(model, prompt, **settings)


def test_activations_are_checked(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="int8"):
        rg.load(tmp_path, activations="int7")
    with pytest.raises(SettingError, match="window"):
        rg.load(tmp_path, activations="int8", memory="1GB")


def test_text_and_pipelines(bundled: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, pipeline

    made = make(bundled, tmp_path / "out", lambda site: choice("int4", "group:32", "f16"))
    model, tokenizer = rg.load(made.path), AutoTokenizer.from_pretrained(made.path)
    prompt = "def mean(values):\n"
    ours = tokenizer.decode(streamed(model, prompt, max_new_tokens=12))
    steps = model.regauge_step.steps
    assert steps == 11
    found = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        prompt, max_new_tokens=12, do_sample=False, return_full_text=False
    )
    assert found[0]["generated_text"] == ours
    assert model.regauge_step.steps == 2 * steps
