"""Kills `apply` again and again and lets it go on, in processes of its own. Prints what it saw as JSON.

    python tests/killed.py MODEL TEXT OUT RECIPE KILLS [SEED]

Everything is imported once, before any thread starts; every attempt is a fork. OUT/whole is a run left alone, OUT/cut
the run that was killed. With KEEP in the environment a loop that learns is kept every so many seconds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def attempt(out: Path, kill_after: float | None, arguments: dict[str, Any]) -> tuple[float, bool]:
    """One process that applies; seconds it lived, and whether it ended by itself."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            from regauge.engine import apply

            apply(out=out, **arguments)
            status = 0
        finally:
            os._exit(status)
    while kill_after is None or time.monotonic() - began < kill_after:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status):
                raise SystemExit("apply failed by itself")
            return time.monotonic() - began, True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return time.monotonic() - began, False


def inodes(root: Path, names: Iterable[str] | None = None) -> dict[str, int]:
    """The shards that a run has committed, or those named; a shard that is written again is another file."""
    if names is None:
        manifest = root / "manifest.json"
        names = json.loads(manifest.read_text())["shards"] if manifest.exists() else ()
    return {name: (root / name).stat().st_ino for name in names}


def contents(root: Path) -> dict[str, bytes]:
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def main() -> None:
    model, text, out, recipe, kills = sys.argv[1:6]
    chance = random.Random(int(sys.argv[6]) if len(sys.argv) > 6 else 0)
    import torch

    import regauge.engine.api  # noqa: F401  # imported once, for every fork
    import regauge.hosts.transformers.load  # noqa: F401  # the same
    from regauge.hosts.transformers.source import Source
    from regauge.learn import loop

    loop.EVERY = float(os.environ.get("KEEP", loop.EVERY))
    torch.set_num_threads(1)
    Source.open(model).tokenizer()
    arguments = {"recipe": recipe, "model": model, "calibration": text, "tokens": 512, "length": 32}
    whole, cut = Path(out) / "whole", Path(out) / "cut"
    seconds, _ = attempt(whole, None, arguments)
    landed: list[int] = []
    loops = 0
    rewritten = False
    different: set[str] = set()
    partial = cut.with_name("cut.partial")
    while True:
        before = inodes(partial)
        _, ended = attempt(cut, chance.uniform(0.05, 0.9) * seconds if len(landed) < int(kills) else None, arguments)
        ended |= cut.exists()  # killed when it had just renamed its output
        rewritten |= not before.items() <= inodes(cut if ended else partial, before).items()
        if not ended:
            landed.append(len(inodes(partial)))
            loops += any(partial.glob("states/learning-*"))
            continue
        one, other = contents(whole), contents(cut)
        different |= {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
        if len(landed) == int(kills):
            break  # the last run was left alone
        shutil.rmtree(cut)
    told = {"shards at each kill": landed, "in a loop": loops, "rewritten": rewritten, "different": sorted(different)}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
