"""Rewrites of the whole source: a model is written anew in another form, and the rest of the recipe works on that.

Attention that becomes latent (`rewrites/latent.py`) has other matrices than the model had, so it is no move of a
stream: the source is run once over calibration text for what each block's attention reads, and the new model is written
as a checkpoint beside OUT, where it is opened like any other and removed when OUT is written.
Cost: a pass over the text, (D + 1)² float64 numbers a block, and the model's size on the disk for as long as it takes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from regauge import parts
from regauge.artifact.disk import check_disk
from regauge.artifact.receipt import Receipt
from regauge.engine.job import Job, prepare
from regauge.engine.reading import UNUSED, drawn, reading, self_sampled
from regauge.engine.watchdog import Clock
from regauge.errors import RecipeError
from regauge.hosts import host_of
from regauge.hosts.base import Source
from regauge.parts import Spec
from regauge.plan import Plan
from regauge.rewrites.latent import LatentAttention
from regauge.text.calibration import Calibration
from regauge.text.corpora import Where

TOKENS = 4096  # of a batch
UNREAD = "its attention is written anew first, and what that loses is known once it is done"
SOURCE = "source"
"""The scope of such a rewrite."""


@dataclass(frozen=True, eq=False)
class Factored:
    """A source in the form that the rest of the recipe works on.

    Attributes:
        source: the model as it was written anew, or as it came.
        original: as it came.
        text: what it was looked at on; None where nothing was written anew.
        notes: what was done, a sentence each.
    """

    source: Source
    original: Source
    text: Calibration | None = None
    notes: tuple[str, ...] = ()

    @property
    def identity(self) -> dict[str, str]:
        """What decides the bytes of OUT: the hash of the model as it came, and of what was made of it."""
        own = {"source": self.original.digest()}
        return own if self.text is None else own | {"factored": self.source.digest()}

    def told(self, receipt: Receipt) -> Receipt:
        """The receipt held to the model as it came."""
        if self.text is None:
            return receipt
        before = self.original.bytes_bf16()
        changes = {
            "family": self.original.anatomy.family,
            "bytes_bf16": before,
            "ratio": receipt.bytes_after / before,
            "calibration": receipt.calibration or self.text.record(),
            "notes": tuple(n for n in dict.fromkeys([*self.notes, *self.text.notes, *receipt.notes]) if n != UNUSED),
        }
        return receipt.model_copy(update=changes)


def rewrite_of(plan: Plan) -> LatentAttention | None:
    """The rewrite of the whole source that a recipe asks for.

    Raises:
        RecipeError: it is not the first, or there are several.
    """
    ours = [(index, spec) for index, spec in enumerate(plan.rewrites) if not parts.foreign(spec.part)]
    found = [(index, made) for index, spec in ours if (made := _built(spec)) is not None]
    if not found:
        return None
    if len(found) > 1 or found[0][0]:
        raise RecipeError(f"recipe {plan.name!r}: 'latent' is done once and before all other rewrites; put it first")
    return found[0][1]


def _built(spec: Spec) -> LatentAttention | None:
    rewrite = parts.build("rewrite", spec)
    found: LatentAttention | None = rewrite if rewrite.scope == SOURCE else None
    return found


@contextmanager
def factored(
    plan: Plan, source: Source, out: Path, text: tuple[Where | None, int | None, int | None], seed: int, clock: Clock
) -> Iterator[Factored]:
    """The source as the recipe has it written anew; itself where it asks for nothing of the kind.

    Args:
        text: calibration, tokens and length, as the user gives them.

    Raises:
        RecipeError: the model cannot be written so.
        TextError: there is no text that would do.
    """
    rewrite = rewrite_of(plan)
    if rewrite is None:
        yield Factored(source, source)
        return
    host = host_of(source.path)
    check(plan, source, rewrite)
    looking = _looking(plan, source, seed)
    read = reading(looking, *text)
    check_disk(out, source.parameters() * source.dtype.itemsize)
    windows = read.windows or self_sampled(looking, read, *drawn(looking, read, clock))
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-latent-", dir=out.parent))
    try:
        clock.say("blocks", "looking at what attention reads")
        notes = host.write_latent(source, folder, moments(looking, windows), rewrite)
        yield Factored(host.open(folder), source, windows, tuple(notes))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check(plan: Plan, source: Source, rewrite: LatentAttention) -> None:
    """Refuses a model that cannot be written so.

    Raises:
        RecipeError: and says why.
    """
    host = host_of(source.path)
    if why := host.latent_refusal(source):
        raise RecipeError(f"recipe {plan.name!r}: rewrite 'latent' does not serve this model: {why}")
    host.latent_numbers(source, rewrite)


def planned(plan: Plan, source: Source) -> Source:
    """The source as the recipe would have it written anew, without weights.

    Raises:
        RecipeError: the model cannot be written so.
    """
    rewrite = rewrite_of(plan)
    if rewrite is None:
        return source
    check(plan, source, rewrite)
    return host_of(source.path).latent_plan(source, rewrite)


def _looking(plan: Plan, source: Source, seed: int) -> Job:
    """A job that changes nothing and reads the text of the plan."""
    job = prepare(replace(plan, rewrites=(), places={}), source, None, seed)
    assert job is not None, "a plan that changes nothing is refused by no model"
    return replace(job, needs={site.name: frozenset({"hessian"}) for site in job.sites(0) if site.kind == "q"})


def moments(job: Job, windows: Calibration) -> list[Tensor]:
    """For each block E[x xᵀ] of what its attention reads with a 1 behind it, (D + 1, D + 1) in float64."""
    source, runner = job.source, job.host.runner(job.source, dtype=job.working)
    width, found = source.anatomy.hidden + 1, []
    states = runner.begin(windows.batches(TOKENS), source.block(None))
    for block in range(source.anatomy.blocks):
        sum_DD = torch.zeros(width, width, dtype=torch.float64, device="cpu")
        count = 0

        def see(x_TD: Tensor, sum_DD: Tensor = sum_DD) -> None:
            nonlocal count
            x_TD = torch.nn.functional.pad(x_TD.detach().double(), (0, 1), value=1.0)
            sum_DD += x_TD.T @ x_TD
            count += len(x_TD)

        states = runner.block(block, source.block(block), states, watch={f"blocks.{block}.attn.q": see})
        found.append(sum_DD / max(count, 1))
    return found
