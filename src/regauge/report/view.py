"""What the page shows, as plain data. Filled from a receipt, and from the run record where a search made it."""

from __future__ import annotations

from dataclasses import dataclass, field

from regauge.amounts import told
from regauge.artifact.receipt import Receipt, SiteReceipt

Row = tuple[str, ...]
Card = tuple[str, str, str]
"""Label, value, small print."""


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


@dataclass(frozen=True)
class Table:
    """A table with a heading and a sentence that says how to read it."""

    title: str
    caption: str
    header: Row
    rows: tuple[Row, ...]
    empty: str = "Nothing to show."


@dataclass(frozen=True)
class Sample:
    """One prompt continued by both models."""

    prompt: str
    source: str
    result: str


@dataclass(frozen=True)
class View:
    """Everything on the page."""

    title: str
    subtitle: str
    cards: tuple[Card, ...]
    points: tuple[Point, ...]
    sites: tuple[SiteReceipt, ...]
    tables: tuple[Table, ...]
    samples: tuple[Sample, ...] = ()
    notes: tuple[str, ...] = ()
    command: str = ""
    facts: tuple[Row, ...] = field(default_factory=tuple)


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
    )


def exceptions(receipt: Receipt) -> Table:
    """Sites that did not get what the plan's first choice says: kept whole, or a fallback."""
    rows = tuple(
        (site.name, "×".join(map(str, site.shape)), site.kept or site.fallback or "")
        for site in receipt.sites
        if site.kept or site.fallback
    )
    return Table(
        "Skipped, kept or fallen back",
        "Nothing is skipped in silence: every site that stayed whole or took a second choice, and why.",
        ("site", "shape", "why"),
        rows,
        "Every site got the first choice of the plan.",
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


def of_receipt(receipt: Receipt) -> View:
    """The page of a single `apply`."""
    cards = (
        (
            "size",
            f"{receipt.ratio:.3f}×",
            f"{told(receipt.bytes_after)} of {told(receipt.bytes_bf16)} as bf16",
        ),
        (
            "sites",
            str(sum(site.choice is not None for site in receipt.sites)),
            f"of {len(receipt.sites)} quantised",
        ),
        ("stored as", receipt.wire, "loads with regauge.load"),
    )
    notes = receipt.notes + tuple(f"not compressed-tensors: {reason}" for reason in receipt.refusals)
    return View(
        title=f"{receipt.source.rstrip('/').rsplit('/', 1)[-1]} → {receipt.plan}",
        subtitle=f"regauge {receipt.regauge}, family {receipt.family}",
        cards=cards,
        points=(),
        sites=receipt.sites,
        tables=(spent(receipt), certificates(receipt), exceptions(receipt)),
        notes=notes,
        command=receipt.command,
        facts=facts(receipt),
    )
