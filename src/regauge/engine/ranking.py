"""Blocks of a family ranked by what they do to calibration text, as the model streams by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from regauge.elastic.family import unranked
from regauge.elastic.order import ranked
from regauge.engine.job import Job


def ranking(job: Job, influences: Sequence[float]) -> tuple[Job, list[str]]:
    """The job whose family knows the order of its blocks, and that order as the receipt tells it."""
    if job.family is None or not unranked(job.family):
        return job, []
    order = ranked(influences)
    told = ", ".join(f"{block} ({influences[block]:.3f})" for block in order)
    return replace(job, family=replace(job.family, ranked=order)), [f"blocks by their influence, most first: {told}"]


def influence(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """How much a block turns the states that go through it: 1 − the mean cosine of a token's states around it.

    0: it could be left out and no direction would change. Reference: block influence, ShortGPT (2403.03853).

    Args:
        before, after: (B, T, H), a batch each.
    """
    total, tokens = 0.0, 0
    for a_BTH, b_BTH in zip(before, after, strict=True):
        cosine = torch.cosine_similarity(a_BTH.float(), b_BTH.float(), dim=-1)
        total, tokens = total + float(cosine.double().sum()), tokens + cosine.numel()
    return 1 - total / max(tokens, 1)
