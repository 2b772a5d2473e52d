"""How far a member is from its teacher on the same text. Lower = nearer; the teacher has no gradient.

Legend: B windows, T tokens, V vocabulary, D channels (of a member perhaps fewer: the first ones).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss, normalize

from regauge.errors import ModelError
from regauge.learn.training import PLUS


@dataclass(frozen=True, eq=False)
class Read:
    """What a model makes of some text.

    Attributes:
        logits_BTV: of a model with a head.
        hidden_BTD: behind the last block.
        mask_BT: 1 where there is text; None: everywhere.
        fronts: block of the whole → the states (B, T, D) that it reads, of the blocks that run.
    """

    hidden_BTD: Tensor
    logits_BTV: Tensor | None = None
    mask_BT: Tensor | None = None
    fronts: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def detached(self) -> Read:
        logits = None if self.logits_BTV is None else self.logits_BTV.detach()
        fronts = {block: one.detach() for block, one in self.fronts.items()}
        return Read(self.hidden_BTD.detach(), logits, self.mask_BT, fronts)


@runtime_checkable
class Distiller(Protocol):
    """The distance of a member from its teacher, a scalar, differentiable in the member."""

    def __call__(self, member: Read, teacher: Read) -> Tensor: ...


def labels(read: Read, ids_BT: Tensor) -> Tensor:
    """The cross-entropy with the next token, nats a token."""
    assert read.logits_BTV is not None, "a head is trained on the next token"
    return cross_entropy(read.logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())


def classes(read: Read, classes_B: Tensor) -> Tensor:
    """The cross-entropy with the class, nats an image."""
    assert read.logits_BTV is not None, "a classifier has a head"
    return cross_entropy(read.logits_BTV, classes_B)


@dataclass(frozen=True)
class Nothing:
    """No distance: what is learnt is learnt from the text."""

    def __call__(self, member: Read, teacher: Read) -> Tensor:
        return member.hidden_BTD.new_zeros(())


@dataclass(frozen=True)
class Divergence:
    """KL(teacher ‖ member), nats a token (arXiv 1503.02531 at temperature 1)."""

    def __call__(self, member: Read, teacher: Read) -> Tensor:
        log_p, log_q = _logs(member, teacher)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@dataclass(frozen=True)
class Alpha:
    """The larger of two α-divergences, one that punishes what a member misses and one what it makes up, with the ratio
    of the two probabilities bounded (arXiv 2102.07954, equations 3 to 5).

    D(p ‖ q) = (Σ q (p / q)^α − 1) / (α (α − 1)), whose gradient is −Σ q (p / q)^α ∇ log q / α; at α = 1 it is the KL.

    Attributes:
        low, high: the two α; bound: the most that (p / q)^α may be in the gradient.
    """

    low: float = -1.0
    high: float = 1.0
    bound: float = 5.0

    def __call__(self, member: Read, teacher: Read) -> Tensor:
        log_p, log_q = _logs(member, teacher)
        return torch.stack([self._one(log_p, log_q, alpha) for alpha in (self.low, self.high)]).max()

    def _one(self, log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
        if alpha == 1:
            return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        with torch.no_grad():
            ratio = (alpha * (log_p - log_q)).exp().clamp(max=self.bound)
            mass = log_q.exp() * ratio
            value = (mass.sum(-1) - 1).mean() / (alpha * (alpha - 1))
        slope = -(mass * log_q).sum(-1).mean() / alpha
        return value + slope - slope.detach()


@dataclass(frozen=True)
class Features:
    """The mean squared distance of the states behind the last block, each token's scaled to length √D
    (arXiv 1412.6550); of a narrower member, to the teacher's first channels."""

    def __call__(self, member: Read, teacher: Read) -> Tensor:
        return _apart(member.hidden_BTD, teacher.hidden_BTD, member)


@dataclass(frozen=True)
class Fronts:
    """As `Features`, of the states that blocks read instead of those behind the last: what a block reads in a member,
    however few run before it, is what it reads in its teacher (after 1909.10351, which compares layers at even steps).
    The mean over the blocks of the member but its first."""

    def __call__(self, member: Read, teacher: Read) -> Tensor:
        if not member.fronts:
            raise ModelError(
                "fronts compares what blocks read, and this model does not tell it: take features instead."
            )
        blocks = sorted(member.fronts.keys() & teacher.fronts.keys())[1:]
        found = [_apart(member.fronts[one], teacher.fronts[one], member) for one in blocks]
        return torch.stack(found).mean() if found else member.hidden_BTD.new_zeros(())


@dataclass(frozen=True)
class Relations:
    """The mean squared distance of how alike tokens are to each other, as cosines (arXiv 1904.05068): widths may
    differ."""

    def __call__(self, member: Read, teacher: Read) -> Tensor:
        own, other = (_alike(read.hidden_BTD) for read in (member, teacher))
        if member.mask_BT is None:
            return mse_loss(own, other)
        both = member.mask_BT[:, :, None] * member.mask_BT[:, None, :]
        return ((own - other).square() * both).sum() / both.sum()


@dataclass(frozen=True)
class Embedding:
    """The squared distance of the embeddings of a text, the mean of its states scaled to length 1 (arXiv 2509.12539):
    what a member encodes then lies in the teacher's space, and either may encode queries or documents."""

    def __call__(self, member: Read, teacher: Read) -> Tensor:
        own, other = (embedding(read) for read in (member, teacher))
        return (own - other).square().sum(-1).mean()


def embedding(read: Read) -> Tensor:
    """(B, D), of length 1."""
    hidden, mask = read.hidden_BTD.float(), read.mask_BT
    mean = hidden.mean(1) if mask is None else (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return normalize(mean, dim=-1)


def _logs(member: Read, teacher: Read) -> tuple[Tensor, Tensor]:
    assert member.logits_BTV is not None, "a distance of distributions is one of logits"
    assert teacher.logits_BTV is not None, "a distance of distributions is one of logits"
    return torch.log_softmax(teacher.logits_BTV.float(), -1), torch.log_softmax(member.logits_BTV.float(), -1)


def _alike(hidden_BTD: Tensor) -> Tensor:
    unit = normalize(hidden_BTD.float(), dim=-1)
    return unit @ unit.transpose(1, 2)


def _apart(own_BTD: Tensor, other_BTD: Tensor, read: Read) -> Tensor:
    """The mean squared distance of states of length 1, of the first channels where the other has more."""
    size = own_BTD.shape[-1]
    own, other = (normalize(_kept(one, read), dim=-1) for one in (own_BTD, other_BTD[..., :size]))
    return size * mse_loss(own, other)


def _kept(hidden_BTD: Tensor, read: Read) -> Tensor:
    return hidden_BTD if read.mask_BT is None else hidden_BTD[read.mask_BT.bool()]


DISTILLERS: Mapping[str, Distiller] = {
    "none": Nothing(),
    "kl": Divergence(),
    "alpha": Alpha(),
    "features": Features(),
    "fronts": Fronts(),
    "relations": Relations(),
    "embedding": Embedding(),
}
"""Name in a recipe → distiller. The names are also in `training.py`, which imports no torch; a test compares them."""
OF_LOGITS = ("none", "kl", "alpha")
"""Those that need a model with a head."""
OF_STATES = ("features", "fronts", "relations", "embedding")
"""Those that read states and nothing else of a teacher."""


@dataclass(frozen=True)
class Sum:
    """Several distances at once, each weighing as much."""

    parts: tuple[Distiller, ...]

    def __call__(self, member: Read, teacher: Read) -> Tensor:
        return torch.stack([one(member, teacher) for one in self.parts]).sum()


def distiller_of(text: str) -> Distiller:
    """`embedding+features` → the distiller; names were checked when the recipe was read."""
    names = text.split(PLUS)
    return DISTILLERS[text] if len(names) == 1 else Sum(tuple(DISTILLERS[name] for name in names))


def of_states(text: str) -> bool:
    """Whether a distiller reads states and no logits of a teacher."""
    return all(name in OF_STATES for name in text.split(PLUS))
