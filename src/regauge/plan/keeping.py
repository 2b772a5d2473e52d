"""What caches take by their rules: bytes a token of one block and of a model, by formats and sizes of heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from regauge import parts
from regauge.anatomy.model import Anatomy, Attention
from regauge.cache.scheme import BlockCache, CachePlan
from regauge.parts import Point, axis_of
from regauge.plan.stores import block_cache, block_of

HEADS = (64, 128)
"""Sizes of heads at which a row's bytes are told, most models' being one of them."""


@dataclass(frozen=True)
class Growth:
    """What another token of a long text takes.

    Attributes:
        before: bytes as bf16.
        after: bytes by the rules, steps included; of a token that is not let go.
        window: the newest tokens, which are whole (the most of any block).
    """

    before: float
    after: float
    window: int = 0

    @property
    def ratio(self) -> float:
        """Of what it was."""
        return self.after / self.before if self.before else 1.0

    def __add__(self, other: Growth) -> Growth:
        return Growth(self.before + other.before, self.after + other.after, max(self.window, other.window))


def growth(points: Mapping[str, Point], anatomy: Anatomy) -> Growth:
    """Over all blocks of a model, of which some stores have points; those behind a sliding window grow no more."""
    total = Growth(2.0 * anatomy.plumbing.cached, 2.0 * anatomy.plumbing.cached)
    held = {block_of(name): point for name, point in points.items()}
    for block, sizes in _growing(anatomy).items():
        total += of_block(held.get(block), sizes)
    return total


def _growing(anatomy: Anatomy) -> dict[int, Attention]:
    """Blocks whose caches grow by every token."""
    found = enumerate(anatomy.attentions) if anatomy.causal else ()
    return {block: sizes for block, sizes in found if sizes is not None and block not in anatomy.plumbing.sliding}


def of_block(point: Point | None, sizes: Attention) -> Growth:
    """Of one block."""
    before = 2.0 * sizes.cached
    if point is None:
        return Growth(before, before)
    scheme = block_cache(point, sizes).scheme
    after = scheme.rate(sizes.kv_heads, (sizes.head_dim, sizes.value_dim))
    return Growth(before, after, scheme.window)


def bytes_at(plan: CachePlan, anatomy: Anatomy, tokens: int, itemsize: int = 2) -> int:
    """Bytes of a sequence of so many tokens over all blocks that grow, none of them let go.

    Args:
        itemsize: bytes of a number that is not rounded.
    """
    total = itemsize * anatomy.plumbing.cached * tokens
    for block, sizes in _growing(anatomy).items():
        scheme = (plan.blocks[block] or BlockCache()).scheme
        total += scheme.bytes(tokens, sizes.kv_heads, (sizes.head_dim, sizes.value_dim), itemsize)
    return total


def rate(plan: CachePlan, anatomy: Anatomy) -> float:
    """Bytes of another token of a long text over all blocks that grow, none of them let go."""
    total = 2.0 * anatomy.plumbing.cached
    for block, sizes in _growing(anatomy).items():
        total += (plan.blocks[block] or BlockCache()).scheme.rate(sizes.kv_heads, (sizes.head_dim, sizes.value_dim))
    return total


def share(point: Point, head: int) -> float:
    """Bytes of a token over those in bf16, at heads of a size."""
    return of_block(point, Attention(1, 1, head, head)).ratio


def bits_of(point: Point) -> tuple[int, ...]:
    """Bits of a code of keys and of values; 16 where they are not rounded."""
    return tuple(_bits(point, axis) for axis in ("keys", "values"))


def _bits(point: Point, axis: str) -> int:
    spec = point[axis]
    return 16 if spec is None else int(parts.build("grid", parts.halves(spec.part)[0]).bits)


def told(point: Point) -> str:
    """A rule's bytes and what it lets go, in a line."""
    shares = {head: f"{share(point, head):.3f}" for head in HEADS}
    alike = len(set(shares.values())) == 1
    spelt = shares[HEADS[0]] if alike else ", ".join(f"{value} (heads of {head})" for head, value in shares.items())
    said = [f"{spelt} of bf16 a token"] if point["keys"] is not None or point["values"] is not None else []
    budget = point["budget"]
    if budget is not None:
        number = parts.numeric(axis_of(point.place, "budget"), budget)
        many = "" if number else parts.spell("budget", budget) or budget.part
        said.append(f"tokens stay by {many}" if many else f"{budget.part} tokens of each head stay")
    if point["merge"] is not None:
        said.append("two layers keep one direction of each token")
    return "; ".join(said) or "everything, as it comes"
