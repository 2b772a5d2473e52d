"""What it costs to read inputs another way: `generate` on models that differ in the reading of their taps, or in a term
beside their weights, each against the same model without it.

    python benchmarks/inputs.py                  # some two minutes, after a first run that makes the models
    python benchmarks/inputs.py --only hadamard  # rows whose name contains a word
    python benchmarks/inputs.py --tokens 64 --rounds 9
    python benchmarks/inputs.py --cpu            # CPU time of one thread, where others load the machine

Four blocks of the 1.1B shape (2048 x 5632, 32 heads) with random weights of 4 bits in groups of 128, and the bundled
model's tokenizer, so that what needs text has some. Batch 1, greedy, tokens of whole `generate` calls less those of
the prompt; pairs of a row and what it is held against are interleaved, and the ratio is the median of the pairs' ratios
with the quarter and three quarters beside it. `step` says whether the native step served every token.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common.artifacts import MODELS, ROOT
from common.shapes import Shape, checkpoint, prompt

import regauge as rg
from regauge.measure.machine import machine
from regauge.plan import digest, load

SHAPE = Shape("blocks", 2048, 5632, 4, 32, 4, 4096, False)
TEXT = ROOT / "src" / "regauge"
CALIBRATED = 512
PROMPT = 16
WEIGHTS = {"grid": "int4-asym", "grain": "group:128", "ranger": "minmax", "scale": "f16", "rounder": "nearest"}
TABLE = {"grid": "int8", "grain": "channel", "ranger": "absmax", "scale": "f32", "rounder": "nearest"}
TOKEN = {"grid": "int8", "grain": "token"}
HIDDEN = "blocks.*.mlp.hidden"


@dataclass(frozen=True)
class Variant:
    """A model of the benchmark.

    Attributes:
        against: the variant that lacks what this one is about.
        inputs: tap → reading; weights: changes of the weights' coordinates.
    """

    against: str
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)


def taps(**changes: Any) -> dict[str, dict[str, Any]]:
    return {"blocks.*": TOKEN | changes}


CHANNEL = {"grain": "channel", "scale": "f32"}
VARIANTS = {
    "w4a16": Variant(""),
    "w4a8": Variant("", taps()),
    "w4a8 hadamard before down": Variant("w4a8", taps() | {HIDDEN: TOKEN | {"transform": "hadamard"}}),
    "w4a8 hadamard everywhere": Variant("w4a8", taps(transform="hadamard")),
    "w4a8 diagonal": Variant("w4a8", taps(transform="diagonal:0.5")),
    "w4a8 static": Variant("w4a8", taps(grain="tensor", ranger="static")),
    "w4a8 static per channel": Variant("w4a8", taps(grain="group:1", ranger="static")),
    "w4 fp8 inputs": Variant("w4a8", taps(grid="fp8")),
    "w4a16 low rank 8": Variant("w4a16", {}, {"compensator": "lorc:8"}),
    "w4a16 low rank 32": Variant("w4a16", {}, {"compensator": "lorc:32"}),
    "w4a8 channel": Variant("", taps(), CHANNEL),
    "w4a4 channel": Variant("w4a8 channel", taps(grid="int4"), CHANNEL),
    "w6a6 channel": Variant("", taps(grid="int6"), CHANNEL | {"grid": "int6-asym"}),
}


def recipe(name: str) -> dict[str, Any]:
    one = VARIANTS[name]
    body = {"blocks.*": WEIGHTS | one.weights, "embed": TABLE, "head": TABLE}
    return {"name": "measured", "weights": body} | ({"inputs": one.inputs} if one.inputs else {})


def source() -> Path:
    """Random weights of the shape, with a tokenizer."""
    out = checkpoint(SHAPE, MODELS / SHAPE.name / "bf16")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "bundled" / "code-llama-5m" / name, out / name)
    return out


def artifact(name: str) -> Path:
    """The artifact of a variant, made where it is missing or was made by another recipe."""
    out = MODELS / SHAPE.name / name.replace(" ", "-")
    written = out.with_suffix(".yaml")
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(json.dumps(recipe(name)), encoding="utf-8")  # JSON is YAML
    receipt = out / "regauge" / "receipt.json"
    made = receipt.exists() and json.loads(receipt.read_text(encoding="utf-8"))["plan_hash"] == digest(load(written))
    if not made:
        rg.apply(written, source(), out, calibration=TEXT, tokens=CALIBRATED, force=True, quiet=True)
    return out


def seconds(model: Any, ids: torch.Tensor, tokens: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Of one new token."""
    found = []
    for new in (1, 1 + tokens):
        start = clock()
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        found.append(clock() - start)
    return (found[1] - found[0]) / tokens


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--only", nargs="+", default=[], help="rows whose name contains one of these")
    words.add_argument("--tokens", type=int, default=32, help="new tokens a sample")
    words.add_argument("--rounds", type=int, default=7, help="pairs of a row")
    words.add_argument("--json", type=Path, default=None, help="also write the figures here")
    words.add_argument("--cpu", action="store_true", help="CPU seconds of one thread: for a machine that others load")
    given = words.parse_args()
    clock = time.process_time if given.cpu else time.perf_counter
    if given.cpu:
        torch.set_num_threads(1)
    ids = torch.tensor([prompt(SHAPE, PROMPT)], dtype=torch.int64, device="cpu")
    rows = [name for name in VARIANTS if not given.only or any(word in name for word in given.only)]
    found: dict[str, Any] = {}
    for name in rows:
        pair = [one for one in (name, VARIANTS[name].against) if one]
        models = {one: rg.load(artifact(one)) for one in pair}
        for model in models.values():
            seconds(model, ids, 4)
        served = models[name].regauge_step.steps
        samples = [{one: seconds(models[one], ids, given.tokens, clock) for one in pair} for _ in range(given.rounds)]
        served = models[name].regauge_step.steps - served
        found[name] = told = {"ms": statistics.median(s[name] for s in samples) * 1e3, "step": served > 0}
        line = f"{name:<28}{told['ms']:8.2f} ms a token  {'step' if told['step'] else 'modules'}"
        if len(pair) == 2:
            ratios = sorted(s[pair[0]] / s[pair[1]] for s in samples)
            low, middle, high = (ratios[round(share * (len(ratios) - 1))] for share in (0.25, 0.5, 0.75))
            told |= {"against": pair[1], "ratio": [middle, low, high]}
            line += f"  {middle:.2f} [{low:.2f}, {high:.2f}] times {pair[1]}"
        print(line, flush=True)
    print(f"{machine().cpu}, {torch.get_num_threads()} threads")
    if given.json is not None:
        kept = {"machine": machine().model_dump(), "rows": found}
        given.json.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
