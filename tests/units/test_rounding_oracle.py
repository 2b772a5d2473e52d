"""GPTQ against optimal brain quantisation done the long way, in float64.

The oracle shares no mathematics with ours beyond the problem: it solves for the free weights by least squares after
every column (the normal equations of those not yet rounded), with no triangular factor, no inverse carried along, no
blocks.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regauge.formats.base import Format, Step
from regauge.formats.grains import Channel, Group
from regauge.formats.grids import E2M1, NF4, Int
from regauge.formats.rangers import AbsMax, MinMax
from regauge.formats.scales import Float32, PowerOfTwo, TwoLevel
from regauge.rounding.rounders import GPTQ

FORMATS = {
    "int4 channel": Format(Int(4), Channel(), AbsMax(), Float32()),
    "int3-asym g16": Format(Int(3, False), Group(16), MinMax(), Float32()),
    "int4 g8": Format(Int(4), Group(8), AbsMax(), Float32()),
    "nf4 g16": Format(NF4(), Group(16), AbsMax(), Float32()),
    "nvfp4": Format(E2M1(), Group(16), AbsMax(), TwoLevel()),
    "mxfp4": Format(E2M1(), Group(16), AbsMax(), PowerOfTwo()),
}


def slow(
    w_OI: Tensor, hessian_II: Tensor, fmt: Format, damp: float, ordered: bool, static: bool
) -> tuple[Tensor, Tensor]:
    """(Ŵ, codes) by the definition: round a column, then re-solve for all that are still free."""
    width = w_OI.shape[1]
    h_II = hessian_II + damp * hessian_II.diagonal().mean() * torch.eye(width)
    order = hessian_II.diagonal().argsort(descending=True).tolist() if ordered else list(range(width))
    span = fmt.grain.span((w_OI.shape[0], width))
    bound = fmt.bound(w_OI)
    steps: dict[int, Step] = {}
    if static or span == width:
        whole = fmt.fit(w_OI)
        for group in range(width // span):
            zero = None if whole.zero_G1 is None else whole.zero_G1.view(len(w_OI), -1)[:, group : group + 1]
            steps[group] = Step(whole.scale_G1.view(len(w_OI), -1)[:, group : group + 1], zero, {})
    now_OI = w_OI.clone()
    codes_OI = torch.zeros(w_OI.shape, dtype=torch.uint8)
    for place, column in enumerate(order):
        group = column // span
        if group not in steps:
            steps[group] = bound.fit(now_OI[:, group * span : (group + 1) * span])
        step = steps[group]
        z_O1 = now_OI[:, [column]] / step.scale_G1.double()
        z_O1 = z_O1 if step.zero_G1 is None else z_O1 + step.zero_G1
        z_O1 = fmt.grid.snap(z_O1)
        codes_OI[:, [column]] = fmt.grid.encode(z_O1)
        z_O1 = z_O1 if step.zero_G1 is None else z_O1 - step.zero_G1
        now_OI[:, [column]] = z_O1 * step.scale_G1
        done, free = order[: place + 1], order[place + 1 :]
        if free:  # least of (w − v) H (w − v)ᵀ over the free columns of v
            error_OD = w_OI[:, done] - now_OI[:, done]
            pull_OF = error_OD @ h_II[done][:, free]
            now_OI[:, free] = w_OI[:, free] + torch.linalg.solve(h_II[free][:, free], pull_OF.T).T
    return now_OI, codes_OI


def objective(e_OI: Tensor, hessian_II: Tensor) -> float:
    return float(((e_OI @ hessian_II) * e_OI).sum())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("ordered", "static"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("tokens", [200, 30])  # 30: fewer tokens than inputs, only damping makes it definite
def test_gptq_is_optimal_brain_quantisation(name: str, ordered: bool, static: bool, tokens: int) -> None:
    generator = torch.Generator().manual_seed(len(name) + tokens)
    mix_II = torch.randn(48, 48, generator=generator).double()
    x_TI = torch.randn(tokens, 48, generator=generator).double() @ mix_II
    x_TI *= torch.rand(48, generator=generator).double() * 3 + 0.1
    w_OI = torch.randn(37, 48, generator=generator).double() * 0.05
    hessian_II = x_TI.T @ x_TI / tokens
    fmt = FORMATS[name]
    theirs_OI, expected_OI = slow(w_OI, hessian_II, fmt, 0.01, ordered, static)
    rounder = GPTQ(order="activation" if ordered else "none", static_groups=static, block=13, precision="double")
    codes = rounder(w_OI, fmt, {"hessian": hessian_II})
    ours_OI = fmt.unscaled(fmt.grid.decode(codes.codes_OI).double(), codes.step)
    assert float((codes.codes_OI == expected_OI).float().mean()) >= 0.999
    want = objective(w_OI - theirs_OI, hessian_II)
    assert objective(w_OI - ours_OI, hessian_II) == pytest.approx(want, rel=1e-6)
    nearest_OI = fmt.decode(fmt.encode(w_OI)).double()
    assert want < 0.8 * objective(w_OI - nearest_OI, hessian_II)  # the oracle itself does something


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_working_precisions_reach_the_same_objective(precision: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x_TI = torch.randn(500, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    hessian_II, w_OI = x_TI.T @ x_TI / 500, torch.randn(64, 96, generator=generator)
    fmt = FORMATS["int4 channel"]
    found = []
    for name in (precision, "double"):
        codes = GPTQ(precision=name)(w_OI, fmt, {"hessian": hessian_II})
        found.append(objective((w_OI - fmt.decode(codes)).double(), hessian_II.double()))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
