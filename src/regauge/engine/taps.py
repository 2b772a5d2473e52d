"""The taps of one block: transforms chosen and folded into every site that reads them, and steps that are known
beforehand. Nothing here runs a model.

A transform is exact before anything is rounded: (x A)(W A⁻ᵀ)ᵀ = x Wᵀ. That is certified for every site in float64, and
again in float32, which rounders work in. Legend: T tokens, O output channels, I input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from regauge import parts
from regauge.anatomy.certificate import EXACT, TOLERANCE, certify
from regauge.anatomy.model import Anatomy, Site
from regauge.artifact.receipt import MoveReceipt
from regauge.engine.block import Moved
from regauge.errors import RecipeError
from regauge.formats.base import JOINED, OBJECTIVE, Format
from regauge.formats.rangers import Dynamic
from regauge.formats.readings import Reading, dynamic, fit
from regauge.formats.transforms import Same, Transform
from regauge.learn.base import LearntShare
from regauge.parts import Point
from regauge.rounding.base import Stats

PROBES = 16
"""Rows of noise on which a transform is certified."""
Taps = Mapping[str, Point]


@dataclass(frozen=True, eq=False)
class Looked:
    """A block whose taps are settled: what rounding starts from.

    Attributes:
        moved: with the transforms of its taps folded into the sites that read them.
        stats: site → statistics of what it reads, after the transform of its tap.
        rare: sites whose expert was rare, and what was done.
        proof: that each transform changes nothing.
    """

    moved: Moved
    stats: Mapping[str, Stats]
    rare: Mapping[str, str]
    proof: Sequence[MoveReceipt]


def at_once(inputs: Taps) -> dict[str, Reading]:
    """The readings that need nothing of a block: no transform, and steps of each call's own values."""
    return {tap: dynamic(parts.format_of(point)) for tap, point in inputs.items() if not waits(point)}


def stand_ins(inputs: Taps, known: Mapping[str, Reading]) -> dict[str, Reading]:
    """What tentative blocks read where a step is known only later: the same format with each call's own range."""
    found = {}
    for tap, point in inputs.items():
        if tap not in known and point.name("transform") in ("", "identity"):
            found[tap] = dynamic(replace(parts.format_of(point), ranger=Dynamic()))
    return found


def waits(point: Point) -> bool:
    """Whether a tap's reading is known only once its block is at hand."""
    return point.name("transform") not in ("", "identity") or bool(parts.format_of(point).ranger.needs)


def refuse_outside(anatomy: Anatomy, inputs: Taps) -> None:
    """Transforms are for taps of blocks, and steps that are known beforehand for those and for what the head reads.

    Raises:
        RecipeError: another tap outside the blocks has one.
    """
    outside = {site.tap: site for site in anatomy.in_block(None)}
    for tap, point in inputs.items():
        turned = point.name("transform") not in ("", "identity")
        if tap in outside and waits(point) and (turned or outside[tap].name != "head"):
            what = "transform" if turned else "static step"
            raise RecipeError(
                f"{tap} is read outside the blocks, where activations have no {what}; write {{grid: "
                f"{point.name('grid')}, grain: token}} for it, or leave it full"
            )


def needs_of_taps(sites: Sequence[Site], inputs: Taps, transforms: bool) -> dict[str, frozenset[str]]:
    """Site → statistics of its tap that the transform wants before it is folded, or else the step after it is."""
    found = {}
    for site in sites:
        point = inputs.get(site.tap or "")
        if point is not None:
            needs = (parts.maker_of(point).needs if transforms else parts.format_of(point).ranger.needs) - {
                OBJECTIVE,
                JOINED,
            }
            if needs:
                found[site.name] = needs
    return found


def fold(
    block: int,
    sites: Sequence[Site],
    moved: Moved,
    inputs: Taps,
    stats: Mapping[str, Stats],
    learnt: Mapping[str, Transform] | None = None,
) -> tuple[Moved, dict[str, Transform], list[MoveReceipt]]:
    """The block with every transform folded into the weights that read it; the transforms, and that they are exact.

    Args:
        stats: site → what the makers of transforms want to know of its tap.
        learnt: tap → its transform, of those that were learnt.

    Raises:
        ExactnessError: a product changed; names the tap.
    """
    readers: dict[str, list[Site]] = {}
    for site in sites:
        if site.tap in inputs and f"{site.name}.weight" in moved.exact:
            readers.setdefault(site.tap or "", []).append(site)
    exact, transforms, proof = dict(moved.exact), dict[str, Transform](), list[MoveReceipt]()
    for tap, own in readers.items():
        weights = [exact[f"{site.name}.weight"] for site in own]
        channels = own[0].shape[1]
        transform = (learnt or {}).get(tap) or parts.maker_of(inputs[tap]).fit(
            channels, stats.get(own[0].name, {}), weights
        )
        if not transform.changes:
            continue
        transforms[tap] = transform
        folded = [transform.inverse_on(w_OI.double()) for w_OI in weights]
        proof.append(_certified(tap, block, transform, weights, folded))
        exact |= {f"{site.name}.weight": w_OI for site, w_OI in zip(own, folded, strict=True)}
    if not transforms:
        return moved, transforms, proof
    changed = {name: tensor for name, tensor in exact.items() if tensor is not moved.exact[name]}
    stored = {name: tensor.to(moved.stored[name].dtype) for name, tensor in changed.items()}
    return replace(moved, exact=exact, stored={**moved.stored, **stored}), transforms, proof


def _certified(
    tap: str, block: int, transform: Transform, weights: Sequence[Tensor], folded: Sequence[Tensor]
) -> MoveReceipt:
    noise = torch.Generator().manual_seed(0)
    x_TI = torch.randn(PROBES, weights[0].shape[1], generator=noise, dtype=torch.float64, device="cpu")
    what, narrow = f"{transform.name} on {tap}", torch.float32
    pairs = [(w_OI.double(), after_OI) for w_OI, after_OI in zip(weights, folded, strict=True)]
    exact = max(certify(transform.forward(x_TI) @ b.T, x_TI @ a.T, EXACT, what) for a, b in pairs)
    x = transform.forward(x_TI.to(narrow))
    stored = max(certify(x @ b.to(narrow).T, x_TI @ a.T, TOLERANCE[narrow], what) for a, b in pairs)
    return MoveReceipt(
        rewrite=f"{transform.name} on inputs",
        block=block,
        streams=(tap,),
        exact=exact,
        stored=stored,
        tolerance=EXACT,
        tolerance_stored=TOLERANCE[narrow],
    )


def settle(
    sites: Sequence[Site],
    inputs: Taps,
    transforms: Mapping[str, Transform],
    stats: Mapping[str, Stats],
    shares: Mapping[str, Tensor],
) -> dict[str, Reading]:
    """Tap → reading, of the taps of a block that had to wait for it.

    Args:
        stats: site → statistics of what it reads, after the transform.
        shares: tap → what is kept of its range, of those whose clip was learnt.
    """
    found: dict[str, Reading] = {}
    for site in sites:
        tap = site.tap or ""
        if tap in inputs and tap not in found and waits(inputs[tap]):
            fmt = parts.format_of(inputs[tap])
            share_1 = begun(fmt) if tap not in shares and OBJECTIVE in fmt.ranger.needs else shares.get(tap)
            found[tap] = fit(fmt, transforms.get(tap, Same()), stats.get(site.name, {}), share_1)
    return found


def begun(fmt: Format) -> Tensor:
    """The share of a range that training begins with."""
    ranger: Any = fmt.ranger  # it needs the objective: that is the contract
    return cast("LearntShare", ranger).share(ranger.init())


def after(
    watch: Mapping[str, Callable[[Tensor], None]], taps: Mapping[str, str], transforms: Mapping[str, Transform]
) -> dict[str, Callable[[Tensor], None]]:
    """The same watchers, shown what sites read after the transform of their tap.

    Args:
        taps: site → tap.
    """

    def through(see: Callable[[Tensor], None], transform: Transform) -> Callable[[Tensor], None]:
        return lambda x_TI: see(transform.forward(x_TI.float()))

    return {
        name: through(see, transforms[taps[name]]) if taps[name] in transforms else see for name, see in watch.items()
    }
