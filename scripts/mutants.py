"""How many deliberate faults the tests see: random mutants of src/, each run against the tests that run its line.

    python scripts/mutants.py --map                # once, and again when tests have changed much: half an hour
    python scripts/mutants.py --count 60 --seed 1  # the figure; ends with 1 below --least
    python scripts/mutants.py --file src/regauge/amounts.py --count 20

Works on copies of the tree under build/mutants. For each mutant the tests of its line run, quickest first, until one
fails; then, because fixtures are shared, the files that hold them. A mutant that runs out of time counts as killed, one
on a line that no test runs as alive. `mutants_equivalent.yaml` lists those that change nothing that a user can see, by
file, function and text of the line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from mutants_made import Mutant, mutants
from mutants_map import Covered, make, read

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "mutants"
EQUIVALENT = Path(__file__).with_name("mutants_equivalent.yaml")
LEFT_OUT = ("src/regauge/version.py", "src/regauge/__main__.py")
SECONDS = 120.0
"""Worth of tests that run for one mutant, by what they took when the map was made."""
PATIENCE = 5.0
"""Times that; then the mutant hangs."""
OPTIONS = (
    "-x",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
    "--tb=line",
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",
)
GONE = "ERROR: not found: "
FORKED = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Told:
    """One mutant and what became of it: killed, hung, alive, unrun (no test runs its line), equivalent."""

    mutant: Mutant
    fate: str
    note: str = ""


def main() -> int:
    """The command."""
    wanted = _arguments()
    if wanted.map:
        tree = _tree("map")
        kept = read(WORK, tree) if wanted.tests else Covered({}, {})
        make(_environment(), tree, WORK, ["-n", "2", *(wanted.tests or [])], kept)
        return 0
    if not (WORK / "map.json").exists():
        sys.exit("there is no map of what the tests run yet: python scripts/mutants.py --map")
    drawn = draw(wanted.file, wanted.count, wanted.seed)
    equivalent = yaml.safe_load(EQUIVALENT.read_text(encoding="utf-8")) or []
    started = time.monotonic()
    told = _judge(drawn, read(WORK, ROOT), equivalent, wanted.jobs)
    (WORK / "last.json").write_text(json.dumps([asdict(one) for one in told], indent=1), encoding="utf-8")
    print(table(told))
    counts = Counter(one.fate for one in told)
    dead, counted = counts["killed"] + counts["hung"], len(told) - counts["equivalent"]
    print(
        f"{dead} of {counted} killed ({dead / max(counted, 1):.1%}; {counts['hung']} by the clock), "
        f"{counts['alive']} alive, {counts['unrun']} on lines that no test runs; {counts['equivalent']} equivalent "
        f"ones are not counted. Seed {wanted.seed}, {time.monotonic() - started:.0f} s."
    )
    return int(dead < wanted.least * counted)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--map", action="store_true", help="run the suite and write down which test runs which line")
    parser.add_argument(
        "--tests", nargs=argparse.REMAINDER, help="with --map: arguments for pytest, for tests to add to the map"
    )
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--least", type=float, default=0.95, help="share killed below which the command fails")
    parser.add_argument("--file", action="append", default=[], help="mutate these files only, not all of src/")
    return parser.parse_args()


def draw(files: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """`count` mutants of src/, every possible one as likely as another."""
    paths = files or [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "src").rglob("*.py"))]
    every = [one for path in paths if path not in LEFT_OUT for one in mutants(ROOT, path)]
    return random.Random(seed).sample(every, min(count, len(every)))


def table(told: Sequence[Told]) -> str:
    """One line a mutant, the living first."""
    order = ("alive", "unrun", "equivalent", "hung", "killed")
    rows = []
    for one in sorted(told, key=lambda one: (order.index(one.fate), one.mutant.file, one.mutant.line)):
        name, after = one.mutant.file.removeprefix("src/regauge/"), " ".join(one.mutant.after.split())
        rows.append(f"{one.fate:10}  {name}:{one.mutant.line}  {one.mutant.text}\n{'':12}{after}  {one.note}".rstrip())
    return "\n".join(rows)


def _tree(name: str) -> Path:
    """A copy of the checkout: what git tracks or would. Files that have not changed are left alone."""
    tree = WORK / name
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    for path in filter(None, listed):
        source, target = ROOT / path, tree / path
        if source.is_file() and not (target.is_file() and target.read_bytes() == source.read_bytes()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    for old in tree.rglob("*.py"):
        if not (ROOT / old.relative_to(tree)).exists():
            old.unlink()
    shared = ROOT.parent / "shared"
    if shared.exists() and not (WORK / "shared").exists():
        (WORK / "shared").symlink_to(shared.resolve())  # the tests look for it beside the checkout
    return tree


def _environment(tree: str = "map") -> Path:
    """Python of an environment whose regauge is the copy's and whose other packages are this one's."""
    home = WORK / f"{tree}.venv"
    python, packages = home / "bin" / "python", Path(sysconfig.get_path("platlib"))
    if not python.exists():
        venv.create(home, symlinks=True, with_pip=False)
    place = next(home.glob("lib/python*/site-packages"))
    beyond = [path for path in map(Path, sys.path) if path.name in ("site-packages", "dist-packages")]
    lines = [WORK / tree / "src", *dict.fromkeys([packages, *beyond])]
    traced = "import os; os.environ.get('COVERAGE_PROCESS_START') and __import__('coverage').process_startup()"
    (place / "copy.pth").write_text("\n".join([*map(str, lines), traced, ""]), encoding="utf-8")
    kernels = place / "regauge" / "kernels" / "cpu"
    kernels.mkdir(parents=True, exist_ok=True)
    for library in packages.glob("regauge/kernels/cpu/libregauge_cpu.*"):
        if not (kernels / library.name).exists():
            (kernels / library.name).symlink_to(library.resolve())
    return python


def _judge(drawn: Sequence[Mutant], covered: Covered, equivalent: Sequence[dict[str, str]], jobs: int) -> list[Told]:
    """The fates of all, `jobs` at a time, each job in a tree of its own."""
    _warm()
    results = FORKED.SimpleQueue()
    workers = []
    for job in range(jobs):
        tree, python = _tree(f"tree{job}"), _environment(f"tree{job}")
        share = [one for place, one in enumerate(drawn) if place % jobs == job]
        worker = FORKED.Process(target=_work, args=(share, covered, equivalent, tree, python, results))
        worker.start()
        workers.append(worker)
    told = []
    for _ in drawn:
        one = results.get()
        told.append(one)
        print(
            f"[{len(told)}/{len(drawn)}] {one.fate:10} {one.mutant.file}:{one.mutant.line} {one.note}", file=sys.stderr
        )
    for worker in workers:
        worker.join()
    return told


def _warm() -> None:
    """What every child would import first. Never regauge: each child reads that from its own tree."""
    import scipy.optimize  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)


def _work(share: Sequence[Mutant], covered: Covered, equivalent: Any, tree: Path, python: Path, results: Any) -> None:
    for mutant in share:
        listed = [one for one in equivalent if _same(one, mutant)]
        if listed:
            results.put(Told(mutant, "equivalent", listed[0]["why"]))
            continue
        path = tree / mutant.file
        source = path.read_bytes()
        path.write_bytes(mutant.apply(source))
        try:
            results.put(_fate(mutant, covered, tree, python))
        finally:
            path.write_bytes(source)


def _same(listed: dict[str, str], mutant: Mutant) -> bool:
    """Whether a listed equivalent is this one. Line numbers move, so they are not asked."""
    mine = (mutant.file.removeprefix("src/regauge/"), mutant.function, mutant.text, " ".join(mutant.after.split()))
    return (listed["file"], listed["function"], listed["line"], listed["becomes"]) == mine


def _fate(mutant: Mutant, covered: Covered, tree: Path, python: Path) -> Told:
    named = covered.of(mutant.file, mutant.line)
    if not named:
        return Told(mutant, "unrun")
    first = _affordable(named, covered, SECONDS)
    files = {test.split("::")[0] for test in named}
    rest = [test for test in covered.seconds if test.split("::")[0] in files and test not in set(first)]
    second = _affordable(sorted(rest, key=covered.seconds.__getitem__), covered, SECONDS)
    for tests in filter(None, (first, second)):
        fate, note = _run(tests, sum(covered.seconds[test] for test in tests), tree, python)
        if fate != "alive":
            return Told(mutant, fate, note)
    return Told(mutant, "alive", f"{len(first)} tests run the line")


def _affordable(tests: Sequence[str], covered: Covered, seconds: float) -> list[str]:
    kept: list[str] = []
    for test in tests:
        seconds -= covered.seconds[test]
        if kept and seconds < 0:
            break
        kept.append(test)
    return kept


def _run(tests: Sequence[str], seconds: float, tree: Path, python: Path) -> tuple[str, str]:
    """("killed", by what), ("hung", ""), ("alive", ""). Forked, so that torch is imported once for all mutants."""
    out = tree.with_name(f"{tree.name}.log")
    child = FORKED.Process(target=_pytest, args=(list(tests), tree, python, out))
    child.start()
    child.join(60 + PATIENCE * seconds)
    if child.is_alive():
        os.killpg(child.pid, signal.SIGKILL)
        child.join()
        return "hung", ""
    if child.exitcode == 0:
        return "alive", ""
    said = out.read_text(encoding="utf-8", errors="replace").splitlines()
    lost = {line.removeprefix(f"{GONE}{tree}/") for line in said if line.startswith(GONE)}
    if lost:  # a test that has another name since the map was made kills nothing
        kept = [test for test in tests if test not in lost]
        return _run(kept, seconds, tree, python) if 0 < len(kept) < len(tests) else ("alive", "")
    killer = next((line for line in said if line.startswith(("FAILED", "ERROR", "ImportError while"))), None)
    if killer is None:
        raise SystemExit(f"pytest ended with {child.exitcode} and no test failed: see {out}")
    return "killed", killer[:150]


def _pytest(tests: list[str], tree: Path, python: Path, out: Path) -> None:
    os.setsid()
    log = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(tree)
    here = str(Path(__file__).parent)
    sys.meta_path[:] = [
        one for one in sys.meta_path if "Redirecting" not in type(one).__name__
    ]  # an editable install's
    sys.path[:] = [str(tree / "src"), *(path for path in sys.path if path not in (here, str(ROOT / "src")))]
    sys.executable, sys.argv = str(python), ["pytest"]
    os.environ |= {"OMP_NUM_THREADS": "1", "HYPOTHESIS_STORAGE_DIRECTORY": str(tree.with_name("hypothesis"))}
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.dont_write_bytecode = True
    import pytest

    sys.exit(pytest.main([*OPTIONS, *tests]))


if __name__ == "__main__":
    sys.exit(main())
