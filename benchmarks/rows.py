"""What each preset gains over rounding to nearest at the same bits, on a small model and text that it never saw.

    python benchmarks/rows.py                 # print the table; minutes on one core
    python benchmarks/rows.py --write         # and keep it where `regauge methods` reads it

For every preset with a point on the weights or the shape: KL of its artifact to the original, in nats a token, with a
95 % interval over documents. Beside it stands its null: the same bits, the same grain and the same inputs, integers
rounded to nearest, nothing rewritten and nothing added back; of a preset that prunes, as many units drawn by lot and
nothing repaired. Presets that are their own null have none.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from regauge import apply, parts
from regauge.hosts.transformers.load import load as load_model
from regauge.hosts.transformers.source import read_tokenizer
from regauge.measure.machine import machine
from regauge.measure.quality import Scores, compare, paired, summarise
from regauge.measure.subject import logits
from regauge.parts import INPUTS, SHAPE, WEIGHTS, Point, Spec
from regauge.plan import Plan, Rule, digest, load, patterns
from regauge.text.corpora import corpus
from regauge.text.split import pieces
from regauge.text.tokens import frame
from regauge.text.windows import Windows, cut

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
MODEL = SHARED / "models" / "novel-llama-8m"
CALIBRATION, EVAL = SHARED / "data" / "novels", SHARED / "data" / "novels-heldout"
KEPT = ROOT / "src" / "regauge" / "presets" / "measured.json"
CALIBRATED, SCORED, LENGTH, BATCH = 8192, 8192, 256, 2048
LIKE = {"bits": 4, "group": 32}
"""Which of the names that a preset file stands for."""


def names() -> list[str]:
    """One name a preset file that says something of weights or shape."""
    found = []
    for pattern in patterns():
        points = pattern.points()
        near = [
            name for name, point in points.items() if all(LIKE.get(key, value) == value for key, value in point.items())
        ]
        name = (near or list(points))[0]
        if load(name).of(WEIGHTS) or load(name).of(SHAPE):
            found.append(name)
    return found


def null(plan: Plan) -> Plan | None:
    """The same bits and grains rounded to nearest; None where that is the plan itself."""
    rules = {
        WEIGHTS: tuple(Rule(rule.select, rule.point and _nearest(rule.point)) for rule in plan.of(WEIGHTS)),
        INPUTS: tuple(Rule(rule.select, rule.point and _alike(rule.point)) for rule in plan.of(INPUTS)),
        SHAPE: tuple(Rule(rule.select, rule.point and _by_lot(rule.point)) for rule in plan.of(SHAPE)),
    }
    made = Plan(name=f"null-of-{plan.name}", places=rules)
    return None if digest(made) == digest(replace(plan, calibration={})) else made


def _nearest(point: Point) -> Point:
    bits = parts.build("grid", point.spec("grid")).bits
    grid, ranger = ("int8", "absmax") if bits == 8 else (f"int{bits}-asym", "minmax")
    scale = point["scale"] if point.name("scale") in ("f32", "f16", "bf16") else Spec("bf16")
    rest = {"ranger": Spec(ranger), "scale": scale, "rounder": Spec("nearest"), "compensator": None}
    return point.but(grid=Spec(grid), **rest)


def _alike(point: Point) -> Point:
    return point.but(grid=Spec(f"int{parts.build('grid', point.spec('grid')).bits}"), transform=Spec("identity"))


def _by_lot(point: Point) -> Point:
    return point.but(score=Spec("random"), repair=Spec("none"))


def scores(plan: Plan | str, windows: Windows, original: Any, folder: Path) -> tuple[Scores, float]:
    """Scores of a plan's artifact, and its bits a weight: of quantised sites, or of the source's where none is."""
    out = folder / (plan if isinstance(plan, str) else plan.name)
    receipt = apply(plan, MODEL, out, calibration=CALIBRATION, tokens=CALIBRATED, length=LENGTH)
    made = load_model(out, dtype=torch.float32)
    batches = [batch.ids_BT for batch in windows.batches(BATCH)]
    with torch.inference_mode():
        found = compare(windows, logits(original, batches), logits(made, batches), BATCH)
    sites = [site for site in receipt.sites if site.choice is not None]
    if not sites:
        return found, 16 * receipt.ratio
    weights = [site.shape[0] * site.shape[1] for site in sites]
    bits = sum(site.bits * count for site, count in zip(sites, weights, strict=True)) / sum(weights)
    return found, bits


def measure(chosen: list[str]) -> dict[str, Any]:
    """What is kept."""
    tokenizer = read_tokenizer(MODEL)
    read = corpus(EVAL)
    windows = cut(pieces(read), tokenizer, LENGTH, description=read.description, before=frame(tokenizer)[0])
    windows = windows.take(SCORED, 0)
    original = load_model(MODEL, dtype=torch.float32)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as where:
        for name in chosen:
            ours, bits = scores(name, windows, original, Path(where))
            kl = summarise(ours).kl
            row: dict[str, Any] = {"bits": round(bits, 3), "kl": _three(kl)}
            other = null(load(name))
            if other is not None:
                if other.of(SHAPE):
                    row["null"] = "by lot"
                base, row["null_bits"] = scores(other, windows, original, Path(where))
                row["null_bits"] = round(row["null_bits"], 3)
                row["null_kl"] = _three(summarise(base).kl)
                row["verdict"] = {"first": "better", "second": "worse", "neither": "no different"}[
                    paired(ours, base).verdict
                ]
            rows[name] = row
            print(f"{name:<26}{told(row)}", flush=True)
    return {
        "command": "python benchmarks/rows.py",
        "unit": "KL to the original, nats a token; 95 % interval over documents",
        "model": MODEL.name,
        "text": f"{windows.predicted} tokens of held-out novels; {CALIBRATED} tokens of others calibrate",
        "null": "nearest rounding at the same bits and grain",
        "machine": machine().cpu,
        "rows": rows,
    }


def _three(figure: Any) -> list[float]:
    return [float(f"{value:.4g}") for value in (figure.value, figure.low, figure.high)]


def told(row: dict[str, Any]) -> str:
    text = f"{row['bits']:6.2f} bits  KL {row['kl'][0]:.2g} [{row['kl'][1]:.2g}, {row['kl'][2]:.2g}]"
    if "null_kl" in row:
        text += f"  {row.get('null', 'nearest')} {row['null_bits']:5.2f} bits {row['null_kl'][0]:.2g}: {row['verdict']}"
    return text


def main() -> int:
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("--write", action="store_true", help=f"keep it in {KEPT.name}")
    words.add_argument("--only", nargs="*", default=[], help="presets of these names")
    given = words.parse_args()
    if not MODEL.exists():
        print(f"this needs {MODEL}")
        return 0
    chosen = [name for name in names() if not given.only or name in given.only]
    found = measure(chosen)
    if given.write:
        if given.only and KEPT.exists():
            found["rows"] = json.loads(KEPT.read_text(encoding="utf-8"))["rows"] | found["rows"]
        KEPT.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
