"""Peers as processes, and the turns they take: A B C A B C …, with a probe of the bandwidth between any two."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from common.probe import Others, gigabytes, native
from common.records import Row

PEERS = Path(__file__).resolve().parents[1] / "peers"
REST = 0.05  # seconds for a peer's threads to fall asleep after its turn
SPINNING = 0.05  # cores that a peer may keep busy while it is not its turn


@dataclass
class Entry:
    """One row to fill: which peer does it, and what it is asked to load."""

    row: Row
    peer: str  # stem of the file in benchmarks/peers
    make: Callable[[], dict[str, Any]]  # makes the files that are missing; what the peer is told, as JSON
    memory: int = 0  # bytes that loading takes
    ids: list[int] = field(default_factory=list)  # tokens that the last run made
    facts: dict[str, Any] = field(default_factory=dict)  # what the peer told when it loaded and ran, JSON


class Peer:
    """A process that loads and runs on request and sleeps in between."""

    def __init__(self, name: str, python: Path, log: Path | None) -> None:
        self.name = name
        errors = None if log is None else log.open("a")
        self.child = subprocess.Popen(
            [str(python), str(PEERS / f"{name}.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        if errors is not None:
            errors.close()
        self.process = psutil.Process(self.child.pid)

    def ask(self, do: str, name: str, **more: object) -> dict[str, Any]:
        """One request; an answer with `error` where the peer cannot or has died."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        try:
            self.child.stdin.write(json.dumps({"do": do, "id": name, **more}) + "\n")
            self.child.stdin.flush()
            line = self.child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return {"error": f"the peer ended with code {self.child.wait()}"}
        found: dict[str, Any] = json.loads(line)
        return found

    def spent(self) -> float:
        """CPU seconds so far."""
        try:
            times = self.process.cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(times.user + times.system)

    def close(self) -> None:
        for stream in (self.child.stdin, self.child.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self.child.wait()


@dataclass
class Rounds:
    """The peers of one run and the probe beside them.

    Attributes:
        interpreters: peer → the Python it needs, where it is not ours; a peer whose Python is missing is skipped.
        log: where peers print; None: stderr.
    """

    interpreters: dict[str, Path] = field(default_factory=dict)
    log: Path | None = None
    peers: dict[str, Peer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.probing = "native" if native() else "torch, by summing a buffer"
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.log.write_text("")
        self.probe: Callable[[], float] = gigabytes

    def run(self, entries: list[Entry], rounds: int, warm: int = 1, tell: Callable[[str], None] = print) -> None:
        """Loads every entry, then lets each run once a round; fills the rows."""
        live = [entry for entry in entries if self._load(entry, tell)]
        others = Others(lambda: [psutil.Process(), *(peer.process for peer in self._alive())])
        before = self.probe()
        for turn in range(warm + rounds):
            for entry in live:
                if entry.row.skipped:
                    continue
                others()
                idle = {name: peer.spent() for name, peer in self.peers.items() if name != entry.peer}
                start = time.monotonic()
                answer = self.peers[entry.peer].ask("run", _key(entry))
                wall = time.monotonic() - start
                busy = others()
                self._spinning(idle, wall, entries)
                time.sleep(REST)
                after = self.probe()
                if "error" in answer:
                    entry.row.skipped = answer["error"]
                    entry.row.seconds, entry.row.probes, entry.row.busy = [], [], []
                elif turn >= warm:
                    for second in answer["seconds"]:
                        entry.row.seconds.append(second)
                        entry.row.probes.append((before + after) / 2)
                        entry.row.busy.append(round(busy, 3))
                    entry.ids = answer["facts"].get("ids", [])
                    _facts(entry.row, answer["facts"])
                    entry.facts |= answer["facts"]
                before = after
        for entry in live:
            self.peers[entry.peer].ask("drop", _key(entry))

    def close(self) -> None:
        for peer in self.peers.values():
            peer.close()
        self.peers = {}

    def _alive(self) -> list[Peer]:
        return [peer for peer in self.peers.values() if peer.child.poll() is None]

    def _load(self, entry: Entry, tell: Callable[[str], None]) -> bool:
        row, free = entry.row, psutil.virtual_memory().available
        python = self.interpreters.get(entry.peer, Path(sys.executable))
        if row.skipped:
            pass
        elif not python.exists():
            row.skipped = f"not installed: python benchmarks/peers/setup.py {python.parent.parent.name}"
        elif entry.memory > free - (1 << 30):
            row.skipped = f"needs {entry.memory / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
        else:
            answer = self._asked(entry, python)
            row.skipped = answer.get("error", "")
            entry.facts |= answer.get("facts", {})
            _facts(row, entry.facts)
        if row.skipped:
            tell(f"  skipped {row.model} {row.name}: {row.skipped}")
        return not row.skipped

    def _asked(self, entry: Entry, python: Path) -> dict[str, Any]:
        try:
            options = entry.make()
        except Exception as error:  # a row that cannot be made says why; the others run
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        peer = self.peers.get(entry.peer)
        if peer is None or peer.child.poll() is not None:
            peer = self.peers[entry.peer] = Peer(entry.peer, python, self.log)
        return peer.ask("load", _key(entry), options=options)

    def _spinning(self, idle: dict[str, float], wall: float, entries: list[Entry]) -> None:
        """Notes on the rows of a peer that burned a core while another was being measured."""
        for name, before in idle.items():
            used = (self.peers[name].spent() - before) / max(wall, 1e-9)
            note = "its threads spin while others are measured"
            if used > SPINNING and wall > 0.2:
                for entry in entries:
                    if entry.peer == name and note not in entry.row.notes:
                        entry.row.notes.append(note)


def _key(entry: Entry) -> str:
    row = entry.row
    return f"{row.model}/{row.variant}/{row.route}/{row.batch}"


def _facts(row: Row, facts: dict[str, Any]) -> None:
    row.bytes = int(facts.get("bytes", row.bytes))
    row.bits = float(facts.get("bits", row.bits))
    row.items = int(facts.get("count", row.items))
    row.operations = float(facts.get("operations", row.operations))
    row.kind = str(facts.get("kind", row.kind))
    for note in facts.get("notes", ()):
        if note not in row.notes:
            row.notes.append(note)
