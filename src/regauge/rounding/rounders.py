"""Which code each weight takes.

Legend: O output channels, I input channels, G groups, K weights in a group, B columns of a block, N groups along a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regauge.formats.base import Codes, Format, Step
from regauge.rounding import tries, words
from regauge.rounding.base import Stats
from regauge.rounding.columns import Columns, together
from regauge.rounding.feedback import Factor, factor, shared
from regauge.rounding.sweep import swept

ORDERS = ("none", "activation")


@dataclass(frozen=True)
class Nearest:
    """Each weight to the nearest value of its grid. Needs no text.

    Cost: about ten passes over the weights, in cache.
    """

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def sweeps(self, fmt: Format, shape: tuple[int, int]) -> int:
        return 0

    def __call__(self, w_OI: Tensor, fmt: Format, stats: Stats) -> Codes:
        return fmt.encode(w_OI)


@dataclass(frozen=True)
class ImportanceNearest:
    """Nearest, on steps fitted where inputs and weights are large: an error counts E[x_i²] · √(spread σ² + w²).

    σ² is the mean of w² in the row. llama.cpp's importance matrix: a diagonal Hessian, no error feedback, and errors of
    large weights count more. It works through the ranger, so a ranger that weighs (`search`) must stand beside it.

    Differs: llama.cpp takes σ² over blocks of 256, with a spread of 1 for its 2-bit types and of 2 for most others.

    Attributes:
        spread: how little the size of a weight counts; infinity for E[x²] alone.
    """

    spread: float = 2.0

    def __post_init__(self) -> None:
        if not self.spread >= 0:
            raise ValueError(f"the spread is 0 or more, not {self.spread}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"second_moment"})

    def sweeps(self, fmt: Format, shape: tuple[int, int]) -> int:
        return 0

    def __call__(self, w_OI: Tensor, fmt: Format, stats: Stats) -> Codes:
        moment_I = stats["second_moment"].to(w_OI.device).float()
        mean = float(moment_I.mean())
        if not 0 < mean < float("inf"):
            return replace(fmt.encode(w_OI), notes=("no finite input reached it: every column counts alike",))
        # A floor keeps a group whose inputs were all silent fitted to its weights.
        weight_OI = (moment_I / mean).clamp_(min=1e-6).expand(w_OI.shape)
        if math.isfinite(self.spread):
            square_OI = w_OI.float().square()
            size_OI = square_OI.add_(square_OI.mean(1, keepdim=True), alpha=self.spread).sqrt_()
            weight_OI = size_OI.div_(size_OI.mean().clamp_(min=torch.finfo(torch.float32).tiny)).mul_(weight_OI)
        return fmt.encode(w_OI, fmt.fit(w_OI, weight_OI), weight_OI)


@dataclass(frozen=True)
class GPTQ:
    """Column by column; the error of each is made good by those not yet rounded (GPTQ, arXiv 2210.17323).

    The codes minimise ‖(W − Ŵ) X‖² greedily: column j rounds not w_j but the best it can do given the errors already
    made. With H = XᵀX + λI = M Mᵀ, M upper triangular, that is w_j + Σ_{i<j} (w_i − ŵ_i) M_ij / M_jj.

    Cost: I³/3 for the factor, O·I² for the feedback (multiply-adds), and the memory of W in float32.

    Differs: the publication factors H⁻¹ and pushes errors forward through it; we factor H from its last column, which
    is the same in exact arithmetic, saves an inverse and a second factorisation, and never inverts. Groups that are
    fitted when reached see every update, where the released code leaves out those of the current block. A factor that
    fails is tried again with ten times the damping, and says so.

    Attributes:
        damp: λ as a share of the mean diagonal of H.
        order: "none" goes left to right, "activation" by falling diagonal of H; this needs static groups.
        static_groups: steps are fitted to the original weights, as those that were learnt are, or that share a level
            along a row. Else a group's is fitted when its first column is reached, to weights that carry the feedback.
        tries: ranges tried, where steps are fitted before the sweep and the grid is coarse: the whole one, and shrunk
            evenly down to 0.8 (stretched up to 1.6 where words are rounded); each row keeps the one that leaves it the
            least error. Each costs a sweep and O·I².
        block: columns of one block of feedback; a matter of speed only.
        precision: "float32" of the factor, with float64 where that fails; "float64" from the start; "double" makes the
            sweep float64 too, for comparisons.
    """

    damp: float = 0.01
    order: str = "none"
    static_groups: bool = False
    tries: int = 1
    block: int = 128
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"the order is one of {', '.join(ORDERS)}, not {self.order!r}")
        if self.order == "activation" and not self.static_groups:
            raise ValueError("order 'activation' mixes the columns of groups, so it needs static_groups: true")
        if self.damp < 0 or self.block < 1 or self.tries < 1:
            given = f"{self.damp}, {self.block} and {self.tries}"
            raise ValueError(f"damp is 0 or more, block and tries are 1 or more, not {given}")
        if self.precision not in _DTYPES:
            raise ValueError(f"the precision is one of {', '.join(_DTYPES)}, not {self.precision!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hessian"})

    def sweeps(self, fmt: Format, shape: tuple[int, int]) -> int:
        return len(self._shares(fmt, shape))

    def __call__(self, w_OI: Tensor, fmt: Format, stats: Stats) -> Codes:
        dtype, sweep = _DTYPES[self.precision]
        hessian_II = stats["hessian"].to(w_OI.device, dtype)
        dead_I = ~(hessian_II.diagonal() > 0)
        if bool(dead_I.all()):
            note = "no input reached it, so it was rounded to nearest"
            return replace(fmt.encode(w_OI), notes=(note,))
        notes = []
        w_OI = w_OI.to(sweep, copy=True)
        if bool(dead_I.any()):
            w_OI[:, dead_I] = 0
            notes.append(f"{int(dead_I.sum())} of {len(dead_I)} inputs were always 0: their weights became 0")
        order_I = words.falling(hessian_II.diagonal(), fmt.grid.run) if self.order == "activation" else None
        made = shared(
            stats["hessian"],
            (self.damp, self.order, fmt.grid.run, dtype, sweep),
            lambda: factor(hessian_II, self.damp, order_I, sweep),
        )
        notes += made.notes
        shape = (w_OI.shape[0], w_OI.shape[1])
        shares = self._shares(fmt, shape)
        if len(shares) > 1:
            rounded = (self._swept(w_OI.clone(), fmt, fmt.fit(w_OI * share), made, order_I) for share in shares)
            codes = tries.least(rounded, w_OI, fmt, hessian_II)
        else:
            codes = self._swept(w_OI, fmt, fmt.fit(w_OI) if self._known(fmt, shape) else None, made, order_I)
        return replace(codes, notes=tuple(notes))

    def _known(self, fmt: Format, shape: tuple[int, int]) -> bool:
        """Whether steps are there before the sweep begins."""
        known = self.static_groups or fmt.step is not None or fmt.scale.loose is not None
        return known or fmt.grain.span(shape) == shape[1]

    def _shares(self, fmt: Format, shape: tuple[int, int]) -> tuple[float, ...]:
        """Shares of the range that are tried."""
        return tries.shares(self.tries if self._known(fmt, shape) else 1, fmt, shape)

    def _swept(self, w_OI: Tensor, fmt: Format, step: Step | None, made: Factor, order_I: Tensor | None) -> Codes:
        """Codes under known steps, or steps fitted as their groups are reached; `w_OI` may be overwritten."""
        codes = swept(w_OI, fmt, step, made, order_I)
        block = words.whole(self.block, fmt.grid.run)
        if codes is None and step is not None:
            return _fixed(w_OI, fmt, step, made, order_I, block)
        return _refitted(w_OI, fmt, made, block) if codes is None else codes


_DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float32),
    "double": (torch.float64, torch.float64),
}
ROWS = 1024
"""Rows swept together: a block of 128 columns of them is 512 KiB of float32, half a core's second-level cache."""


def _fixed(w_OI: Tensor, fmt: Format, step: Step, made: Factor, order_I: Tensor | None, block: int) -> Codes:
    """Feedback with all steps known; columns in the given order."""
    rows, columns = w_OI.shape
    codes_OI = torch.empty(rows, columns, dtype=torch.uint8, device=w_OI.device)
    steps = Columns.of(step, fmt, (rows, columns), w_OI.dtype)
    group_I = torch.arange(columns, device=w_OI.device, dtype=torch.int64) // fmt.grain.span((rows, columns))
    if order_I is not None:
        w_OI, group_I = w_OI[:, order_I], group_I[order_I]
    groups = group_I.tolist()
    for top in range(0, rows, ROWS):
        part = slice(top, top + ROWS)
        work_RI, out_RI = w_OI[part], codes_OI[part]
        for start in range(0, columns, block):
            end = min(start + block, columns)
            target_BR = _targets(work_RI, made.feedback_II, start, end)
            out_RI[:, start:end] = _sweep(
                work_RI, target_BR, made.feedback_II, start, steps, groups[start:end], part, fmt
            )
    if order_I is not None:
        codes_OI = codes_OI[:, order_I.argsort()]
    return Codes(codes_OI, step)


def _refitted(w_OI: Tensor, fmt: Format, made: Factor, block: int) -> Codes:
    """Feedback with each group's step fitted when its first column is reached."""
    rows, columns = w_OI.shape
    fmt = replace(fmt.bound(w_OI), grain=fmt.grain.taken((rows, columns)))
    span = fmt.grain.span((rows, columns))
    codes_OI = torch.empty(rows, columns, dtype=torch.uint8, device=w_OI.device)
    wide = max(1, block // span) * span  # feedback from earlier blocks comes for several groups at once
    fitted: list[Step] = []
    for first in range(0, columns, wide):
        target_WO = _targets(w_OI, made.feedback_II, first, min(first + wide, columns))
        for start in range(first, min(first + wide, columns), span):
            end = start + span
            target_BO = target_WO[start - first : end - first]
            if start > first:
                target_BO.addmm_(made.feedback_II[first:start, start:end].T, w_OI[:, first:start].T)
            step = fmt.fit(made.conditional(w_OI[:, start:end], target_BO.T, start, end))
            steps = Columns.of(step, fmt, (rows, span), w_OI.dtype)
            fitted.append(step)
            for top in range(0, rows, ROWS):
                part = slice(top, top + ROWS)
                codes_OI[part, start:end] = _sweep(
                    w_OI[part], target_BO[:, part].contiguous(), made.feedback_II, start, steps, [0] * span, part, fmt
                )
    return Codes(codes_OI, together(fitted, fmt))


def _targets(work_RI: Tensor, feedback_II: Tensor, start: int, end: int) -> Tensor:
    """What columns start … end would round given the errors of all before `start`: (B, R), contiguous, never a view.

    Columns of `work_RI` before `start` hold errors w − ŵ, the others weights.
    """
    columns_RB = work_RI[:, start:end]
    if start:
        columns_RB = torch.addmm(columns_RB, work_RI[:, :start], feedback_II[:start, start:end])
    return columns_RB.T.clone(memory_format=torch.contiguous_format)


def _sweep(
    work_RI: Tensor,
    target_BR: Tensor,
    feedback_II: Tensor,
    start: int,
    steps: Columns,
    groups: Sequence[int],
    part: slice,
    fmt: Format,
) -> Tensor:
    """Round the columns of one block in turn; its errors replace its weights in `work_RI`. Codes (R, B)."""
    end = start + target_BR.shape[0]
    if fmt.grid.run > 1:
        scale_RN = torch.stack([steps.at(group, part)[0].expand(len(work_RI)) for group in groups[:: fmt.grid.run]], 1)
        block_BB = feedback_II[start:end, start:end]
        return words.sweep(work_RI[:, start:end], target_BR.T.contiguous(), block_BB, scale_RN.contiguous(), fmt.grid)
    w_BR = work_RI[:, start:end].T.contiguous()
    error_BR = torch.empty_like(target_BR)
    z_BR = torch.empty_like(target_BR)
    feedback_BB = feedback_II[start:end, start:end].T.contiguous()
    for column, group in enumerate(groups):
        target_R = target_BR[column]
        if column:
            target_R = torch.addmv(target_R, error_BR[:column].T, feedback_BB[column, :column])
        scale_R, zero_R = steps.at(group, part)
        z_R = target_R / scale_R
        if zero_R is None:
            z_R = fmt.grid.snap(z_R)
            torch.addcmul(w_BR[column], z_R, scale_R, value=-1, out=error_BR[column])
        else:
            z_R = fmt.grid.snap(z_R.add_(zero_R))
            torch.addcmul(w_BR[column], z_R - zero_R, scale_R, value=-1, out=error_BR[column])
        z_BR[column] = z_R
    work_RI[:, start:end] = error_BR.T
    return fmt.grid.encode(z_BR).T
