"""`AutoModel….from_pretrained(ARTIFACT, trust_remote_code=True)`: every argument is honoured, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from artifacts import choice, make
from pico import pico, save
from regauge.errors import SettingError
from regauge.hosts import from_pretrained


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("door")
    source = save(pico("llama"), folder / "source")
    return make(source, folder / "artifact", lambda site: choice("nf4") if site.block is not None else None).path


def open_it(path: Path, **options: Any) -> Any:
    return from_pretrained("AutoModelForCausalLM", path, **options)


def test_what_can_be_honoured_is(artifact: Path) -> None:
    model = open_it(artifact, attn_implementation="eager", use_cache=False, dtype="bfloat16", device_map={"": "cpu"})
    assert model.config._attn_implementation == "eager"
    assert model.config.use_cache is False
    assert model.dtype == torch.bfloat16
    assert len(model(torch.arange(5)[None], output_attentions=True).attentions) == model.config.num_hidden_layers
    assert open_it(artifact, torch_dtype=torch.float32, device_map="auto", token=None).dtype == torch.float32
    found, told = open_it(artifact, output_loading_info=True)
    assert type(found).__name__ == "LlamaForCausalLM"
    assert told == {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def test_a_config_may_differ_where_no_tensor_does(artifact: Path) -> None:
    config = AutoConfig.from_pretrained(str(artifact), trust_remote_code=True)
    config.use_cache = False
    assert open_it(artifact, config=config).config.use_cache is False
    config.rms_norm_eps = 0.5
    with pytest.raises(SettingError, match="another rms_norm_eps than the artifact"):
        open_it(artifact, config=config)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"state_dict": {}}, "state_dict= cannot be honoured"),
        ({"quantization_config": object()}, "quantization_config= cannot"),
        ({"subfolder": "x"}, "subfolder= cannot"),
        ({"tp_plan": "auto"}, "tp_plan= cannot"),
        ({"max_memory": {0: "1GB"}}, "max_memory= cannot"),
        ({"device_map": {"": "disk"}}, "sends the model to the disk"),
        ({"device_map": {"model": 0, "lm_head": "cpu"}}, "over several places"),
        ({"dtype": "int8"}, "do not compute in dtype 'int8'"),
    ],
)
def test_what_cannot_is_refused_by_name(options: dict[str, Any], said: str, artifact: Path) -> None:
    with pytest.raises(SettingError, match=said):
        open_it(artifact, **options)


@pytest.mark.parametrize("auto", ["AutoModelForSequenceClassification", "AutoModelForMaskedLM"])
def test_another_class_than_the_artifacts(auto: str, artifact: Path) -> None:
    with pytest.raises(SettingError, match=r"is a LlamaForCausalLM, .* open it with AutoModelForCausalLM"):
        from_pretrained(auto, artifact)
    assert type(from_pretrained("AutoModel", artifact)).__name__ == "LlamaForCausalLM"
