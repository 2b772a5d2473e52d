"""A command in a process of its own, watched from outside: time, memory of it and its children, bytes on disk."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

EVERY, DISK = 0.02, 50  # seconds between two looks at memory; looks at memory for one at the disk


@dataclass(frozen=True)
class Watched:
    """One command: seconds, CPU seconds, most anonymous bytes, most bytes on disk, exit status, what it said."""

    wall: float
    cpu: float
    peak: int
    disk: int
    code: int
    printed: str
    complaints: str


def size_of(*folders: Path) -> int:
    """Bytes of the files below some folders; those that vanish meanwhile count 0."""
    total = 0
    for folder in folders:
        for path in folder.glob("**/*"):
            with contextlib.suppress(OSError):
                total += path.stat().st_blocks * 512 if path.is_file() else 0
    return total


def anonymous(process: int) -> int:
    """Anonymous bytes of a process and all below it; those that ended meanwhile count 0."""
    total = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("RssAnon:"):
                total += int(line.split()[1]) * 1024
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in (task / "children").read_text(encoding="utf-8").split():
                total += anonymous(int(child))
    return total


def watched(command: Sequence[str], folders: Sequence[Path], limit: float | None = None) -> Watched:
    """Runs a command to its end, or stops it and all below it after so many seconds (the exit status is then negative);
    what it writes is looked for in `folders`."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    peak, disk = [0], [0]

    def watch() -> None:
        turn = 0
        while child.poll() is None:
            peak[0] = max(peak[0], anonymous(child.pid))
            if turn % DISK == 0:
                disk[0] = max(disk[0], size_of(*folders))
            turn += 1
            if limit is not None and time.monotonic() - began > limit:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
            time.sleep(EVERY)

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed, complaints = (said.decode(errors="replace") for said in child.communicate())
    wall = time.monotonic() - began
    watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Watched(wall, cpu, peak[0], max(disk[0], size_of(*folders)), child.returncode, printed, complaints)
