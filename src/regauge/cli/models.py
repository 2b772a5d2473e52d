"""What `regauge inspect` prints for a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from regauge.amounts import told
from regauge.cli.show import line, table
from regauge.report.fits import fitting

if TYPE_CHECKING:
    from regauge.report.inspection import AttentionGroup, Inspection, SiteGroup
    from regauge.report.positions import BlockDrift
    from regauge.search.sense import Sensitivity


def inspection(found: Inspection, streams: bool = False) -> None:
    """Bytes, sites, streams with the moves they admit, and why not the others."""
    same = len(found.attention) == 1 and len(found.attention[0].blocks) == found.blocks
    heads = ", ".join(_heads(group, same) for group in found.attention) or "no attention"
    line(f"{found.model}: {found.family}, {found.blocks} blocks, hidden {found.hidden}, {heads}")
    line(
        f"  {found.parameters:,} parameters: {told(found.bytes_bf16)} as bf16, {told(found.bytes_stored)} stored "
        f"({found.dtype}){', head tied to the embeddings' if found.tied else ''}"
    )
    if found.cache_bytes_a_token is not None:
        smaller = "".join(f", {round(size):,} by {name}" for name, size in found.caches.items())
        line(f"  cache: {found.cache_bytes_a_token:,} bytes a token in bf16, from shapes{smaller}")
    each = found.block_bytes_bf16
    if each:
        apart = f"{told(each[0])} each" if len(set(each)) == 1 else ", ".join(told(one) for one in each)
        line(f"  blocks: {told(sum(each))} as bf16, {apart}")
    for note in found.notes:
        line(f"  note: {note}")
    names = [g.select for g in found.sites]
    table(
        ["sites", "out × in", "how many", "bf16", "share"],
        [
            [
                _named(g, names),
                f"{g.shape[0]} × {g.shape[1]}",
                str(g.count),
                told(g.bytes_bf16),
                f"{100 * g.share:.1f} %",
            ]
            for g in found.sites
        ],
    )
    if streams:
        _streams(found)


def _streams(found: Inspection) -> None:
    rows = []
    for g in found.streams:
        admits = ", ".join(f"{move} ({how})" if how else move for move, how in g.admits.items()) or "nothing"
        rows.append([g.name, str(g.size), str(g.count), admits])
    table(["streams", "channels", "how many", "moves that keep the function"], rows)
    line("  nonzero: any but 0; pairs: alike for both channels of a rotary pair; free: channels without rotary")
    stops: dict[str, dict[str, list[str]]] = {}
    for g in found.streams:
        for move, why in g.stops.items():
            stops.setdefault(why, {}).setdefault(g.name, []).append(move)
    line("where the other moves stop")
    for why, streams in stops.items():
        alike: dict[str, list[str]] = {}
        for name, moves in streams.items():
            alike.setdefault(", ".join(moves), []).append(name)
        stopped = "; ".join(f"{moves} on {', '.join(names)}" for moves, names in alike.items())
        line(f"  {stopped}: {why}")


def sizes(found: Inspection, fits: tuple[int, int] | None) -> None:
    """What the model would take under the presets people choose; those that fit in (bytes, with tokens of cache)."""
    if not found.sizes:
        return
    shown, title = found.sizes, "what it would take"
    if fits is not None:
        shown = fitting(found.sizes, *fits)
        title = f"what fits in {told(fits[0])} with {fits[1]:,} tokens of cache"
        if not shown:
            least = min(one.with_cache.get(fits[1], one.bytes) for one in found.sizes)
            line(f"nothing fits in {told(fits[0])}: the smallest shown takes {told(least)}; a cache of fewer tokens")
            line("  takes less (--context 4k), and `regauge fit --budget memory=...` spends unevenly")
            return
    lengths = sorted({context for one in shown for context in one.with_cache})
    table(
        [title, "bits a weight", "weights", *(f"with {context // 1024}k of cache" for context in lengths), "on a CPU"],
        [
            [
                one.name,
                f"{one.bits:.2f}",
                told(one.bytes),
                *(told(one.with_cache[context]) for context in lengths),
                "native" if one.native else "decoded",
            ]
            for one in shown
        ],
    )
    line("  counted from formats and shapes; cache, embedding and head are bf16 where no option says otherwise")


def _named(group: SiteGroup, names: Sequence[str]) -> str:
    """Its selector, with its blocks where sites of the same name have other sizes elsewhere."""
    return group.select if names.count(group.select) == 1 else f"{group.select} in {_blocks(group.blocks)}"


def _heads(group: AttentionGroup, same: bool) -> str:
    """`8 heads of 32 (4 of keys and values)`, and in which blocks, where they are not all alike."""
    shared = f" ({group.kv_heads} of keys and values)" if group.kv_heads != group.heads else ""
    return f"{group.heads} heads of {group.head_dim}{shared}{'' if same else f' in {_blocks(group.blocks)}'}"


def _blocks(numbers: Sequence[int]) -> str:
    return f"{'block' if len(numbers) == 1 else 'blocks'} {_runs(numbers)}"


def _runs(numbers: Sequence[int]) -> str:
    """`0-3, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def sensitivity(found: Sensitivity) -> None:
    """Predicted KL of rounding each matrix alone: a row a block, a column a kind."""
    kinds = list(dict.fromkeys(site.kind for site in found.sites))
    blocks = sorted({site.block for site in found.sites if site.block is not None})
    rows = []
    for block in blocks:
        some = {kind: sum(s.kl for s in found.sites if s.block == block and s.kind == kind) for kind in kinds}
        rows.append([f"blocks.{block}", *(f"{some[kind]:.1e}" for kind in kinds), f"{sum(some.values()):.1e}"])
    table(["KL predicted", *kinds, "block"], rows)
    option = ", ".join(dict.fromkeys(site.option for site in found.sites))
    line(f"  nats a token were each alone rounded to {option}; predicted from {found.tokens:,} tokens of {found.text}")
    for note in found.notes:
        line(f"  note: {note}")


def positions(found: Sequence[BlockDrift]) -> None:
    """How far products drift when a text is moved, a line a block."""
    from regauge.report.positions import SHIFTS, TOLD

    line(TOLD)
    table(
        ["block", *(f"at {shift:,}" for shift in SHIFTS), "first token", "float32", "spread"],
        [
            [
                str(one.block),
                *(f"{drift.mean:.4f}" for drift in one.drifts),
                f"{one.drifts[-1].first:.4f}",
                f"{one.drifts[-1].wide:.4f}",
                f"{one.drifts[-1].spread:.2f}",
            ]
            for one in found
        ],
    )
