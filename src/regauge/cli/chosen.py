"""What a search over members found, for a person."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from regauge.amounts import told
from regauge.cli.show import line, table, where

if TYPE_CHECKING:
    from regauge.search.members.record import Chosen


def members(found: Chosen, out: Path) -> None:
    """What a search over members found."""
    line(f"{where(out)}: one family, weights {found.weights or 'as the source has them'}")
    rows = [
        [
            one.name,
            told(one.bytes),
            f"{one.ratio:.3f}x",
            f"{one.quality.kl.value:.4f}",
            one.own.removeprefix("perplexity "),
            *(f"{ratio:.2f}x" for ratio in one.speeds.values()),
        ]
        for one in found.members
    ]
    table(
        [
            "member",
            "bytes",
            "of bf16",
            "KL",
            "perplexity" if found.members[0].quality.nats is None else "by itself",
            *found.members[0].speeds,
        ],
        rows,
    )
    for one in found.members:
        line(f"  {one.name}: {one.subnet or 'all of it'}")
    line(f"  {found.measured} members measured on the search text; figures are of the evaluation text")
    if found.drafts is not None:
        line(f"  drafts for the whole: {found.drafts}")
    for note in found.notes:
        line(f"  note: {note}")
    last_name = found.members[-1].name
    line()
    line(f'{"loads in":<13}rg.load("{where(out)}"), and with rg.use(model, "{last_name}") that member')
