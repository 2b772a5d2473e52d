"""The steps before any decision: what is refused at once, the work folder, rounding, sensitivity, first true KLs."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch import Tensor

from regauge.artifact.disk import check_disk, one_sentence
from regauge.artifact.staging import differences
from regauge.engine.watchdog import Clock
from regauge.errors import BudgetError, OutputError, ResumeError
from regauge.hosts.transformers.source import Source
from regauge.search.allocation import Candidate, least
from regauge.search.budgets import Budget
from regauge.search.effort import Effort, Stopwatch
from regauge.search.model import Subject, batches
from regauge.search.options import FULL, SiteGroup, group_bytes, site_groups
from regauge.search.problem import Problem, read_ledger
from regauge.search.record import Run
from regauge.search.sensitivity import Losses, fisher, forward
from regauge.search.shelf import Shelf, room
from regauge.search.trials import Picks
from regauge.text.split import Texts
from regauge.text.tokens import frame
from regauge.text.windows import cut
from regauge.version import __version__

ROWS = 2048  # tokens of a batch


@dataclass(frozen=True)
class Desk:
    """`OUT.search/`: what a search has found so far. Kept when it fails, so that the next run goes on."""

    folder: Path

    @staticmethod
    def open(folder: Path, identity: Mapping[str, object], force: bool) -> Desk:
        """Makes or resumes the folder.

        Raises:
            ResumeError: it belongs to a search of other things.
        """
        path = folder / "identity.json"
        plain = json.loads(json.dumps(dict(identity)))
        with one_sentence("making", folder):
            if path.exists():
                was = json.loads(path.read_text(encoding="utf-8"))
                if was != plain:
                    if not force:
                        raise ResumeError(
                            f"{folder} belongs to another search ({', '.join(differences(was, plain))}); remove it, "
                            "or start over with --force."
                        )
                    shutil.rmtree(folder)
            elif folder.exists() and any(folder.iterdir()):
                raise OutputError(f"{folder} is in the way: it is not empty and not a search of ours; move it away.")
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(plain), encoding="utf-8")
        return Desk(folder)

    def __enter__(self) -> Desk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to release: what lies there is for the next run."""

    def load(self, name: str) -> object:
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def save(self, name: str, value: object) -> None:
        part = self.folder / f"{name}.part"
        with one_sentence("writing", part):
            part.write_text(json.dumps(value), encoding="utf-8")
            part.replace(self.folder / name)


def fixed_bytes(source: Source, groups: Sequence[SiteGroup], itemsize: int) -> int:
    """Bytes that no choice changes: norms, biases, and what the search leaves alone."""
    chosen = sum(site.shape[0] * site.shape[1] for group in groups for site in group.sites)
    return (source.parameters() - chosen) * itemsize


def reachable(source: Source, budgets: Sequence[Budget]) -> None:
    """Refuses a memory budget that no allocation can meet, before any work.

    Raises:
        BudgetError: says how near one can come.
    """
    groups = site_groups(source.anatomy)
    itemsize = source.dtype.itemsize
    sizes = [
        [Candidate(0.0, {"bytes": float(group_bytes(group, o, itemsize))}) for o in group.options] for group in groups
    ]
    floor = least(sizes, "bytes") + fixed_bytes(source, groups, itemsize)
    whole = source.bytes_bf16()
    for budget in budgets:
        if budget.resource == "memory" and budget.bytes(whole) < floor:
            raise BudgetError(
                f"{budget.text!r} allows {budget.bytes(whole):,} bytes, and the smallest that we can make is "
                f"{floor:,.0f} ({floor / whole:.3f}x of the source counted as bf16); ask for that or more."
            )


def estimate(
    source: Source, model: str, budgets: Sequence[Budget], floor: dict[str, float], effort: Effort, seed: int
) -> Run:
    """What `fit` would do: a record without points, whose notes say what it would read, try and need."""
    groups = site_groups(source.anatomy)
    options = sum(len(group.options) for group in groups)
    tokens = effort.calibration * 2 + effort.gradient * 4 + effort.search * (effort.checks + 24 + effort.neighbours * 3)
    flops = 2 * source.parameters() * tokens + 8 * effort.builds // 2 * source.parameters() * effort.calibration
    notes = (
        f"{len(groups)} choices of {options} options in all; {room(groups):,} bytes of work folder while it runs",
        f"passes: one over {effort.calibration:,} calibration tokens that rounds every option, one backward over "
        f"{effort.gradient:,}, then up to {effort.checks + 24 + effort.neighbours * 3} variants of "
        f"{effort.search:,} tokens, and {effort.evaluation:,} tokens for the final figures",
        f"about {flops / 5e10 + room(groups) / 4e6 + 30:.0f} s on two cores",
    )
    return Run(
        regauge=__version__,
        command="",
        seed=seed,
        source=model,
        source_hash="",
        family=source.anatomy.family,
        parameters=source.parameters(),
        bytes_bf16=source.bytes_bf16(),
        budgets=tuple(budgets),
        floor=floor,
        texts=(),
        points=(),
        chosen=-1,
        chosen_why="dry run: nothing was searched",
        notes=notes,
    )


def begin(
    subject: Subject, texts: Texts, desk: Desk, effort: Effort, seed: int, clock: Clock, watch: Stopwatch
) -> Problem:
    """Every option rounded, the backward pass done, embedding and head measured, predictions checked on a sample."""
    source = subject.source
    groups = site_groups(subject.anatomy)
    check_disk(desk.folder, room(groups) + 2 * source.bytes_bf16())
    shelf = Shelf(desk.folder, groups)
    inputs = calibration_batches(source, texts, effort.calibration)
    keep = max(1, -(-effort.gradient // inputs[0].numel()))
    predicted = desk.load("fisher.json")
    started = time.monotonic()
    if predicted is None:
        borders = forward(subject, shelf, inputs, keep, lambda step, share: clock.show(step, int(100 * share), 100))
        watch.lap("rounding", started)
        started = time.monotonic()
        predicted = fisher(subject, shelf, borders, seed, lambda step, share: clock.show(step, int(100 * share), 100))
        desk.save("fisher.json", predicted)
        watch.lap("sensitivity", started)
        started = time.monotonic()
    problem = Problem(
        subject=subject,
        shelf=shelf,
        windows=texts.search,
        predicted=_losses(predicted),
        fixed=float(fixed_bytes(source, groups, subject.itemsize)),
        folder=desk.folder,
        ledger=read_ledger(desk.folder),
        say=clock.show,
    )
    problem.measure(outside(problem) + sample(problem, effort.checks // 2))
    watch.lap("trials", started)
    return problem


def calibration_batches(source: Source, texts: Texts, tokens: int) -> list[Tensor]:
    """Whole windows of the calibration text, in batches."""
    tokenizer = source.tokenizer()
    found = cut(texts.calibration, tokenizer, texts.length, before=frame(tokenizer)[0])
    whole = [ids for ids in found.ids if len(ids) == texts.length]
    return batches(whole[: max(1, tokens // texts.length)], ROWS)


def _losses(found: object) -> Losses:
    assert type(found) is dict, "written by this module"
    return {str(group): {str(o): float(loss) for o, loss in options.items()} for group, options in found.items()}


def outside(problem: Problem) -> list[Picks]:
    """Every option of the groups that no prediction covers: embedding and head."""
    return [
        {group.name: option}
        for group in problem.groups
        if group.block is None
        for option in group.options
        if option.name != FULL
    ]


def sample(problem: Problem, count: int) -> list[Picks]:
    """Single-group variants spread over depth, kinds and grains, at 3 and 4 bits, to check predictions by."""
    inner = [group for group in problem.groups if group.block is not None]
    step = max(1, len(inner) // max(count, 1))
    picks: list[Picks] = []
    for place, group in enumerate(inner[::step][:count]):
        plain = [option for option in group.options if option.bits in (3, 4)]
        picks.append({group.name: plain[place % len(plain)]})
    return picks
