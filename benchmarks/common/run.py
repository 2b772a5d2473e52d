"""What every benchmark of speed does around its rows: options, rounds, the record, what is printed."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common import table
from common.models import INTERPRETERS
from common.probe import peaks
from common.records import Result, write
from common.rounds import Entry, Rounds
from regauge.measure.machine import machine

OUT = Path(__file__).resolve().parents[2] / "out" / "bench"
VERSIONS = ("regauge", "torch", "transformers")


def words(doc: str | None) -> argparse.ArgumentParser:
    """The options that all have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--profile", choices=("quick", "full"), default="quick")
    made.add_argument("--quick", dest="profile", action="store_const", const="quick", help="as --profile quick")
    made.add_argument("--full", dest="profile", action="store_const", const="full", help="as --profile full")
    made.add_argument("--rounds", type=int, default=0, help="samples a row; 0: as the profile has it")
    made.add_argument("--out", type=Path, default=None, help="the JSON to write; out/bench/NAME.json by default")
    made.add_argument("--list", action="store_true", help="print the rows and end")
    made.add_argument("--make", action="store_true", help="make the files that the rows need and end")
    return made


def run(bench: str, given: argparse.Namespace, groups: list[list[Entry]], rounds: int, script: Path) -> int:
    """Runs groups of entries, each in rounds of its own; writes after every group what there is."""
    only = given.only
    groups = [[e for e in group if not only or any(word in e.row.name for word in only)] for group in groups]
    if given.list or given.make:
        for entry in (entry for group in groups for entry in group):
            if given.make:
                entry.make()
            print(entry.row.model, entry.row.name, f"batch {entry.row.batch}", flush=True)
        return 0
    taking = Rounds(dict(INTERPRETERS), log=OUT / f"{bench}.peers.log")
    result = Result(
        bench=bench,
        profile=given.profile,
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=shlex.join(["python", f"benchmarks/{script.name}", *sys.argv[1:]]),
        machine=machine().model_dump(),
        versions=versions(),
        probe=taking.probing,
        peaks=peaks(),
    )
    path = given.out or OUT / f"{bench}.json"
    try:
        for group in groups:
            taking.run(group, rounds)
            result.rows += [entry.row for entry in group]
            result.notes = agreement(groups)
            write(result, path)
            taking.close()
    finally:
        taking.close()
    print(table.whole(result))
    print(f"\n{path}")
    return 0 if any(row.seconds for row in result.rows) else 1


def versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def agreement(groups: list[list[Entry]]) -> list[str]:
    """Where two routes of one model did not make the same tokens."""
    notes = []
    for group in groups:
        first: dict[tuple[str, str, str], list[int]] = {}
        for entry in (entry for entry in group if entry.ids):
            key = (entry.row.model, entry.row.runner, entry.row.variant)
            ids = first.setdefault(key, entry.ids)
            if ids != entry.ids:
                at = next((n for n, (a, b) in enumerate(zip(ids, entry.ids, strict=False)) if a != b), len(ids))
                notes.append(f"{' '.join(key)}: routes part at token {at}")
    return notes
