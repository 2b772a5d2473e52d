"""`device=`: each thing that a user may write gets its sentence before any work; without triton weights are decoded."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import regauge as rg
from artifacts import choice, make
from regauge.errors import BudgetError, FallbackWarning, SettingError
from regauge.runtime import capabilities, device
from regauge.runtime.device import Placed, placed
from regauge.runtime.matrices.modules import PackedMatrix
from tests.pico import pico, save

NOWHERE = Path("/nowhere/at/all")
BAD = {
    "mps": "models run on 'cpu' or 'cuda', and device='mps' was asked for.",
    "xpu": "models run on 'cpu' or 'cuda', and device='xpu' was asked for.",
    "meta": "models run on 'cpu' or 'cuda', and device='meta' was asked for.",
    "cudda": "there is no device 'cudda' (did you mean 'cuda'?)",
    "gpu": "there is no device 'gpu'",
    "": "there is no device ''",
    "cuda:x": "there is no device 'cuda:x' (did you mean 'cuda'?)",
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_device_is_a_sentence_before_any_work(name: str) -> None:
    with pytest.raises(SettingError) as caught:
        rg.load(NOWHERE, device=name)
    assert str(caught.value).startswith(BAD[name])
    assert "\n" not in str(caught.value)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SettingError, match="torch sees no CUDA device here; leave device out to run on the CPU"):
        rg.load(NOWHERE, device="cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if capabilities.installed("triton"):
        assert placed("cuda") == Placed("cuda", torch.device("cpu"))


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert placed("cuda:0") == Placed("cuda", torch.device("cuda:0"))
    assert placed(torch.device("cuda")) == Placed("cuda", torch.device("cuda"))
    with pytest.raises(SettingError, match="device='cuda:3' was asked for, and torch sees one CUDA device here, numb"):
        placed("cuda:3")


def test_what_is_for_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SettingError, match="activations='int8' is how a CPU rounds; leave it out"):
        rg.load(NOWHERE, device="cuda", activations="int8")
    with pytest.raises(BudgetError, match="memory= keeps a window in the memory of the CPU, and device='cuda' was ask"):
        rg.load(NOWHERE, device="cuda", memory="2GB")


def test_without_triton_weights_are_decoded_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cuda` here is tensors of the CPU: what is seen is the way that is chosen, and what is said."""
    made = make(
        save(pico("llama"), tmp_path / "model"), tmp_path / "out", lambda site: choice("int4"), prefer="regauge"
    )
    monkeypatch.setattr(capabilities, "installed", lambda library: False)
    monkeypatch.setattr(device, "installed", lambda library: False)
    monkeypatch.setattr("regauge.hosts.transformers.load.placed", lambda _: Placed("cuda", torch.device("cpu")))
    device._said.cache_clear()
    with pytest.warns(FallbackWarning, match=r"a GPU decodes packed weights .* pip install 'regauge\[gpu\]'"):
        model = rg.load(made.path, device="cuda")
    assert {m.way.name for m in model.modules() if isinstance(m, PackedMatrix)} == {"decoded"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rg.load(made.path, device="cuda")
        logits = model(torch.tensor([[1, 2, 3]])).logits
    torch.testing.assert_close(logits, rg.load(made.path)(torch.tensor([[1, 2, 3]])).logits, rtol=1e-2, atol=1e-2)
