"""The store of each block as one more choice of a search: its options, its bytes, and attention as it would read it.

An option is a point of `cache`, as a recipe's rule has it: keys and values each at 8, 4, 3 or 2 bits, in the formats of
the presets (KIVI's grains at two sizes of group, or turned by a Hadamard), the newest tokens whole. Its bytes are by
formula at the context of a budget. What it loses is seen where every token reads what decoding one token after another
would have held: of each query the sealed tokens in their codes, the others as they came.

Legend: B sequences, H query heads, K heads of keys and values, T = S tokens, D and E channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regauge.anatomy.model import Anatomy, Attention
from regauge.cache.scheme import Scheme
from regauge.hosts.base import Runner, Source
from regauge.hosts.heads import Heads
from regauge.parts import CACHE, Point
from regauge.plan.stores import block_cache, stores
from regauge.plan.text import parse
from regauge.runtime.store.packed import Packed
from regauge.runtime.store.sealing import Coding, codings, turned
from regauge.search.options import FULL, Option, SiteGroup, Store

BITS = (8, 4, 3, 2)
WINDOW = 128
"""Newest tokens that stay whole, as KIVI has it: at the contexts that budgets name a small share."""
FORMATS: Mapping[str, tuple[str, str, str]] = {
    "g32": ("int{}-asym/time:32", "int{}-asym/group:32 else group:16 else token", ""),
    "g128": ("int{}-asym/time:128", "int{}-asym/token", ""),
    "turned": ("int{}-asym/token", "int{}-asym/token", "hadamard"),
}
"""Name → formats of keys and of values, and what turns both first."""
PIECE = 512  # tokens that a store is shown at a time when its bytes are read


def store_groups(anatomy: Anatomy, contexts: tuple[int, ...]) -> tuple[SiteGroup, ...]:
    """A choice a block whose store grows with the text.

    Args:
        contexts: tokens at which its bytes count, the largest first; none: there are no such choices.
    """
    found = []
    for block, sizes in enumerate(anatomy.attentions if contexts and anatomy.causal else ()):
        if sizes is None or block in anatomy.plumbing.sliding:
            continue
        options = _options(f"blocks.{block}.cache", anatomy)
        if options:
            found.append(SiteGroup(f"blocks.{block}.cache", (), options, Store(block, sizes, contexts[0])))
    return tuple(found)


def _options(name: str, anatomy: Anatomy) -> tuple[Option, ...]:
    found = []
    for how, formats in FORMATS.items():
        for keys in BITS:
            for values in BITS:
                point = _point(formats, keys, values)
                if not stores(anatomy, {name: point}).reasons:
                    found.append(Option(f"k{keys}v{values}-{how}", point))
    found.sort(key=lambda option: option.bits)
    return (*found, Option(FULL, None)) if found else ()


@lru_cache(maxsize=256)
def _point(formats: tuple[str, str, str], keys: int, values: int) -> Point:
    turn = {"transform": formats[2]} if formats[2] else {}
    rule = {"keys": formats[0].format(keys), "values": formats[1].format(values), "window": WINDOW, **turn}
    point = parse({CACHE: {"*": rule}}).of(CACHE)[0].point
    assert point is not None, "a rule that says something"
    return point


@lru_cache(maxsize=1024)
def scheme_of(point: Point | None, sizes: Attention) -> Scheme:
    """How a block of such heads keeps its past by a point; None: whole."""
    return Scheme() if point is None else block_cache(point, sizes).scheme


def store_bytes(group: SiteGroup, option: Option, tokens: int) -> int:
    """Bytes of one sequence of so many tokens in a block, by the formats; what is not rounded as 16 bits."""
    assert group.store is not None, "a store's choice"
    sizes = group.store.sizes
    return scheme_of(option.choice, sizes).bytes(tokens, sizes.kv_heads, (sizes.head_dim, sizes.value_dim))


def all_bytes(groups: Iterable[SiteGroup], picks: Mapping[str, Option], tokens: int) -> int:
    """The same over all blocks that are chosen for."""
    return sum(store_bytes(group, picks[group.name], tokens) for group in groups if group.store is not None)


def whole_bytes(groups: Iterable[SiteGroup], tokens: int) -> int:
    """What the same blocks take with nothing rounded."""
    return all_bytes(groups, {group.name: Option(FULL, None) for group in groups}, tokens)


def read_bytes(scheme: Scheme, sizes: Attention, tokens: int) -> int:
    """Bytes of a block's store as they are once it has seen so many tokens, in bfloat16: codes, steps, whole rows."""
    store, left = Packed(scheme), tokens
    while left:
        new = min(PIECE, left)
        shapes = ((1, sizes.kv_heads, new, sizes.head_dim), (1, sizes.kv_heads, new, sizes.value_dim))
        store.take(*(torch.zeros(shape, dtype=torch.bfloat16, device="cpu") for shape in shapes))
        left -= new
    return store.bytes


def scheme_at(groups: Iterable[SiteGroup], picks: Mapping[str, Option], block: int) -> Scheme | None:
    """How a block keeps its past under some picks; None: whole."""
    for group in groups:
        option = picks.get(group.name)
        if group.store is not None and group.store.block == block and option is not None and option.choice is not None:
            return scheme_of(option.choice, group.store.sizes)
    return None


def reading(runner: Runner, scheme: Scheme | None) -> AbstractContextManager[None]:
    """While it lasts, blocks attend to what a store by a scheme holds."""
    return nullcontext() if scheme is None else runner.attending(partial(held, scheme=scheme))


def held(heads: Heads, scheme: Scheme, sides: tuple[bool, bool] = (True, True)) -> Tensor:
    """(B, T, H, E) of attention in which each token reads what a store has sealed before it from its codes.

    Args:
        sides: whether keys, and whether values, are rounded at all.
    """
    keys, values = heads.keys_BKSD, heads.values_BKSE
    coded = [
        _decoded(x, one, scheme) if rounded else x
        for x, one, rounded in zip((keys, values), codings(scheme, keys, values), sides, strict=True)
    ]
    tokens, seen = heads.queries_BHTD.shape[2], keys.shape[2]
    sealed = [scheme.sealed(at) for at in range(seen - tokens, seen)]
    starts = [at for at in range(tokens) if at == 0 or sealed[at] != sealed[at - 1]]
    found = []
    for start, stop in zip(starts, [*starts[1:], tokens], strict=True):  # of which each reads the same codes
        last, old = seen - tokens + stop, sealed[start]
        read = [
            torch.cat((code[:, :, :old], x[:, :, old:last]), 2) for code, x in zip(coded, (keys, values), strict=True)
        ]
        out_BHTE = scaled_dot_product_attention(
            heads.queries_BHTD[:, :, start:stop],
            read[0],
            read[1],
            attn_mask=_mask(heads, start, stop, last),
            scale=heads.scale,
            enable_gqa=True,
        )
        found.append(out_BHTE.transpose(1, 2))
    return torch.cat(found, 1)


def _mask(heads: Heads, start: int, stop: int, last: int) -> Tensor:
    """What some queries see of the keys up to the last of them."""
    if heads.mask is not None:
        return heads.mask[:, :, start:stop, :last]
    device = heads.queries_BHTD.device
    return torch.ones(stop - start, last, dtype=torch.bool, device=device).tril(last - (stop - start))


def _decoded(x_BKSD: Tensor, coding: Coding, scheme: Scheme) -> Tensor:
    """All whole blocks of a text through their codes; what does not fill one stays."""
    batch, kept, seen, channels = x_BKSD.shape
    count = seen // scheme.tokens
    if coding.format is None or not count:
        return x_BKSD
    turn = turned(channels) if scheme.hadamard else (lambda x: x)
    whole = turn(x_BKSD[:, :, : count * scheme.tokens]).reshape(-1, scheme.tokens, channels)
    found = turn(coding.open(*coding.seal(whole)).reshape(batch, kept, count * scheme.tokens, channels))
    return torch.cat((found.to(x_BKSD.dtype), x_BKSD[:, :, count * scheme.tokens :]), 2)


@torch.no_grad()
def why_not_read(source: Source, runner: Runner, block: int) -> str:
    """Why attention of a family cannot be made to read codes here; "" where it can. A block is run on a few tokens."""
    seen: list[Heads] = []

    def look(heads: Heads) -> Tensor:
        seen.append(heads)
        (batch, several, tokens, _), width = heads.queries_BHTD.shape, heads.values_BKSE.shape[-1]
        return heads.queries_BHTD.new_zeros(batch, tokens, several, width)

    ids_BT = torch.arange(4, dtype=torch.int64, device="cpu")[None] % source.anatomy.site("embed").shape[0]
    states = runner.begin([ids_BT], source.block(None))
    with runner.attending(look):
        runner.block(block, source.block(block), states)
    if len(seen) != 1:
        return f"attention of {source.anatomy.family} cannot be shown keys and values from codes here"
    if seen[0].beyond:
        return f"attention of {source.anatomy.family} has {', '.join(seen[0].beyond)}, which is not computed on codes"
    return ""
