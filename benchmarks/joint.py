"""One budget over weights and cache against the two ways to spend it without: at equal bytes, is KL lower?

    python benchmarks/joint.py [--quick] [--context 16k] [--total 30MB]

On novel-llama-8m, at two totals of bytes of weights and cache at a context: what `kivi-4` and even 4-bit weights take
together, and what a bf16 cache and such weights take. At each, `fit --budget memory@16k=...` is held against the better
of (a) `fit` on the weights alone beside a bf16 cache and (b) kivi-4 with the best even weights that fit in beside it.
All are built, loaded and scored on held-out novels, in windows of as many tokens as the model reads (1,024: bytes are
by formula at the longer context), piece by piece behind their caches, so that tokens read codes. The bootstrap draws
documents for both at once. Passes where the interval of the difference of mean KL lies below zero at both totals.
`--total` takes another total in their place; give it several times for several.

--quick reads less text and tries fewer variants. Without ../shared there is nothing to run on, and it says so.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from fit_vs_uniform import SHARED, halves, novels, uniform

from regauge.amounts import context as read_context
from regauge.amounts import memory, told
from regauge.artifact.files import weight_bytes
from regauge.cache.scheme import CachePlan
from regauge.engine import apply
from regauge.errors import BudgetError
from regauge.hosts.transformers.load import load
from regauge.hosts.transformers.source import Source
from regauge.measure.quality import Scores, paired, summarise
from regauge.plan import Plan
from regauge.plan.caches import asked, cache_plan, with_cache
from regauge.plan.keeping import bytes_at
from regauge.search.fit import fit
from regauge.search.loop.build import score
from regauge.search.loop.desk import Effort
from regauge.search.subject import Subject, reader
from regauge.text.split import Sizes, Texts, prepare

MODEL = "novel-llama-8m"
CACHE = "kivi-4"
EVEN = ("even-int8-g128", "even-int6-g128", "even-int5-g128", "even-int4-g32", "even-int4-g128", "even-int3-g32")
FIRST = "even-int4-g32"
"""What weights the totals are taken from."""


@dataclass(frozen=True, eq=False)
class Made:
    """An artifact, scored behind its cache."""

    name: str
    weights: int
    cache: int
    scores: Scores

    @property
    def kl(self) -> float:
        return float(self.scores.kl_N.mean())

    @property
    def line(self) -> str:
        kl = summarise(self.scores).kl
        total = told(self.weights + self.cache)
        return (
            f"  {self.name:44} {told(self.weights):>9} + {told(self.cache):>9} = {total:>9}   "
            f"KL {kl.value:.5f} [{kl.low:.5f}, {kl.high:.5f}]"
        )


@dataclass(frozen=True, eq=False)
class Bench:
    """What all are made from and scored on."""

    subject: Subject
    texts: Texts
    folder: Path
    context: int
    train: list[str]
    held: list[str]

    @property
    def whole(self) -> int:
        """Bytes of a bf16 cache."""
        anatomy = self.subject.anatomy
        return bytes_at(CachePlan("bf16", (None,) * anatomy.blocks), anatomy, self.context)

    def scored(self, name: str, path: Path, weights: int, cache: CachePlan | None) -> Made:
        model = load(path, dtype=torch.float32)
        held = self.whole if cache is None else bytes_at(cache, self.subject.anatomy, self.context)
        return Made(name, weights, held, score(model, self.subject, self.texts.evaluation, cache))

    def applied(self, name: str) -> tuple[Path, int]:
        """Even weights beside kivi-4, made once."""
        path, texts = self.folder / name, self.texts
        if path.exists():
            return path, weight_bytes(path)
        plan: Plan = with_cache(uniform(name, self.subject.source), CACHE)
        receipt = apply(
            plan, self.subject.source.path, path, calibration=list(texts.calibration), tokens=texts.tokens,
            length=texts.length, force=True,
        )  # fmt: skip
        return path, receipt.bytes_after

    def size(self, name: str) -> int:
        """Bytes of even weights, about: norms are not counted, and no group falls back."""
        bits, _, group = name.removeprefix("even-int").partition("-g")
        steps = (16 + (0 if bits == "8" else int(bits))) / int(group)
        return round(self.subject.source.parameters() * (int(bits) + steps) / 8)

    def even(self, limit: int) -> Made:
        """kivi-4 beside the best even weights that fit in."""
        plan = asked(CACHE)
        assert plan is not None
        cache = cache_plan(plan, self.subject.anatomy)
        room = limit - bytes_at(cache, self.subject.anatomy, self.context)
        if self.subject.source.bytes_bf16() <= room:
            scores = score(self.subject.host.whole(self.subject.source), self.subject, self.texts.evaluation, cache)
            held = bytes_at(cache, self.subject.anatomy, self.context)
            return Made(f"{CACHE} + bf16 weights", self.subject.source.bytes_bf16(), held, scores)
        found: list[Made] = []
        for name in [name for name in EVEN if self.size(name) <= 1.02 * room][:2]:  # the others have fewer bits
            path, size = self.applied(name)
            if size <= room:
                found.append(self.scored(f"{CACHE} + {name}", path, size, cache))
        return min(found, key=lambda one: one.kl)

    def searched(self, name: str, budget: str) -> Made:
        out = self.folder / name
        run = fit(self.subject.source.path, out, [budget], calibration=self.train, eval=self.held, force=True)
        cache = None
        if run.caches:
            print("  keys  ", " ".join(str(one.keys) for one in run.caches))
            print("  values", " ".join(str(one.values) for one in run.caches))
            from regauge.search.loop.build import plan_for
            from regauge.search.menus import Menu, groups_of

            groups = groups_of(self.subject.anatomy, Menu(contexts=(self.context,)))
            cache = cache_plan(plan_for(run.point.picks, groups, "fit", self.texts), self.subject.anatomy)
        size = run.point.bytes_measured
        assert size is not None
        return self.scored(name, out, size, cache)


def contest(bench: Bench, limit: int) -> bool:
    print(f"\n{told(limit)} of weights and cache at {bench.context:,} tokens")
    others = [bench.even(limit)]
    if limit > bench.whole:
        try:
            others.append(bench.searched("fit, weights alone + bf16 cache", f"memory={(limit - bench.whole) / 1000}KB"))
        except BudgetError as error:
            print(f"  weights alone + bf16 cache cannot be had: {error}")
    else:
        print(f"  weights alone + bf16 cache cannot be had: the cache alone takes {told(bench.whole)}")
    ours = bench.searched("fit, weights and cache", f"memory@{bench.context}={limit / 1000}KB")
    for one in (*others, ours):
        print(one.line)
    best = min(others, key=lambda one: one.kl)
    gap = paired(ours.scores, best.scores)
    interval = gap.difference
    passed = gap.verdict == "first" and ours.weights + ours.cache <= limit
    said = "PASS" if passed else "FAIL"
    print(f"  {said}: less {best.name}: {interval.value:+.5f} [{interval.low:+.5f}, {interval.high:+.5f}] nats a token")
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--context", default="16k")
    parser.add_argument("--first", action="store_true", help="the smaller total alone")
    parser.add_argument("--total", action="append", default=[], help="30MB: this total instead")
    given = parser.parse_args()
    if not (SHARED / "models" / MODEL).exists():
        print(f"skipped: {SHARED / 'models' / MODEL} is not here")
        return 0
    began, context = time.monotonic(), read_context(given.context, given.context)
    effort = Effort()
    if given.quick:
        effort = replace(effort.lesser()[-1], calibration=8192, search=4096, evaluation=2048, checks=8)
    source = Source.open(SHARED / "models" / MODEL)
    train = novels("novels")
    held, _ = halves("\n\n".join(novels("novels-heldout")), 6000)
    with tempfile.TemporaryDirectory() as folder, patch.object(Effort, "most", staticmethod(lambda: effort)):
        read = reader(source, 0, 1024)
        texts = prepare(read, train, held, Sizes(effort.calibration, 2048, 12288 if given.quick else 49152), 0)
        bench = Bench(Subject.of(source), texts, Path(folder), context, train, held)
        plan = asked(CACHE)
        assert plan is not None
        kivi = bytes_at(cache_plan(plan, source.anatomy), source.anatomy, context)
        _, weights = bench.applied(FIRST)
        limits = [kivi + weights, bench.whole + weights][: 1 if given.first else 2]
        limits = [memory(total, f"--total {total}") for total in given.total] or limits
        passed = [contest(bench, limit) for limit in limits]
    print(f"\n{'PASS' if all(passed) else 'FAIL'}; {time.monotonic() - began:.0f} s")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
