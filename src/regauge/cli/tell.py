"""What each command prints for a person."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regauge.amounts import told
from regauge.cli.show import line, span, table, where
from regauge.plan.select import pattern

if TYPE_CHECKING:
    from regauge.artifact.receipt import Receipt, StoreReceipt, TapReceipt
    from regauge.engine.estimate import DryRun, SitePlan
    from regauge.measure.compare import Comparison
    from regauge.measure.cost import Costs
    from regauge.report.words import Words
    from regauge.search.record import Run


def receipt(done: Receipt, out: Path) -> None:
    """What `apply` did, in the order in which a person asks."""
    from regauge.report import words

    line(f"{where(out)}: {told(done.bytes_after)}, {done.ratio:.3f} of the source's {told(done.bytes_bf16)} as bf16")
    quantised = [site for site in done.sites if site.choice is not None]
    weights = sum(site.shape[0] * site.shape[1] for site in quantised)
    bits = sum(site.bits * site.shape[0] * site.shape[1] for site in quantised) / max(weights, 1)
    if quantised:
        errors = [site for site in quantised if site.error is not None]
        worst = max(errors, key=lambda site: site.error or 0.0, default=None)
        largest = f"; largest relative error {worst.error:.3f} at {worst.name}" if worst is not None else ""
        line(f"  {len(quantised)} of {len(done.sites)} sites quantised, {bits:.2f} bits a weight{largest}")
    _taps(done.taps)
    _caches(done.caches)
    if done.moves:
        exact, stored = max(move.exact for move in done.moves), max(move.stored for move in done.moves)
        logits = "" if done.logits_error is None else f"; logits {done.logits_error:.1e}"
        line(f"  {len(done.moves)} certificates of exact moves: {exact:.1e} in float64, {stored:.1e} as stored{logits}")
    if done.selects:
        before, after = (sum(getattr(s, what) for s in done.selects) for what in ("before", "after"))
        how = ", ".join(f"{axis} {part}" for axis, part in done.selects[0].how.items())
        line(f"  {after:,} of {before:,} units stay in {len(done.selects)} blocks ({how})")
        least, most = (pick(select.error for select in done.selects) for pick in (min, max))
        line(f"  outputs of those blocks change by {least:.3f} to {most:.3f} of their size, measured, not certified")
    line(f"  format: {done.wire}" + (f", because {'; '.join(done.refusals)}" if done.refusals else ""))
    for note in done.notes:
        line(f"  note: {note}")
    peak = f", peak memory {told(done.peak_bytes)} (anonymous)" if done.peak_bytes > 0 else ""
    line(f"  {span(done.seconds)}{peak}, plan {done.plan_hash[:12]}")
    last(words.of_receipt(done, where(out)))


def last(said: Sequence[Words]) -> None:
    """The last words: what a person wants to know, a line each."""
    line()
    for one in said:
        line(f"{one.about:<13}{one.said}")


def recovered(done: Receipt, out: Path) -> None:
    """What a recovery did."""
    told_of: dict[str, Any] = dict(done.recovered)
    before, after = told_of["before"], told_of["after"]
    share = f", {1 - after / before:.0%} less" if before > 0 else ""
    line(f"{where(out)}: KL to the original {before:.4f} → {after:.4f} nats a token{share}")
    line(f"  on {told_of['held_out']:,} tokens held out of {told_of['text']}, which were never trained on")
    line(f"  {told_of['steps']:,} steps, {told_of['parameters']:,} numbers trained; {told_of['ended']}")
    for note in told_of["notes"]:
        line(f"  note: {note}")
    peak = f", peak memory {told(done.peak_bytes)} (anonymous)" if done.peak_bytes > 0 else ""
    line(f"  {told(done.bytes_after)} stored, {span(done.seconds)}{peak}")


def dry_run(plan: DryRun) -> None:
    """What would be done, site by site, and what it would cost. Estimates are called so."""
    line(f"{plan.plan} on {plan.source} ({plan.family}): nothing is written")
    if plan.sites:
        table(
            ["sites", "out × in", "bf16", "after", "what"], [_site_row(name, some) for name, some in _alike(plan.sites)]
        )
        _taps(plan.taps)
        _caches(plan.caches, plan.cache_bytes)
        line(f"  {told(plan.bytes_after)} of {told(plan.bytes_bf16)} as bf16: {plan.ratio:.3f}, counted from formats")
        line(f"  format: {plan.wire}" + (f", because {'; '.join(plan.wire_refusals)}" if plan.wire_refusals else ""))
    for number, what in enumerate(plan.passes, 1):
        line(f"  pass {number}: {what}" if len(plan.passes) > 1 else f"  {what}")
    if plan.seconds is not None:
        disk = f"{told(plan.memory_needed)} of memory, {told(plan.disk_needed)} of disk ({told(plan.disk_free)} free)"
        line(f"  about {span(plan.seconds)} on this machine, {disk}")
    if plan.quality:
        line(f"  {plan.quality}")
    for note in plan.notes:
        line(f"  note: {note}")
    if plan.refusals:
        line("refused, for every one of these reasons:")
        for reason in plan.refusals:
            line(f"  {reason}")


def _taps(taps: Sequence[TapReceipt]) -> None:
    """Activations that are rounded, those that differ in block or expert alone in one line."""
    grouped: dict[str, list[str]] = {}
    for tap in taps:
        names = grouped.setdefault(" ".join(str(value) for value in tap.reading.values()), [])
        names += [] if pattern(tap.name) in names else [pattern(tap.name)]
    for reading, names in grouped.items():
        line(f"  inputs of {', '.join(names)}: {reading}")


def _caches(stores: Sequence[StoreReceipt], whole: float = 0.0) -> None:
    """What blocks keep of the past, those that keep the same in one line, and bytes a token before and after."""
    grouped: dict[str, list[StoreReceipt]] = {}
    for store in stores:
        grouped.setdefault(" ".join(f"{axis} {part}" for axis, part in store.keeping.items()), []).append(store)
    for keeping, some in grouped.items():
        which = some[0].name if len(some) == 1 else f"{len(some)} blocks, {some[0].name} to {some[-1].name}"
        before, after = (sum(getattr(store, field) for store in some) for field in ("bytes_before", "bytes_after"))
        line(f"  cache of {which}: {keeping}")
        line(f"    {before:,.0f} → {after:,.0f} bytes a token of a long text ({after / before:.3f}x), by the formats")
    before, after = (sum(getattr(store, field) for store in stores) for field in ("bytes_before", "bytes_after"))
    if stores and whole > before:
        line(f"  cache of the whole model: {whole:,.0f} → {whole - before + after:,.0f} bytes a token")


def _alike(sites: Sequence[SitePlan]) -> list[tuple[str, list[SitePlan]]]:
    """Sites that differ in block or expert alone and get the same."""
    grouped: dict[tuple[str, tuple[int, int], str], list[SitePlan]] = {}
    for site in sites:
        key = (pattern(site.name), site.shape, f"{site.choice}{site.kept}{site.fallback}")
        grouped.setdefault(key, []).append(site)
    return [(key[0], some) for key, some in grouped.items()]


def _site_row(name: str, some: Sequence[SitePlan]) -> list[str]:
    first = some[0]
    what = f"full: {first.kept}" if first.choice is None else " ".join(str(value) for value in first.choice.values())
    if first.fallback:
        what += f" ({first.fallback})"
    before, after = (sum(getattr(site, field) for site in some) for field in ("bytes_before", "bytes_after"))
    return [name, f"{len(some)} of {first.shape[0]} × {first.shape[1]}", told(before), told(after), what]


def run(found: Run, out: Path, receipt: Receipt | None = None) -> None:
    """The frontier, then what was measured of the chosen point: size, quality, speed in its parts, and the budgets."""
    from regauge.report import figures, words

    if not found.points:  # a dry run
        line(f"{found.source}: {found.parameters:,} parameters, {found.bytes_bf16:,} bytes as bf16; nothing is written")
        for note in found.notes:
            line(f"  {note}")
        return
    rows = [
        [
            f"{one.name}{' ←' if index == found.chosen else ''}",
            f"{one.bits:.2f}",
            f"{told(one.bytes_predicted)}{f' + {told(one.cache_bytes)} of cache' if one.cache_bytes else ''}",
            "" if one.bytes_measured is None else told(one.bytes_measured),
            f"{one.kl_predicted:.4f}",
            "" if one.in_memory is None else f"{one.in_memory.kl.value:.4f}",
            "" if one.measured is None else f"{one.measured.kl.value:.4f}",
        ]
        for index, one in enumerate(found.points)
    ]
    heads = ["point", "bits", "bytes predicted", "bytes built", "KL predicted", "KL in memory", "KL of the artifact"]
    table(heads, rows, "Frontier")
    for note in found.notes:
        line(f"  note: {note}")
    for one in figures.tables(found):
        table(list(one.header), [list(row) for row in one.rows], one.title)
        line(f"  {one.caption if one.rows else one.empty}")
        line()
    line(f"{where(out)}: point {found.point.name} of {len(found.points)}, {found.chosen_why}")
    for verdict in found.verdicts:
        word = "met" if verdict.met else "NOT met"
        line(f"  {word}: {verdict.text}: {figures.amount(verdict.measured, verdict.unit)} ({verdict.how})")
    if found.drafts is not None:
        line(f"  drafts: {found.drafts}")
    line(f"  {figures.made(found)}")
    line(f"  the page: {where(out)}/regauge/report.html")
    if receipt is not None:
        last(words.of_run(found, receipt, where(out)))


def measurement(found: Comparison) -> None:
    """Models side by side: quality with intervals, then cost; the first is what the others are held to."""
    from regauge.report import figures, kinds

    kind = kinds.KINDS[found.kind]
    read = next((row.quality for row in found.rows if row.quality is not None), None)
    drawn = 0 if read is None else read.drawn
    line(f"{found.text}: {found.tokens:,} {kind.scored}; {'' if read is None else figures.over(read)}".rstrip("; "))
    rows = [[row.name, *kinds.row(row.quality)] for row in found.rows if row.quality is not None]
    if rows:
        table(["model", *kinds.header(found.kind)], rows)
    for row in found.rows:
        if row.cosine is not None:
            line(f"  {row.name}: mean cosine of embeddings {row.cosine:.5f}")
        if row.labels is not None:
            same, kl = row.labels.agreement, figures.spread(row.labels.kl, 5, row.labels.documents)
            line(f"  {row.name}: {100 * same.value:.1f} % of {row.labels.compared:,} labels are the same; KL {kl}")
    own = [] if found.original is None else [_cost_row(f"{found.rows[0].name}, by transformers", found.original)]
    table(
        ["model", kind.one, kind.many, "resident", "mapped", kind.cache, "files"],
        [*own, *(_cost_row(row.name, row.costs) for row in found.rows)],
    )
    if any(row.costs.decode_at for row in found.rows):
        _by_context(found)
    gained = [
        list(figures.gain_row(f"{row.name}, {what}", gain))
        for row in found.rows
        for what, gain in zip(kind.ways, (row.decode, row.prefill), strict=True)
        if gain is not None
    ]
    if gained and kind.nats:
        table(["against " + found.rows[0].name, "speed"], [some[:2] for some in gained])
        line("  all interleaved in one run; where quartiles overlap, 'no faster'")
    elif gained:
        table(["against " + found.rows[0].name, "compression", "runtime", "together"], gained)
        line("  compression: against the same runtime on the first model; runtime: the first model by it, against")
        line("  transformers' own modules; together: against transformers' own modules. All interleaved in one run.")
    for name, pair in found.pairs.items():
        said = {"first": "lower", "second": "higher"}.get(pair.verdict, "no difference that the text can show")
        line(f"  {name}: KL {figures.spread(pair.difference, 5, drawn, '+')}: {said}")
    for row in found.rows:
        if row.long is not None:
            line(f"  {row.name}: {row.long.told}")
    for one in found.tasks:
        for name, value in one.value.items():
            line(f"  {figures.answered(one, name, value)}")
    line(f"  memory was read at {found.bandwidth / 1e9:.1f} GB/s at this minute; {span(found.seconds)}")
    for note in found.notes:
        line(f"  note: {note}")


def _by_context(found: Comparison) -> None:
    """Decoding behind a context of some lengths."""
    lengths = sorted({length for row in found.rows for length in row.costs.decode_at})
    own = [] if found.original is None else [(f"{found.rows[0].name}, by transformers", found.original)]
    table(
        ["decode tokens/s at a context of", *(f"{length // 1024}k" for length in lengths)],
        [
            [name, *(f"{costs.decode_at[n].median:.1f}" if n in costs.decode_at else "" for n in lengths)]
            for name, costs in (*own, *((row.name, row.costs) for row in found.rows))
        ],
    )


def _cost_row(name: str, costs: Costs) -> list[str]:
    return [
        name,
        "" if costs.decode is None else f"{costs.decode.median:.1f}",
        "" if costs.prefill is None else f"{costs.prefill.median:.0f}",
        "" if costs.memory is None else told(costs.memory.anonymous),
        "" if costs.memory is None else told(costs.memory.file),
        "" if costs.cache_bytes is None else told(round(costs.cache_bytes)),
        "" if costs.bytes is None else told(costs.bytes),
    ]
