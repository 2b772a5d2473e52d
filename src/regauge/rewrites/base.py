"""What a rewrite is: a choice of exact moves.

A rewrite looks at the anatomy, perhaps at weights and statistics, and returns moves; it never touches a tensor. The
engine applies the moves (`anatomy.moves.apply`), block by block, and certifies them. Anatomy in, anatomy out: the
one returned is the one given after the moves, with notes on what a rewrite left alone and why.

**Scope.** `model`: called once before streaming, with `weights={}` and `block=None`; its moves (fold every norm, turn
the residual) are applied to the embeddings, to each block and to the head as they are read. A `model` rewrite that
`needs` statistics gets those of every site, which costs a pass of the whole model. `block`: called for each block with
that block's tensors, as earlier moves left them, and the statistics of its sites' inputs *in that gauge*.

**Search.** Where a coordinate is chosen by the loss of the whole model, `search` names the option and its grid
(`{"alpha": (0.0, 0.05, …)}`), and is empty once nothing is left to choose. The engine runs it as an outer loop: for
each value `fixed(rewrite, alpha=value)` gives the rewrite that does it, the model is streamed under the plan's formats,
and the value with the least loss of the whole model wins (the first of equals). A rewrite is never called while its
`search` is not empty.

**Objective.** A callable that gives the loss of tentative tensors of the block, as moves left them, under the plan's
formats: the error of the block's output against the uncompressed model's, on the states that the compressed model has
made (`engine/objective.py`). Lower = better. It is given to rewrites of scope `block` whose `needs` holds `objective`,
which costs a second stream of states and a run of the block for each call; None for all others. Given `sites`, it is
the error that rounding these alone makes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from regauge.anatomy.model import Anatomy, Weights
from regauge.anatomy.moves import Move
from regauge.errors import RecipeError

Statistics = Mapping[str, Mapping[str, Tensor]]
"""Site name → statistic name → tensor, of the site's input (names in `rounding/base.py`)."""


@runtime_checkable
class Objective(Protocol):
    """The error of a block's output with these tensors, rounded as the plan says."""

    def __call__(self, weights: Weights, sites: Collection[str] | None = None) -> float:
        """`sites`: only these are rounded, and the block is given what the uncompressed model has; None: all."""


Moved = tuple[Anatomy, list[Move]]

NOTHING: Mapping[str, tuple[float, ...]] = {}
TRAINED = "trained"
"""What a rewrite needs, beside the objective, whose moves are only the start: more are trained with the block by
`learn/loop.py` (see `LearntRewrite` in `learn/base.py`)."""


@runtime_checkable
class Rewrite(Protocol):
    """A choice of exact moves; a frozen dataclass."""

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def scope(self) -> str: ...

    @property
    def search(self) -> Mapping[str, tuple[float, ...]]: ...

    def __call__(
        self,
        anatomy: Anatomy,
        weights: Weights,
        stats: Statistics,
        objective: Objective | None = None,
        block: int | None = None,
    ) -> Moved: ...


R = TypeVar("R")


def fixed(rewrite: R, **options: float) -> R:
    """The same rewrite with options set, as the engine does for each value of `search`."""
    return replace(rewrite, **options)  # type: ignore[type-var]  # every rewrite is a dataclass


def statistic(stats: Statistics, site: str, name: str, who: str) -> Tensor:
    """One statistic of a site's input, or an error that says who wanted it."""
    try:
        return stats[site][name]
    except KeyError:
        raise RecipeError(
            f"rewrite {who} needs the statistic {name!r} of {site}, which was not collected; give calibration text"
        ) from None


def unseen(stats: Statistics, site: str) -> bool:
    """Whether no token reached the site (an expert that was never chosen), so its statistics say nothing."""
    found: Mapping[str, Any] = stats.get(site, {})
    return "count" in found and int(found["count"]) == 0
