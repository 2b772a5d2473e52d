"""Memory: counted before the work, refused where a bound cannot be kept, and the same bytes under a bound."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from regauge.cli.app import app
from regauge.engine import api, apply, block, dry_run
from regauge.engine.room import Room
from regauge.errors import BudgetError
from tests import tiny

ROOM = Room(always=100, block=50, making=(30, 20, 10), begin=60)
CHILD = """
import sys
import regauge as rg
told = rg.dry_run("gptq-w4g128", sys.argv[1], calibration=sys.argv[2], tokens=4096)
got = rg.apply("gptq-w4g128", sys.argv[1], sys.argv[3], calibration=sys.argv[2], tokens=4096)
print(told.memory_needed, got.peak_bytes)
"""


def test_as_many_at_once_as_there_are_threads_and_fewer_under_a_bound(two_threads: None) -> None:
    assert [ROOM.peak(count) for count in (1, 2)] == [180, 200]
    assert ROOM.peak() == 200
    assert [ROOM.at_once(bound) for bound in (None, 200, 199, 180)] == [2, 2, 1, 1]
    with pytest.raises(BudgetError, match="takes 180 bytes of memory at the least, and --max-memory allows 179"):
        ROOM.at_once(179)
    assert Room(100, 50, (5,), begin=60).peak(1) == 160  # what lies outside the blocks took more


def test_the_bytes_are_the_same_with_one_at_a_time(
    tmp_path: Path, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = tiny.folder(tmp_path / "m"), tiny.text(tmp_path)
    apply("gptq-w4g32", model, tmp_path / "plain", calibration=text)
    asked: list[int | None] = []
    real = block.named
    monkeypatch.setattr(block, "named", lambda jobs, at_once=None: (asked.append(at_once), real(jobs, at_once))[1])
    monkeypatch.setattr(api, "room", lambda *_: Room(0, 0, (1, 1)))
    apply("gptq-w4g32", model, tmp_path / "bound", calibration=text, max_memory=1)
    assert 1 in asked
    assert 2 not in asked
    for path in sorted((tmp_path / "plain").glob("*.safetensors")):
        assert (tmp_path / "bound" / path.name).read_bytes() == path.read_bytes()


def test_a_bound_that_cannot_be_kept_is_refused_before_any_work_with_the_least_that_can(tmp_path: Path) -> None:
    model, text = tiny.folder(tmp_path / "m"), tiny.text(tmp_path)
    with pytest.raises(BudgetError) as refused:
        apply("gptq-w4g32", model, tmp_path / "out", calibration=text, max_memory=10**6)
    least = int(re.search(r"takes ([\d,]+) bytes", str(refused.value))[1].replace(",", ""))  # type: ignore[index]
    assert 50e6 < least < 5e9
    assert not list(tmp_path.glob("out*"))
    told = dry_run("gptq-w4g32", model, calibration=text, max_memory=10**6)
    assert any("of memory at the least" in reason for reason in told.refusals)
    assert told.memory_needed >= 0.9 * least


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("1GG", "did you mean 'GB'"),
        ("lots", "is not an amount"),
        ("-3GB", "is negative"),
        ("0GB", "is zero"),
        ("300", "has no unit"),
        ("1MB", "of memory at the least"),
    ],
)
def test_what_the_option_says_to_other_words(words: str, said: str, tmp_path: Path) -> None:
    model, text = tiny.folder(tmp_path / "m"), tiny.text(tmp_path)
    given = ["apply", "gptq-w4g32", str(model), "-o", str(tmp_path / "out"), "--calibration", str(text)]
    found = CliRunner().invoke(app, [*given, f"--max-memory={words}"])
    told = found.output + str(found.exception)
    assert found.exit_code != 0
    assert said in " ".join(told.split())
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_what_is_told_is_what_a_process_takes(root: Path, tmp_path: Path) -> None:
    """400M of random weights of a real shape, in a process of its own."""
    script = root / "scripts" / "write_random_model.py"
    subprocess.run([sys.executable, str(script), str(tmp_path / "m"), "--size", "400m"], check=True)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{tiny.TEXT}Number {i} of {i * i}.\n\n" for i in range(400)), encoding="utf-8")
    words = [sys.executable, "-c", CHILD, str(tmp_path / "m"), str(text), str(tmp_path / "out")]
    ran = subprocess.run(words, check=True, capture_output=True, text=True)
    told, took = json.loads("[" + ran.stdout.split("\n")[-2].replace(" ", ",") + "]")
    assert told == pytest.approx(took, rel=0.2)
