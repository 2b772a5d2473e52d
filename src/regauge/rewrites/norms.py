"""Norms made plain: gains and biases into their readers, LayerNorm into RMSNorm. The gate to rotations.

Cost: none at run time; an untied head where the last norm is folded, or the embedding centred, under a tied head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from regauge.anatomy.model import Anatomy, Weights
from regauge.anatomy.moves import Move, check, transform
from regauge.rewrites.base import NOTHING, Moved, Objective, Statistics


@dataclass(frozen=True)
class FoldNorm:
    """The gain and bias of each norm go into its readers: W ← W diag(g), b ← b + W β, g = 1, β = 0.

    A rotation of the residual commutes with a norm only once it is plain (2404.00456, section 3). A norm without a
    gain has nothing to fold. Where a norm cannot be folded (post-norm models, a bias in front of expert stacks) this
    is an error: a model half folded is of no use to what comes next.
    """

    scope: ClassVar[str] = "model"
    needs: ClassVar[frozenset[str]] = frozenset()
    search: ClassVar[Mapping[str, tuple[float, ...]]] = NOTHING

    def __call__(
        self,
        anatomy: Anatomy,
        weights: Weights,
        stats: Statistics,
        objective: Objective | None = None,
        block: int | None = None,
    ) -> Moved:
        moves = [Move("fold", stream.name) for stream in anatomy.streams if stream.kind == "norm"]
        return transform(moves, anatomy), moves


@dataclass(frozen=True)
class FoldBatchNorm:
    """Each batch norm goes into the convolution before it: W ← diag(g / √(σ² + ε)) W, b ← (b − μ) g / √(σ² + ε) + β.

    With stored statistics a batch norm is a scale and a shift a channel, so nothing is lost (1712.05877, section 3.2);
    what stands in its place does nothing. A model without batch norms is left alone, and the notes say so.
    """

    scope: ClassVar[str] = "model"
    needs: ClassVar[frozenset[str]] = frozenset()
    search: ClassVar[Mapping[str, tuple[float, ...]]] = NOTHING

    def __call__(
        self,
        anatomy: Anatomy,
        weights: Weights,
        stats: Statistics,
        objective: Objective | None = None,
        block: int | None = None,
    ) -> Moved:
        moves = [Move("fold", stream.name) for stream in anatomy.streams if stream.kind == "batch"]
        if not moves:
            note = "fold-batch-norm: the model has no batch norms, nothing to fold"
            return anatomy.with_(notes=(*anatomy.notes, note)), []
        return transform(moves, anatomy), moves


@dataclass(frozen=True)
class LayerNormToRMS:
    """Every writer of the residual centred, so that each LayerNorm is an RMSNorm: W ← (I − 11ᵀ/d) W.

    LN(x) = RMS(x − mean x), and a sum of zero-mean writers has zero mean (Pre-RMSNorm, 2305.14858). Embeddings,
    positions, token types, class and patch embeddings, o and down are centred, with their biases. Pre-norm models only.
    A model whose norms are RMSNorm already is left alone, and the notes say so.
    """

    scope: ClassVar[str] = "model"
    needs: ClassVar[frozenset[str]] = frozenset()
    search: ClassVar[Mapping[str, tuple[float, ...]]] = NOTHING

    def __call__(
        self,
        anatomy: Anatomy,
        weights: Weights,
        stats: Statistics,
        objective: Objective | None = None,
        block: int | None = None,
    ) -> Moved:
        if all(norm.kind == "rms" for norm in anatomy.norms):
            note = "layernorm-to-rms: every norm is an RMSNorm already, nothing to centre"
            return anatomy.with_(notes=(*anatomy.notes, note)), []
        moves = [Move("centre", "residual")]
        check(anatomy, moves[0])
        return transform(moves, anatomy), moves
