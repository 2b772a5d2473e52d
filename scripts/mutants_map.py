"""Which tests run which lines of src/, and how long each takes: made by coverage.py, kept in build/.

As a pytest plugin (`-p mutants_map`) it names the running test to coverage, in whatever process; as a module it runs
the suite that way and reads what came out. Only `scripts/mutants.py` uses it.
"""

from __future__ import annotations

import difflib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import coverage
import pytest
from coverage.numbits import numbits_to_nums

RUNNING = "REGAUGE_RUNNING_TEST"
TIMES = "REGAUGE_TEST_TIMES"
_times: dict[str, float] = {}
_failed: set[str] = set()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """What runs until the next test, set-up of its fixtures included, counts as run by this one."""
    tracing = coverage.Coverage.current()
    os.environ[RUNNING] = item.nodeid  # what a subprocess of the test runs is its own
    if tracing is not None:
        tracing.switch_context(item.nodeid)
    try:
        return (yield)
    finally:
        os.environ.pop(RUNNING, None)
        if tracing is not None:
            tracing.switch_context("")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Seconds of each test, and whether it passed here (under xdist: in the process that collects)."""
    _times[report.nodeid] = _times.get(report.nodeid, 0.0) + report.duration
    if report.outcome != "passed":  # a skipped test kills nothing either
        _failed.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Workers of xdist end without a word, so what they saw is saved before."""
    tracing = coverage.Coverage.current()
    if hasattr(session.config, "workerinput"):
        if tracing is not None:
            tracing.stop()
            tracing.save()
    elif os.environ.get(TIMES):
        passed = {test: seconds for test, seconds in _times.items() if test not in _failed}
        Path(os.environ[TIMES]).write_text(json.dumps(passed), encoding="utf-8")


@dataclass(frozen=True)
class Covered:
    """`tests[file][line]`: the tests that run it. `seconds[test]`: what it took. Only tests that passed are named."""

    tests: dict[str, dict[int, list[str]]]
    seconds: dict[str, float]

    def of(self, file: str, line: int) -> list[str]:
        """Tests of a line, the quickest first. A line that runs on import has those of its file."""
        lines = self.tests.get(file, {})
        named = lines.get(line) or [test for tests in lines.values() for test in tests]
        return sorted(set(named), key=lambda test: (self.seconds[test], test))


def make(python: Path, tree: Path, work: Path, pytest_args: list[str], kept: Covered) -> None:
    """Runs tests of `tree` with every process traced, and leaves what they ran, and what is `kept`, in `work`."""
    config = work / "coveragerc"
    config.write_text(
        f"[run]\nsource = {tree / 'src'}\nparallel = true\ndata_file = {work / 'data' / 'coverage'}\n"
        f"context = ${{{RUNNING}-}}\ndisable_warnings = no-data-collected, module-not-imported, module-not-measured, "
        "couldnt-parse, trace-changed, already-imported, no-ctracer\n",
        encoding="utf-8",
    )
    (work / "data").mkdir(parents=True, exist_ok=True)
    for old in (work / "data").glob("coverage*"):
        old.unlink()
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "COVERAGE_PROCESS_START": str(config),
        TIMES: str(work / "times.json"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [str(python), "-m", "pytest", "-p", "mutants_map", "-p", "no:cacheprovider", *pytest_args]
    ended = subprocess.run(command, cwd=tree, env=environment, check=False).returncode
    if ended not in (0, 1):  # 1: some failed; they are left out
        sys.exit(f"the suite did not run (exit code {ended})")
    seconds = json.loads((work / "times.json").read_text(encoding="utf-8"))
    found = {file: {str(line): set(names) for line, names in lines.items()} for file, lines in kept.tests.items()}
    texts = {path.relative_to(tree).as_posix(): _lines(path) for path in sorted((tree / "src").rglob("*.py"))}
    for data in sorted((work / "data").glob("coverage.*")):
        _read(data, tree, seconds, found)
    tests = {file: {line: sorted(names) for line, names in lines.items()} for file, lines in found.items()}
    whole = {"tests": tests, "seconds": kept.seconds | seconds, "texts": texts}
    (work / "map.json").write_text(json.dumps(whole), encoding="utf-8")


def _read(data: Path, tree: Path, seconds: dict[str, float], found: dict[str, dict[str, set[str]]]) -> None:
    """Adds what one process saw; a process that was killed while it wrote has nothing to say."""
    query = (
        "select file.path, context.context, line_bits.numbits from line_bits "
        "join file on file.id = line_bits.file_id join context on context.id = line_bits.context_id"
    )
    try:
        rows = sqlite3.connect(data).execute(query).fetchall()
    except sqlite3.DatabaseError:
        return
    for path, context, bits in rows:
        test = context.removeprefix("|") if context.startswith("|") else context.split("|")[0]
        if test in seconds:
            lines = found.setdefault(Path(path).relative_to(tree).as_posix(), {})
            for line in numbits_to_nums(bits):
                lines.setdefault(str(line), set()).add(test)


def read(work: Path, root: Path) -> Covered:
    """The map as `make` left it, its lines found again in the files under `root`; nothing where there is none."""
    if not (work / "map.json").exists():
        return Covered({}, {})
    kept = json.loads((work / "map.json").read_text(encoding="utf-8"))
    tests = {}
    for file, lines in kept["tests"].items():
        if (root / file).exists():
            now = _moved(kept["texts"][file], _lines(root / file))
            tests[file] = {now[int(line)]: names for line, names in lines.items() if int(line) in now}
    return Covered(tests, kept["seconds"])


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _moved(before: list[str], after: list[str]) -> dict[int, int]:
    """Number of a line → its number now. A changed line is the one in its place among lines that were not."""
    if before == after:
        return {number: number for number in range(1, len(before) + 1)}
    found = {}
    for kind, low, high, first, last in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind in ("equal", "replace"):
            found |= {low + k + 1: first + k + 1 for k in range(min(high - low, last - first))}
    return found
