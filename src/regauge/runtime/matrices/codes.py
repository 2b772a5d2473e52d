"""Inputs as the codes of their reading, for kernels that multiply codes: those of `Reading.codes`, to the bit.

Legend: T tokens, I channels, G groups of a token's channels that share a step, N: T, or 1 where all tokens share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regauge.formats.readings import Reading
from regauge.kernels.cpu.coded import Tokens

BYTE, MIDDLE = 127.0, 128.0
"""The greatest code of a signed byte; codes of grids that go beyond are counted from their middle."""


def alone(reading: Reading) -> bool:
    """Whether kernels round inputs so by themselves: to signed integers, a step a token, from all of its own values."""
    plain = reading.step is None and reading.share_1 is None and not reading.transform.changes
    return plain and reading.bits is not None and reading.format.grain.name == "token"


def codes_of(reading: Reading, x_TI: Tensor) -> Tokens:
    """The codes of one token or more; of one with a value that is none or infinite the step is none."""
    x_TI = reading.prepared(x_TI).float()
    found = reading.rounded(x_TI)
    scale_G1, zero_G1 = found.step.scale_G1, found.step.zero_G1
    times = 1 if scale_G1.numel() == 1 else len(x_TI)
    less = MIDDLE if found.format.grid.high > BYTE else 0.0
    z_TI = found.z_TI.sub_(less) if less else found.z_TI
    nothing_T1 = torch.linalg.vector_norm(x_TI, torch.inf, -1, True).mul_(0.0)
    scale_TG = (scale_G1.float().view(times, -1) + nothing_T1).contiguous()
    zero_NG = None if zero_G1 is None else (zero_G1.nan_to_num().view(times, -1) - less).to(torch.int32)
    return Tokens(z_TI.to(torch.int8), scale_TG, zero_NG)
