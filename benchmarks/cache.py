"""Caches by their length: bytes held, and milliseconds a token, of our rows and of other runtimes, in turns in one run.

    python benchmarks/peers/setup.py llama caches kvpress openvino    # once: the peers
    python benchmarks/cache.py --quick                                # a smoke run
    python benchmarks/cache.py --contexts 16384                       # one length at a time: some four minutes each
    python benchmarks/cache.py --sequences                            # how many of 4k fit in 2 GB, and their tokens/s
    python benchmarks/cache.py --contexts --keep                      # runs nothing: keeps what is there

Random weights of the 135M shape: ours and OpenVINO's in 4 bits (groups of 32), llama.cpp's Q4_0, transformers' in bf16,
so hold its quantised caches against its own full one. Batch 1 but for `--sequences`. Caches are filled with random keys
and values (llama.cpp's with what it holds of 256 tokens, repeated) and grow by the tokens that are timed. Bytes are
those of the formula and those by which the process grew. Results of a length and set of peers replace those before in
out/bench/cache.json, of which `--keep` makes `src/regauge/presets/speed.json`, which `regauge explain` and `regauge
methods` tell.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import artifacts, models, run
from common.records import Row, spread
from common.rounds import Entry, Rounds
from common.shapes import SHAPES
from common.table import shown, versus
from peers.setup import python

from regauge.measure.machine import machine

KEPT = Path(__file__).resolve().parents[1] / "src" / "regauge" / "presets" / "speed.json"
SHAPE = SHAPES["smollm-135m"]
WEIGHTS = "int4 g32"
CONTEXTS = (1024, 4096, 16384, 32768)
WHOLE = {"regauge": "none", "llama.cpp": "f16", "transformers": "full", "kvpress": "full", "OpenVINO": "f16"}
"""The cache of each that nothing is done to."""
ROWS = ("none", "kv8", "kivi-4", "kivi-2", "kvarn", "rotated-kv4", "streaming", "snapkv")
PEERS = {
    "llama.cpp": ("cache_llama", ("f16", "f16 plain", "q8_0", "q4_0")),
    "OpenVINO": ("cache_openvino", ("f16", "u8", "u8 keys by channel", "u4", "u4 keys by channel")),
    "transformers": ("cache_torch", ("full", "quanto 4", "quanto 2", "hqq 4", "hqq 2", "fp8")),
    "kvpress": ("cache_kvpress", ("full", "knorm", "streaming")),
}
ROOM = 512
"""Tokens that a peer with a fixed cache makes room for behind the context."""
FAST = ("f16", "f16 plain")
"""llama.cpp's whole caches: others are held against the faster of them in this run."""
BUDGET, LENGTH = 2e9, 4096
"""Bytes, weights included, and the length of the sequences that are to fit."""
Found = dict[str, Any]  # one row as JSON


def entry(runner: str, peer: str, row: str, context: int, tokens: int, batch: int = 1) -> Entry:
    """One row."""

    def make() -> dict[str, Any]:
        options = {"row": row, "context": context, "tokens": tokens, "batch": batch, "room": ROOM}
        if runner == "regauge":
            path = artifacts.artifact(SHAPE.name, WEIGHTS)
        elif runner == "llama.cpp":
            path = artifacts.gguf(SHAPE.name, "Q4_0", python("llama"))
        else:
            path = artifacts.source(SHAPE.name)
        return {**options, "path": str(path), "shape": asdict(SHAPE) | {"head": SHAPE.head}}

    whole = 4 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head * context * batch
    return Entry(Row(model=runner, runner=runner, variant=row, route=str(context), batch=batch), peer, make, whole)


def found(one: Entry) -> Found:
    row, facts = one.row, one.facts
    return {
        "runner": row.runner, "cache": row.variant, "batch": row.batch, "seconds": row.seconds, "probes": row.probes,
        "held": facts.get("held", 0), "grown": facts.get("grown", 0), "skipped": row.skipped, "notes": row.notes,
    }  # fmt: skip


def measured(entries: list[Entry], rounds: int) -> list[Found]:
    taking = Rounds(dict(models.INTERPRETERS), log=run.OUT / "cache.peers.log")
    try:
        taking.run(entries, rounds)
    finally:
        taking.close()
    return [found(one) for one in entries]


def as_row(one: Found) -> Row:
    return Row(model="", runner=one["runner"], variant=one["cache"], seconds=one["seconds"], probes=one["probes"])


def table(context: str, rows: list[Found]) -> str:
    """One length: bytes, milliseconds, how many times as fast as the runner's own whole cache and as llama.cpp's."""
    named = {(one["runner"], one["cache"]): one for one in rows}
    plain = [named[key] for kind in FAST if (key := ("llama.cpp", kind)) in named and named[key]["seconds"]]
    fastest = min(plain, key=lambda one: statistics.median(one["seconds"]), default=None)
    probes = [value for one in rows for value in one["probes"]]
    told = f"; the probe read {statistics.median(probes):.1f} GB/s" if probes else ""
    lines = [
        f"**{context} tokens**{told}", "",
        "| runner | cache | MB | MB, process | ms a token | its own whole cache / it | llama.cpp's f16 / it |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for one in rows:
        name = f"| {one['runner']} | {one['cache']} |"
        if not one["seconds"]:
            lines.append(f"{name} | | – | {one['skipped'] or 'not run'} | |")
            continue
        ms = shown(spread([1e3 * second for second in one["seconds"]]))
        sizes = [f"{one[key] / 1e6:.1f}" if one[key] else "" for key in ("held", "grown")]
        against = [named.get((one["runner"], WHOLE[one["runner"]])), fastest]
        ratios = [shown(versus(as_row(one), as_row(two))) if two and two["seconds"] else "" for two in against]
        lines.append(f"{name} {sizes[0]} | {sizes[1]} | {ms} | {ratios[0]} | {ratios[1]} |")
    notes = dict.fromkeys(f"- {one['runner']} {one['cache']}: {note}" for one in rows for note in one["notes"])
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def many(rows: tuple[str, ...], rounds: int, tokens: int) -> list[Found]:
    """The most sequences that fit, and what they make together."""
    ones = measured([entry("regauge", "cache_regauge", row, LENGTH, 1) for row in rows], 1)
    weights, _ = artifacts.read_bytes(artifacts.artifact(SHAPE.name, WEIGHTS), SHAPE.tied)
    counts = {one["cache"]: int((BUDGET - weights) / max(one["held"], one["grown"])) for one in ones if one["held"]}
    entries = [entry("regauge", "cache_regauge", row, LENGTH, tokens, count) for row, count in counts.items()]
    return [one | {"weights": weights} for one in measured(entries, rounds)]


def crowd(rows: list[Found]) -> str:
    """The table of `many`."""
    first = next((one for one in rows if one["cache"] == "none" and one["seconds"]), None)
    lines = [
        f"**Sequences of {LENGTH} tokens in {BUDGET / 1e9:g} GB, weights included**", "",
        "| cache | sequences | weights and caches, MB, process | the same at bf16's number, MB | tokens/s together "
        "| times bf16's tokens/s |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for one in rows:
        if not one["seconds"]:
            lines.append(f"| {one['cache']} | | | – | {one['skipped']} | |")
            continue
        rate = spread([one["batch"] / second for second in one["seconds"]])
        size = one["weights"] + one["grown"]
        each, same, gain = one["grown"] / one["batch"], "", ""
        if first is not None:
            same = f"{(one['weights'] + each * first['batch']) / 1e6:.0f}"
            gain = f"{rate.median * statistics.median(first['seconds']) / first['batch']:.2f}"
        lines.append(f"| {one['cache']} | {one['batch']} | {size / 1e6:.0f} | {same} | {shown(rate)} | {gain} |")
    lines += ["", "KIVI's publication: 2.6 times less peak memory, and 2.35 to 3.47 times the throughput (2 bits)."]
    return "\n".join(lines)


def speeds(contexts: dict[str, list[Found]]) -> dict[str, dict[str, float]]:
    """Our rows → length → how many times as fast as bf16 a token is."""
    told: dict[str, dict[str, float]] = {}
    for run_of, rows in contexts.items():
        context = run_of.split(" ")[0]
        ours = {one["cache"]: one for one in rows if one["runner"] == "regauge" and one["seconds"]}
        for name, one in ours.items():
            if name != "none" and "none" in ours:
                told.setdefault(name, {})[context] = round(versus(as_row(one), as_row(ours["none"])).median, 2)
    return told


def _length(pair: tuple[str, float]) -> int:
    return int(pair[0])


def keep(result: Found) -> None:
    """What explain tells, one row a line."""
    found = {name: dict(sorted(row.items(), key=_length)) for name, row in speeds(result["contexts"]).items()}
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found))
    head = {
        "command": "python benchmarks/cache.py",
        "unit": "bf16's time a token over the row's, by tokens of context, batch 1; below 1 the row is slower",
        "model": f"{SHAPE.name} shape, {WEIGHTS} weights",
        "machine": f"{result['machine']['cpu']}, {result['machine']['threads']} threads",
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}," for key, value in head.items()]
    KEPT.write_text("\n".join(["{", *lines, ' "rows": {', rows, " }", "}"]) + "\n", encoding="utf-8")


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--contexts", type=int, nargs="*", default=list(CONTEXTS))
    words.add_argument("--rows", nargs="*", default=list(ROWS), help="ours; none is bf16")
    words.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--tokens", type=int, default=32, help="of a sample; slow rows end after 0.7 s")
    words.add_argument("--sequences", action="store_true", help="the most sequences in 2 GB, in place of lengths")
    words.add_argument("--keep", action="store_true", help="write presets/speed.json")
    words.add_argument("--quick", action="store_true", help="256 tokens, one round")
    words.add_argument("--out", type=Path, default=run.OUT / "cache.json")
    given = words.parse_args()
    result: Found = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {"contexts": {}}
    result |= {"machine": machine().model_dump(), "versions": run.versions()}
    contexts, rounds = ([256], 1) if given.quick else (given.contexts, given.rounds)
    told = f"{datetime.date.today().isoformat()}, `{shlex.join(['python', 'benchmarks/cache.py', *sys.argv[1:]])}`"
    print(f"{result['machine']['cpu']}, {result['machine']['threads']} threads; {told}", flush=True)
    if given.sequences:
        result["sequences"] = many(tuple(given.rows), rounds, 4)
        contexts = []
    for context in contexts:
        entries = [entry("regauge", "cache_regauge", row, context, given.tokens) for row in given.rows]
        for runner in given.peers:
            peer, rows = PEERS[runner]
            entries += [entry(runner, peer, row, context, given.tokens) for row in rows]
        made = measured(entries, rounds)
        result["contexts"][" ".join([str(context), *given.peers])] = made
        print(f"\n{table(str(context), made)}", flush=True)
        if not given.quick:
            write(result, given.out)
    if given.sequences:
        print(f"\n{crowd(result['sequences'])}")
        write(result, given.out)
    if given.keep:
        keep(result)
    return 0


def write(result: Found, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".partial")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
