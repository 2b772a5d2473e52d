"""From what was found to the record: final figures on the evaluation text, costs, baselines, samples."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from regauge.engine.api import versions
from regauge.engine.watchdog import Clock
from regauge.hosts.transformers.load import load
from regauge.hosts.transformers.sampling import whole_model
from regauge.hosts.transformers.source import Source
from regauge.measure.machine import bandwidth, machine
from regauge.measure.quality import Scores, paired, summarise
from regauge.measure.samples import continuations
from regauge.plan import Plan
from regauge.search.allocation import Allocation
from regauge.search.budgets import Budget
from regauge.search.build import costs, score
from regauge.search.effort import Effort, Stopwatch
from regauge.search.options import Option, group_bytes, plan_of, site_bytes, site_groups
from regauge.search.problem import Problem
from regauge.search.record import Point, Run, Sample, SitePick, Verdict
from regauge.search.trials import true_scores
from regauge.text.split import Texts
from regauge.version import __version__

if TYPE_CHECKING:
    from regauge.search.verdict import Settled

UNIFORMS = ("int3-g128", "int4-g128", "int4-g32", "int5-g128", "int6-g128", "int8-channel")


def plan_for(picks: Mapping[str, str], source: Source, name: str, texts: Texts) -> Plan:
    """The recipe of named picks: every site by name."""
    groups = site_groups(source.anatomy)
    options = {group.name: group.option(picks[group.name]) for group in groups}
    return plan_of(options, groups, name, "found by regauge fit", texts.tokens, texts.length)


def assemble(
    settled: Settled,
    asked: Sequence[Budget],
    floors: Mapping[str, float],
    texts: Texts,
    effort: Effort,
    seed: int,
    clock: Clock,
    watch: Stopwatch,
    model: str,
    command: str,
    given: Mapping[str, object],
) -> Run:
    """The record of a finished search. The evaluation text is read here and nowhere else."""
    problem = settled.problem
    subject, source = problem.subject, problem.subject.source
    started = time.monotonic()
    clock.say("measure", "final figures on the evaluation text")
    compressed = score(load(settled.built.folder, dtype=torch.float32), subject, texts.evaluation)
    uniforms = _uniforms(problem, settled.built.bytes)
    frontier = [problem.picks(point) for point in settled.frontier]
    scores = true_scores(subject, problem.shelf, texts.evaluation, [*frontier, *uniforms.values()])
    trials = problem.measure(frontier)
    chosen = next(i for i, point in enumerate(settled.frontier) if point.picks == settled.point.picks)
    points = [
        _point(problem, str(i), "searched", frontier[i], settled.frontier[i], scores[i], trials[i], seed)
        for i in range(len(frontier))
    ]
    points[chosen] = points[chosen].model_copy(
        update={
            "bytes_measured": settled.built.bytes,
            "measured": summarise(compressed, seed),
            "measured_on": "artifact",
        }
    )
    even = {
        name: _point(problem, name, "uniform", picks, None, scores[len(frontier) + i], None, seed)
        for i, (name, picks) in enumerate(uniforms.items())
    }
    against = {
        name: paired(scores[chosen], scores[len(frontier) + i], seed)
        for i, name in enumerate(uniforms)
        if even[name].bytes_predicted >= points[chosen].bytes_predicted * 0.9
    }
    watch.lap("evaluation", started)
    started = time.monotonic()
    clock.say("measure", "speed and memory")
    spent = costs(source, settled.built.folder, effort.turns, effort.memory)
    watch.lap("costs", started)
    started = time.monotonic()
    samples = _samples(source, settled, texts)
    watch.lap("samples", started)
    sums = [sum(problem.losses()[name][option.name] for name, option in picks.items()) for picks in frontier]
    ratios = sorted(true / total for true, total in zip(trials, sums, strict=True) if total > 0)
    return Run(
        regauge=__version__,
        command=command,
        seed=seed,
        source=model,
        source_hash=source.digest(),
        family=source.anatomy.family,
        parameters=source.parameters(),
        bytes_bf16=source.bytes_bf16(),
        budgets=tuple(asked),
        floor=dict(floors),
        texts=texts.records,
        points=tuple(points),
        chosen=chosen,
        chosen_why=settled.why,
        uniforms=tuple(even.values()),
        against_uniform=against,
        sites=_sites(problem, settled.point),
        quality=points[chosen].measured,
        original=summarise(_itself(compressed), seed),
        costs=spent,
        verdicts=_verdicts(settled, asked, floors, source, points[chosen]),
        check=problem.check(),
        additivity=ratios[len(ratios) // 2] if ratios else None,
        builds=settled.builds,
        samples=samples,
        machine=machine().model_dump(mode="json"),
        bandwidth=bandwidth(),
        seconds=watch.seconds,
        versions=versions(),
        calibration={
            **given,
            "sizes": {"calibration": effort.calibration, "search": effort.search, "evaluation": effort.evaluation},
        },
        notes=(*texts.notes, *_notes(problem, settled)),
    )


def _point(
    problem: Problem,
    name: str,
    kind: str,
    picks: Mapping[str, Option],
    point: Allocation | None,
    scores: Scores,
    trial: float | None,
    seed: int,
) -> Point:
    losses = problem.losses()
    weights = sum(site.shape[0] * site.shape[1] for group in problem.groups for site in group.sites)
    stored = sum(group_bytes(group, picks[group.name], problem.subject.itemsize) for group in problem.groups)
    takes = point.takes if point is not None else {}
    return Point(
        name=name,
        kind=kind,
        picks={group: option.name for group, option in picks.items()},
        bits=8 * stored / weights,
        bytes_predicted=round(problem.size(picks)),
        kl_predicted=sum(losses[group][option.name] for group, option in picks.items()),
        kl_trial=trial,
        decode_ms_predicted=takes.get("decode"),
        prefill_ms_predicted=takes.get("prefill"),
        measured=summarise(scores, seed),
        measured_on="memory",
    )


def _uniforms(problem: Problem, size: int) -> dict[str, dict[str, Option]]:
    """Every site alike, at sizes near that of the artifact: what the reader would otherwise take."""
    found = {name: picks for name in UNIFORMS if (picks := problem.uniform(name)) is not None}
    near = {name: picks for name, picks in found.items() if 0.7 * size <= problem.size(picks) <= 1.5 * size}
    return near or dict(list(found.items())[-1:])


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
    return Scores(scores.nll_original_N, scores.nll_original_N, nothing, nothing + 1, scores.document_N, scores.bytes_D)


def _verdicts(
    settled: Settled, asked: Sequence[Budget], floors: Mapping[str, float], source: Source, point: Point
) -> tuple[Verdict, ...]:
    found: list[Verdict] = []
    whole = source.bytes_bf16()
    for budget in asked:
        if budget.resource == "memory":
            limit = float(budget.bytes(whole))
            said = "bytes of the artifact's tensors, steps and embeddings included"
            size = float(settled.built.bytes)
            if budget.context is not None:
                bound = next(b for b in settled.bounds if b.resource == "bytes" and b.limit < limit)
                size += limit - bound.limit
                said += f", and of the cache at {budget.context:,} tokens"
            found.append(_verdict(budget.text, limit, size, "bytes", size <= limit, said))
            continue
        assert settled.speeds is not None, "a speed is asked for"
        pair = settled.speeds[budget.resource]
        reached = pair["compressed"].median / pair["original"].median
        said = "medians of interleaved rounds against the source in bf16"
        found.append(_verdict(budget.text, budget.amount, reached, "x", reached >= budget.amount, said))
    for name, amount in floors.items():
        assert point.measured is not None, "the artifact was measured"
        said = f"mean on the search text, where it was held to; {point.measured.kl.value:.4g} on the evaluation text"
        found.append(
            _verdict(f"{name}={amount:g}", amount, settled.built.kl, "nats a token", settled.built.kl <= amount, said)
        )
    return tuple(found)


def _verdict(text: str, limit: float, measured: float, unit: str, met: bool, how: str) -> Verdict:
    return Verdict(text=text, limit=limit, measured=measured, unit=unit, met=met, how=how)


def _samples(source: Source, settled: Settled, texts: Texts) -> tuple[Sample, ...]:
    tokenizer = source.tokenizer()
    prompts = texts.prompts[:4]
    before = continuations(whole_model(source), tokenizer, prompts)
    after = continuations(load(settled.built.folder), tokenizer, prompts)
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
    return notes + list(settled.built.receipt.refusals)
