"""An artifact in regauge's packed format never becomes a model with random weights, whoever opens it and how.

One process without regauge tries every stock way; one with regauge loads it through the shim.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from artifacts import choice, make
from pico import pico, save
from regauge.artifact.loading import instead

WITHOUT = """
import json, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "regauge":
            raise ModuleNotFoundError("No module named 'regauge'", name="regauge")
sys.meta_path.insert(0, Hidden())
import transformers
transformers.logging.set_verbosity_error()
told = {}
def attempt(name, load):
    try:
        model = load()
        told[name] = f"LOADED {type(model).__name__}"
    except Exception as error:
        told[name] = f"{type(error).__name__}: {error}"
classes = {"auto": "AutoModelForCausalLM", "body": "AutoModel", "class": "LlamaForCausalLM"}
every = []
for path in sys.argv[1:]:
    told = {}
    for trust in (True, False):
        for name, kind in classes.items():
            open_it = getattr(transformers, kind).from_pretrained
            attempt(f"{name} trust={trust}", lambda: open_it(path, trust_remote_code=trust))
    attempt("class plain", lambda: transformers.LlamaForCausalLM.from_pretrained(path))
    attempt("serve", lambda: transformers.LlamaForCausalLM.from_pretrained(path, dtype="auto", device_map="cpu"))
    attempt("base class", lambda: transformers.LlamaModel.from_pretrained(path))
    every.append(told)
print(json.dumps(every))
"""

WITH = """
import json, sys
import torch, transformers
transformers.logging.set_verbosity_error()
path, saved, pruned = sys.argv[1:]
told = {}
told["pruned"] = type(transformers.AutoModelForCausalLM.from_pretrained(pruned, trust_remote_code=True)).__name__
model = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
told["class"] = type(model).__name__
told["logits"] = model(input_ids=torch.arange(9)[None]).logits.sum().item()
told["half"] = str(transformers.AutoModelForCausalLM.from_pretrained(
    path, trust_remote_code=True, dtype=torch.bfloat16, device_map="cpu").dtype)
try:
    transformers.AutoModelForCausalLM.from_pretrained(path)
    told["no trust"] = "LOADED"
except Exception as error:
    told["no trust"] = type(error).__name__
try:
    model.save_pretrained(saved)
    told["saved"] = "SAVED"
except Exception as error:
    told["saved"] = f"{type(error).__name__}: {error}"
print(json.dumps(told))
"""


def run(script: str, *args: Path) -> Any:
    environment = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    command = [sys.executable, "-c", script, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("closed")
    source = save(pico("llama"), folder / "source")
    return make(source, folder / "artifact", lambda site: choice("nf4") if site.block is not None else None).path


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of other widths and nothing quantised: every tensor has a stock name, and none lies where stock looks."""
    from sizes import cut

    made = cut(tmp_path_factory.mktemp("pruned"), "llama", "ffn", "full").made
    assert not made.wire.layout.quantised
    return made.path


@pytest.mark.long
def test_without_regauge_every_way_to_open_it_is_an_error(artifact: Path, pruned: Path) -> None:
    every = run(WITHOUT, artifact, pruned)
    assert len(every) == 2
    for told in every:
        assert len(told) == 9
        assert not {name: what for name, what in told.items() if what.startswith("LOADED")}
        for name in told.keys() - {"auto trust=True", "body trust=True"}:  # there transformers says what to install
            error = told[name].split(": ", 1)
            assert error[0] == "ValueError", told[name]
            assert error[1].endswith(instead("AutoModelForCausalLM")), told[name]
    assert "regauge" in every[0]["auto trust=True"]  # it says what to install


@pytest.mark.long
def test_with_regauge_the_shim_loads_it_and_transformers_will_not_save_it(
    artifact: Path, pruned: Path, tmp_path: Path
) -> None:
    import torch

    from regauge.hosts.transformers.load import load

    told = run(WITH, artifact, tmp_path / "saved", pruned)
    assert told["pruned"] == "LlamaForCausalLM"
    assert told["class"] == "LlamaForCausalLM"
    assert told["logits"] == pytest.approx(
        load(artifact)(input_ids=torch.arange(9)[None]).logits.sum().item(), rel=1e-4
    )
    assert told["half"] == "torch.bfloat16"
    assert told["no trust"] == "ValueError"
    assert "not serializable" in told["saved"]
    assert not list((tmp_path / "saved").glob("*.safetensors"))
