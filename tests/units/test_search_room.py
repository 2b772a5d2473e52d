"""What a search takes of memory, counted before it: by hand, and against a process in a slow test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from regauge.errors import BudgetError
from regauge.search.loop.desk import Limits
from regauge.search.loop.room import LEAST, SearchRoom, Step
from regauge.search.losses.trials import STATES
from tests import tiny

ROOM = SearchRoom((Step("rounding", 100, (30, 20, 10)), Step("variants", 90, states=STATES)))
CHILD = """
import os, sys, threading, time
from regauge.kernels.cpu.machine import anonymous_bytes
from regauge.hosts import host_of
from regauge.search.fit import fit
from regauge.search.loop.desk import Effort, Limits
from regauge.search.loop.room import room
from regauge.search.options import site_groups
Effort.sized = lambda self, _: Effort(
    calibration=4096, search=1024, evaluation=1024, gradient=2048, seen=4096, checks=3, neighbours=1, rounds=1,
    points=2, builds=1, turns=1, draws=1, shown=1, uniforms=1, memory=False)
model, text, out = sys.argv[1:]
source = host_of(model).open(model)
from regauge.search.budgets import parse
told = room(source, site_groups(source.anatomy), Effort().sized(0), parse(["memory=0.35x"])).peak(Limits())
most, ended = [0], threading.Event()

def watch():
    while not ended.is_set():
        most[0] = max(most[0], anonymous_bytes())
        time.sleep(0.005)

watcher = threading.Thread(target=watch)
watcher.start()
try:
    fit(model, out, budgets=["memory=0.35x"], calibration=text)
finally:
    ended.set()
    watcher.join()
print(told, most[0])
"""


def test_less_is_done_at_once_under_a_bound_and_the_least_is_told(two_threads: None) -> None:
    assert ROOM.limits(None) == Limits()
    assert ROOM.peak(Limits()) == 90 + STATES
    assert ROOM.highest(Limits(1, 1)).name == "rounding"
    assert ROOM.limits(90 + STATES) == Limits(2, STATES, 90 + STATES)
    assert ROOM.limits(90 + STATES - 1) == Limits(2, STATES // 2, 90 + STATES - 1)
    assert ROOM.limits(90 + LEAST) == Limits(2, LEAST, 90 + LEAST)
    with pytest.raises(BudgetError, match=rf"takes {90 + LEAST:,} bytes of memory at the least \(variants\)"):
        ROOM.limits(89 + LEAST)
    narrow = SearchRoom((Step("rounding", 100, (30, 20)),))
    assert narrow.limits(149).at_once == 1
    assert narrow.limits(150).at_once == 2


@pytest.mark.slow
def test_what_is_told_of_a_search_is_what_a_process_takes(root: Path, tmp_path: Path) -> None:
    """135M of random weights of a real shape, a whole search with little effort."""
    script = root / "scripts" / "write_random_model.py"
    subprocess.run([sys.executable, str(script), str(tmp_path / "m"), "--size", "135m"], check=True)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{tiny.TEXT}Number {i} of {i * i}.\n\n" for i in range(600)), encoding="utf-8")
    words = [sys.executable, "-c", CHILD, str(tmp_path / "m"), str(text), str(tmp_path / "out")]
    ran = subprocess.run(words, check=True, capture_output=True, text=True)
    told, took = map(int, ran.stdout.splitlines()[-1].split())  # the solver writes lines of its own now and then
    assert told == pytest.approx(took, rel=0.2)
