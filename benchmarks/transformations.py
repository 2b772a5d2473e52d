"""Transformations beside their nulls: the same grid, grain and rounder without them, on the plain and the planted form.

    python benchmarks/transformations.py                                  # the bundled model, minutes on one core
    python benchmarks/transformations.py --model DIR --calibration TEXTS --eval HELD_OUT
    python benchmarks/transformations.py --only shift-scale rotate --write   # and into docs/transforms.md

The planted form is the model after `plant-outliers` (`rewrites/planting.py`): the same function with a large model's
outliers. All are held against the model itself on the same held-out windows. A line a contest and form: KL without and
with the transformation, their difference paired window by window with a 95 % interval over documents, and by how much
perplexity rises with it.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from common.heldout import HeldOut
from common.sections import merged, put, section

import regauge as rg
from regauge.measure.machine import machine
from regauge.measure.quality import Scores, paired, summarise
from regauge.plan import Plan, parse

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "transforms.md"
HEAD = "| | bits | form | KL without | KL with | difference | perplexity |\n|---|---|---|---|---|---|---|"
LENGTH = 256
INT8 = {"grid": "int8", "grain": "channel", "ranger": "absmax", "scale": "f32"}
INT6 = INT8 | {"grid": "int6"}
GROUPED = {"grain": "group:64 else group:32 else channel", "ranger": "minmax", "scale": "bf16"}
A_TOKEN = {"grain": "token", "ranger": "dynamic", "scale": "f32"}
A8, A6, A6_ASYM = ({"grid": grid, **A_TOKEN} for grid in ("int8", "int6", "int6-asym"))
STATIC = {"grid": "int8-asym", "grain": "tensor", "ranger": "static", "scale": "f32"}
HIDDEN = "blocks.*.mlp.hidden"
TURNED = ("layernorm-to-rms", "fold-norm", "rotate")


@dataclass(frozen=True)
class Contest:
    """A transformation at some bits.

    Attributes:
        bits: as tables name them.
        weights, inputs: as a recipe has them, of every block; the null's as well.
        at: which taps are read so.
        rewrites: what is tried.
        online: of taps, in place of the null's readings there.
        learning: how what is learnt is trained, in the null as well.
    """

    bits: str
    weights: Mapping[str, object]
    inputs: Mapping[str, object] | None = None
    rewrites: tuple[str | dict[str, object], ...] = ()
    online: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    learning: Mapping[str, object] = field(default_factory=dict)
    at: str = "blocks.*"

    def plan(self, name: str, tried: bool) -> Plan:
        """The recipe, with the transformation or without."""
        recipe: dict[str, object] = {"name": name, "weights": {"blocks.*": dict(self.weights)}}
        if self.learning:
            recipe["learning"] = dict(self.learning)
        if self.inputs is not None:
            readings = {self.at: self.inputs, **(self.online if tried else {})}
            recipe["inputs"] = {select: dict(reading) for select, reading in readings.items()}
        if tried and self.rewrites:
            recipe["rewrites"] = list(self.rewrites)
        return parse(yaml.safe_dump(recipe))


CONTESTS: Mapping[str, Contest] = {
    "smooth-norms": Contest("w8a8", INT8, A8, ("smooth-norms:0.5",)),
    "smooth-streams:0.5": Contest("w8a8", INT8, A8, ({"part": "smooth-streams", "alpha": 0.5},)),
    "smooth-streams": Contest("w4a16", {"grid": "int4-asym", **GROUPED}, None, ("smooth-streams",)),
    "smooth-streams, norms": Contest(
        "w4a16", {"grid": "int4-asym", **GROUPED}, None, ({"part": "smooth-streams", "streams": "norm"},)
    ),
    "smooth-readers": Contest("w3a16", {"grid": "int3-asym", **GROUPED}, None, ("smooth-readers",)),
    "shift-scale": Contest("w6a6", INT6, A6_ASYM, ("shift-scale",)),
    "gain-biases, shift-scale": Contest("w6a6", INT6, A6_ASYM, ("gain-biases", "shift-scale")),
    "shift-scale, static": Contest("w8a8", INT8, STATIC, ("shift-scale",)),
    "level": Contest("w8a8", INT8, STATIC, ("level:8",)),
    "learnt-equivalence": Contest(
        "w4a4",
        {"grid": "int4-asym", "grain": "channel", "ranger": "learnt-clip:0.08", "scale": "bf16"},
        {"grid": "int4", **A_TOKEN},
        ({"part": "learnt-equivalence", "rate": 0.03, "streams": "norm+value+ffn"},),
        learning={"steps": 48, "batch": 512, "schedule": "cosine", "patience": 0},
    ),
    "rotate": Contest("w4a8", {"grid": "int4", **GROUPED}, A8, TURNED),
    "rotate, hadamard": Contest(
        "w4a8",
        {"grid": "int4", **GROUPED},
        A8,
        TURNED,
        {HIDDEN: {"transform": "hadamard", "grid": "int8", **A_TOKEN}},
    ),
    "hadamard": Contest(
        "w8a6", INT8, A6, online={HIDDEN: {"transform": "hadamard", "grid": "int6", **A_TOKEN}}, at=HIDDEN
    ),
    "diagonal": Contest(
        "w8a6", INT8, A6, online={HIDDEN: {"transform": "diagonal:0.5", "grid": "int6", **A_TOKEN}}, at=HIDDEN
    ),
}
"""Each part that moves outliers, at the bits of its paper where those are of our axes."""
FORMS: Mapping[str, str] = {
    "plain": "",
    "planted": "plant-outliers",
    "rare": "{part: plant-outliers, channels: rare}",
}
"""Form of the model → the rewrite that makes it."""


def made(plan: Plan, model: Path, held: HeldOut, given: argparse.Namespace) -> Scores:
    """How far the recipe's artifact is from the model itself."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        rg.apply(plan, model, out, calibration=str(given.calibration), tokens=given.tokens, length=LENGTH)
        return held.scores(out)


def line(name: str, contest: Contest, form: str, null: Scores, tried: Scores) -> str:
    """A row of the table."""
    found, base, gap = summarise(tried), summarise(null), paired(tried, null, 0).difference
    rise = math.expm1(float((tried.nll_N - tried.nll_original_N).mean()))
    return (
        f"| {name} | {contest.bits} | {form} | {base.kl.value:.5f} | {found.kl.value:.5f} | "
        f"{gap.value:+.5f} [{gap.low:+.5f}, {gap.high:+.5f}] | {100 * rise:+.2f} % |"
    )


def write(rows: list[str], held: HeldOut, given: argparse.Namespace) -> None:
    """The rows in a section of the docs, beside others that were measured in the same way."""
    heading = f"{given.model.name} on {given.eval.name}"
    how = (
        f"{held.windows.predicted:,} held-out tokens of {held.windows.documents} documents; {given.tokens:,} tokens of "
        f"{given.calibration.name} calibrate; {machine().cpu}. `python benchmarks/transformations.py --model DIR "
        "--calibration TEXTS --eval HELD_OUT`"
    )
    before = section(PAGE, heading)
    kept = merged(before if how in before else "", rows, key=3)
    put(PAGE, heading, "\n".join([how, "", HEAD, *kept]))


def main() -> int:
    words = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    words.add_argument("--only", nargs="+", default=[], choices=list(CONTESTS), metavar="NAME")
    words.add_argument("--model", type=Path, default=ROOT / "bundled" / "code-llama-5m")
    words.add_argument("--calibration", type=Path, default=ROOT / "src")
    words.add_argument("--eval", type=Path, default=ROOT / "tests")
    words.add_argument("--tokens", type=int, default=8192, help="that calibrate")
    words.add_argument("--read", type=int, default=10240, help="held-out tokens")
    words.add_argument("--forms", nargs="+", default=["plain", "planted"], choices=list(FORMS))
    words.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}, row by row")
    given = words.parse_args()
    held = HeldOut(given.model, given.eval, LENGTH, given.read)
    print("\n" + HEAD)
    with tempfile.TemporaryDirectory() as scratch:
        models = {"plain": given.model}
        for form in set(given.forms) - {"plain"}:
            models[form] = Path(scratch) / form
            plan = parse(f"name: {form}\nrewrites: [{FORMS[form]}]\n")
            rg.apply(plan, given.model, models[form], calibration=str(given.calibration), tokens=given.tokens)
        nulls: dict[tuple[str, str], Scores] = {}
        for name in given.only or CONTESTS:
            contest = CONTESTS[name]
            for form in given.forms:
                plain = contest.plan("null", tried=False)
                key = (form, repr(plain))
                if key not in nulls:
                    nulls[key] = made(plain, models[form], held, given)
                tried = made(contest.plan(name, tried=True), models[form], held, given)
                row = line(name, contest, form, nulls[key], tried)
                print(row, flush=True)
                if given.write:
                    write([row], held, given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
