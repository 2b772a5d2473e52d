"""Blocks of a family ranked by what they do to calibration text, as the model streams by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
