"""From what was found to the record: final figures on the evaluation text, costs, baselines, samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from regauge.engine.receipts import versions
from regauge.kernels.cpu.machine import bandwidth, give_back, load
from regauge.measure.images import EACH
from regauge.measure.machine import machine
from regauge.measure.quality import Paired, Quality, Scores, paired, summarise
from regauge.measure.reading import longest
from regauge.measure.samples import continuations
from regauge.search.allocation import Allocation
from regauge.search.budgets import Budget
from regauge.search.drafting import DECODE
from regauge.search.loop.build import costs, score
from regauge.search.loop.caches import by_recipe, cached, filled, noted, picked
from regauge.search.loop.desk import TURNS, Desk
from regauge.search.loop.forecast import FRESH, TIMED
from regauge.search.loop.gather import even, nearest
from regauge.search.loop.goal import reached
from regauge.search.loop.lasting import lasting, told
from regauge.search.loop.problem import Problem, pairs
from regauge.search.loop.settle import Settled
from regauge.search.losses.trials import true_scores
from regauge.search.options import Option, group_bytes, site_bytes
from regauge.search.record import Point, Run, Sample, SitePick, Verdict
from regauge.version import __version__


@dataclass(frozen=True, eq=False)
class Figures:
    """What was measured on the evaluation text, which is read for this and nothing else.

    Attributes:
        points: the frontier, smallest first; the chosen one with its artifact's figures too.
        uniforms: every site alike, in memory.
        against: the artifact less the variant in memory of each uniform.
    """

    points: tuple[Point, ...]
    chosen: int
    uniforms: tuple[Point, ...]
    against: dict[str, Paired]
    quality: Quality
    original: Quality
    additivity: float | None


def assemble(desk: Desk, settled: Settled) -> Run:
    """The record of a finished search."""
    ask, texts, watch = desk.ask, desk.texts, desk.watch
    problem, source = settled.problem, desk.subject.source
    with watch.step("evaluation"):
        figures = evaluate(desk, settled)
    busy = load()
    turns = max(TURNS, watch.many("rounds of timing", ask.effort.turns, TIMED))
    memory = ask.effort.memory and watch.can("memory in fresh processes", FRESH)
    with watch.step("costs"):
        spent = costs(source, settled.built, turns, memory, watch.can, desk.facts)
    long = lasting(desk, settled, spent)
    samples: tuple[Sample, ...] = ()
    if ask.effort.samples and watch.can("samples", watch.expected.get("samples", 0.0)):
        with watch.step("samples"):
            samples = _samples(desk, settled)
    return Run(
        regauge=__version__,
        command=ask.command,
        seed=ask.seed,
        source=ask.model,
        source_hash=source.digest(),
        family=source.anatomy.family,
        parameters=source.parameters(),
        bytes_bf16=source.bytes_bf16(),
        budgets=ask.budgets,
        floor=dict(ask.floors),
        texts=texts.records,
        points=figures.points,
        chosen=figures.chosen,
        chosen_why=settled.why,
        uniforms=figures.uniforms,
        against_uniform=figures.against,
        sites=_sites(problem, settled.point),
        caches=picked(problem, settled.point),
        quality=figures.quality,
        original=figures.original,
        costs=spent,
        long=long,
        drafts=settled.drafts,
        verdicts=_verdicts(desk, settled, figures.quality),
        check=problem.check(),
        additivity=figures.additivity,
        builds=settled.builds,
        samples=samples,
        machine=machine().model_dump(mode="json"),
        bandwidth=bandwidth(folder=desk.folder.path),
        load=busy,
        seconds=watch.seconds,
        versions=versions(),
        calibration={
            **ask.given,
            "sizes": {
                "calibration": ask.effort.calibration,
                "search": ask.effort.search,
                "evaluation": ask.effort.evaluation,
            },
        },
        notes=(*ask.notes, *texts.notes, *watch.late, *_notes(problem, settled), *by_recipe(ask.cache), *told(long)),
    )


def _afforded(
    desk: Desk, settled: Settled, shown: list[int], uniform: dict[str, dict[str, Option]]
) -> tuple[list[int], dict[str, dict[str, Option]]]:
    """As many of the frontier's points and of the baselines as there is time for: the chosen point, then baselines."""
    watch, wanted = desk.watch, len(shown) + len(uniform)
    each = watch.expected.get("evaluation", 0.0) / (
        2 + min(desk.ask.effort.shown, 8) + min(desk.ask.effort.uniforms, 4)
    )
    count = watch.many("variants beside the artifact", wanted, each)
    if count >= wanted:
        return shown, uniform
    chosen = next(i for i, point in enumerate(settled.frontier) if point.picks == settled.point.picks)
    first = [i for i in shown if i == chosen][:count]
    kept = dict(list(uniform.items())[: max(0, count - len(first))])
    others = [i for i in shown if i != chosen][: max(0, count - len(first) - len(kept))]
    return sorted([*first, *others]), kept


def evaluate(desk: Desk, settled: Settled) -> Figures:
    """The artifact as it loads; the frontier and the uniform baselines as variants in memory."""
    problem, text, effort = settled.problem, desk.texts.evaluation, desk.ask.effort
    seed, size = desk.ask.seed, settled.built.bytes
    model = desk.subject.host.load(settled.built.folder, dtype=torch.float32)
    made = score(model, desk.subject, text, settled.built.cache)
    del model
    give_back()  # the artifact in float32 would stay beside the variants
    total = size + problem.size(problem.picks(settled.point)) - problem.stored(problem.picks(settled.point))
    uniform = even(problem, total, effort.uniforms)
    picks = [problem.picks(point) for point in settled.frontier]
    shown = nearest(settled.frontier, settled.point.takes["bytes"], effort.shown)
    shown, uniform = _afforded(desk, settled, shown, uniform)
    variants = [*(picks[i] for i in shown), *uniform.values()]
    problem.ready(pairs(variants))
    scores = true_scores(desk.subject, problem.shelf, text, variants, desk.limits.states)
    trials = dict(zip(shown, problem.measure([picks[i] for i in shown]), strict=True))
    chosen = next(i for i, point in enumerate(settled.frontier) if point.picks == settled.point.picks)
    quality = summarise(made, seed)
    seen = dict(zip(shown, scores, strict=False))
    points = [
        _timed(_point(problem, picks[i], seen.get(i), seed, str(i)), point, trials.get(i))
        for i, point in enumerate(settled.frontier)
    ]
    points[chosen] = points[chosen].model_copy(update={"bytes_measured": size, "measured": quality})
    others = dict(zip(uniform, scores[len(shown) :], strict=True))
    uniforms = {name: _point(problem, uniform[name], others[name], seed, name, "uniform") for name in uniform}
    losses = problem.losses()
    ratios = [trials[i] / total for i in shown if (total := sum(losses[n][o.name] for n, o in picks[i].items())) > 0]
    ratios.sort()
    return Figures(
        points=tuple(points),
        chosen=chosen,
        uniforms=tuple(uniforms.values()),
        against={
            name: paired(made, others[name], seed) for name, point in uniforms.items() if point.held >= total * 0.9
        },
        quality=quality,
        original=summarise(_itself(made), seed),
        additivity=ratios[len(ratios) // 2] if ratios else None,
    )


def _point(
    problem: Problem, picks: Mapping[str, Option], scores: Scores | None, seed: int, name: str, kind: str = "searched"
) -> Point:
    """A variant, measured in memory where there are scores of it."""
    losses = problem.losses()
    weights = sum(site.shape[0] * site.shape[1] for group in problem.groups for site in group.sites)
    stored = sum(group_bytes(group, picks[group.name], problem.subject.itemsize) for group in problem.groups)
    return Point(
        name=name,
        kind=kind,
        picks={group: option.name for group, option in picks.items()},
        bits=8 * stored / weights,
        bytes_predicted=round(problem.stored(picks)),
        cache_bytes=round(problem.size(picks) - problem.stored(picks)),
        kl_predicted=sum(losses[group][option.name] for group, option in picks.items()),
        in_memory=None if scores is None else summarise(scores, seed),
    )


def _timed(point: Point, found: Allocation, trial: float | None) -> Point:
    """With what the allocation took, and true KL on the search text."""
    takes = found.takes
    return point.model_copy(
        update={
            "kl_trial": trial,
            "decode_ms_predicted": takes.get("decode"),
            "prefill_ms_predicted": takes.get("prefill"),
        }
    )


def _sites(problem: Problem, point: Allocation) -> tuple[SitePick, ...]:
    losses, picks = problem.losses(), problem.picks(point)
    found = []
    for group in problem.groups:
        option = picks[group.name]
        for site in group.sites:
            size = site_bytes(site, option, problem.subject.itemsize)
            found.append(
                SitePick(
                    name=site.name,
                    kind=site.kind,
                    block=site.block,
                    shape=site.shape,
                    option=option.name,
                    bits=8 * size / (site.shape[0] * site.shape[1]),
                    bytes=size,
                    group=group.name,
                    kl_predicted=losses[group.name][option.name],
                )
            )
    return tuple(found)


def _itself(scores: Scores) -> Scores:
    """The original against itself, on the same tokens."""
    nothing = scores.kl_N * 0
    return replace(scores, nll_N=scores.nll_original_N, kl_N=nothing, agree_N=nothing + 1)


def _verdicts(desk: Desk, settled: Settled, quality: Quality) -> tuple[Verdict, ...]:
    """Every budget and floor against what was measured."""
    problem, found = settled.problem, list[Verdict]()
    for one in settled.goal.held:
        cache = one.cache + cached(problem, problem.picks(settled.point), one.budget)
        verdict = _budget(settled, one.budget, cache, desk.subject.source.bytes_bf16())
        more = "" if one.budget.context is None else filled(problem, settled.point, one.budget.context)
        found.append(verdict.model_copy(update={"how": verdict.how + more}))
    for name, amount in desk.ask.floors.items():
        kl = settled.built.kl
        said = f"mean on the search text, where it was held to; {quality.kl.value:.4g} on the evaluation text"
        found.append(
            Verdict(
                text=f"{name}={amount:g}",
                limit=amount,
                measured=kl,
                unit=f"nats {EACH[quality.kind]}",
                met=kl <= amount,
                how=said,
            )
        )
    return tuple(found)


def _budget(settled: Settled, budget: Budget, cache: float, whole: int) -> Verdict:
    if budget.resource != "memory":
        assert settled.speeds is not None, "a speed is asked for"
        ratio = reached(settled.speeds, budget.resource)
        said = "medians of interleaved rounds against the source in bf16 by the same runtime"
        if budget.resource == DECODE and settled.drafts is not None and settled.drafts.gain > 1:
            said = f"{ratio:.2f}x from the weights, by {said}; {settled.drafts}"
            ratio *= settled.drafts.gain
        return Verdict(
            text=budget.text, limit=budget.amount, measured=ratio, unit="x", met=ratio >= budget.amount, how=said
        )
    limit, size = float(budget.bytes(whole)), settled.built.bytes + cache
    said = "bytes of the artifact's tensors, steps and embeddings included"
    if budget.context is not None:
        said += f", and of the cache at {budget.context:,} tokens"
    return Verdict(text=budget.text, limit=limit, measured=size, unit="bytes", met=size <= limit, how=said)


def _samples(desk: Desk, settled: Settled) -> tuple[Sample, ...]:
    source, host = desk.subject.source, desk.subject.host
    tokenizer, prompts = source.tokenizer(), desk.texts.prompts[:4]
    before = continuations(host.ways_of_source(source).runtime, tokenizer, prompts)
    give_back()
    after = continuations(host.load(settled.built.folder), tokenizer, prompts)
    return tuple(Sample(prompt=p, original=a, compressed=b) for p, a, b in zip(prompts, before, after, strict=True))


def _notes(problem: Problem, settled: Settled) -> list[str]:
    kept = [site.name for site in problem.subject.anatomy.sites if all(site not in g.sites for g in problem.groups)]
    kept = [name for name in kept if not (name == "head" and problem.subject.anatomy.tied)]
    notes = [f"left whole and not searched: {', '.join(kept[:4])}{' …' if len(kept) > 4 else ''}"] if kept else []
    check = problem.check()
    if check is not None:
        notes.append(
            f"predicted against true KL of {check.variants} single-group changes: rank correlation {check.rank:.3f}, "
            f"scale {check.scale:.2f}, spread {check.spread:.2f}; corrected by them"
        )
    notes += noted(problem, settled.point, longest(problem.windows))
    return notes + list(settled.built.receipt.refusals)
