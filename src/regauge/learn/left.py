"""What can still be trained of a model whose codes are fixed: steps, offsets, low-rank factors, and what stayed whole.

A parameter stands for a change: all are 0 (a right factor apart) where training begins, so the model is then what it
was, to the bit. What is computed with is what will be stored: each number is rounded as its artifact keeps it, and the
gradient sees that rounding as the identity. `learn/loop.py` trains them against the whole model's output.

Legend: O output channels, I input channels, G groups, K weights in a group, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regauge.formats.base import LOW, Codes, Format, Step
from regauge.formats.scales import Cast
from regauge.formats.terms import LOW_RANK, LowRank
from regauge.learn.base import Parameters, Rates

STEP, BOTTOM, LEFT, RIGHT, VALUE = "step", "low", "left", "right", "value"
RATES: Mapping[str, float] = {STEP: 5e-3, BOTTOM: 5e-3, LEFT: 5e-3, RIGHT: 5e-3, VALUE: 5e-3}
"""Kind of parameter → its learning rate: all are shares of what they change."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """One matrix in codes. W = scale · (z − zero), plus its low-rank term; z stays.

    `step` (G, 1) multiplies each scale by eˢ; `low` (G, 1) moves the offset of a step that keeps one, in steps; `left`
    and `right` are added to the factors of a low-rank term, in units of their mean size.

    Attributes:
        codes, fmt: as the artifact holds them.
        rank: of a term to begin, where it has none; 0 for none.
        dtype: in which the factors of a new term are stored.
        seed: of its right factor; the left one begins at 0.
    """

    codes: Codes
    fmt: Format
    rank: int = 0
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    @property
    def why_not(self) -> str:
        """Why its steps stay as they are, or ""."""
        step = self.codes.step
        if self.fmt.scale.fused:
            return "runtimes take one level for the steps of matrices that they fuse"
        again, _ = self._restored(step.scale_G1)
        return "" if torch.equal(again, step.scale_G1) else "its steps cannot be stored anew without a change"

    @property
    def rates(self) -> Rates:
        found = {} if self.why_not else {STEP: RATES[STEP]}
        if found and LOW in self.codes.step.fields:
            found |= {BOTTOM: RATES[BOTTOM]}
        return found | ({LEFT: RATES[LEFT], RIGHT: RATES[RIGHT]} if self._factors() is not None else {})

    def init(self) -> Parameters:
        zeros = {STEP: self.codes.step.scale_G1, BOTTOM: self.codes.step.scale_G1}
        factors = self._factors()
        if factors is not None:
            zeros |= {LEFT: factors.left_OR, RIGHT: factors.right_RI}
        return {name: torch.zeros_like(zeros[name], dtype=torch.float32) for name in self.rates}

    def apply(self, parameters: Parameters) -> Tensor:
        """Ŵ (O, I), float32, differentiable."""
        like_OI, step = self.codes.codes_OI, self._step(parameters)
        z_GK = self.fmt.grid.decode(self.fmt.grain.split(like_OI))
        if step.zero_G1 is not None:
            z_GK = z_GK - step.zero_G1
        w_OI = self.fmt.grain.join(z_GK * step.scale_G1, like_OI)
        term = self._term(parameters)
        return w_OI if term is None else w_OI + term.left_OR.float() @ term.right_RI.float()

    def finish(self, parameters: Parameters) -> Codes:
        """The same codes on the steps that were learnt, with the terms that were."""
        with torch.no_grad():
            step, term = self._step(parameters), self._term(parameters)
        others = tuple(one for one in self.codes.terms if one.kind != LOW_RANK)
        if term is None:
            return replace(self.codes, step=step)
        like = self._factors() or term
        left_OR, right_RI = term.left_OR.to(like.left_OR.dtype), term.right_RI.to(like.right_RI.dtype)
        return replace(self.codes, step=step, terms=(*others, LowRank(left_OR, right_RI)))

    def _step(self, parameters: Parameters) -> Step:
        step = self.codes.step
        if STEP not in parameters:
            return step
        raw_G1 = step.scale_G1 * parameters[STEP].exp()
        scale_G1, fields = self._restored(raw_G1.detach())
        fields = {**step.fields, **fields}
        low_G1 = None
        if BOTTOM in parameters:
            kept_G1 = step.fields[LOW]
            low_G1 = kept_G1.float() + parameters[BOTTOM] * step.scale_G1
            fields[LOW] = low_G1.detach().to(kept_G1.dtype)
            low_G1 = fields[LOW].float() + (low_G1 - low_G1.detach())
        scale_G1 = scale_G1 + (raw_G1 - raw_G1.detach())
        zero_G1 = step.zero_G1 if low_G1 is None else self.fmt.grid.low - low_G1 / scale_G1
        return Step(scale_G1, zero_G1, fields)

    def _restored(self, scale_G1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The scales as they are stored, and the fields that hold them; in the dtype that they have, of which not every
        format speaks."""
        scale = self.fmt.scale.bind(scale_G1, self.fmt.grid, self.codes.codes_OI.shape[0])
        found, fields = scale.store(scale_G1)
        held = self.codes.step.fields["scale"].dtype
        if fields["scale"].dtype is held or not held.is_floating_point:
            return found, fields
        return Cast("as it is", held).store(scale_G1)

    def _factors(self) -> LowRank | None:
        """The low-rank term as it is before training."""
        for term in self.codes.terms:
            if term.kind == LOW_RANK:
                return LowRank.of(term.tensors)
        if not self.rank:
            return None
        rows, columns = self.codes.codes_OI.shape
        noise = torch.randn(
            (self.rank, columns),
            generator=torch.Generator().manual_seed(self.seed),
            dtype=torch.float32,
            device="cpu",
        )
        left_OR = torch.zeros((rows, self.rank), dtype=self.dtype, device="cpu")
        return LowRank(left_OR, (noise / columns**0.5).to(self.dtype))

    def _term(self, parameters: Parameters) -> LowRank | None:
        """The low-rank term under these parameters, as it is stored, differentiable."""
        factors = self._factors()
        if factors is None:
            return None
        left, right = factors.left_OR, factors.right_RI
        return LowRank(
            moved(left, parameters[LEFT], _size(left) or self._reach()), moved(right, parameters[RIGHT], _size(right))
        )

    def _reach(self) -> float:
        """The mean step: what a factor that begins at 0 is counted in."""
        return float(self.codes.step.scale_G1.mean())


@dataclass(frozen=True, eq=False)
class Whole:
    """A tensor in full precision: a gain, a bias, an embedding. `value` is added to it, in units of its mean size.

    Attributes:
        tensor: canonical, as the artifact holds it.
        dtype: in which it is stored.
        offset: what the module adds to what is stored.
    """

    tensor: Tensor
    dtype: torch.dtype
    offset: float = 0.0

    @property
    def rates(self) -> Rates:
        return {VALUE: RATES[VALUE]}

    def init(self) -> Parameters:
        return {VALUE: torch.zeros_like(self.tensor, dtype=torch.float32)}

    def apply(self, parameters: Parameters) -> Tensor:
        """The tensor, differentiable, as it will be stored."""
        return moved((self.tensor.float() - self.offset).to(self.dtype), parameters[VALUE], self._unit()) + self.offset

    def finish(self, parameters: Parameters) -> Tensor:
        with torch.no_grad():
            found = self.apply(parameters)
        return found if self.offset else found.to(self.dtype)

    def _unit(self) -> float:
        return _size(self.tensor) or 0.01


def moved(stored: Tensor, change: Tensor, unit: float) -> Tensor:
    """`stored` + unit · change as it is stored, float32; the gradient passes."""
    raw = stored.float() + unit * change
    return raw.detach().to(stored.dtype).float() + (raw - raw.detach())


def _size(tensor: Tensor) -> float:
    return float(tensor.float().square().mean().sqrt())
