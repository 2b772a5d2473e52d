"""A length of time is kept: effort that fits is chosen before, and what there is no time for is left out, and said."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from regauge.engine.watchdog import Clock, Course, Progress
from regauge.errors import BudgetError, ModelError
from regauge.hosts import host_of
from regauge.search.fit import fit
from regauge.search.loop.desk import AMOUNTS, Effort
from regauge.search.loop.forecast import NOMINAL, Time, steps, within
from regauge.search.loop.pace import Stopwatch
from regauge.search.options import site_groups


def stopwatch(limit: float | None, elapsed: float = 0.0) -> Stopwatch:
    watch = Stopwatch(limit, began=time.monotonic() - elapsed)
    watch.expects({"sensitivity": 8.0, "trials": 4.0, "build": 6.0}, {"build": 6.0, "evaluation": 4.0})
    return watch


def test_what_must_come_is_kept_free() -> None:
    watch = stopwatch(30.0, elapsed=10.0)
    assert watch.spare() == pytest.approx(9.5, abs=0.2)
    assert watch.can("samples", 9.0)
    assert not watch.can("samples", 11.0)
    assert watch.left_out == ["samples"]
    assert watch.many("variants", 10, 2.0) == 4
    assert watch.left_out == ["samples", "6 of 10 variants"]


def test_a_machine_that_slows_makes_everything_dearer() -> None:
    watch = stopwatch(60.0, elapsed=20.0)
    watch.seconds["sensitivity"] = 18.0
    assert watch.pace == pytest.approx(2.0)
    assert watch.spare() == pytest.approx(19.5, abs=0.2)  # 40 left, twice 10 to come
    assert watch.many("variants", 10, 2.0) == 4


def test_a_step_that_is_over_must_not_come_any_more() -> None:
    watch = stopwatch(30.0)
    with watch.step("build"):
        pass
    assert watch.must == {"evaluation": 4.0}


def test_without_a_limit_nothing_is_left_out() -> None:
    watch = stopwatch(None, elapsed=1e6)
    assert math.isinf(watch.spare())
    assert watch.many("variants", 10, 1e9) == 10
    assert watch.can("samples", 1e9)
    assert watch.left_out == []


def test_less_time_is_less_effort_and_too_little_is_refused(bundled: Path) -> None:
    source = host_of(bundled).open(bundled, None)
    groups = site_groups(source.anatomy)
    total = [sum(steps(source, groups, effort, NOMINAL).values()) for effort in Effort().lesser()]
    assert total == sorted(total, reverse=True)
    for place, effort in enumerate(Effort().lesser()):
        assert within(source, groups, Effort(), Time(total[place] / 0.85 + 0.01, 60.0, NOMINAL)) == effort
    with pytest.raises(BudgetError, match=r"--time 1s does not suffice .* the least takes about \d+ s here now"):
        within(source, groups, Effort(), Time(-2.0, 1.0, NOMINAL))


def test_effort_on_the_text_of_an_earlier_search() -> None:
    few = Effort().lesser()[-1]
    kept = Effort().reading(few.amounts)
    assert {name: getattr(kept, name) for name in AMOUNTS} == few.amounts
    assert kept.checks == Effort().checks


def test_the_share_of_a_course_never_falls_and_tells_what_is_left() -> None:
    seen: list[Progress] = []
    clock = Clock(seen.append)
    clock.course = Course({"a": 1.0, "b": 2.0, "c": 1.0}, began=time.monotonic() - 10)
    clock.start("b", 2)
    clock.tick("b", 1, 2)
    clock.show("a", 1, 1)
    clock.say("elsewhere")
    clock.ended("c")
    assert [event.share for event in seen] == [0.25, 0.5, 0.5, 0.5, 1.0]
    assert seen[1].left == pytest.approx(10, abs=0.5)
    clock.within("b")(Progress("inner", 1, 2, share=0.9))
    assert (seen[-1].phase, seen[-1].share) == ("inner", 1.0)


def test_a_dry_run_refuses_what_the_run_would(bundled: Path, tmp_path: Path) -> None:
    # caches at 2 bits, keys in groups of 128 tokens: 24 heads of 21 bytes a token, and the last 128 whole
    with pytest.raises(BudgetError, match="the cache alone takes 16,843,776 at 32,768 tokens"):
        fit(bundled, tmp_path / "out", ["memory@32k=0.3x"], dry_run=True)
    with pytest.raises(BudgetError, match=r"the smallest that we can make is [\d,]+ beside a cache of 844,800"):
        fit(bundled, tmp_path / "out", ["memory@1k=0.15x"], dry_run=True)
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in bundled.iterdir():
        if not path.name.startswith("tokenizer"):
            shutil.copy(path, bare)
    with pytest.raises(ModelError, match="has no tokenizer"):
        fit(bare, tmp_path / "out", ["memory=0.3x"], dry_run=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True], ids=["as it is", "beside another process"])
def test_a_search_ends_in_time(busy: bool, bundled: Path, tmp_path: Path) -> None:
    """On the bundled model, as the issue asks: within 1.15 T + 5 s, also with a process that eats a core."""
    text = [path.read_text(encoding="utf-8") for path in sorted(Path(os.__file__).parent.glob("*.py"))[:120]]
    eater = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    began = time.monotonic()
    try:
        run = fit(bundled, tmp_path / "out", ["memory=0.30x"], calibration=text, time_limit=20.0)
    finally:
        if eater is not None:
            eater.kill()
            eater.wait()
    assert time.monotonic() - began <= 1.15 * 20 + 5
    assert run.quality is not None
    assert run.point.bytes_measured is not None
