"""Kills a command again and again and lets it go on, in processes of its own. Prints what it saw as JSON.

    python tests/killed.py MODEL TEXT OUT JOB KILLS [SEED] [--force]

JOB is `fit`, `pick`, or a recipe for `apply`. Everything is imported once, before any thread starts; every attempt is a
fork. OUT/whole is a run left alone, OUT/cut the run that was killed. With --force OUT/cut is another artifact at first,
and at every kill that one or the new one must be there whole. Files of somebody else lie around it all the time. With
KEEP in the environment a loop that learns is kept every so many seconds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

Job = Callable[[Path, bool], object]
VOLATILE = ("command", "seconds", "costs", "bandwidth", "load", "machine")  # of a run record
OTHERS = ("mine.txt", "cut.txt", "cut.old/mine.txt", "cut.search.txt", "partial/cut.partial")
"""Files that no command may touch."""


def attempt(job: Job, out: Path, force: bool, kill_after: float | None) -> tuple[float, bool]:
    """One process that does the job; seconds it lived, and whether it ended by itself (refused: OUT was there)."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            from regauge.errors import OutputError

            try:
                job(out, force)
                status = 0
            except OutputError as error:
                status = 3 if "exists; choose another directory" in str(error) else 1
                if status == 1:
                    raise
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    while kill_after is None or time.monotonic() - began < kill_after:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status) not in (0, 3):
                raise SystemExit("the command failed by itself")
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
        names = [*names, *(p.name for p in root.glob("options-*.safetensors") if p.with_suffix(".sha256").exists())]
    return {name: (root / name).stat().st_ino for name in names if (root / name).exists()}


def contents(root: Path) -> dict[str, bytes]:
    """Every file by path; a run record without what was timed."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name != ".lock")
    found = {str(path.relative_to(root)): path.read_bytes() for path in files}
    record = found.get("regauge/run.json")
    if record is not None:
        kept = {key: value for key, value in json.loads(record).items() if key not in VOLATILE}
        found["regauge/run.json"] = json.dumps(kept).encode()
    found.pop("regauge/run-log.json", None)
    return found


def job_of(name: str, model: str, text: str, folder: Path) -> Job:
    if name not in ("fit", "pick"):
        from regauge.engine import apply

        return lambda out, force: apply(name, model, out, calibration=text, tokens=512, length=32, force=force)
    from regauge.search.fit import fit, pick
    from regauge.search.loop import finish
    from regauge.search.loop.desk import Effort

    small = Effort(
        calibration=512, search=128, evaluation=256, gradient=256, checks=4, neighbours=2, rounds=1, points=3, builds=2,
        turns=2, memory=False,
    )  # fmt: skip
    for at, what, value in (
        (Effort, "most", staticmethod(lambda: small)),
        (finish, "costs", lambda *_: {}),
        (finish, "bandwidth", lambda **_: 1e9),
        (finish, "_samples", lambda *_: ()),
    ):
        setattr(at, what, value)

    def search(out: Path, force: bool) -> object:
        return fit(model, out, budgets=["memory=0.5x"], calibration=text, force=force)

    if name == "fit":
        return search
    attempt(search, folder / "run", False, None)
    return lambda out, force: pick(folder / "run", 0, out, force=force)


def within(some: Mapping[str, bytes], root: Path) -> bool:
    """Whether an artifact lies there whole."""
    return root.exists() and some.items() <= contents(root).items()


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--force"]
    model, text, out, name, kills = words[:5]
    force = "--force" in sys.argv
    chance = random.Random(int(words[5]) if len(words) > 5 else 0)
    import torch

    import regauge.search.fit  # noqa: F401  # imported once, for every fork
    from regauge.hosts.transformers.source import Source
    from regauge.learn import loop

    loop.EVERY = float(os.environ.get("KEEP", loop.EVERY))
    torch.set_num_threads(1)
    Source.open(model).tokenizer()
    folder = Path(out)
    whole, cut, old = folder / "whole", folder / "cut", folder / "old"
    for other in OTHERS:
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_text(other)
    job = job_of(name, model, text, folder)
    seconds, _ = attempt(job, whole, False, None)
    first: dict[str, bytes] = {}
    if force:
        attempt(job_of("rtn-w8", model, text, folder), old, False, None)
        first = contents(old)
        shutil.copytree(old, cut)
    expected = contents(whole)
    landed: list[int] = []
    loops = 0
    rewritten = False
    lost: set[str] = set()
    different: set[str] = set()
    partial = folder / ("cut.search" if name == "fit" else "cut.partial")
    while True:
        before = inodes(partial)
        last = len(landed) == int(kills)
        _, ended = attempt(job, cut, force, None if last else chance.uniform(0.05, 0.95) * seconds)
        lost |= {other for other in OTHERS if not (folder / other).is_file() or (folder / other).read_text() != other}
        if not ended:
            landed.append(len(inodes(partial)))
            loops += any(partial.glob("states/learning-*"))
            if force and not (within(first, cut) or within(first, folder / "cut.replaced") or within(expected, cut)):
                lost.add("OUT")
            if force or not cut.exists():
                leaving = within(expected, cut)  # the output is whole: what lay beside it is being removed
                rewritten |= not leaving and partial.exists() and not before.items() <= inodes(partial, before).items()
                continue  # with --force the same command makes it again
            attempt(job, cut, force, None)  # killed when it had just renamed its output: refused, and tidied up
        elif name != "fit":
            rewritten |= not before.items() <= inodes(cut, before).items()
        found = contents(cut)
        different |= {path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path)}
        different |= {
            path.name for path in folder.glob("cut.*") if path.name in ("cut.partial", "cut.replaced", "cut.search")
        }
        if last:
            break  # the last run was left alone
        shutil.rmtree(cut)
        if force:
            shutil.copytree(old, cut)
    told = {
        "shards at each kill": landed,
        "in a loop": loops,
        "rewritten": rewritten,
        "different": sorted(different),
        "lost": sorted(lost),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
