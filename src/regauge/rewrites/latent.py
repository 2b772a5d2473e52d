"""Latent attention: keys and values of all heads in one narrow vector a token (TransMLA)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from regauge.anatomy.model import Anatomy, Weights
from regauge.errors import RecipeError
from regauge.rewrites.base import NOTHING, Moved, Objective, Statistics


@dataclass(frozen=True)
class LatentAttention:
    """Grouped queries written anew as latent attention, whose latent is what the cache holds (TransMLA, 2502.07864).

    The repetition of key and value heads is a product of two matrices, so the same function can be had through a latent
    of all heads; the model comes out in DeepSeek-V3's form, which transformers caches so. A mix of the heads that is
    alike for both halves of a rotary frequency changes no score. With `keep: 1` every slot stays turned by its position
    and the logits are the same. Below it the function changes: slots that lose their turn are approximated at any rank,
    and they and the values are cut to principal components of what calibration text makes of them.

    Where we differ from the paper: which slots of which frequencies stay turned is chosen by what the scores lose,
    rather than one slot of each frequency; a turn that is not made is replaced by its mean over `reach` tokens; keys
    are weighed by how their queries ask; nothing is trained afterwards. `published: true` is the paper's layout.
    Cost: one pass over calibration text and (D + 1)² float64 numbers a block; when the model runs, a token's cache is
    smaller, and decoding reads the latent itself, in torch: no native step, as the model as it was has.

    Attributes:
        keep: share of the numbers that a token leaves in the cache.
        rotary: share of those that stay turned.
        reach: tokens over which a turn that is not made is averaged.
    """

    keep: float = 0.5
    rotary: float = 0.5
    reach: int = 64
    published: bool = False
    scope: ClassVar[str] = "source"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    search: ClassVar[Mapping[str, tuple[float, ...]]] = NOTHING

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise RecipeError(f"latent keeps a share of the cache above 0 and up to 1; you wrote keep: {self.keep:g}")
        if not 0 < self.rotary < 1:
            raise RecipeError(f"latent turns a share of what it keeps between 0 and 1; you wrote rotary: {self.rotary}")
        if self.reach < 1:
            raise RecipeError(f"latent averages a turn over 1 token or more; you wrote reach: {self.reach}")

    def __call__(
        self,
        anatomy: Anatomy,
        weights: Weights,
        stats: Statistics,
        objective: Objective | None = None,
        block: int | None = None,
    ) -> Moved:
        """Nothing: it is done to the whole model before anything else is (`engine/factoring.py`)."""
        return anatomy, []
