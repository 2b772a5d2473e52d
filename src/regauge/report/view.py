"""What the page shows, as plain data. Filled from a receipt, and from the run record where a search made it."""

from __future__ import annotations

from dataclasses import dataclass, field

from regauge.amounts import told
from regauge.artifact.loading import CAUSAL, ways
from regauge.artifact.receipt import Receipt, SiteReceipt
from regauge.measure.bootstrap import Interval
from regauge.plan.select import pattern
from regauge.report import words
from regauge.report.curves import losses
from regauge.report.words import Words

Row = tuple[str, ...]
OUT = "OUT"
"""An artifact whose place is not known, in lines to copy."""


@dataclass(frozen=True)
class Point:
    """One point of the frontier. Sizes in bytes, KL in nats a token; None where it was not measured.

    Attributes:
        label: what the reader sees, e.g. `3` or `gptq-w4g128`.
        kind: `searched` or `uniform`, both variants in memory; `built`, the artifact.
        interval: 95 % bootstrap interval of the measured KL.
    """

    label: str
    kind: str
    bytes: int
    predicted: float | None = None
    measured: float | None = None
    interval: tuple[float, float] | None = None
    chosen: bool = False


def uniform(label: str, size: int, kl: Interval) -> Point:
    """What chose the same everywhere, as it was measured."""
    return Point(label, "uniform", size, measured=kl.value, interval=(kl.low, kl.high))


@dataclass(frozen=True)
class Table:
    """A table with a heading and a sentence that says how to read it.

    Attributes:
        lines: the column whose cells are lines to copy, if any.
        folded: it opens when asked to.
    """

    title: str
    caption: str
    header: Row
    rows: tuple[Row, ...]
    empty: str = "Nothing to show."
    lines: int | None = None
    folded: bool = False


@dataclass(frozen=True)
class Sample:
    """One prompt continued by both models."""

    prompt: str
    source: str
    result: str


@dataclass(frozen=True)
class View:
    """Everything on the page.

    Attributes:
        words: the last words of the command, which the page leads with.
        first: tables that stand before the pictures of sites; `tables` stand after them.
        picture: what a model of images drew, as a page takes it.
        dots: what the dots of the chart are, where they are not those of a search.
        curve: of a training, as `curves` draws it.
    """

    title: str
    subtitle: str
    words: tuple[Words, ...]
    points: tuple[Point, ...]
    sites: tuple[SiteReceipt, ...]
    first: tuple[Table, ...]
    tables: tuple[Table, ...]
    samples: tuple[Sample, ...] = ()
    picture: str = ""
    notes: tuple[str, ...] = ()
    command: str = ""
    facts: tuple[Row, ...] = field(default_factory=tuple)
    dots: str = ""
    curve: str = ""


def certificates(receipt: Receipt) -> Table:
    """One row a block and rewrite: error in float64, error after storage, what was allowed."""
    rows = tuple(
        (
            move.rewrite,
            "whole model" if move.block is None else str(move.block),
            ", ".join(move.streams),
            f"{move.exact:.1e}",
            f"{move.tolerance:.0e}",
            f"{move.stored:.1e}",
            f"{move.tolerance_stored:.0e}",
        )
        for move in receipt.moves
    )
    return Table(
        "Certificates",
        "Each exact move was checked on fixed inputs: relative maximum error of the block's output in float64, and "
        "again after rounding to the stored type. Over its tolerance the run would have stopped.",
        ("rewrite", "block", "streams", "error, float64", "allowed", "error, stored", "allowed"),
        rows,
        "This plan moves nothing: there was nothing to certify.",
        folded=bool(rows),
    )


def exceptions(receipt: Receipt) -> Table:
    """Sites that did not get what the plan's first choice says: kept whole, or a fallback; alike ones in one row."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for site in receipt.sites:
        why = site.kept or site.fallback
        if why:
            key = (pattern(site.name), "×".join(map(str, site.shape)), why)
            grouped.setdefault(key, []).append(site.name)
    rows = tuple(
        (names[0] if len(names) == 1 else name, str(len(names)), shape, why)
        for (name, shape, why), names in grouped.items()
    )
    return Table(
        "Skipped, kept or fallen back",
        "Nothing is skipped in silence: every site that stayed whole or took a second choice, and why.",
        ("site", "of them", "shape", "why"),
        rows,
        "Every site got the first choice of the plan.",
    )


def loads(receipt: Receipt, out: str = OUT, auto: str = CAUSAL) -> Table:
    """What can load the artifact, and with which line."""
    return Table(
        "What loads it",
        "",
        ("", "line", "needs"),
        tuple((way.runtime, way.line, way.note) for way in ways(receipt.wire, receipt.refusals, out, auto)),
        lines=1,
    )


def spent(receipt: Receipt) -> Table:
    """Bytes, bits and error a kind of site."""
    kinds: dict[str, list[SiteReceipt]] = {}
    for site in receipt.sites:
        kinds.setdefault(site.kind, []).append(site)
    rows = []
    for kind, sites in kinds.items():
        weights = sum(site.shape[0] * site.shape[1] for site in sites)
        after = sum(site.bytes_after for site in sites)
        errors = [site.error for site in sites if site.error is not None]
        rows.append(
            (
                kind,
                str(len(sites)),
                told(sum(site.bytes_before for site in sites)),
                told(after),
                f"{8 * after / weights:.2f}" if weights else "–",
                f"{sum(errors) / len(errors):.4f}" if errors else "–",
            )
        )
    return Table(
        "What was spent where",
        "Bits count everything stored for a weight: codes, steps and zero points. Error is relative to the site's "
        "own output, a mean over the sites of the kind.",
        ("kind", "sites", "bytes before", "bytes after", "bits a weight", "mean error"),
        tuple(rows),
    )


def facts(receipt: Receipt) -> tuple[Row, ...]:
    """Where the result came from: plan, source, text, machine, versions."""
    found: list[Row] = [
        ("plan", f"{receipt.plan} ({receipt.plan_hash[:12]})"),
        ("source", f"{receipt.source} ({receipt.source_hash[:12]})"),
        ("family", receipt.family),
        ("stored as", receipt.wire),
        ("seed", str(receipt.seed)),
    ]
    found += [(f"text: {key}", str(value)) for key, value in receipt.calibration.items()]
    found += [(f"machine: {key}", str(value)) for key, value in receipt.machine.items()]
    found += [(f"version: {key}", str(value)) for key, value in receipt.versions.items()]
    if receipt.peak_bytes:
        found.append(("peak memory", told(receipt.peak_bytes)))
    if receipt.seconds:
        found.append(("seconds", f"{receipt.seconds:.1f}"))
    if receipt.logits_error is not None:
        found.append(("logits after all exact moves", f"{receipt.logits_error:.1e} relative"))
    return tuple(found)


def of_receipt(receipt: Receipt, out: str = OUT, auto: str = CAUSAL) -> View:
    """The page of a single `apply`.

    Args:
        out: the artifact's place, as the reader would type it.
        auto: the Auto class of transformers that opens it.
    """
    notes = receipt.notes + tuple(f"not compressed-tensors: {reason}" for reason in receipt.refusals[1:])
    return View(
        title=f"{receipt.source.rstrip('/').rsplit('/', 1)[-1]} → {receipt.plan}",
        subtitle=f"regauge {receipt.regauge}, family {receipt.family}",
        words=words.of_receipt(receipt, out),
        points=(),
        sites=receipt.sites,
        first=(loads(receipt, out, auto), spent(receipt)),
        tables=(*raised(receipt), certificates(receipt), exceptions(receipt)),
        notes=tuple(dict.fromkeys(notes)),
        command=receipt.command,
        facts=facts(receipt),
        curve=curve(receipt),
    )


def raised(receipt: Receipt) -> tuple[Table, ...]:
    """Members of a family before and after they were trained."""
    found = receipt.trained
    if found is None:
        return ()
    rows = tuple((name, f"{one.before:.4f}", f"{one.after:.4f}") for name, one in found.members.items())
    caption = f"{found.unit} on {found.held_out:,} {found.counted} held out; {found.steps:,} steps, {found.ended}."
    return (Table("Members that were trained", caption, ("member", "before", "after"), rows),)


def curve(receipt: Receipt) -> str:
    """The losses of a training; "" where there was none."""
    found = receipt.trained
    return "" if found is None else losses(found.steps, found.losses, found.looks)
