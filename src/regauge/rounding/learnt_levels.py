"""Rounding that is learnt for several levels of a nested grid at once, trained by `learn/loop.py` on a block's errors.

Legend: O output channels, I input channels, G groups, K weights in a group, L levels that have bytes of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regauge.formats.base import OBJECTIVE, Codes, Format, Step
from regauge.formats.learnt import checked_rate, in_steps, passed
from regauge.formats.planes import LEVELS, MIDDLE, SHIFT, STRETCH, cells, level_step
from regauge.formats.prefixes import FEWEST
from regauge.rounding.base import Rounder, Stats
from regauge.rounding.learnt import INSIDE
from regauge.rounding.levels import Levels, bits_of
from regauge.rounding.rounders import Nearest

OFFSET, STEPS = "offset", "steps"
STARTS: Mapping[str, Rounder] = {"nearest": Nearest(), "gptq-levels": Levels()}
"""Where learning may begin: the codes of another rounder, and its steps of levels."""


@dataclass(frozen=True)
class LearntLevels:
    """An offset for each weight before it is rounded, and the bytes of levels, trained by what the block loses at the
    whole and at some levels (MatQuant, arXiv 2502.06786, its joint loss; offsets as AutoRound's, 2309.05516).

    What is lowered is the geometric mean of the block's errors at these levels, so that none of them drowns another;
    the whole's counts a tenth, as published. Rounding and cutting are passed straight through. With `optimiser: sign`,
    a linear schedule and the default rate a code moves by about half of `reach` at most, and a byte by 4.

    Differs: MatQuant trains the weights, or clips and shifts of channels, with weights of its losses found by trial,
    and rounds where it cuts; here cells have their middles, and steps of their own, instead.
    Cost: in each training step the block forward and backward, and some passes over the weights, for each level.

    Attributes:
        start: `nearest` or `gptq-levels`.
        levels: bits, below the whole's, whose errors count.
        reach: codes that an offset of 1 is.
        rate: learning rate; None: one over the number of steps.
    """

    start: str = "gptq-levels"
    levels: str = "4/3/2"
    reach: float = 2.0
    rate: float | None = None

    def __post_init__(self) -> None:
        checked_rate(self.rate)
        if self.start not in STARTS:
            raise ValueError(f"learning starts from one of {', '.join(STARTS)}, not {self.start!r}")
        if not self.reach > 0:
            raise ValueError(f"the reach is above 0, not {self.reach}")
        if not bits_of(self.levels):
            raise ValueError(f"levels are bits from {FEWEST} on, like 4/3/2, not {self.levels!r}")

    @property
    def needs(self) -> frozenset[str]:
        return STARTS[self.start].needs | {OBJECTIVE}

    @property
    def rates(self) -> Mapping[str, float | None]:
        return {OFFSET: self.rate, STEPS: self.rate}

    def sweeps(self, fmt: Format, shape: tuple[int, int]) -> int:
        return STARTS[self.start].sweeps(fmt, shape)

    def __call__(self, w_OI: Tensor, fmt: Format, stats: Stats) -> Codes:
        """The codes before training."""
        return STARTS[self.start](w_OI, fmt, stats)

    def init(self, w_OI: Tensor, fmt: Format, stats: Stats) -> dict[str, Tensor]:
        """Offsets (O, I), and of each group and level with a byte (G, 2 L) its halves from the middle, in eighths."""
        codes = STARTS[self.start](w_OI, fmt, stats)
        z_GK = in_steps(fmt.grain.split(w_OI).float(), fmt.fit(w_OI))
        wanted_GK = fmt.grain.split(codes.codes_OI).float()
        offset_GK = (z_GK.clamp(wanted_GK - INSIDE, wanted_GK + INSIDE) - z_GK) / self.reach
        offset_GK = offset_GK.masked_fill(fmt.grid.snap(z_GK) == wanted_GK, 0)
        groups = len(codes.step.scale_G1)
        bytes_GL = (
            codes.step.fields.get(LEVELS, torch.empty(0, dtype=torch.uint8, device=w_OI.device)).view(groups, -1).int()
        )
        halves_GL = torch.cat([bytes_GL >> 4, bytes_GL & 15], 1) - MIDDLE
        return {OFFSET: fmt.grain.join(offset_GK, w_OI), STEPS: halves_GL.float() / MIDDLE}

    def apply(self, parameters: Mapping[str, Tensor], w_OI: Tensor, fmt: Format, progress: float) -> Tensor:
        """Ŵ of the whole under these offsets, float32, differentiable."""
        return self._at(parameters, w_OI, fmt, (fmt.grid.bits,))[fmt.grid.bits]

    def beside(
        self, parameters: Mapping[str, Tensor], w_OI: Tensor, fmt: Format, progress: float
    ) -> Mapping[int, Tensor]:
        """Ŵ of the levels that count."""
        return self._at(parameters, w_OI, fmt, tuple(bits for bits in bits_of(self.levels) if bits < fmt.grid.bits))

    def penalty(self, parameters: Mapping[str, Tensor], progress: float) -> Tensor | None:
        return None

    def finish(self, parameters: Mapping[str, Tensor], w_OI: Tensor, fmt: Format) -> Codes:
        """The codes under these offsets, and steps of levels, exactly those that were trained."""
        z_GK = self._along(parameters, w_OI, fmt)
        return Codes(
            fmt.grain.join(z_GK.round().to(torch.uint8), w_OI), self._step(parameters[STEPS], fmt.fit(w_OI), fmt)
        )

    def _along(self, parameters: Mapping[str, Tensor], w_OI: Tensor, fmt: Format) -> Tensor:
        offset_GK = self.reach * fmt.grain.split(parameters[OFFSET])
        z_GK = in_steps(fmt.grain.split(w_OI).float(), fmt.fit(w_OI), offset_GK)
        return z_GK.clamp(fmt.grid.low, fmt.grid.high)

    @staticmethod
    def _step(steps_GL: Tensor, step: Step, fmt: Format) -> Step:
        if not steps_GL.numel():
            return step
        stretch_GL, shift_GL = _counts(steps_GL.detach()).int().add(MIDDLE).chunk(2, 1)
        return fmt.load({**step.fields, LEVELS: (stretch_GL * 16 + shift_GL).to(torch.uint8).reshape(-1)})

    def _at(
        self, parameters: Mapping[str, Tensor], w_OI: Tensor, fmt: Format, levels: tuple[int, ...]
    ) -> dict[int, Tensor]:
        """Bits → Ŵ. What it is comes from the codes, how it changes from z and the counts of stretches and shifts."""
        step, top, z_GK = fmt.fit(w_OI), fmt.grid.bits, self._along(parameters, w_OI, fmt)
        whole, code_GK = self._step(parameters[STEPS], step, fmt), z_GK.detach().round()
        stretch_GL, shift_GL = passed(MIDDLE * parameters[STEPS], lambda x: _counts(x / MIDDLE)).chunk(2, 1)
        found = {}
        for bits in levels:
            own = whole if bits == top else level_step(whole, replace(fmt, step=None), bits)
            assert own.zero_G1 is not None, "a nested grid has a zero point"
            cell_GK = (code_GK / (1 << (top - bits))).floor()
            soft_GK = z_GK * step.scale_G1
            if bits - FEWEST < stretch_GL.shape[1] and bits < top:
                wide_G1, _ = cells(step, top, bits)
                stretch_G1, shift_G1 = (one[:, bits - FEWEST, None] for one in (stretch_GL, shift_GL))
                middle_GK = cell_GK - ((1 << bits) - 1) / 2
                soft_GK = soft_GK + wide_G1 * (
                    middle_GK * stretch_G1 * (STRETCH / 2 ** (bits - FEWEST)) + shift_G1 * SHIFT
                )
            hard_GK = (cell_GK - own.zero_G1) * own.scale_G1
            found[bits] = fmt.grain.join(hard_GK + (soft_GK - soft_GK.detach()), w_OI)
        return found


def _counts(steps: Tensor) -> Tensor:
    """Whole counts of stretches and shifts, from −8 to 7."""
    return (MIDDLE * steps).round().clamp(-MIDDLE, MIDDLE - 1)
