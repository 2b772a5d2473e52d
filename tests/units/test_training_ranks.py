"""Several processes that train one family: the losses of one, and a lost process told in a sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from regauge.learn.ranks import ALONE, ranks
from tests.pico import pico, save
from tests.words import save_tokenizer, text

RECIPE = """
name: f
calibration: {tokens: 512, length: 32}
family: {depth: [1], ffn: [0.5]}
train: {sampler: sandwich:1, rate: 0.01, steps: STEPS, batch: 128}
"""
SIZES: dict[str, Any] = {"hidden_size": 32, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2}


def command(folder: Path, out: str, steps: int, processes: int = 1) -> list[str]:
    """What trains a pico family."""
    if not (folder / "model").exists():
        save_tokenizer(save(pico("llama", **SIZES, intermediate_size=64), folder / "model"))
        (folder / "text.txt").write_text("\n\n".join(text(2000, seed) for seed in range(4)), encoding="utf-8")
    (folder / "f.yaml").write_text(RECIPE.replace("STEPS", str(steps)), encoding="utf-8")
    run = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
    run += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    words = ["-m", "regauge", "learn", str(folder / "f.yaml"), str(folder / "model"), "-o", str(folder / out), "-q"]
    words += ["--text", str(folder / "text.txt"), "--length", "32", "--tokens", "1024", "--threads", "1"]
    return [sys.executable, *(run if processes > 1 else []), *words]


def trained(folder: Path) -> Any:
    return json.loads((folder / "regauge/receipt.json").read_text(encoding="utf-8"))["trained"]


def test_without_torchrun_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with ranks() as found:
        assert found == ALONE
        assert found.any(True)
        assert found.same("x") == "x"


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    subprocess.run(command(tmp_path, "one", 6), check=True, capture_output=True, timeout=300)
    subprocess.run(command(tmp_path, "two", 6, processes=2), check=True, capture_output=True, timeout=300)
    one, two = trained(tmp_path / "one"), trained(tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert [at for at, _ in two["looks"]] == [at for at, _ in one["looks"]]


@pytest.mark.slow
def test_a_killed_process_is_told_in_a_sentence_and_the_rest_is_kept(tmp_path: Path) -> None:
    run = subprocess.Popen(
        command(tmp_path, "out", 100_000, processes=2), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        manifest, until = tmp_path / "out.partial" / "manifest.json", time.monotonic() + 200
        while (
            not (manifest.exists() and '"training"' in manifest.read_text(encoding="utf-8"))
            and time.monotonic() < until
        ):
            time.sleep(0.2)
        time.sleep(2)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text(encoding="utf-8").split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, said = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode
    told = " ".join(said.split())
    ended, stopped = "another process of this training has ended", "this training was stopped by whoever started"
    assert ended in told or stopped in told, said[-3000:]
    assert "the same command goes on from there" in told
    assert "this is a bug" not in said
    assert (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out").exists()
