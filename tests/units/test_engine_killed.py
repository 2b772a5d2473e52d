"""Killed at random moments and run again, `apply`, `fit` and `pick` end with the bytes of a run left alone."""

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


def survive(folder: Path, job: str, kills: int, seed: int, *more: str) -> dict[str, Any]:
    """What `tests/killed.py` saw of a command; `job` is `fit`, `pick` or a recipe."""
    model = tiny.folder(folder / "m", num_hidden_layers=4, hidden_size=96, intermediate_size=70)
    text = tiny.text(folder) if job not in ("fit", "pick") else varied(folder)
    command = [sys.executable, str(ROOT / "tests" / "killed.py"), str(model), str(text), str(folder), job]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [*command, str(kills), str(seed), *more],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def varied(folder: Path) -> Path:
    """A text whose stretches differ, so that it can be split in three."""
    path = folder / "text.txt"
    path.write_text("".join(f"{tiny.TEXT}Number {i} of {i * i}.\n\n" for i in range(60)), encoding="utf-8")
    return path


def check(found: dict[str, Any], kills: int) -> None:
    assert found["different"] == []
    assert found["lost"] == []
    assert found["rewritten"] is False
    assert len(found["shards at each kill"]) == kills


@pytest.mark.long
def test_killed_twice(tmp_path: Path) -> None:
    check(survive(tmp_path, "quarot-gptq-w4g32", 2, 1), 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "kills", "force"),
    [
        pytest.param("quarot-gptq-w4g32", 10, False, marks=pytest.mark.telling),
        ("gptq-w4g32", 10, False),
        ("smoothquant", 10, False),
        ("rtn-w4", 10, True),
        ("gptq-w4g32", 10, True),
        ("fit", 10, False),
        ("fit", 15, True),
        ("pick", 10, False),
        ("pick", 15, True),
    ],
    ids=lambda value: {True: "force", False: "plain"}.get(value) if isinstance(value, bool) else str(value),
)
def test_killed_a_hundred_times(job: str, kills: int, force: bool, tmp_path: Path) -> None:
    """A hundred in all; with --force OUT is an older artifact at first, which stays until the new one is whole."""
    found = survive(tmp_path, job, kills, 2, *(["--force"] if force else []))
    check(found, kills)
    assert max(found["shards at each kill"]) > 0
