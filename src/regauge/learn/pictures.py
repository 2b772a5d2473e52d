"""Images changed by chance while they are trained on, so that a network sees no image twice.

Legend: B images, C channels, H and W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def moved(x_BCHW: Tensor, most: int, drawn: torch.Generator) -> Tensor:
    """Images mirrored by chance and moved, each by its own number of pixels up to `most`; zeros come in at edges."""
    (height, width), edge = x_BCHW.shape[-2:], functional.pad(x_BCHW, (most,) * 4)
    places = torch.randint(0, 2 * most + 1, (len(x_BCHW), 2), generator=drawn, dtype=torch.int64, device="cpu")
    at = places.tolist()
    cut = torch.stack([edge[n, :, i : i + height, j : j + width] for n, (i, j) in enumerate(at)])
    mirror = torch.rand(len(x_BCHW), 1, 1, 1, generator=drawn, dtype=torch.float32, device="cpu") < 0.5
    return torch.where(mirror.to(cut.device), cut.flip(3), cut)
