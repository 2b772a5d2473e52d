"""Statistics of batch norms, taken anew where what stands before a norm was rounded: a recipe says `statistics: anew`.

A norm divides by how much its channels vary, and channels of rounded weights vary otherwise: at few bits most of what a
residual network loses comes from norms that still divide by the old numbers. Mean and variance of each channel are
those over all places of all calibration images, block by block, each norm behind those before it as they are then.

Legend: C channels, N places of images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy, Weights
from regauge.engine.block import Moved
from regauge.engine.work import Pass
from regauge.errors import RecipeError
from regauge.formats.base import Codes
from regauge.plan import Plan

TOLD = "statistics of batch norms in blocks were taken anew on what the recipe reads"


def refuse(plan: Plan, anatomy: Anatomy) -> None:
    """
    Raises:
        RecipeError: statistics are to be taken anew, and blocks have no batch norms.
    """
    if plan.statistics and not any(norm.block is not None and norm.mean is not None for norm in anatomy.norms):
        raise RecipeError(
            f"recipe {plan.name!r} takes statistics of batch norms anew, and blocks of this {anatomy.family} have none "
            "(fold-batch-norm takes them away): leave 'statistics' out"
        )


def anew(work: Pass, block: int, moved: Moved, codes: dict[str, Codes]) -> tuple[Moved, list[str]]:
    """The block with the statistics that its norms have now, and what is to be told of it."""
    runner, states = work.running()
    found: Weights = {}
    for norm in work.job.anatomy.norms:
        if norm.block == block and norm.mean is not None:
            seen = _Seen()
            weights = work.built(moved, codes)
            runner.block(block, weights, states, outputs={norm.name.removesuffix(".norm"): seen})
            for word, tensor in (("mean", seen.mean_C), ("var", seen.var_C)):
                name = f"{norm.name}.{word}"
                found[name] = tensor.to(moved.stored[name].dtype)
            moved = Moved(moved.source, moved.exact | found, moved.stored | found, moved.moves)
    return moved, [TOLD] if found else []


class _Seen:
    """Sums over what a convolution gives."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Tensor | None = None

    def __call__(self, y: Tensor) -> Tensor:
        """
        Args:
            y: (..., C).
        """
        y_NC = y.detach().flatten(0, -2).double()
        sums = torch.stack([y_NC.sum(0), y_NC.square().sum(0)])
        self.count += len(y_NC)
        self.sums = sums if self.sums is None else self.sums + sums
        return y

    @property
    def mean_C(self) -> Tensor:
        assert self.sums is not None, "images were read"
        return self.sums[0] / self.count

    @property
    def var_C(self) -> Tensor:
        assert self.sums is not None, "images were read"
        return (self.sums[1] / self.count - self.mean_C.square()).clamp_min(0)
