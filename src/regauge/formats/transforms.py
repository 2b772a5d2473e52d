"""How the channels of an activation are mixed before it is rounded: x → x A, and W → W A⁻ᵀ for every matrix that reads
it, so that the product x Wᵀ stays what it was while outliers are spread or shrunk.

A recipe names a *maker* (`hadamard`), which gives the transform of one tap once its channels are known: new (`fit`), or
again from what an artifact keeps of it (`load`). What can be constructed is not stored.
Laws: forward(x) @ inverse_on(W)ᵀ = x Wᵀ to 1e-12 in float64; an identity transform leaves both as they are.

Legend: O output channels, I input channels; x (..., I).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from regauge.formats.hadamard import Kronecker, straight

NOTHING: Mapping[str, Tensor] = {}


@dataclass(frozen=True, eq=False)
class Native:
    """A transform as kernels apply it: a multiplier a channel, or A = left ⊗ right. Float32, contiguous.

    Attributes:
        sylvester: whether A is a normalised Hadamard of Sylvester's order, for which kernels have a fast way.
    """

    diagonal_I: Tensor | None = None
    pair: tuple[Tensor, Tensor] | None = None
    sylvester: bool = False


@runtime_checkable
class Transform(Protocol):
    """x → x A on the channels of one tap."""

    @property
    def name(self) -> str: ...
    @property
    def tensors(self) -> Mapping[str, Tensor]: ...  # what an artifact keeps of it, by name
    @property
    def bytes(self) -> int: ...
    @property
    def changes(self) -> bool: ...  # False: A is the identity
    @property
    def native(self) -> Native | None: ...  # as kernels apply it, where they can
    def forward(self, x: Tensor) -> Tensor:
        """x A, in the shape and dtype of x (..., I)."""

    def inverse_on(self, w_OI: Tensor) -> Tensor:
        """W A⁻ᵀ: the matrix that reads x A as `w_OI` reads x."""


@runtime_checkable
class Maker(Protocol):
    """A transform whose channels are not known yet: what a recipe names."""

    @property
    def needs(self) -> frozenset[str]: ...  # statistics of the tap

    def fit(self, channels: int, stats: Mapping[str, Tensor], weights: Sequence[Tensor]) -> Transform:
        """The transform of a tap.

        Args:
            stats: of the tap, those of `needs`.
            weights: (O, I) of each site that reads it.
        """

    def load(self, channels: int, tensors: Mapping[str, Tensor]) -> Transform:
        """The same transform from what was kept of it.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """


@dataclass(frozen=True, eq=False)
class Same:
    """A is the identity."""

    name: str = "identity"
    changes: bool = False
    bytes: int = 0
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    native: Native | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x

    def inverse_on(self, w_OI: Tensor) -> Tensor:
        return w_OI


@dataclass(frozen=True, eq=False)
class Scaled:
    """A = diag(1 / s): each channel divided by its own number.

    Attributes:
        divisor_I: s, positive.
    """

    divisor_I: Tensor
    name: str = "diagonal"
    changes: bool = True

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"divisor": self.divisor_I}

    @property
    def bytes(self) -> int:
        return _bytes(self.tensors)

    @cached_property
    def native(self) -> Native:
        return Native(diagonal_I=(1 / self.divisor_I.float()).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return x / self.divisor_I.to(x.device, x.dtype)

    def inverse_on(self, w_OI: Tensor) -> Tensor:
        return w_OI * self.divisor_I.to(w_OI.device, w_OI.dtype)


_ONE = torch.ones(1, 1, dtype=torch.float64, device="cpu")


def _cut(factors: Sequence[Tensor], cut: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return factors[:cut], factors[cut:]


@dataclass(frozen=True, eq=False)
class Turned:
    """A = Qᵀ with Q orthogonal and fast (a product of small factors), so W A⁻ᵀ = W Qᵀ.

    Attributes:
        turn: Q.
        tensors: a factor that no construction gives again.
    """

    turn: Kronecker
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    name: str = "hadamard"
    changes: bool = True

    @property
    def bytes(self) -> int:
        return _bytes(self.tensors)

    @cached_property
    def native(self) -> Native:
        """Cut where the two sides are as small as they can be: kernels multiply by both, channel by channel."""
        factors = self.turn.factors
        cuts = range(1, len(factors) + 1)
        cut = min(cuts, key=lambda cut: sum(math.prod(f.shape[0] for f in side) for side in _cut(factors, cut)))
        left, right = (reduce(torch.kron, side, _ONE).T.float().contiguous() for side in _cut(factors, cut))
        return Native(pair=(left, right), sylvester=self.turn.size & (self.turn.size - 1) == 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.turn(x, -1)

    def inverse_on(self, w_OI: Tensor) -> Tensor:
        return self.turn(w_OI, -1)


@dataclass(frozen=True, eq=False)
class Crossed:
    """A = left ⊗ right, both square and invertible: channel i·b + j goes by left_ik · right_jl (FlatQuant, arXiv
    2410.09426). I = a·b multiplications by a and by b instead of I².

    Attributes:
        left_AA, right_BB: (a, a) and (b, b).
    """

    left_AA: Tensor
    right_BB: Tensor
    name: str = "kronecker"
    changes: bool = True

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"left": self.left_AA, "right": self.right_BB}

    @property
    def bytes(self) -> int:
        return _bytes(self.tensors)

    @cached_property
    def native(self) -> Native:
        return Native(pair=(self.left_AA.float().contiguous(), self.right_BB.float().contiguous()))

    def forward(self, x: Tensor) -> Tensor:
        return _crossed(x, self.left_AA.to(x.device, x.dtype), self.right_BB.to(x.device, x.dtype))

    def inverse_on(self, w_OI: Tensor) -> Tensor:
        left, right = (torch.linalg.inv(side.double()).T.to(w_OI.device) for side in (self.left_AA, self.right_BB))
        return _crossed(w_OI.double(), left, right).to(w_OI.dtype)


def _crossed(x: Tensor, left_AA: Tensor, right_BB: Tensor) -> Tensor:
    pairs = x.reshape(*x.shape[:-1], left_AA.shape[0], right_BB.shape[0])
    return (left_AA.T @ pairs @ right_BB).reshape(x.shape)


@dataclass(frozen=True)
class Identity:
    """The activation as it is."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def fit(self, channels: int, stats: Mapping[str, Tensor], weights: Sequence[Tensor]) -> Transform:
        return Same()

    def load(self, channels: int, tensors: Mapping[str, Tensor]) -> Transform:
        return Same()


@dataclass(frozen=True)
class Hadamard:
    """Each channel spread evenly over all by a Hadamard matrix, while the model runs (QuaRot, arXiv 2404.00456, its
    online Hadamard before `down`): the one input that no rotation of a stream reaches, because an activation function
    stands before it.

    H is symmetric up to its construction and orthogonal; see `formats/hadamard.py` for the sizes that there are. Where
    none is known for the channels, the largest that divides them times a small random orthogonal factor, which is then
    the only thing stored. Differs from QuaRot: no random signs, which change nothing of what one activation's range is.
    Cost: n log n a token, in float32, before the products.
    """

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def fit(self, channels: int, stats: Mapping[str, Tensor], weights: Sequence[Tensor]) -> Transform:
        turn, factor = straight(channels)
        return Turned(turn, {} if factor is None else {"factor": factor})

    def load(self, channels: int, tensors: Mapping[str, Tensor]) -> Transform:
        turn, factor = straight(channels, tensors.get("factor"))
        return Turned(turn, {} if factor is None else {"factor": factor})


@dataclass(frozen=True)
class Diagonal:
    """Each channel divided by its own number while the model runs, for taps into which no scale can be folded:
    s = max|x|^α / max|W|^(1 − α), as SmoothQuant (arXiv 2211.10438, equation 4) chooses it; powers of two nearby.

    Cost: one product a channel; one pass over calibration text.

    Attributes:
        alpha: 0 … 1, how much of the difficulty goes from the activation to the weights.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is 0 to 1, not {self.alpha}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"absmax"})

    def fit(self, channels: int, stats: Mapping[str, Tensor], weights: Sequence[Tensor]) -> Transform:
        largest_I = stats["absmax"].double().clamp(min=1e-5)
        weight_I = torch.stack([w_OI.abs().amax(0) for w_OI in weights]).amax(0).double().clamp(min=1e-5)
        wanted_I = largest_I**self.alpha / weight_I ** (1 - self.alpha)
        return Scaled(torch.exp2(wanted_I.log2().round().clamp(-14, 14)).float())

    def load(self, channels: int, tensors: Mapping[str, Tensor]) -> Transform:
        return Scaled(shaped(tensors, "divisor", (channels,)))


def shaped(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """What was kept under a name.

    Raises:
        ValueError: nothing was, or it has another shape.
    """
    if name not in tensors or tuple(tensors[name].shape) != shape:
        seen = list(tensors[name].shape) if name in tensors else "nothing"
        raise ValueError(f"{name} of a transform is {list(shape)}, and {seen} was found")
    return tensors[name]


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
