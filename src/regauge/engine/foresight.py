"""What a recipe will cost in quality, before it is applied: a few tokens run through the model, its weights rounded.

Every matrix is rounded to nearest in the format that it would get, and both models run side by side on some hundred
tokens, block by block. What a rounder that reads text gains over that is known well: of 16 pairs of presets (2 to 8
bits, four models of 0.3M to 8M parameters) GPTQ left 0.38 to 0.83 of the KL, importance 0.85 to 1.0. So does the effect
of moves that keep the function, where nothing but weights is rounded: 0.41 to 0.69 beside 0.41 to 0.63 without them.
KL is in nats a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge import parts
from regauge.anatomy.model import Weights
from regauge.engine.job import Job
from regauge.engine.reading import Reading
from regauge.errors import RegaugeError
from regauge.hosts import host_of
from regauge.hosts.base import Source
from regauge.measure.quality import divergence
from regauge.parts import Point, Spec
from regauge.plan.learnable import learnt

WINDOWS, LENGTH = 8, 32
MOST = 500_000_000
"""Parameters up to which a dry run runs the model."""
GAINS = {"nearest": 1.0, "importance": 0.92, "gptq": 0.5, "gptq-ordered": 0.42}
"""Rounder → the part of nearest rounding's KL that it leaves: medians of the pairs above."""
OFF = 3.0
"""By how much a prediction may be off, either way; see docs/LOG.md."""


@dataclass(frozen=True)
class Foresight:
    """What is predicted.

    Attributes:
        low, high: KL between these.
        stays: of 100 next tokens, how many are the same.
        basis: what it was predicted from.
        why: why nothing was; the rest says nothing then.
    """

    low: float
    high: float
    stays: float
    basis: str
    why: str = ""

    @staticmethod
    def nothing(why: str) -> Foresight:
        return Foresight(0.0, 0.0, 0.0, "", why)

    def __str__(self) -> str:
        if self.why:
            return f"quality is not predicted: {self.why}"
        return (
            f"predicted: KL {self.low:.2g} to {self.high:.2g} nats a token, about {self.stays:.0f} of 100 next tokens "
            f"stay; from {self.basis}"
        )


@dataclass(frozen=True)
class Lost:
    """What rounding to nearest costs: mean KL, and the share of next tokens that change."""

    kl: float
    changed: float


def foresee(job: Job, read: Reading) -> Foresight:
    """What a job will cost, or why that is not predicted.

    Cost: two forward passes over 256 tokens, which the model samples where no text was given.
    """
    choices = {name: point for name, point in job.choices.items() if point is not None}
    if why := _unforeseen(job, choices):
        return Foresight.nothing(why)
    try:
        ids_NT, text = tokens(job.source, job.seed, None if read.windows is None else read.windows.inputs)
        (lost,) = nearest(job.source, ids_NT, [choices])
    except RegaugeError as error:
        return Foresight.nothing(f"the model could not be run ({error})")
    gains = [GAINS[point.name("rounder")] for point in choices.values()]
    return told(lost, sum(gains) / len(gains), f"rounding to nearest on {ids_NT.numel()} tokens {text}")


def told(lost: Lost, gain: float, basis: str) -> Foresight:
    """A prediction from what nearest rounding costs, of which a better rounder leaves a part."""
    kl = lost.kl * gain
    return Foresight(kl / OFF, kl * OFF, 100 * (1 - lost.changed * math.sqrt(gain)), basis)


def unforeseen(source: Source) -> str:
    """Why nothing can be predicted of a model; "" where something can."""
    if not source.anatomy.causal or "head" not in {site.name for site in source.anatomy.sites}:
        return "it predicts no next token"
    if source.parameters() > MOST:
        return f"a dry run does not run a model of {source.parameters():,} parameters"
    return ""


def _unforeseen(job: Job, choices: Mapping[str, Point]) -> str:
    if why := unforeseen(job.source):
        return why
    if job.shaping is not None:
        return "what taking units out costs is only seen by doing it"
    if job.resolution.inputs:
        return "what rounding activations costs hangs on their outliers"
    if not choices:
        return "no matrix is rounded"
    for point in choices.values():
        if learnt(point) or point["compensator"] is not None:
            return "nothing is known of what a learnt range or a correction gains"
        if point.name("rounder") not in GAINS:
            return f"nothing is known of what rounder {point.name('rounder')!r} gains"
    return ""


def tokens(source: Source, seed: int, given: Tensor | None) -> tuple[Tensor, str]:
    """Some windows (N, T), and where they are from: a given text's first, or what the model samples."""
    if given is not None and given.dim() == 2:
        return given[:, : WINDOWS * LENGTH][: max(1, WINDOWS * LENGTH // given.shape[1])], "of the calibration text"
    host = host_of(source.path)
    ids_NT, _ = host.sample(source, source.tokenizer(), WINDOWS, LENGTH, seed)
    return ids_NT, "that the model sampled"


@torch.no_grad()
def nearest(source: Source, ids_NT: Tensor, variants: Sequence[Mapping[str, Point]]) -> list[Lost]:
    """What each variant (site → its point) costs on some tokens, every matrix rounded to nearest."""
    runner = host_of(source.path).runner(source)
    outer = source.block(None)
    plain, moved = runner.begin([ids_NT], outer), []
    outers = [_rounded(source, None, outer, variant) for variant in variants]
    moved = [runner.begin([ids_NT], own) for own in outers]
    for block in range(source.anatomy.blocks):
        weights = source.block(block)
        plain = runner.block(block, weights, plain)
        for place, variant in enumerate(variants):
            moved[place] = runner.block(block, _rounded(source, block, weights, variant), moved[place])
    (logits_BTV,) = runner.tail(outer, plain)
    log_p = torch.log_softmax(logits_BTV.float().flatten(0, 1), -1)
    found = []
    for own, states in zip(outers, moved, strict=True):
        (other_BTV,) = runner.tail(own, states)
        kl_N, agree_N = divergence(log_p, torch.log_softmax(other_BTV.float().flatten(0, 1), -1))
        found.append(Lost(float(kl_N.mean()), 1 - float(agree_N.mean())))
    return found


def _rounded(source: Source, block: int | None, weights: Weights, variant: Mapping[str, Point]) -> Weights:
    changed = dict(weights)
    for site in source.anatomy.in_block(block):
        if site.name in variant:
            changed[f"{site.name}.weight"] = to_nearest(weights[f"{site.name}.weight"], variant[site.name])
    if block is None and source.anatomy.tied and "embed" in variant:
        changed["head.weight"] = changed["embed.weight"]
    return changed


def to_nearest(w_OI: Tensor, point: Point) -> Tensor:
    """A matrix rounded to nearest in the format of a point."""
    fmt = parts.format_of(point)
    rounder: Callable[..., object] = parts.rounder_of(point.but(rounder=Spec("nearest")))
    return fmt.decode(rounder(w_OI.float(), fmt, {})).to(w_OI.dtype)  # type: ignore[arg-type]  # codes
