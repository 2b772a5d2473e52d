"""Where in memory the numbers of a family's matrices begin.

torch's product of one token sums in an order that depends on where a matrix begins within 64 bytes, and tensors that
are mapped from a file begin where the file has them. So a member loaded alone, whose tensors were copied, would differ
from itself in its family in the last bits. Here both begin at multiples of 64.
"""

from __future__ import annotations

from torch import nn

LINE = 64
"""Bytes; torch's own memory on a CPU begins at multiples of it."""


def align(model: nn.Module) -> None:
    """Copies parameters that begin elsewhere, one at a time; what is mapped from a file is let go of."""
    for one in model.parameters():
        if one.device.type == "cpu" and one.data_ptr() % LINE:
            one.data = one.data.clone()
