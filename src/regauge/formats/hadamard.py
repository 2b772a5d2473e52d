"""Hadamard matrices, constructed for every size that a construction is known for, never stored.

What: H with entries ±1 and HᵀH = nI, divided by √n: an orthogonal map that spreads each channel evenly over all.
Constructions: 1, 2 and their Kronecker powers (Sylvester); q + 1 for a prime power q ≡ 3 mod 4 and 2(q + 1) for a prime
power q ≡ 1 mod 4 (Paley I and II, by the quadratic character of GF(q)); Kronecker products of these. That covers the
widths of today's models, since they hold high powers of two: 11008 = 2⁵·344 with 344 = 7³ + 1, 896 = 2⁵·28 with
28 = 3³ + 1, 576 = 2²·12·12 with 12 = 11 + 1. Sizes that need Williamson or Turyn kinds (92, 116, 156, …) are not made.
Elsewhere (an odd width, say) the largest constructible divisor b is used as H_b ⊗ Q with Q a random orthogonal matrix
of size n/b: it still mixes every channel with every other; `Kronecker.made` says what was done.

Cost: a vector of n channels costs n·Σ(sizes of the factors): the Sylvester part is cut into factors of at most 64, so
n log n up to a constant.
Reference: Paley, J. Math. Phys. 12 (1933); signs drawn at random as in QuaRot (2404.00456).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

CHUNK = 64  # largest Sylvester factor applied as one small matrix


@dataclass(frozen=True, eq=False)
class Kronecker:
    """The orthogonal map Q = (F₁ ⊗ F₂ ⊗ …) diag(signs), or its inverse where `undo`.

    Attributes:
        factors: small orthogonal matrices in float64.
        signs: ±1 (n,).
        made: how it was made, for the receipt.
    """

    factors: tuple[Tensor, ...]
    signs: Tensor
    made: str
    undo: bool = False

    @property
    def size(self) -> int:
        return self.signs.shape[0]

    def inverse(self) -> Kronecker:
        return replace(self, undo=not self.undo)

    def __call__(self, x: Tensor, axis: int) -> Tensor:
        """Q (or Q⁻¹) applied along one axis, in x's dtype."""
        y = torch.movedim(x, axis, -1)
        shape = y.shape
        signs = self.signs.to(x.device, x.dtype)
        y = y if self.undo else y * signs
        y = y.reshape(-1, *(factor.shape[0] for factor in self.factors))
        for place, factor in enumerate(self.factors, start=1):
            matrix = factor.to(x.device, x.dtype)
            matrix = matrix if self.undo else matrix.T  # rows of y are vectors: y Fᵀ applies F
            y = torch.movedim(torch.movedim(y, place, -1) @ matrix, -1, place)
        y = y.reshape(shape)
        return torch.movedim(y * signs if self.undo else y, -1, axis)

    def matrix(self) -> Tensor:
        """The map written out (n, n), float64."""
        return self(torch.eye(self.size, dtype=torch.float64, device="cpu"), 0)


def rotation(n: int, seed: int) -> Kronecker:
    """A randomised Hadamard of size n, or the nearest thing to it; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (n,), generator=generator, dtype=torch.int64, device="cpu") * 2 - 1
    orders = factorise(n)
    rest = 1
    if orders is None:
        base = max(b for b in range(1, n) if n % b == 0 and factorise(b) is not None)
        orders, rest = factorise(base) or (), n // base
    factors = [_normalised(order) for order in _chunks(orders)]
    made = f"Hadamard of size {n // rest} ({_say(orders)})"
    if rest > 1:
        gaussian = torch.randn(rest, rest, generator=generator, dtype=torch.float64, device="cpu")
        factors.append(torch.linalg.qr(gaussian)[0])
        made = f"random orthogonal matrix of size {rest}" + (f" times a {made}" if n > rest else "")
        made += f": no construction of a Hadamard of size {n} is known here"
    return Kronecker(
        tuple(factors) or (torch.ones(1, 1, dtype=torch.float64, device="cpu"),), signs.to(torch.float64), made
    )


def straight(n: int, rest: Tensor | None = None) -> tuple[Kronecker, Tensor | None]:
    """A Hadamard of size n without signs, or the nearest thing to it, and its factor that no construction gives.

    Args:
        rest: that factor, where it was kept; without it a new one is drawn, the same each time on one machine.

    Raises:
        ValueError: `rest` does not complete a Hadamard of this size.
    """
    made = rotation(n, 0)
    ones = torch.ones(n, dtype=torch.float64, device="cpu")
    if factorise(n) is not None:
        if rest is not None:
            raise ValueError(f"a Hadamard of size {n} has no factor to keep, and one was found")
        return replace(made, signs=ones), None
    last = made.factors[-1] if rest is None else rest.double()
    if last.shape != made.factors[-1].shape:
        raise ValueError(f"a factor {list(last.shape)} does not complete a Hadamard of size {n}")
    return replace(made, factors=(*made.factors[:-1], last), signs=ones), last


def hadamard(n: int) -> Tensor | None:
    """H (n, n) with entries ±1 in int8 and HᵀH = nI, or None where no construction is known here."""
    orders = factorise(n)
    if orders is None:
        return None
    matrix = torch.ones(1, 1, dtype=torch.int8, device="cpu")
    for order in orders:
        matrix = torch.kron(matrix, prime_order(order))
    return matrix


@lru_cache(maxsize=256)
def factorise(n: int) -> tuple[int, ...] | None:
    """Orders whose Kronecker product has size n, twos first; None where there are none. Prefers a small Paley core."""
    if n & (n - 1) == 0:
        return (2,) * (n.bit_length() - 1)
    for order in range(12, n + 1, 4):
        if n % order == 0 and _paley(order) is not None:
            rest = factorise(n // order)
            if rest is not None:
                return tuple(sorted((*rest, order)))
    return None


def prime_order(order: int) -> Tensor:
    """The Hadamard matrix of one construction: order 2, or Paley I or II."""
    if order == 2:
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8, device="cpu")
    found = _paley(order)
    if found is None:
        raise ValueError(f"no Paley construction has order {order}")
    kind, q = found
    size = q + 1
    core = torch.ones(size, size, dtype=torch.int8, device="cpu")
    core[1:, 1:] = _jacobsthal(q)
    core[0, 0] = 0
    eye = torch.eye(size, dtype=torch.int8, device="cpu")
    if kind == 1:
        core[1:, 0] = -1
        return core + eye
    plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8, device="cpu")
    minus = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8, device="cpu")
    return torch.kron(core, plus) + torch.kron(eye, minus)


def _paley(order: int) -> tuple[int, int] | None:
    if order % 4 == 0:
        if _prime_power(order - 1) and (order - 1) % 4 == 3:
            return 1, order - 1
        half = order // 2 - 1
        if half % 4 == 1 and half > 1 and _prime_power(half):
            return 2, half
    return None


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = pᵉ, or None."""
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    e, rest = 0, q
    while rest % p == 0 and p > 1:
        rest //= p
        e += 1
    return (p, e) if rest == 1 and e else None


def _jacobsthal(q: int) -> Tensor:
    """χ(a − b) for all a, b of GF(q), χ the quadratic character: 0 at 0, 1 at squares, −1 elsewhere."""
    p, e = _prime_power(q) or (0, 0)
    place = torch.tensor([p**i for i in range(e)], dtype=torch.int64, device="cpu")
    character = torch.zeros(q, dtype=torch.int8, device="cpu")
    for exponent, element in enumerate(_powers(p, e)):
        character[torch.tensor(element, dtype=torch.int64, device="cpu") @ place] = (
            -1
        ) ** exponent  # the squares are the even powers
    digits = torch.tensor(list(product(range(p), repeat=e)), dtype=torch.int64, device="cpu").flip(1)
    return torch.stack([character[((digits[a] - digits) % p) @ place] for a in range(q)])


@lru_cache(maxsize=64)
def _powers(p: int, e: int) -> tuple[tuple[int, ...], ...]:
    """1, t, t², … of GF(pᵉ) as polynomials in t over GF(p), lowest power first.

    Tries monic polynomials until t modulo one has order pᵉ − 1: then every element but 0 is a power of t, so the ring
    is a field and t a primitive element. With e = 1 this finds a primitive root.
    """
    one = (1,) + (0,) * (e - 1)
    for low in product(range(p), repeat=e):
        powers = [one]
        while len(powers) < p**e:
            last = powers[-1]
            shifted = (0, *last[:-1])
            powers.append(tuple((x - last[-1] * y) % p for x, y in zip(shifted, low, strict=True)))
            if powers[-1] == one:
                break
        if powers[-1] == one and len(powers) == p**e:
            return tuple(powers[:-1])
    raise ValueError(f"no primitive polynomial of degree {e} over GF({p})")


def _chunks(orders: Sequence[int]) -> list[tuple[int, ...]]:
    """Twos gathered into factors of at most CHUNK; other orders alone."""
    twos = orders.count(2)
    step = CHUNK.bit_length() - 1
    cut = [(2,) * min(step, twos - i) for i in range(0, twos, step)]
    return cut + [(order,) for order in orders if order != 2]


def _normalised(orders: Sequence[int]) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.int8, device="cpu")
    for order in orders:
        matrix = torch.kron(matrix, prime_order(order))
    return matrix.to(torch.float64) / math.sqrt(matrix.shape[0])


def _say(orders: Sequence[int]) -> str:
    twos = orders.count(2)
    words = [f"Sylvester 2^{twos}"] if twos else []
    for order in orders:
        if order != 2:
            kind, q = _paley(order) or (0, 0)
            words.append(f"Paley {'I' * kind} of order {order} over GF({q})")
    return " ⊗ ".join(words) or "1"
