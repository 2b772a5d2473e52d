"""What a chosen cache does to long texts: the measure of a search whose budget counts a cache at a context.

Windows of a search are read by teacher's forcing on people's text. Here the source writes, and the artifact reads what
was written behind what its stores have kept (`measure.long`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from regauge.kernels.cpu.machine import give_back
from regauge.measure.cost import COMPRESSED, RUNTIME, Costs
from regauge.measure.long import PARTS, PROMPTS, Long, along, in_sight, prompts, room, write
from regauge.measure.subject import Batch, Outputs, Reader
from regauge.search.loop.desk import Desk
from regauge.search.loop.settle import Settled

TOKENS = 2048
"""Tokens that are written, where the model reads so many."""


def lasting(desk: Desk, settled: Settled, spent: Mapping[str, Costs]) -> Long | None:
    """How long the artifact would write what the source writes; None where no budget is about a context, where the
    model reads too little, or where there is no time.

    Args:
        spent: speeds that were measured, by which the time is foreseen.
    """
    if not desk.ask.effort.samples or all(budget.context is None for budget in desk.ask.budgets):
        return None
    source, host, text = desk.subject.source, desk.subject.host, desk.words.evaluation
    most = host.context(source)
    tokens = min(TOKENS, TOKENS if most is None else most - room(text, most))
    if tokens < PARTS or not desk.watch.can("a long generation", _seconds(tokens, spent)):
        return None
    with desk.watch.step("long generation"):
        begun_BP = prompts(text, tokens, most)
        written = write(host.ways_of_source(source).runtime, begun_BP, tokens)
        give_back()
        original, made = _reader(desk, Path(source.path)), _reader(desk, settled.built.folder)
        found = along(original, made, written)
        ends = in_sight(original, made, text) if host.facts(settled.built.folder).lets_go else None
    return found if ends is None else found.model_copy(update={"seen": ends[0], "unseen": ends[1]})


def told(found: Long | None) -> tuple[str, ...]:
    """A note for a reader."""
    return () if found is None else (f"long generation: {found.told}",)


def _reader(desk: Desk, path: Path) -> Reader:
    @torch.no_grad()
    def outputs(batches: Sequence[Batch], prompt: int | None = None) -> Outputs:
        return desk.subject.host.outputs(path, batches, None, prompt)

    return outputs


def _seconds(tokens: int, spent: Mapping[str, Costs]) -> float:
    """Decoding of all prompts at once, and both models' reading."""
    speeds = [spent[name].decode for name in (RUNTIME, COMPRESSED) if name in spent]
    step = max((1 / speed.median for speed in speeds if speed is not None), default=0.0)
    return PROMPTS * tokens * step
