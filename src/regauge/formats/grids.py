"""Which numbers exist: integers, small floats, code books.

Every grid is idempotent (`snap(snap(z)) == snap(z)`), monotone, saturates outside [low, high] and says how it breaks
ties. A code is a byte; `table` lists the value of every code, so one definition decodes all grids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from regauge.formats.grid import Single
from regauge.kernels.cpu.sweep import FLOATS, INTEGERS, LIST, Values


@dataclass(frozen=True)
class Int(Single):
    """Integers. Symmetric: −2^(b−1) … 2^(b−1) − 1. Asymmetric: 0 … 2^b − 1 with a zero point.

    Ties go to the even integer, as `torch.round` and compressed-tensors do. Code = z − low.
    """

    bits: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"an integer grid has 1 to 8 bits, not {self.bits}")

    @property
    def name(self) -> str:
        return f"int{self.bits}" if self.symmetric else f"int{self.bits}-asym"

    @property
    def kind(self) -> str:
        return "integer"

    @property
    def offset(self) -> int:
        return 1 << (self.bits - 1) if self.symmetric else 0

    @property
    def cast(self) -> torch.dtype | None:
        return None

    @property
    def low(self) -> float:
        return float(-self.offset)

    @property
    def high(self) -> float:
        return self.low + (1 << self.bits) - 1

    @cached_property
    def table(self) -> Tensor:
        return torch.arange(1 << self.bits, dtype=torch.float32, device="cpu") + self.low

    @property
    def kernel(self) -> Values | None:
        return Values(INTEGERS, self.bits, self.low, self.high, zero=not self.symmetric)

    def snap(self, z: Tensor) -> Tensor:
        return z.round().clamp_(self.low, self.high)

    def encode(self, z: Tensor) -> Tensor:
        return (z - self.low).to(torch.uint8) if self.low else z.to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.float().add_(self.low)


@dataclass(frozen=True)
class Float(Single):
    """Small floats with sign, exponent and mantissa, subnormals included, no infinity: e4m3, e5m2, e3m2, e2m3, e2m1.

    Ties go to the even mantissa. e4m3 is torch's `float8_e4m3fn` and e5m2 its `float8_e5m2`, bit for bit, after
    saturation; e2m1 and e2m3 are compressed-tensors' FP4 and FP6. A code is sign, exponent, mantissa from the top; the
    codes of NaN and infinity are never written. Zero keeps its sign.

    Attributes:
        top: greatest value (e4m3 and e5m2 give codes away to NaN and infinity).
        tiny: least normal value, a power of two; below it the spacing stays `tiny · 2^−mantissa`.
        cast: torch's dtype where there is one.
    """

    name: str
    bits: int
    mantissa: int
    top: float
    tiny: float
    cast: torch.dtype | None = None

    @property
    def kind(self) -> str:
        return "float"

    @property
    def offset(self) -> int:
        return 0

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def low(self) -> float:
        return -self.top

    @property
    def high(self) -> float:
        return self.top

    @cached_property
    def table(self) -> Tensor:
        half = 1 << (self.bits - 1)
        values = []
        for code in range(half):
            exponent, fraction = code >> self.mantissa, (code & ((1 << self.mantissa) - 1)) / (1 << self.mantissa)
            values.append(self.tiny * (fraction if exponent == 0 else 2.0 ** (exponent - 1) * (1 + fraction)))
        values = [value if value <= self.top else math.nan for value in values]
        return torch.tensor(values + [-value for value in values], dtype=torch.float32, device="cpu")

    @property
    def kernel(self) -> Values | None:
        return Values(FLOATS, self.bits, self.low, self.high, mantissa=self.mantissa, tiny=self.tiny)

    def snap(self, z: Tensor) -> Tensor:
        if self.cast is not None:
            return z.clamp(-self.top, self.top).to(self.cast).to(z.dtype)
        size = z.abs().clamp_(max=self.top)
        # The power of two below |z|: the exponent bits alone. Spacing of the grid there: that, times 2^−mantissa.
        spacing = _power_below(size).clamp_(min=self.tiny).mul_(2.0**-self.mantissa)
        return size.div_(spacing).round_().mul_(spacing).copysign_(z)

    def encode(self, z: Tensor) -> Tensor:
        if self.cast is not None:
            return z.to(self.cast).view(torch.uint8)
        size = z.abs().float()
        normal = (size.view(torch.int32) >> (23 - self.mantissa)) - self._offset
        subnormal = (size * (2.0**self.mantissa / self.tiny)).to(torch.int32)
        code = torch.where(size < self.tiny, subnormal, normal)
        return (code | (z.signbit().to(torch.int32) << (self.bits - 1))).to(torch.uint8)

    @property
    def _offset(self) -> int:
        """Code of a float32 less the code here, both as integers: the difference of the exponents' biases."""
        return (126 + int(math.log2(self.tiny))) << self.mantissa

    def decode(self, codes: Tensor) -> Tensor:
        if self.cast is not None:
            return codes.view(self.cast).float()
        return self.table.to(codes.device)[codes.int()]


def _power_below(size: Tensor) -> Tensor:
    """2^floor(log2 size) by masking the mantissa; 0 below the normal floats."""
    if size.dtype == torch.float64:
        return (size.view(torch.int64) & (0x7FF << 52)).view(torch.float64)
    if size.dtype == torch.float32:
        return (size.view(torch.int32) & (0xFF << 23)).view(torch.float32)
    return (size.float().view(torch.int32) & (0xFF << 23)).view(torch.float32).to(size.dtype)


@lru_cache
def E4M3() -> Float:
    """8-bit floats, 4 exponent and 3 mantissa bits, up to 448 (`fn`: no infinity). arXiv 2209.05433."""
    return Float("fp8", 8, 3, 448.0, 2.0**-6, torch.float8_e4m3fn)


@lru_cache
def E5M2() -> Float:
    """8-bit floats, 5 exponent and 2 mantissa bits, up to 57344; infinity is never used. arXiv 2209.05433."""
    return Float("fp8-e5m2", 8, 2, 57344.0, 2.0**-14, torch.float8_e5m2)


@lru_cache
def E3M2() -> Float:
    """6-bit floats, 3 exponent and 2 mantissa bits, up to 28. arXiv 2310.10537."""
    return Float("fp6", 6, 2, 28.0, 2.0**-2)


@lru_cache
def E2M3() -> Float:
    """6-bit floats, 2 exponent and 3 mantissa bits, up to 7.5. arXiv 2310.10537."""
    return Float("fp6-e2m3", 6, 3, 7.5, 1.0)


@lru_cache
def E2M1() -> Float:
    """4-bit floats: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. arXiv 2310.10537."""
    return Float("fp4", 4, 1, 6.0, 1.0)


@dataclass(frozen=True)
class CodeBook(Single):
    """A sorted list of values; a code is the place in it. A tie goes to the lesser value."""

    name: str
    bits: int
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if list(self.values) != sorted(set(self.values)) or not 2 <= len(self.values) <= 1 << self.bits:
            raise ValueError(f"a code book of {self.bits} bits is at most {1 << self.bits} values in rising order")

    @property
    def kind(self) -> str:
        return "table"

    @property
    def offset(self) -> int:
        return 0

    @property
    def cast(self) -> torch.dtype | None:
        return None

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def low(self) -> float:
        return self.values[0]

    @property
    def high(self) -> float:
        return self.values[-1]

    @cached_property
    def table(self) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float32, device="cpu")

    @cached_property
    def _middles(self) -> tuple[float, ...]:
        return tuple((low + high) / 2 for low, high in pairwise(self.values))

    @property
    def kernel(self) -> Values | None:
        return Values(LIST, self.bits, self.low, self.high, values=self.values)

    def snap(self, z: Tensor) -> Tensor:
        return self.table.to(z)[self.encode(z).int()]

    def encode(self, z: Tensor) -> Tensor:
        # Counting the middles below z is four times as fast as a binary search: it runs in vectors.
        codes = torch.zeros(z.shape, dtype=torch.uint8, device=z.device)
        for middle in self._middles:
            codes += z > middle
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        return self.table.to(codes.device)[codes.int()]


def normal_quantiles(bits: int = 4, offset: float = 0.9677083) -> tuple[float, ...]:
    """The NF code book of QLoRA (arXiv 2305.14314, appendix E): quantiles of the normal distribution, divided by the
    largest, with an exact 0 and one more positive than negative value.

    The probabilities are spaced in float32, as in the published code, so that the values are its own to the last bit.

    Args:
        offset: probability of the outermost quantile, ½(1 − 1/32 + 1 − 1/30) for 4 bits.
    """
    half = 1 << (bits - 1)
    up = torch.special.ndtri(torch.linspace(offset, 0.5, half + 1, dtype=torch.float32, device="cpu")[:-1].double())
    down = -torch.special.ndtri(torch.linspace(offset, 0.5, half, dtype=torch.float32, device="cpu")[:-1].double())
    values = torch.cat([down, torch.zeros(1, dtype=torch.float64, device="cpu"), up]).sort().values
    return tuple(float(value) for value in (values.float() / values.float().max()))


@lru_cache
def NF4() -> CodeBook:
    """16 quantiles of the normal distribution. arXiv 2305.14314."""
    return CodeBook("nf4", 4, normal_quantiles())


@lru_cache
def IQ4() -> CodeBook:
    """16 whole numbers of GGUF's IQ4 types, dense near 0; 0 is none of them."""
    return CodeBook("iq4", 4, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))


@lru_cache
def Ternary() -> CodeBook:
    """−1, 0, 1 in two bits."""
    return CodeBook("ternary", 2, (-1.0, 0.0, 1.0))
