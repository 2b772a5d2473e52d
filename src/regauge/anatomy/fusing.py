"""Which matrices serving runtimes (vLLM, SGLang, TensorRT-LLM) stack into one when they load a model.

They read the same tap and are multiplied at once: q, k and v; gate and up, of an expert too. Such a stack has one
format and, where a format has a level for a whole matrix, one of that.
"""

from __future__ import annotations

from collections.abc import Iterable

from regauge.anatomy.model import Site

STACKS = {"q": "q, k, v", "k": "q, k, v", "v": "q, k, v", "gate": "gate, up", "up": "gate, up"}


def fused(sites: Iterable[Site]) -> dict[tuple[int | None, int | None, str], list[Site]]:
    """(block, expert, `q, k, v` or `gate, up`) → the sites stacked there, of stacks of two and more."""
    found: dict[tuple[int | None, int | None, str], list[Site]] = {}
    for site in sites:
        if site.kind in STACKS:
            found.setdefault((site.block, site.expert, STACKS[site.kind]), []).append(site)
    return {where: some for where, some in found.items() if len(some) > 1}
