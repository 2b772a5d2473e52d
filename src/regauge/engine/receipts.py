"""The receipt of a run: made from what was done, written beside the artifact, read back."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from regauge.artifact.card import CARD, card
from regauge.artifact.config import artifact_files
from regauge.artifact.families import FILE, family_json
from regauge.artifact.folder import RUN_LOG
from regauge.artifact.receipt import MoveReceipt, Receipt, SelectReceipt, SiteReceipt
from regauge.artifact.staging import Staging
from regauge.engine.block import store_receipts, tap_receipts
from regauge.engine.job import Job
from regauge.engine.watchdog import Clock, PeakMemory
from regauge.measure.machine import machine
from regauge.parts import CACHE
from regauge.plan import digest, dump
from regauge.text.calibration import Calibration
from regauge.version import __version__

VOLATILE = ("command", "seconds", "peak_bytes", "machine")


@dataclass(frozen=True, eq=False)
class Done:
    """What a run did."""

    job: Job
    windows: Calibration | None
    sites: list[SiteReceipt]
    moves: list[MoveReceipt]
    selects: list[SelectReceipt]
    notes: list[str]
    searched: list[dict[str, object]]
    logits_error: float | None
    learnt: tuple[dict[str, object], ...] = ()


def receipt_of(done: Done, source: str, source_hash: str, after: int) -> Receipt:
    """The receipt; `after` is bytes of the tensors as stored."""
    job, windows = done.job, done.windows
    before = job.source.bytes_bf16()
    return Receipt(
        regauge=__version__,
        plan=job.plan.name,
        plan_hash=digest(job.plan),
        source=source,
        source_hash=source_hash,
        family=job.source.anatomy.family,
        wire=job.wire.name,
        refusals=job.refusals,
        seed=job.seed,
        calibration=windows.record() if windows is not None else {},
        sites=tuple(done.sites),
        taps=tuple(tap_receipts(job.anatomy, job.resolution.inputs)),
        caches=store_receipts(job.anatomy, job.resolution.at(CACHE)),
        moves=tuple(done.moves),
        selects=tuple(done.selects),
        searched=tuple(done.searched),
        learnt=done.learnt,
        logits_error=done.logits_error,
        notes=tuple(dict.fromkeys([*job.resolution.notes, *done.notes])),
        bytes_bf16=before,
        bytes_after=after,
        ratio=after / before,
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """What decides the bytes beside the inputs."""
    found = {name: version(name) for name in ("torch", "transformers", "compressed-tensors")}
    return {"regauge": __version__, "python": sys.version.split()[0], **found}


def log_of(clock: Clock, memory: PeakMemory, command: str) -> dict[str, Any]:
    return {
        "command": command,
        "seconds": round(clock.seconds, 3),
        "peak_bytes": memory.peak,
        "machine": machine().model_dump(mode="json"),
    }


def command_line() -> str:
    return " ".join(Path(word).name if number == 0 else word for number, word in enumerate(sys.argv))


def text_of(receipt: Receipt) -> str:
    """The receipt as its file has it: without what differs from run to run, and what it has nothing to say of."""
    empty = [name for name in ("learnt", "caches", "recovered", "trained", "drafts") if not getattr(receipt, name)]
    kept = receipt.model_dump(mode="json", exclude={*VOLATILE, *empty})
    return json.dumps(kept, indent=1, ensure_ascii=False) + "\n"


def files_of(job: Job, receipt: Receipt, log: Mapping[str, Any], staging: Staging) -> dict[str, bytes | str | Path]:
    files = artifact_files(job.source.path, job.wire, staging.index(), dump(job.plan), text_of(receipt))
    files[CARD] = card(receipt, job.source.path, json.loads(str(files["config.json"])))
    if job.family is not None:
        files[FILE] = family_json(job.family)
    return {**files, **job.source.beside, RUN_LOG: json.dumps(dict(log), indent=1) + "\n"}
