"""The page of a search: what `fit` found, what it built, and what was measured."""

from __future__ import annotations

from dataclasses import replace

from regauge.amounts import told
from regauge.artifact.loading import CAUSAL
from regauge.artifact.receipt import Receipt
from regauge.measure.bootstrap import FEW
from regauge.measure.contexts import MOST
from regauge.measure.cost import PROMPT, Costs, Speed
from regauge.measure.quality import Quality
from regauge.report import drafting, figures, kinds, words
from regauge.report.view import OUT, Point, Row, Sample, Table, View, loads, of_receipt, spent
from regauge.search import record
from regauge.search.record import Run


def of_run(run: Run, receipt: Receipt, out: str = OUT, auto: str = CAUSAL) -> View:
    """The page of a run: the receipt's page, and around it the frontier, the budgets and what was measured.

    Args:
        out, auto: as of `of_receipt`.
    """
    base = of_receipt(receipt, out, auto)
    return replace(
        base,
        title=f"{run.source.rstrip('/').rsplit('/', 1)[-1]} at {receipt.ratio:.3f}× of its bytes",
        subtitle=f"regauge {run.regauge}, family {run.family}, {run.parameters:,} parameters. "
        + _sentence(run.chosen_why),
        words=words.of_run(run, receipt, out),
        points=_points(run),
        first=(
            frontier(run, out),
            loads(receipt, out, auto),
            _budgets(run),
            *(() if run.drafts is None else (drafting.table(run.drafts),)),
            *figures.tables(run),
            _contexts(run),
            _decoding(run),
            _costs(run),
            spent(receipt),
        ),
        tables=(*base.tables, *_caches(run), _quality(run), _builds(run), _texts(run)),
        samples=tuple(Sample(s.prompt, s.original, s.compressed) for s in run.samples),
        notes=tuple(dict.fromkeys(run.notes + base.notes)),
        command=run.command,
        facts=base.facts + _facts(run),
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}" if text else ""


def frontier(run: Run, out: str) -> Table:
    """Every point with the line that builds it."""
    rows = tuple(
        (
            f"{index}{' (built)' if index == run.chosen else ''}",
            f"{one.bits:.2f}",
            f"{told(one.bytes_predicted)}{f' + {told(one.cache_bytes)} of cache' if one.cache_bytes else ''}",
            figures.NONE if one.bytes_measured is None else told(one.bytes_measured),
            f"{one.kl_predicted:.4f}",
            figures.NONE if one.in_memory is None else f"{one.in_memory.kl.value:.4f}",
            figures.NONE if one.measured is None else f"{one.measured.kl.value:.4f}",
            words.pick(out, index),
        )
        for index, one in enumerate(run.points)
    )
    header = ("point", "bits a weight", "bytes predicted", "bytes built", "KL predicted", "KL in memory")
    return Table(
        "Frontier",
        "Smallest first. A line builds its point without searching again.",
        (*header, "KL of the artifact", "line"),
        rows,
        lines=len(header) + 1,
    )


def _points(run: Run) -> tuple[Point, ...]:
    """Variants in memory, at bytes counted from formats; and what was built, at the bytes and KL of its artifact."""
    found = [_variant(point) for points in (run.points, run.uniforms) for point in points]
    chosen = run.point
    if chosen.measured is not None and chosen.bytes_measured is not None:
        kl = chosen.measured.kl
        bars = _bars(chosen.measured)
        size = chosen.bytes_measured + chosen.cache_bytes
        found.append(Point(chosen.name, "built", size, None, kl.value, bars, chosen=True))
    return tuple(found)


def _variant(point: record.Point) -> Point:
    found = point.in_memory
    return Point(
        label=point.name,
        kind=point.kind,
        bytes=point.held,
        predicted=point.kl_predicted if point.kind == "searched" else None,
        measured=None if found is None else found.kl.value,
        interval=None if found is None else _bars(found),
    )


def _bars(found: Quality) -> tuple[float, float] | None:
    return (found.kl.low, found.kl.high) if found.drawn >= FEW else None


def _budgets(run: Run) -> Table:
    rows = tuple(
        (
            v.text,
            figures.amount(v.limit, v.unit),
            figures.amount(v.measured, v.unit),
            "met" if v.met else "missed",
            v.how,
        )
        for v in run.verdicts
    )
    return Table(
        "Budgets",
        "Every budget is held against a measurement of what was built, not against a prediction.",
        ("asked", "limit", "measured", "", "how it was measured"),
        rows,
        "No budget was given: the knee of the frontier was built.",
    )


def _caches(run: Run) -> tuple[Table, ...]:
    """What each block keeps of the past, where the search chose it."""
    if not run.caches:
        return ()
    rows = tuple(
        (one.name, one.option, str(one.keys), str(one.values), told(one.bytes), f"{one.kl_predicted:.2g}")
        for one in run.caches
    )
    caption = (
        f"Bytes at {run.caches[0].tokens:,} tokens, by the formats. Where sizes are compared on this page, the cache "
        "is counted with the weights."
    )
    header = ("store", "option", "bits of keys", "bits of values", "bytes", "KL predicted")
    return (Table("The cache, block by block", caption, header, rows),)


def _quality(run: Run) -> Table:
    named = (("original", run.original), ("compressed", run.quality))
    rows = tuple(_quality_row(name, quality) for name, quality in named if quality is not None)
    kind = "tokens" if run.quality is None else run.quality.kind
    of = kinds.KINDS[kind]
    return Table(
        f"Quality on the evaluation {of.text}",
        f"KL in nats {of.each} to the original. " + ("" if run.quality is None else figures.over(run.quality)),
        ("model", *kinds.header(kind)[:-3], "KL, mean", "KL, 99th percentile", of.same),
        rows,
        "Quality was not measured.",
        folded=bool(rows),
    )


def _quality_row(name: str, quality: Quality) -> Row:
    drawn = quality.drawn
    last = ((quality.kl, 5), (quality.kl99, 4), (quality.agreement, 4))
    if quality.bits_per_byte is None:
        first = kinds.own(quality)
    else:
        both = ((quality.perplexity, 3), (quality.bits_per_byte, 4))
        first = tuple(figures.spread(interval, places, drawn) for interval, places in both)
    return (name, *first, *(figures.spread(interval, places, drawn) for interval, places in last))


def _contexts(run: Run) -> Table:
    """Memory by the length of the context."""
    rows = []
    for name, costs in run.costs.items():
        held = None if costs.memory is None else costs.memory.anonymous + costs.memory.file
        row = [figures.NAMES.get(name, name), figures.NONE if held is None else told(held)]
        for length in words.CONTEXTS:
            known = held is not None and costs.cache_bytes is not None
            row.append(told((held or 0) + length * (costs.cache_bytes or 0)) if known else figures.NONE)
        rows.append((*row, figures.NONE if costs.cache_bytes is None else told(costs.cache_bytes)))
    return Table(
        "Memory by context length",
        "Resident memory is what a fresh process gained by loading the model; the cache is added at its bytes a token.",
        ("model", "at load", *(f"at {length // 1024}k" for length in words.CONTEXTS), "a token of cache"),
        tuple(rows),
        "Memory was not measured.",
    )


def _decoding(run: Run) -> Table:
    """Tokens a second by the length of the context."""
    lengths = sorted({length for costs in run.costs.values() for length in costs.decode_at})
    rows = tuple(
        (
            figures.NAMES.get(name, name),
            _speed(costs.decode),
            *(_speed(costs.decode_at.get(length)) for length in lengths),
        )
        for name, costs in run.costs.items()
        if costs.decode_at
    )
    return Table(
        "Decoding by context length" + figures.marked(run),
        "Tokens a second, medians with quartiles, measured behind a cache of random tokens. A length that the model "
        f"does not read, or that takes more than {MOST:.0f} seconds to measure, is left out.",
        ("model", f"behind {PROMPT} tokens", *(f"at {length // 1024}k" for length in lengths)),
        rows,
        "Decoding was measured at the start of a context only.",
    )


def _costs(run: Run) -> Table:
    rows = tuple(_cost_row(figures.NAMES.get(name, name), costs) for name, costs in run.costs.items())
    caption = "Tokens a second at batch 1 as medians with quartiles, all interleaved in one run. "
    if run.bandwidth:
        caption += f"Beside them memory was read at {run.bandwidth / 1e9:.1f} GB/s."
    return Table(
        "Measured speeds" + figures.marked(run),
        caption,
        ("model", "decode, tokens/s", "prefill, tokens/s", "mapped from files", "files"),
        rows,
        "Costs were not measured.",
    )


def _cost_row(name: str, costs: Costs) -> Row:
    return (
        name,
        _speed(costs.decode),
        _speed(costs.prefill),
        figures.NONE if costs.memory is None else told(costs.memory.file),
        figures.NONE if costs.bytes is None else told(costs.bytes),
    )


def _speed(speed: Speed | None) -> str:
    return "–" if speed is None else f"{speed.median:.1f} [{speed.low:.1f}, {speed.high:.1f}]"


def _builds(run: Run) -> Table:
    return Table(
        "Built on the way",
        "The search builds, measures and corrects; every artifact that it built is here.",
        ("point", "bytes", "KL", "decode", "why"),
        tuple((b.point, told(b.bytes), f"{b.kl:.5f}", b.decode or "–", b.why) for b in run.builds),
        "Only the artifact itself was built.",
        folded=bool(run.builds),
    )


def _texts(run: Run) -> Table:
    return Table(
        "Text",
        "No document serves twice: the search reads none that the final figures are measured on.",
        ("role", "what", "tokens", "documents", "sha256"),
        tuple((t.role, t.description, f"{t.tokens:,}", f"{t.documents:,}", t.sha256[:12]) for t in run.texts),
    )


def _facts(run: Run) -> tuple[Row, ...]:
    found: list[Row] = [(f"seconds: {step}", f"{value:.1f}") for step, value in run.seconds.items()]
    if run.check is not None:
        check = run.check
        found.append(
            (
                "prediction against true KL",
                f"rank correlation {check.rank:.3f} over {check.variants} single-site variants, before correction",
            )
        )
    return tuple(found)
