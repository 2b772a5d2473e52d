"""Arithmetics that a model is evaluated under: what its products would give on a machine that multiplies otherwise.

    with Products(LMul(4)):
        logits = model(ids).logits

Matrix products of the model's modules (linear layers, attention's scores and its sums of values) are computed as the
arithmetic has them; what is taken element by element (gates, norms, rotary angles, softmax) stays as it is. This says
what an arithmetic costs in quality; it is slower than ordinary products, and nothing of its speed is measured.

Legend: T rows of the first factor, I what is summed over, O columns of the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from regauge.errors import RecipeError
from regauge.measure.subject import Outputs

MOST = 7
"""Bits of mantissa at most: bfloat16's."""


@runtime_checkable
class Arithmetic(Protocol):
    """How two numbers are multiplied."""

    @property
    def name(self) -> str: ...

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        """x · y, element by element, float32."""

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """Σ x · y over the last axis of x and the last but one of y, each product as `multiply` has it."""


@dataclass(frozen=True)
class LMul:
    """Products by adding exponents and mantissas (L-Mul, Addition is All You Need, 2410.00907).

    Both numbers are rounded to `bits` bits of mantissa, x = ± 2^e (1 + a / 2^m). Their fields of exponent and mantissa
    are added as integers, with 2^(m − l) for the product of the mantissas that is left out, l = m for m ≤ 3, 3 for 4
    and 4 above; signs are xored. That addition is the definition: where the mantissas carry, with u = (a + b) / 2^m +
    2^−l, the result is 2^(e+1) u and not 2^e (1 + u) as the paper's formula has it (2^(e+2) (u − 1) beyond 2). Zero and
    what is subnormal in float32 give zero; sums are in float32, as the paper's are.

    Cost: the result depends on the sum of two mantissas alone, a table of 2^m × 2^m; its singular vectors turn one
    product of matrices into at most 2^m ordinary ones, exact to float32.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MOST:
            raise RecipeError(f"l-mul adds mantissas of 1 to {MOST} bits, not {self.bits}")

    @property
    def name(self) -> str:
        return f"l-mul:{self.bits}"

    @property
    def offset(self) -> int:
        """2^(m − l), what stands for the product of the mantissas."""
        least = self.bits if self.bits <= 3 else 3 if self.bits == 4 else 4
        return 1 << (self.bits - least)

    @cached_property
    def table(self) -> Tensor:
        """(2^m, 2^m), float64: the product of 1 + a / 2^m and 1 + b / 2^m."""
        size = 1 << self.bits
        a = torch.arange(size, dtype=torch.int64, device="cpu")
        field = a[:, None] + a[None, :] + self.offset
        return torch.exp2((field // size).double()) * (1 + (field % size).double() / size)

    @cached_property
    def _sides(self) -> tuple[Tensor, Tensor]:
        """(R, 2^m) twice, float32: the table as a sum of R products of one side's value by the other's."""
        u, s, v = torch.linalg.svd(self.table)
        kept = s > s[0] * 1e-12
        root = s[kept].sqrt()
        return (u[:, kept] * root).T.float(), (root[:, None] * v[kept]).float()

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(± 2^e, a) of each number rounded to `bits` bits of mantissa; ties to even."""
        size = 1 << self.bits
        mantissa, exponent = torch.frexp(x.float())
        whole = (mantissa.abs() * (2 * size)).round().to(torch.int32)  # size … 2 · size
        over = whole == 2 * size
        whole = torch.where(over, size, whole)
        power = torch.ldexp(torch.sign(mantissa), exponent - 1 + over.to(exponent.dtype))
        power = torch.where(power.abs() < 2.0**-126, 0.0, power)
        return power, (whole - size).clamp_min(0)

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        (p, a), (q, b) = self.parts(x), self.parts(y)
        return p * q * self.table.float().to(p.device)[a, b]

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        (p, a), (q, b) = self.parts(x), self.parts(y)
        left, right = (side.to(p.device) for side in self._sides)
        total: Tensor = sum((p * u[a]) @ (q * v[b]) for u, v in zip(left, right, strict=True))
        return total


class Products(TorchFunctionMode):
    """While it is entered, matrix products that torch is asked for are those of an arithmetic, in float32."""

    def __init__(self, arithmetic: Arithmetic) -> None:
        super().__init__()
        self._under = arithmetic
        self._taken: dict[Any, Callable[..., Tensor]] = {
            torch.nn.functional.linear: self._linear,
            torch.nn.functional.scaled_dot_product_attention: self._attention,
            torch.addmm: self._addmm,
        }
        self._taken |= dict.fromkeys(
            (torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm), self._matmul
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = self._taken.get(func)
        return func(*args, **(kwargs or {})) if own is None else own(*args, **(kwargs or {}))

    def _matmul(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape[-1] == 1 or y.dim() < 2:  # an outer product sums nothing: rotary angles
            return torch.matmul(x, y)
        return self._under.matmul(x, y).to(x.dtype)

    def _linear(self, x: Tensor, w_OI: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self._under.matmul(x, w_OI.t()).to(x.dtype)
        return y if bias is None else y + bias

    def _addmm(self, bias: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return bias + self._matmul(x, y)

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
        score = self._under.matmul(q, k.transpose(-1, -2)) * (scale or 1 / math.sqrt(q.shape[-1]))
        if is_causal:
            seen = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).tril()
            score = score.masked_fill(~seen, -math.inf)
        if attn_mask is not None:
            hidden = attn_mask.dtype is torch.bool
            score = score.masked_fill(~attn_mask, -math.inf) if hidden else score + attn_mask
        return self._under.matmul(score.softmax(-1), v).to(q.dtype)


def under(arithmetic: Arithmetic, outputs: Outputs) -> Outputs:
    """The same outputs, computed under an arithmetic."""

    def run() -> Iterator[Tensor]:
        with Products(arithmetic):
            found = iter(outputs())
        while True:
            with Products(arithmetic):
                made = next(found, None)
            if made is None:
                return
            yield made

    return run
