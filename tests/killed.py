"""Kills `apply` again and again and lets it go on, in processes of its own. Prints what it saw as JSON.

    python tests/killed.py MODEL TEXT OUT RECIPE KILLS [SEED]

Everything is imported once, before any thread starts; every attempt is a fork. OUT/whole is a run left alone, OUT/cut
the run that was killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
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


def inodes(root: Path) -> dict[str, int]:
    """The shards that a killed run committed; a shard that is written again is another file."""
    manifest = root / "manifest.json"
    if not manifest.exists():
        return {}
    names = json.loads(manifest.read_text())["shards"]
    return {name: (root / name).stat().st_ino for name in names}


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def main() -> None:
    model, text, out, recipe, kills = sys.argv[1:6]
    chance = random.Random(int(sys.argv[6]) if len(sys.argv) > 6 else 0)
    import torch

    import regauge.engine.api
    import regauge.hosts.transformers.loader  # noqa: F401  # imported once, for every fork
    from regauge.hosts.transformers.source import Source

    torch.set_num_threads(1)
    Source.open(model).tokenizer()
    arguments = {"recipe": recipe, "model": model, "calibration": text, "tokens": 512, "length": 32}
    whole, cut = Path(out) / "whole", Path(out) / "cut"
    seconds, _ = attempt(whole, None, arguments)
    landed, kept = [], 0
    while len(landed) < int(kills):
        _, ended = attempt(cut, chance.uniform(0.02, 0.8) * seconds, arguments)
        if ended:
            raise SystemExit("the run ended before it was killed often enough")
        partial = inodes(cut.with_name("cut.partial"))
        landed.append(len(partial))
        kept = max(kept, len(partial))
    before = inodes(cut.with_name("cut.partial"))
    attempt(cut, None, arguments)
    after = {name: (cut / name).stat().st_ino for name in before}
    one, other = contents(whole), contents(cut)
    different = sorted(n for n in one.keys() | other.keys() if one.get(n) != other.get(n))
    print(json.dumps({"shards at each kill": landed, "rewritten": before != after, "different": different}))


if __name__ == "__main__":
    main()
