"""What each command prints for a person."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from regauge.cli.show import line, size, span, table, where

if TYPE_CHECKING:
    from regauge.inspection import Inspection
    from regauge.receipt import Receipt


def inspection(found: Inspection) -> None:
    """Bytes, sites, streams with the moves they admit, and why not the others."""
    groups = f" ({found.kv_heads} of keys and values)" if found.kv_heads not in (0, found.heads) else ""
    heads = f"{found.heads} heads of {found.head_dim}{groups}"
    line(f"{found.model}: {found.family}, {found.blocks} blocks, hidden {found.hidden}, {heads}")
    line(
        f"  {found.parameters:,} parameters: {size(found.bytes_bf16)} as bf16, {size(found.bytes_stored)} stored "
        f"({found.dtype}){', head tied to the embeddings' if found.tied else ''}"
    )
    if found.cache_bytes_a_token is not None:
        line(f"  cache: {found.cache_bytes_a_token:,} bytes a token in bf16, from shapes")
    each = found.block_bytes_bf16
    if each:
        told = f"{size(each[0])} each" if len(set(each)) == 1 else ", ".join(size(one) for one in each)
        line(f"  blocks: {size(sum(each))} as bf16, {told}")
    for note in found.notes:
        line(f"  note: {note}")
    table(
        ["sites", "out × in", "how many", "bf16", "share"],
        [
            [g.select, f"{g.shape[0]} × {g.shape[1]}", str(g.count), size(g.bytes_bf16), f"{100 * g.share:.1f} %"]
            for g in found.sites
        ],
    )
    rows = []
    for g in found.streams:
        admits = ", ".join(f"{move} ({how})" if how else move for move, how in g.admits.items()) or "nothing"
        rows.append([g.name, str(g.size), str(g.count), admits])
    table(["streams", "channels", "how many", "moves that keep the function"], rows)
    line(
        "  nonzero: any but 0; pairs: alike for the two channels that rotary turns together; free: channels without rotary"
    )
    stops: dict[str, dict[str, list[str]]] = {}
    for g in found.streams:
        for move, why in g.stops.items():
            stops.setdefault(why, {}).setdefault(g.name, []).append(move)
    line("where the other moves stop")
    for why, streams in stops.items():
        alike: dict[str, list[str]] = {}
        for name, moves in streams.items():
            alike.setdefault(", ".join(moves), []).append(name)
        told = "; ".join(f"{moves} on {', '.join(names)}" for moves, names in alike.items())
        line(f"  {told}: {why}")


def receipt(done: Receipt, out: Path) -> None:
    """What `apply` did, in the order in which a person asks."""
    line(f"{where(out)}: {size(done.bytes_after)}, {done.ratio:.3f} of the source's {size(done.bytes_bf16)} as bf16")
    quantised = [site for site in done.sites if site.choice is not None]
    weights = sum(site.shape[0] * site.shape[1] for site in quantised)
    bits = sum(site.bits * site.shape[0] * site.shape[1] for site in quantised) / max(weights, 1)
    if quantised:
        errors = [site for site in quantised if site.error is not None]
        worst = max(errors, key=lambda site: site.error or 0.0, default=None)
        told = f"; largest relative error {worst.error:.3f} at {worst.name}" if worst is not None else ""
        line(f"  {len(quantised)} of {len(done.sites)} sites quantised, {bits:.2f} bits a weight{told}")
    if done.moves:
        exact, stored = max(move.exact for move in done.moves), max(move.stored for move in done.moves)
        logits = "" if done.logits_error is None else f"; logits {done.logits_error:.1e}"
        line(f"  {len(done.moves)} certificates of exact moves: {exact:.1e} in float64, {stored:.1e} as stored{logits}")
    line(f"  format: {done.wire}" + (f", because {'; '.join(done.refusals)}" if done.refusals else ""))
    for note in done.notes:
        line(f"  note: {note}")
    line(f"  {span(done.seconds)}, peak memory {size(done.peak_bytes)} (anonymous), plan {done.plan_hash[:12]}")
