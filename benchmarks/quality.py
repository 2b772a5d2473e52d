"""Quality at equal bits beside the field: every peer on the same model, text and held-out tokens, one evaluator.

    python benchmarks/quality.py                                   # the bundled model at 4, 3 and 2 bits
    python benchmarks/quality.py --model DIR --calibration TEXTS --eval HELD_OUT --bits 2 3 --fit
    python benchmarks/quality.py --bits 4 --write                  # a section of docs/quality.md
    python benchmarks/quality.py --peers none --ours gptq-w3g64 autoround-w3g64 --bits 3

Peers are installed by `python benchmarks/peers/setup.py imatrix llmcompressor autoround grids`, each in an environment
of its own; one that is missing or fails is a row that says so. What a peer made is decoded into the plain model. KL to
the original on windows that nobody calibrated on, with its interval over documents; `bits` are of the matrices in the
blocks, codes, steps, zero points and tables counted; MB with everything that was left alone at 16 bits. Seconds are
CPU seconds of the whole process, memory its most anonymous bytes. Each group ends with our best even row against the
best peer of no more bits than ours have, paired; `--fit` adds a search at the bytes of that row, paired against both.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.calibrating import PEERS, missing
from common.calibrating import Peer as Kind
from common.heldout import HeldOut
from common.sections import put
from common.watched import Watched, watched
from peers.setup import KNOWN, python

from regauge.measure.bootstrap import Interval
from regauge.measure.machine import machine
from regauge.measure.quality import Scores, paired, summarise

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "quality.md"
TABLE = "| | bits | MB | KL | CPU s | memory |\n|---|---|---|---|---|---|"
SEED = 0
THEIRS = "auto-round"
NEAR = 0.03
"""Bits a weight that a peer may have beyond the widest of our rows and still count as no more."""
CHILD = """
import json, sys
import regauge as rg
from regauge.ranking.bench import bits_in_blocks
recipe, model, out, text, tokens, length = sys.argv[1:7]
if recipe.startswith("memory="):
    rg.fit(model, out, recipe, calibration=text)
    print(json.dumps({"bits": None}))
else:
    receipt = rg.apply(recipe, model, out, calibration=text, tokens=int(tokens), length=int(length))
    print(json.dumps({"bits": bits_in_blocks(receipt)}))
"""
OURS = ("gptq-w{0}g64", "autoround-w{0}g64", "trellis-w{0}")
GRIDS = ("hqq-w{0}g64", "torchao-w{0}g64")
LLAMA = {
    4: ("iq4_xs", "q4_0", "q4_k_s"),
    3: ("iq3_xxs", "iq3_s", "q3_k_s"),
    2: ("iq2_xxs", "iq2_xs", "iq2_s", "q2_k_s"),
}


@dataclass(frozen=True)
class Row:
    """What one contender made."""

    name: str
    ours: bool
    bits: float
    megabytes: float
    kl: float
    low: float
    high: float
    seconds: float
    memory: int

    def __str__(self) -> str:
        bits = f"{self.bits:5.2f} bits" if self.bits else "          "
        return (
            f"{self.name:28} {bits} {self.megabytes:8.3f} MB  KL {self.kl:.5f} [{self.low:.5f}, {self.high:.5f}]  "
            f"{self.seconds:6.0f} cpu s {self.memory / 1e6:6.0f} MB of memory"
        )

    def cells(self) -> str:
        """The row as docs have it."""
        name, bits = f"`{self.name}`" if self.ours else self.name, f"{self.bits:.2f}" if self.bits else ""
        return (
            f"| {name} | {bits} | {self.megabytes:.3f} | {self.kl:.5f} [{self.low:.5f}, {self.high:.5f}] | "
            f"{self.seconds:.0f} | {self.memory / 1e9:.1f} GB |"
        )


def rivals(bits: int) -> dict[str, tuple[Kind, str]]:
    """Row → how it is had, and its kind, at a width."""
    found = {f"llama.cpp {kind}": (Kind("quality_llama", "imatrix"), kind) for kind in LLAMA[bits]}
    found["auto-round"] = Kind("quality_autoround", "autoround"), f"w{bits}g64"
    for method in ("gptq", "awq"):
        found[f"llm-compressor {method}"] = Kind("quality_llmcompressor", "llmcompressor"), f"{method}-w{bits}g64"
    grids = [form.format(bits) for form in GRIDS]
    grids += [f"quanto-w{bits}g64"] if bits in (2, 4) else []
    grids += ["bnb-nf4"] if bits == 4 else []
    return found | {kind: (Kind("quality_grids", "grids"), kind) for kind in grids}


class Field:
    """One model and its texts; what was made of it so far.

    Attributes:
        said: lines that are no row: what could not run, how ours stands.
    """

    def __init__(self, given: argparse.Namespace, scratch: Path) -> None:
        self.given, self.scratch = given, scratch
        self.held = HeldOut(given.model, given.eval, given.length, given.read)
        self.rows: dict[str, Row] = {}
        self.scores: dict[str, Scores] = {}
        self.said: list[str] = []

    def say(self, line: str) -> None:
        """Prints a line, and keeps it for the docs."""
        self.said.append(line.strip())
        print(line, flush=True)

    def _keep(self, name: str, out: Path, told: tuple[float, float, float, int], ours: bool) -> Row:
        bits, size, seconds, memory = told
        scores = self.held.scores(out)
        kl = summarise(scores, SEED).kl
        row = Row(name, ours, bits, size / 1e6, kl.value, kl.low, kl.high, seconds, memory)
        self.rows[name], self.scores[name] = row, scores
        print(row, flush=True)
        return row

    def ours(self, recipe: str, name: str = "") -> Row | None:
        """One of our rows, or a search within `memory=...`."""
        given, out = self.given, self.scratch / "ours"
        command = [sys.executable, "-c", CHILD, recipe, str(given.model), str(out), str(given.calibration)]
        with _removed(out):
            ran = watched([*command, str(given.tokens), str(given.length)], [out])
            said = _said(ran)
            if isinstance(said, str):
                self.say(f"{name or recipe:28} {said}")
                return None
            size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
            return self._keep(name or recipe, out, (said["bits"] or 0.0, size, ran.cpu, ran.peak), True)

    def peer(self, name: str, kind: Kind, word: str) -> Row | None:
        """One peer's row."""
        if why := missing(kind):
            self.say(f"{name:28} {why}")
            return None
        given, out = self.given, self.scratch / "peer"
        command = [str(python(kind.venv)), str(PEERS / f"{kind.script}.py")]
        command += [str(given.model), str(out), str(given.calibration), str(given.tokens), str(given.length), word]
        with _removed(out):
            ran = watched(command, [out])
            said = _said(ran)
            if isinstance(said, str):
                self.say(f"{name:28} {said}")
                return None
            return self._keep(name, out, (said["bits"], said["bytes"], ran.cpu, ran.peak), False)

    def against(self, one: Row, other: Row) -> Interval:
        """KL of one less that of the other, with its interval over documents."""
        return paired(self.scores[one.name], self.scores[other.name], SEED).difference


@contextmanager
def _removed(path: Path) -> Iterator[None]:
    """What is made lies there only while it is scored."""
    try:
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _said(ran: Watched) -> dict[str, Any] | str:
    """The line of JSON that a process ended with, or a sentence where it failed."""
    lines = [line for line in ran.printed.splitlines() if line.startswith("{") and '"bits"' in line]
    if ran.code or not lines:
        last = [line for line in ran.complaints.splitlines() if line.strip()][-1:]
        return f"ended with {ran.code}: {' '.join(last)[:200]}"
    return dict(json.loads(lines[-1]))


def told(what: str, gap: Interval) -> str:
    verdict = "lower" if gap.high < 0 else "higher" if gap.low > 0 else "no different"
    return f"  {what}: {gap.value:+.5f} [{gap.low:+.5f}, {gap.high:+.5f}], {verdict}"


def group(field: Field, bits: int, given: argparse.Namespace) -> None:
    """One width: rows, then how ours stands."""
    print(f"\n{bits} bits", flush=True)
    names = given.ours or [form.format(bits) for form in OURS]
    mine = [row for row in map(field.ours, names) if row]
    others = [field.peer(name, kind, word) for name, (kind, word) in rivals(bits).items() if taking(name, given.peers)]
    if not mine:
        return
    best = min(mine, key=lambda row: row.kl)
    most = max(row.bits for row in mine) + NEAR
    even = [row for row in others if row and row.bits <= most]
    rival = min(even, key=lambda row: row.kl) if even else None
    field.say(f"best of ours: {best.name}")
    if rival:
        field.say(told(f"against {rival.name}, the best peer of {rival.bits:.2f} bits", field.against(best, rival)))
    for row in others:
        if row and row.bits > most and row.kl < best.kl:
            field.say(f"  {row.name} has a lower KL with {row.bits - best.bits:.2f} bits more")
    learnt, peer = (
        field.rows.get(f"autoround-w{bits}g64"),
        next((row for row in others if row and row.name == THEIRS), None),
    )
    if learnt and peer:
        field.say(f"  {learnt.name} calibrates in {learnt.seconds / peer.seconds:.2f} of the CPU time of {THEIRS}")
        field.say(told(f"{learnt.name} against {THEIRS}", field.against(learnt, peer)))
    if given.fit:
        found = field.ours(f"memory={best.megabytes:.3f}MB", f"fit at {best.megabytes:.3f} MB")
        for row in (best, rival):
            if found and row:
                field.say(told(f"fit against {row.name}", field.against(found, row)))


def written(field: Field, bits: int) -> None:
    """The width as a section of the docs: how it was had, rows, what is to be said of them."""
    given, held = field.given, field.held.windows
    rivals_of = {kind.venv for kind, _ in rivals(bits).values() if not missing(kind)}
    packages = sorted({package for venv in rivals_of for package in KNOWN[venv].packages})
    command = (
        f"python benchmarks/quality.py --model DIR --calibration {given.calibration.name} --eval {given.eval.name}"
    )
    command += f" --peers {' '.join(map(shlex.quote, given.peers))}" if given.peers else ""
    lines = [
        f"`{command} --bits {bits} --tokens {given.tokens} --read {given.read}{' --fit' * given.fit} --write`, "
        f"{held.predicted:,} held-out tokens of {held.documents} documents, {machine().cpu}. "
        f"Peers: {', '.join(packages) or 'none'}.",
        "\n".join([TABLE, *(row.cells() for row in field.rows.values())]),
        "\n".join(f"- {' '.join(line.split())}" for line in field.said),
    ]
    put(PAGE, f"{given.model.name}, {bits} bits", "\n\n".join(lines))


def taking(name: str, wanted: list[str]) -> bool:
    return not wanted or any(word in name for word in wanted)


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--model", type=Path, default=ROOT / "bundled" / "code-llama-5m")
    words.add_argument("--calibration", type=Path, default=ROOT / "src")
    words.add_argument("--eval", type=Path, default=ROOT / "tests")
    words.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], choices=sorted(LLAMA))
    words.add_argument("--ours", nargs="+", default=[], help="presets; three at each width by default")
    words.add_argument("--peers", nargs="+", default=[], help="only those whose name has one of these; none for none")
    words.add_argument("--fit", action="store_true", help="a search at the same bytes beside them")
    words.add_argument("--tokens", type=int, default=65536, help="that calibrate")
    words.add_argument("--length", type=int, default=256, help="of windows")
    words.add_argument("--read", type=int, default=61440, help="held-out tokens")
    words.add_argument("--json", type=Path)
    words.add_argument("--write", action="store_true", help=f"each width as a section of {PAGE.relative_to(ROOT)}")
    given = words.parse_args()
    began, made = time.monotonic(), list[Row]()
    with tempfile.TemporaryDirectory() as scratch:
        field = Field(given, Path(scratch))
        for bits in given.bits:
            field.said, field.rows = [], {}
            group(field, bits, given)
            made += field.rows.values()
            if given.write:
                written(field, bits)
    print(f"\n{time.monotonic() - began:.0f} s in all")
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in made], indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
