"""`fit` against spending evenly: at no more bytes than the best uniform preset, is KL on held-out text lower?

    python benchmarks/fit_vs_uniform.py [--quick] [--out FOLDER] [MODEL ...]

For each model: the uniform presets below are built by `apply`, with the calibration text that `fit` reads, and with
embedding and head at the preset's own grid, grain and scale (rounded to nearest with a searched range, which is kinder
than the preset's own range; an untied head gets the preset's rounder). Beside the published presets stand fit's own
options spent evenly (`even-int4-g32`: GPTQ with searched ranges), so that what is tested is the allocation and not the
parts. Among those of at most 0.30 of the source's bf16 bytes the one with the lowest KL on the *evaluation* text is the
best uniform one, which favours it. `fit` gets its bytes as the budget and never sees that text. Both artifacts are
loaded and scored on the same windows; the bootstrap draws documents (novels in stretches of some 4,000 characters,
modules of the standard library, stories in stretches) for both at once.

Passes where fit's bytes are no more, and the 95% interval of the difference of mean KL lies below zero.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from regauge.engine import apply
from regauge.hosts.transformers.load import load
from regauge.hosts.transformers.source import Source
from regauge.measure.quality import Scores, paired, summarise
from regauge.parts import WEIGHTS, Spec
from regauge.plan import Plan, Rule
from regauge.plan import load as load_plan
from regauge.search.fit import fit
from regauge.search.loop.build import score
from regauge.search.options import integer
from regauge.search.subject import Subject, reader
from regauge.text.corpora import corpus
from regauge.text.split import Sizes, Texts, pieces, prepare

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SHARE = 0.30
QUICK = ("gptq-w4g32", "gptq-w4g64", "gptq-w4g128", "quarot-gptq-w4g32", "nvfp4", "even-int4-g32", "even-int4-g128")
FULL = (*QUICK, "gptq-w4", "gptq-w3g32", "rtn-w4g32", "imatrix-w4g32", "nf4", "mxfp4", "quarot-gptq-w4g128")


@dataclass(frozen=True)
class Case:
    """A model with its two texts."""

    name: str
    model: Path
    calibration: list[str]
    evaluation: list[str]


def halves(text: str, size: int) -> tuple[list[str], list[str]]:
    """Stretches of a text, interleaved."""
    found = pieces(corpus([text])) if size == 0 else [text[i : i + size] for i in range(0, len(text), size)]
    return found[0::2], found[1::2]


def novels(folder: str) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted((SHARED / "data" / folder).glob("*.txt"))]


def cases(bundled: Path) -> dict[str, Case]:
    """Those whose model and text are here."""
    found: dict[str, Case] = {}
    if (SHARED / "ASSETS.md").exists():
        train, held = novels("novels"), novels("novels-heldout")
        for name in ("novel-llama-8m", "novel-neox-9m"):
            found[name] = Case(name, SHARED / "models" / name, train, held)
        stories = SHARED / "data" / "tinystories"
        first, second = halves((stories / "ts_valid_30k.txt").read_text(encoding="utf-8"), 500)
        second += [(stories / "ts_sample_4k.txt").read_text(encoding="utf-8")]
        found["babyllama-1m"] = Case("babyllama-1m", SHARED / "models" / "babyllama-1m", first, second)
    if (bundled / "config.json").exists():
        sys.path.insert(0, str(ROOT / "scripts"))
        from stdlib_text import stdlib_files  # type: ignore[import-not-found]  # a script of this repository

        files = stdlib_files()
        texts = {split: [file.text for file in files if file.split == split] for split in ("train", "heldout")}
        found[bundled.name] = Case(bundled.name, bundled, texts["train"], texts["heldout"])
    return found


def uniform(name: str, source: Source) -> Plan:
    """A preset with its embedding and head at its own coordinates; `even-int4-g32`: fit's option, everywhere."""
    if name.startswith("even-"):
        bits, _, grain = name.removeprefix("even-int").partition("-g")
        choice = integer(int(bits), int(grain)).choice
        assert choice is not None
        spec = Spec("group", (("otherwise", "channel"), ("size", int(grain))))
        plan = Plan(name=name, places={WEIGHTS: (Rule("blocks.*", choice.but(grain=spec)),)})
    else:
        plan = load_plan(name)
    choice = plan.rules[0].point
    assert choice is not None
    table = choice.but(rounder=Spec("nearest"))
    if choice.name("scale") in ("bf16", "f16", "f32") and choice.name("grid") != "nf4":
        table = table.but(ranger=Spec("search"))
    rules = [*plan.rules, Rule("embed", table)]
    folded = any(spec.part in ("fold-norm", "layernorm-to-rms") for spec in plan.rewrites)
    if not source.anatomy.tied or folded:
        rules.append(Rule("head", choice))
    return replace(plan, places={**plan.places, WEIGHTS: tuple(rules)})


@dataclass(frozen=True, eq=False)
class Made:
    """One artifact, scored."""

    name: str
    bytes: int
    scores: Scores

    @property
    def kl(self) -> float:
        return float(self.scores.kl_N.mean())


def make(name: str, plan: Plan, subject: Subject, texts: Texts, folder: Path) -> Made:
    receipt = apply(
        plan,
        subject.source.path,
        folder,
        calibration=list(texts.calibration),
        tokens=texts.tokens,
        length=texts.length,
        force=True,
    )
    made = Made(name, receipt.bytes_after, score(load(folder, dtype=torch.float32), subject, texts.evaluation))
    shutil.rmtree(folder)
    return made


def run(case: Case, names: tuple[str, ...], folder: Path) -> dict[str, object]:
    """One model's table; returns the row of the summary."""
    source = Source.open(case.model)
    subject = Subject.of(source)
    texts = prepare(reader(source, 0), case.calibration, case.evaluation, Sizes(search=2048))
    whole = source.bytes_bf16()
    print(f"\n## {case.name}: {whole:,} bytes as bf16; {texts.evaluation.predicted:,} evaluation tokens in "
          f"{texts.evaluation.documents} documents")  # fmt: skip
    print(f"{'recipe':<22}{'bytes':>11}{'x bf16':>8}{'KL':>10}   95% interval")
    made = []
    for name in names:
        one = make(name, uniform(name, source), subject, texts, folder / "uniform")
        made.append(one)
        show(one, whole)
    eligible = [one for one in made if one.bytes <= SHARE * whole]
    best = min(eligible, key=lambda one: one.kl)
    started = time.monotonic()
    out = folder / "fit"
    record = fit(
        case.model,
        out,
        budgets=[f"memory={best.bytes}B"],
        calibration=case.calibration,
        eval=case.evaluation,
        force=True,
    )
    seconds = time.monotonic() - started
    size = record.point.bytes_measured or 0
    ours = Made("fit", size, score(load(out, dtype=torch.float32), subject, texts.evaluation))
    show(ours, whole)
    pair = paired(ours.scores, best.scores)
    d = pair.difference
    passed = ours.bytes <= best.bytes and d.high < 0
    print(f"best uniform at ≤ {SHARE}x: {best.name}; fit less it: {d.value:+.5f} [{d.low:+.5f}, {d.high:+.5f}] "
          f"({ours.kl / best.kl:.2f} of its KL, {seconds:.0f} s): {'PASS' if passed else 'FAIL'}")  # fmt: skip
    return {
        "model": case.name,
        "uniform": best.name,
        "uniform_bytes": best.bytes,
        "uniform_kl": best.kl,
        "fit_bytes": ours.bytes,
        "fit_kl": ours.kl,
        "difference": [d.value, d.low, d.high],
        "seconds": round(seconds, 1),
        "passed": passed,
    }


def show(one: Made, whole: int) -> None:
    kl = summarise(one.scores).kl
    print(
        f"{one.name:<22}{one.bytes:>11,}{one.bytes / whole:>8.4f}{kl.value:>10.5f}   [{kl.low:.5f}, {kl.high:.5f}]",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("models", nargs="*")
    parser.add_argument("--quick", action="store_true", help="fewer presets")
    parser.add_argument("--out", type=Path, help="where the summary goes, as JSON")
    parser.add_argument("--bundled", type=Path, default=ROOT / "bundled" / "code-llama-5m")
    given = parser.parse_args()
    known = cases(given.bundled)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.models or known:
            rows.append(run(known[name], QUICK if given.quick else FULL, Path(folder) / name))
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(f"\n{sum(bool(row['passed']) for row in rows)} of {len(rows)} models passed")
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
