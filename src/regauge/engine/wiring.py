"""What each place gets and the format of the files, which depend on each other."""

from __future__ import annotations

from regauge.anatomy.model import Anatomy
from regauge.artifact.codec.base import REGAUGE, Layout
from regauge.artifact.codec.choose import Chosen, choose
from regauge.engine.shaping import Shaping
from regauge.hosts.base import Source
from regauge.parts import ATTENTION, CACHE, TOKENS
from regauge.plan.model import Plan
from regauge.plan.resolution import Resolution, resolve


def wired(
    plan: Plan, resolution: Resolution, source: Source, anatomy: Anatomy, shaping: Shaping | None, wire: str | None
) -> tuple[Resolution, Chosen]:
    """What each place gets, and the format of the files. Where groups of several sizes, which widths led to, are all
    that keeps stock runtimes from reading it, every matrix takes the smallest of them.

    Args:
        resolution: of the plan on this anatomy, each place by itself.

    Raises:
        RefusedError: the format that is insisted on cannot say it.
    """
    if resolution.fallbacks and wire != REGAUGE and choose(layout_of(source, anatomy, resolution, shaping)).refusals:
        level = resolve(plan, anatomy, alike=True)
        if not choose(layout_of(source, anatomy, level, shaping)).refusals:
            resolution = level
    return resolution, choose(layout_of(source, anatomy, resolution, shaping), wire)


def layout_of(source: Source, anatomy: Anatomy, resolution: Resolution, shaping: Shaping | None) -> Layout:
    """What the artifact's tensors will be."""
    config, unsaid = source.config_changes(anatomy)
    if shaping is not None and shaping.waiting:
        config, unsaid = {}, "its widths are decided block by block, and config.json has one number for all blocks"
    inputs, choices = resolution.inputs, resolution.choices
    return Layout(
        source.anatomy,
        anatomy,
        choices,
        source.dtype,
        source.shapes,
        inputs=inputs,
        config=config,
        unsaid=unsaid,
        cache=resolution.at(CACHE),
        attention=resolution.at(ATTENTION),
        tokens=resolution.at(TOKENS),
    )
