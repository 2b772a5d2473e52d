"""How several sites share one matrix: which rows are whose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from regauge.anatomy.model import Slot
from regauge.hosts.transformers.columns import Row


@dataclass(frozen=True)
class Heads:
    """Sizes of one block's attention: heads of queries, of keys, and channels of each."""

    queries: int
    keys: int
    dim: int

    def of(self, kind: str) -> int:
        return {"q": self.queries, "o": self.queries, "k": self.keys, "v": self.keys}.get(kind, 0)


def slots(names: list[str], row: Row, key: str, shape: tuple[int, ...], heads: Heads) -> Iterator[tuple[Slot, str]]:
    """Where each of the sites that share a matrix lies in it."""
    total = shape[1] if row.transposed else shape[0]
    kinds = [name.rpartition(".")[2] for name in names]
    if row.part == "heads":
        many = [heads.of(kind) or heads.queries for kind in kinds]
        count = {"heads": heads.queries, "kv_heads": heads.keys}.get(str(row.count)) or int(row.count)
    else:
        many, count = [1] * len(names), total // len(names)
    start = which = 0
    for number, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        size = heads.of(kind) * heads.dim or total // len(names)
        span = max(1, many[number] // count) if row.part == "heads" else 1
        parts = sum(max(1, some // count) for some in many) if row.part == "heads" else len(names)
        yield (
            Slot(
                key=key,
                transposed=row.transposed,
                heads=(count, parts, which) if row.part in ("heads", "each") else None,
                rows=(start, start + size) if row.part == "rows" else None,
                span=span,
            ),
            name,
        )
        start, which = start + size, which + span
