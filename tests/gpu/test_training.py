"""Families trained on a GPU: the losses of the CPU but for rounding, and the same bytes where a run is cut.

On a card only: the interpreter has no part in what torch itself computes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from regauge.artifact.receipt import TrainedReceipt
from regauge.engine.recovery_text import Amounts
from regauge.engine.training import train
from regauge.engine.training_recipe import Asked
from regauge.engine.watchdog import Progress, Watcher
from regauge.errors import SettingError
from regauge.learn import loop
from regauge.plan import parse
from tests.pico import pico, save
from tests.words import save_tokenizer, text

pytestmark = pytest.mark.gpu
SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
TEXT = [text(2000, seed) for seed in range(3)]
ROWS = {
    "plain": "family: {depth: [2], ffn: [0.5]}\ntrain: {sampler: sandwich:1, batch: 128, rate: 0.001, steps: 12}\n",
    "alpha": "family: {heads: [0.5]}\ntrain: {sampler: uniform:2, distiller: alpha, batch: 128, steps: 6}\n",
    "routed": "family: {depth: [2], members: {small: 'depth=2'}}\ntrain: {route: 0.7, batch: 128, steps: 4}\n",
    "gated": "family: {ffn: [0.5, 0.25]}\ntrain: {gates: 0.5, layers: each, batch: 128, steps: 4}\n",
}


@pytest.fixture(autouse=True)
def card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(save(pico("llama", **SIZES), tmp_path_factory.mktemp("training") / "model"))


def learnt(row: str, model: Path, out: Path, device: str, watch: Watcher | None = None) -> TrainedReceipt:
    recipe = parse(f"name: f\n{ROWS[row]}calibration: {{tokens: 512, length: 32}}\n")
    asked = Asked(Amounts(tokens=1024, length=32), device=device)
    found = train(recipe, model, out, TEXT, asked, watch).trained
    assert found is not None
    return found


@pytest.mark.parametrize("row", ROWS)
def test_a_gpu_gives_the_losses_of_a_cpu(row: str, model: Path, tmp_path: Path) -> None:
    ours, theirs = (learnt(row, model, tmp_path / device, device) for device in ("cuda", "cpu"))
    assert (ours.device, theirs.device) == ("cuda", "cpu")
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-3)
    for name, errors in theirs.members.items():
        assert ours.members[name].after == pytest.approx(errors.after, rel=1e-3)


def test_a_run_that_is_cut_ends_with_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "EVERY", 0.0)

    class Killed(BaseException): ...

    def watch(event: Progress) -> None:
        if event.phase == "training" and event.done == 5:
            raise Killed

    learnt("plain", model, tmp_path / "whole", "cuda")
    with pytest.raises(Killed):
        learnt("plain", model, tmp_path / "cut", "cuda", watch)
    learnt("plain", model, tmp_path / "cut", "cuda")
    one, other = (json.loads((tmp_path / name / "regauge/receipt.json").read_text()) for name in ("whole", "cut"))
    assert one["trained"] == other["trained"]
    shards = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert shards
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes() for name in shards)


def test_a_card_that_is_not_there_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="numbered from 0"):
        learnt("plain", model, tmp_path / "out", "cuda:99")
    assert not (tmp_path / "out").exists()
