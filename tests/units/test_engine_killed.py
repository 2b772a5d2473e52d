"""Killed with SIGKILL at random moments and resumed, `apply` ends with the bytes of a run left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny

ROOT = Path(__file__).resolve().parents[2]


def survive(folder: Path, recipe: str, kills: int, seed: int, **changes: Any) -> dict[str, Any]:
    model, text = tiny.folder(folder / "m", num_hidden_layers=4, **changes), tiny.text(folder)
    command = [sys.executable, str(ROOT / "tests" / "killed.py"), str(model), str(text), str(folder), recipe]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [*command, str(kills), str(seed)], capture_output=True, text=True, timeout=600, check=False, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def check(found: dict[str, Any], kills: int) -> None:
    assert found["different"] in ([], ["regauge/run-log.json"])
    assert found["rewritten"] is False
    assert len(found["shards at each kill"]) == kills


def test_killed_twice(tmp_path: Path) -> None:
    check(survive(tmp_path, "quarot-gptq-w4g32", 2, 1), 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", ["gptq-w4g32", pytest.param("quarot-gptq-w4g32", marks=pytest.mark.telling), "smoothquant", "rtn-w4"]
)
def test_killed_ten_times(recipe: str, tmp_path: Path) -> None:
    found = survive(tmp_path, recipe, 10, 2)
    check(found, 10)
    assert max(found["shards at each kill"]) > 0
