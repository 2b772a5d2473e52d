"""Two installations of regauge on the same artifacts, interleaved: what a change of the kernels costs a token.

    python benchmarks/interface.py --before ../base/.venv/bin/python       # against the Python that runs this
    python benchmarks/interface.py --before A/bin/python --after B/bin/python --rounds 40 --threads 1

Both decode the same prompt greedily from the same artifact of random weights in 4 bits, made by the older one, in
rounds of a few tokens: A B, B A, A B ... Told are the medians of milliseconds a token, and the median and quartiles of
the ratio after / before, round by round, by the clock and by the processor time, which others on the machine disturb
less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

VARIANT = "int4 g32"
TOKENS = {"smollm-135m": 48, "tinyllama-1.1b": 12, "pico": 16}


def child(path: str, prompt: list[int], tokens: int, threads: int) -> None:
    """Decodes once for every line that comes, and tells (ms, processor ms) a token, and the tokens."""
    import torch

    import regauge as rg

    if threads:
        torch.set_num_threads(threads)
    answers, sys.stdout = sys.stdout, sys.stderr
    model, ids = rg.load(Path(path)), torch.tensor([prompt])
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        found, wall, own = [], [], []
        for token in rg.stream(model, ids, max_new_tokens=tokens):
            found.append(int(token))
            wall.append(time.perf_counter())
            own.append(time.process_time())
        each = [1e3 * (times[-1] - times[0]) / (tokens - 1) for times in (wall, own)]
        print(json.dumps({"wall": each[0], "own": each[1], "ids": found}), file=answers, flush=True)


def started(python: Path, path: Path, prompt: list[int], tokens: int, threads: int) -> subprocess.Popen[str]:
    command = [str(python), __file__, "--child", str(path), json.dumps(prompt), str(tokens), str(threads)]
    made = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert made.stdout is not None
    if made.stdout.readline().strip() != "ready":
        raise SystemExit(f"{python} does not load {path}")
    return made


def asked(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


def artifact(name: str, before: Path) -> Path:
    """The artifact, made by the older installation, whose format both read."""
    from common import artifacts
    from common.shapes import SHAPES

    out = artifacts.MODELS / name / "interface"
    if not out.exists():
        recipe = artifacts.recipe(VARIANT, SHAPES[name]).replace("weights:", "rules:")
        written = artifacts.MODELS / name / "interface.yaml"
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(recipe, encoding="utf-8")
        command = [str(before), "-m", "regauge", "apply", str(written), str(artifacts.source(name)), "-o", str(out)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return out


def told(name: str, rounds: list[dict[str, dict[str, Any]]], kind: str) -> str:
    """One line: medians, and the ratio with its quartiles."""
    middle = {side: statistics.median(one[side][kind] for one in rounds) for side in ("before", "after")}
    low, ratio, high = statistics.quantiles([one["after"][kind] / one["before"][kind] for one in rounds], n=4)
    clock = {"wall": "clock", "own": "processor"}[kind]
    return (
        f"{name}, {clock}: before {middle['before']:.2f} ms, after {middle['after']:.2f} ms a token; "
        f"after / before {ratio:.3f} ({low:.3f} to {high:.3f}), {len(rounds)} rounds"
    )


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        path, prompt, tokens, threads = sys.argv[2:]
        child(path, json.loads(prompt), int(tokens), int(threads))
        return 0
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--before", type=Path, required=True, help="the Python that has the older regauge")
    words.add_argument("--after", type=Path, default=Path(sys.executable), help="the Python that has the newer one")
    words.add_argument("--models", nargs="+", default=["smollm-135m", "tinyllama-1.1b"], choices=TOKENS)
    words.add_argument("--rounds", type=int, default=24)
    words.add_argument("--threads", type=int, default=0, help="of each; 0: as torch takes them")
    given = words.parse_args()
    from common.shapes import SHAPES, prompt

    for name in given.models:
        path = artifact(name, given.before)
        options = path, prompt(SHAPES[name], 16), TOKENS[name], given.threads
        sides = {"before": started(given.before, *options), "after": started(given.after, *options)}
        rounds = []
        for turn in range(given.rounds + 1):
            order = ("before", "after") if turn % 2 else ("after", "before")
            found = {side: asked(sides[side]) for side in order}
            if turn:  # the first warms up
                rounds.append(found)
        same = all(one["before"]["ids"] == one["after"]["ids"] for one in rounds)
        for process in sides.values():
            process.terminate()
        for kind in ("wall", "own"):
            print(told(name, rounds, kind), flush=True)
        print(f"{name}: {'the same tokens' if same else 'other tokens'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
