"""One row of a comparison: a recipe applied, scored against the original, and let go.

Cost: the artifact, which lies on disk until it is scored, and two readings of the text, one by the original.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from regauge.artifact.receipt import Receipt
from regauge.engine.api import apply
from regauge.engine.measuring import text_of
from regauge.engine.watchdog import Watcher
from regauge.errors import ModelError
from regauge.hosts import host_of
from regauge.hosts.base import Source
from regauge.measure.bootstrap import FEW
from regauge.measure.compare import batch_tokens
from regauge.measure.quality import Scores, compare, summarise
from regauge.plan import Plan
from regauge.ranking.record import Result, Windowed
from regauge.ranking.settings import FULL, Setting
from regauge.text.corpora import Where, corpus
from regauge.text.windows import Windows, begin
from regauge.version import __version__


@dataclass(frozen=True)
class Given:
    """What every row reads.

    Attributes:
        tokens: of calibration text; None: as the recipe says.
        planted: on the model's planted form (`rewrites/planting.py`).
    """

    calibration: Where | None = None
    eval: Where | None = None
    tokens: int | None = None
    seed: int = 0
    max_memory: int | None = None
    planted: bool = False
    revision: str | None = None


@dataclass(frozen=True, eq=False)
class Bench:
    """A model and its texts, opened."""

    model: Path | str
    name: str
    digest: str
    calibration: str
    windows: Windows
    halved: Windows
    vocabulary: int
    given: Given


def made(bench: Bench, plan: Plan, said: tuple[str, str, str, str], out: Path, watch: Watcher) -> Result:
    """One recipe applied, scored and let go."""
    given, (name, recipe, setting, base) = bench.given, said
    shutil.rmtree(out, ignore_errors=True)  # whole, and never scored: a run was ended between
    receipt = apply(
        plan,
        bench.model,
        out,
        calibration=given.calibration,
        tokens=given.tokens,
        seed=given.seed,
        max_memory=given.max_memory,
        progress=watch,
    )
    try:
        windows = bench.halved if Setting.read(setting).kept != FULL else bench.windows
        scores, most = _scores(bench, windows, out)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return Result(
        model=bench.digest,
        name=bench.name,
        text=windows.hash(),
        read=windows.description,
        recipe=recipe,
        method=name,
        setting=setting,
        null=base,
        seed=given.seed,
        quality=summarise(scores, given.seed),
        bytes=receipt.bytes_after,
        bits=round(bits_in_blocks(receipt), 4),
        seconds=receipt.seconds,
        peak=receipt.peak_bytes,
        windows=_by_window(scores, windows, most),
    )


def bits_in_blocks(receipt: Receipt) -> float:
    """Bits a weight of the matrices in blocks, everything stored for them counted."""
    sites = [site for site in receipt.sites if site.name.startswith("blocks.")]
    return 8 * sum(site.bytes_after for site in sites) / max(1, sum(s.shape[0] * s.shape[1] for s in sites))


def _scores(bench: Bench, windows: Windows, out: Path) -> tuple[Scores, int]:
    host, most = host_of(bench.model), 1 if windows.halved else batch_tokens(bench.vocabulary)
    inputs = [{"input_ids": batch.ids_BT} for batch in windows.batches(most)]
    with torch.inference_mode():
        original, other = host.outputs(bench.model, inputs)(), host.outputs(out, inputs)()
        return compare(windows, original, other, most), most


def _by_window(scores: Scores, windows: Windows, most: int) -> Windowed:
    """Sums over each window, in the order in which tokens were scored."""
    lengths = [length for batch in windows.batches(most) for length in batch.lengths]
    tokens_W = np.array([length - 1 - begin(length, windows.halved) for length in lengths], dtype=np.int64)
    starts_W = np.concatenate([[0], np.cumsum(tokens_W)[:-1]])
    few = windows.documents < FEW
    unit_W = np.arange(len(lengths)) if few else np.array(windows.document)
    return Windowed(np.add.reduceat(scores.kl_N, starts_W), tokens_W, unit_W.astype(np.int64))


def opened(source: Source, name: str, given: Given) -> Bench:
    host = host_of(source.path)
    facts = host.facts(source.path)
    if not facts.generative:
        raise ModelError(f"compare ranks methods by the KL of next tokens, and {name} gives {facts.gives}.")
    windows = text_of(source.path, given.eval, facts, given.seed)
    return Bench(
        model=source.path,
        name=name,
        digest=source.digest(),
        calibration="" if given.calibration is None else corpus(given.calibration).sha256,
        windows=windows,
        halved=replace(windows, halved=True),
        vocabulary=facts.vocabulary,
        given=given,
    )


def identity(bench: Bench, recipe: str) -> dict[str, object]:
    """What decides a result."""
    given = bench.given
    return {
        "model": bench.digest,
        "recipe": recipe,
        "calibration": bench.calibration,
        "text": bench.windows.hash(),
        "tokens": given.tokens,
        "seed": given.seed,
        "version": __version__,
    }
