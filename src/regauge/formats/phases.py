"""Widely linear form: a real matrix as two complex ones, and each of their entries as one of four phases.

[[A, B], [C, D]] (halves, not interleaved) acts on x = x_top + i x_bottom as U x + V x̄ with U = ½((A + D) + i(C − B))
and V = ½((A − D) + i(C + B)), exactly (Fairy2i, 2512.02901). Each entry of U and V goes to the nearest axis: ±s_re or
±i s_im, the steps being the mean size of what fell on that axis; what is left is taken again, pass by pass. A pass is
two bits for each complex entry, one for each real weight.

Legend: O output channels, I input channels, P passes, H and J halves of O and I, B bytes of a packed row, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.formats.base import ALL
from regauge.kernels.reference import pack, unpack

PHASES = "phases"
EIGHT = 8  # input channels of a byte, over both complex matrices


@dataclass(frozen=True, eq=False)
class Phases:
    """Passes of a matrix in its widely linear form.

    Attributes:
        codes_RB: uint8 (2·P·H, I / 8), two bits an entry: of each pass U's rows and then V's; 0 to 3 for 1, i, −1, −i.
        scales_P22: (P, 2, 2): of each pass (U, V) by (real, imaginary).
    """

    codes_RB: Tensor
    scales_P22: Tensor

    def __post_init__(self) -> None:
        passes, rows = self.scales_P22.shape[0], self.codes_RB.shape[0]
        if self.scales_P22.shape[1:] != (2, 2) or self.codes_RB.dim() != 2 or not passes or rows % (2 * passes):
            shapes = f"{list(self.codes_RB.shape)} and {list(self.scales_P22.shape)}"
            raise ValueError(f"phases are (2·P·O/2, I/8) bytes beside (P, 2, 2) steps, and these are {shapes}")

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Phases:
        """From `codes` and `scales`."""
        return Phases(tensors["codes"], tensors["scales"])

    @property
    def kind(self) -> str:
        return PHASES

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes_RB.shape[0] // self.scales_P22.shape[0], self.codes_RB.shape[1] * EIGHT

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"codes": self.codes_RB, "scales": self.scales_P22}

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.codes_RB, self.scales_P22))

    def _passes(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(codes of U, codes of V, steps) of each pass; codes (H, J)."""
        rows, columns = self.shape
        each = unpack(self.codes_RB, 2, columns // 2).view(len(self.scales_P22), 2, rows // 2, columns // 2)
        return ((codes[0], codes[1], scales) for codes, scales in zip(each, self.scales_P22, strict=True))

    def dense(self, index: slice | Tensor = ALL) -> Tensor:
        u = v = torch.zeros((), dtype=torch.complex64, device=self.codes_RB.device)
        for u_HJ, v_HJ, steps_22 in self._passes():
            u, v = u + values(u_HJ, steps_22[0].float()), v + values(v_HJ, steps_22[1].float())
        return join(u, v)[index].to(self.scales_P22.dtype)

    def apply(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        """y + x Wᵀ. Inputs are added and subtracted by signs; a sum is multiplied by its step once."""
        a_TJ, b_TJ = x_TI.chunk(2, -1)
        real, imaginary = (torch.zeros_like(half) for half in y_TO.chunk(2, -1))
        for u_HJ, v_HJ, steps_22 in self._passes():
            for codes_HJ, (s_re, s_im), b in ((u_HJ, steps_22[0], b_TJ), (v_HJ, steps_22[1], -b_TJ)):
                on_re, on_im = (sign.to(x_TI.dtype).t() for sign in signs(codes_HJ))
                real = real + s_re * (a_TJ @ on_re) - s_im * (b @ on_im)
                imaginary = imaginary + s_re * (b @ on_re) + s_im * (a_TJ @ on_im)
        return y_TO + torch.cat([real, imaginary], -1)


def split(w_OI: Tensor) -> tuple[Tensor, Tensor]:
    """U and V (H, J), complex, of a matrix of even sizes."""
    (a, b), (c, d) = (half.chunk(2, 1) for half in w_OI.chunk(2, 0))
    return torch.complex(a + d, c - b) / 2, torch.complex(a - d, c + b) / 2


def join(u_HJ: Tensor, v_HJ: Tensor) -> Tensor:
    """The matrix again."""
    top = torch.cat([u_HJ.real + v_HJ.real, v_HJ.imag - u_HJ.imag], 1)
    return torch.cat([top, torch.cat([u_HJ.imag + v_HJ.imag, u_HJ.real - v_HJ.real], 1)], 0)


def signs(codes_HJ: Tensor) -> tuple[Tensor, Tensor]:
    """−1, 0 or 1 on the real axis, and on the imaginary."""
    whole = codes_HJ.to(torch.int8)
    return (whole == 0).to(torch.int8) - (whole == 2).to(torch.int8), (whole == 1).to(torch.int8) - (whole == 3).to(
        torch.int8
    )


def values(codes_HJ: Tensor, steps_2: Tensor) -> Tensor:
    """Complex entries of codes."""
    on_re, on_im = signs(codes_HJ)
    return torch.complex(on_re * steps_2[0], on_im * steps_2[1])


def nearest(w_HJ: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, steps) of one complex matrix: sectors cut at ±45° and ±135°, the mean size on each axis."""
    real = w_HJ.real.abs() >= w_HJ.imag.abs()
    codes_HJ = torch.where(real, torch.where(w_HJ.real < 0, 2, 0), torch.where(w_HJ.imag < 0, 3, 1)).to(torch.uint8)
    on = [part.abs()[where] for part, where in ((w_HJ.real, real), (w_HJ.imag, ~real))]
    return codes_HJ, torch.stack([some.mean() if len(some) else some.new_zeros(()) for some in on])


def phases(w_OI: Tensor, passes: int) -> Phases:
    """The passes of a matrix, each of what those before it left.

    Raises:
        ValueError: its halves are not whole bytes.
    """
    if w_OI.shape[0] % 2 or w_OI.shape[1] % EIGHT:
        raise ValueError("phases pair halves: rows must divide by 2 and columns by 8")
    left, rows, steps = list(split(w_OI.float())), list[Tensor](), list[Tensor]()
    for _ in range(passes):
        for side in (0, 1):
            codes_HJ, steps_2 = nearest(left[side])
            left[side] = left[side] - values(codes_HJ, steps_2)
            rows.append(pack(codes_HJ, 2))
            steps.append(steps_2)
    return Phases(torch.cat(rows), torch.stack(steps).view(passes, 2, 2))
