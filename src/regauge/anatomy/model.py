"""What a model is: sites, norms and streams, as pure data.

Canonical tensors are named `{site}.weight`, `{site}.bias`, `{norm}.gain`, `{norm}.bias`; of batch norms also
`{norm}.mean`, `{norm}.var`. A site's weight is always (O, I), output channels first, whatever the checkpoint does.
`embed.weight` is (V, D): it *writes* the residual along its axis 1. Names of sites: `embed`, `embed.position`,
`embed.type`, `embed.patch`, `head`, `blocks.3.attn.q`, `blocks.3.mlp.down`, `blocks.3.moe.router`, `blocks.3.moe.5.up`.
Of norms: `embed.norm`, `blocks.3.attn.norm`, `blocks.3.attn.q.norm` (qwen3), `blocks.3.attn.post` (gemma, post-norm),
`blocks.3.mlp.norm`, `blocks.3.mlp.post`, `norm` (the last). Of streams: see `Stream`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

Weights = dict[str, Tensor]
"""Canonical name → tensor. Often only the tensors of one block."""


@dataclass(frozen=True)
class Slot:
    """Where a canonical tensor lies in the module that holds it.

    Attributes:
        key: parameter name in the transformers module, e.g. `model.layers.0.self_attn.q_proj.weight`.
        index: expert of a stacked parameter (leading axis), or None.
        transposed: stored as (I, O), as Conv1D does. Applied after `index`, before `heads` and `rows`.
        heads: (count, parts, which) where parts are interleaved a head at a time (gpt_neox: (H, 3, 0..2)); axis 0 is
            viewed as (count, parts, size) and `which` is taken, with `span - 1` after it (falcon's queries).
        rows: [start, stop) along axis 0 where parts are stacked one after another (phi3 qkv), or None for all.
    """

    key: str
    index: int | None = None
    transposed: bool = False
    heads: tuple[int, int, int] | None = None
    rows: tuple[int, int] | None = None
    span: int = 1


@dataclass(frozen=True)
class Site:
    """One weight matrix with its bias.

    Attributes:
        name: canonical, `blocks.3.attn.q`.
        kind: `q k v o gate up down router in out inner embed position type class patch head`: see `streams`.
        shape: (O, I).
        weight, bias: where they lie; there may be no bias.
        block: its block, or None for embed and head.
        tap: name of the activation it reads, `blocks.3.attn.in`; None for tables looked up by index.
        module: path of the module that computes it (several sites share one where storage is fused).
        expert: which expert it belongs to, or None.
        heads: into how many heads its rows fall (`q`, `k`, `v`) or its columns (`o`); 0 for any other kind.
        window: of a convolution in a block, places of each channel that it reads, side by side in columns; 0: of none.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    weight: Slot
    bias: Slot | None = None
    block: int | None = None
    tap: str | None = None
    module: str = ""
    expert: int | None = None
    heads: int = 0
    window: int = 0

    @property
    def head_dim(self) -> int:
        """Channels of one of its heads; 0 where it has none."""
        return self.shape[self.kind == "o"] // self.heads if self.heads else 0


@dataclass(frozen=True)
class Attention:
    """The sizes of one block's attention, read off its sites: heads that ask, heads that the cache keeps, channels of a
    query or key, and of a value."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int

    @property
    def cached(self) -> int:
        """Numbers that a token leaves in the cache of the block."""
        return self.kv_heads * (self.head_dim + self.value_dim)


@dataclass(frozen=True)
class Norm:
    """One normalisation.

    Attributes:
        name: canonical, `blocks.3.attn.norm`.
        kind: `rms`, `layer`, or `batch` (behind the convolution whose name its own begins with).
        size: channels normalised.
        module: path of its module.
        gain: where its gain lies, or None.
        bias: where its bias lies, or None.
        offset: what the module adds to the stored gain (gemma: 1); canonical gains include it.
        eps: inside the root.
        plain: gain all ones and bias, if any, all zeros, because a `fold` made it so; a batch norm is gone.
        source_kind: kind in the source checkpoint; differs from `kind` after LayerNorm → RMSNorm.
        mean, var: where a batch norm keeps its statistics.
    """

    name: str
    kind: str
    size: int
    module: str
    gain: Slot | None
    bias: Slot | None = None
    offset: float = 0.0
    eps: float = 1e-6
    block: int | None = None
    source_kind: str = ""
    plain: bool = False
    mean: Slot | None = None
    var: Slot | None = None

    @property
    def slots(self) -> dict[str, Slot]:
        """Last word of a canonical tensor → where it lies, of those that the norm has."""
        return {word: slot for word in ("gain", "bias", "mean", "var") if (slot := getattr(self, word)) is not None}


@dataclass(frozen=True)
class Stop:
    """Moves (none: all) that a family does not admit, on streams by kind or by name without the block (`attn.in`)."""

    streams: tuple[str, ...]
    why: str
    moves: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plumbing:
    """The facts of a family that its sites and norms do not tell, and that decide which moves a stream admits.

    Attributes:
        arrangement: where the norms sit. `pre`: x + f(norm(x)). `post`: norm(x + f(x)), as in BERT: the norm's output
            is the residual. `sandwich`: x + post(f(norm(x))), as in gemma2/3: the post-norm's gain writes the
            residual. A parallel one is `pre` too; where both parts share one norm, it is the `attn.norm`.
        activation: of the feed-forward layer, by transformers' name. Only `relu` lets a scale through; in a gated
            unit (a `gate` site beside `up`) the linear branch always does.
        rotary: channels of a head that rotary embeddings turn, from 0; 0: none.
        pairing: which channels turn together. `half`: i with i + rotary/2 (llama, neox). `interleaved`: 2i, 2i + 1.
        fixed: why the channels of the residual must keep their place, where they must: the model has no head, so the
            residual is what it returns, or a parameter outside the anatomy reads it.
        stops: moves that the family does not admit.
        cached: numbers that a token leaves in caches beside keys and values: of attention taken as it is, and copies.
        sliding: blocks that keep a window of the past, or what others keep, and grow by no token.
        scales: tokens come scale by scale, all of one at once; those of earlier scales are kept.
        stays: blocks that cannot be left out; routed: experts that a token goes to, 0 where no fewer can be said.
    """

    arrangement: str = "pre"
    activation: str = "silu"
    rotary: int = 0
    pairing: str = "half"
    fixed: str = ""
    stops: tuple[Stop, ...] = ()
    cached: int = 0
    sliding: tuple[int, ...] = ()
    stays: tuple[int, ...] = ()
    scales: bool = False
    routed: int = 0


@dataclass(frozen=True)
class Port:
    """A run of channels of a canonical tensor that a stream writes or reads: [start, start + size) along `axis`. Gains
    and biases have one axis, 0; a bias of a writing site is a port of its own. A channel of the stream covers `width`
    neighbours of the tensor (a head covers its `head_dim` rows)."""

    tensor: str
    axis: int
    start: int = 0
    width: int = 1


@dataclass(frozen=True)
class Stream:
    """Channels that some tensors write and others read.

    Attributes:
        name: `residual`, `blocks.3.attn.in`, `blocks.3.mlp.in`, `head.in`, `blocks.3.value.1` (KV head 1),
            `blocks.3.qk.1`, `blocks.3.qk` (gains of q/k norms that heads share), `blocks.3.heads` (KV groups),
            `blocks.3.ffn`, `blocks.3.moe.5.ffn`, `blocks.3.mlp.up.out` (what a batch norm reads).
        kind: `residual norm batch value qk heads ffn`.
        size: channels.
        writers, readers: every port. A move multiplies writers by M and readers by its inverse transpose.
        through: ports that act channel by channel in between: gains and biases of norms in the residual, the gate of a
            gated unit. Only `permute` and `select` touch them.
        admits: move kind → "" where allowed, or the condition on its value (`nonzero`, `positive`, `pairs`, `free`:
            see `moves.py`); kinds absent from here are refused.
        stops: move kind → why it is refused, in a sentence.
    """

    name: str
    kind: str
    size: int
    writers: tuple[Port, ...]
    readers: tuple[Port, ...]
    admits: Mapping[str, str] = field(default_factory=dict)
    stops: Mapping[str, str] = field(default_factory=dict)
    block: int | None = None
    through: tuple[Port, ...] = ()


@dataclass(frozen=True)
class Anatomy:
    """A model as data. Rewrites return a new one. Sizes are facts of sites: blocks may differ in every one of them.

    A family table fills all but `streams`, which `with_streams` builds. Where `tied`, `head` exists all the same
    with the slot it has once untied (`lm_head.weight`), and reading `head.weight` gives that of `embed.weight`.
    """

    family: str
    blocks: int
    hidden: int
    sites: tuple[Site, ...]
    norms: tuple[Norm, ...]
    streams: tuple[Stream, ...]
    tied: bool
    causal: bool = True
    notes: tuple[str, ...] = ()
    plumbing: Plumbing = Plumbing()

    def site(self, name: str) -> Site:
        return self._sites[name]

    def stream(self, name: str) -> Stream:
        return self._streams[name]

    def norm(self, name: str) -> Norm:
        return self._norms[name]

    @cached_property
    def _sites(self) -> dict[str, Site]:
        return {site.name: site for site in self.sites}

    @cached_property
    def _by_block(self) -> dict[int | None, tuple[Site, ...]]:
        found: dict[int | None, list[Site]] = {}
        for site in self.sites:
            found.setdefault(site.block, []).append(site)
        return {block: tuple(sites) for block, sites in found.items()}

    @cached_property
    def _norms(self) -> dict[str, Norm]:
        return {norm.name: norm for norm in self.norms}

    @cached_property
    def _streams(self) -> dict[str, Stream]:
        return {stream.name: stream for stream in self.streams}

    @property
    def stream_names(self) -> frozenset[str]:
        return frozenset(self._streams)

    def attention(self, block: int) -> Attention | None:
        """The sizes of a block's attention; None where the block has none."""
        found = {site.kind: site for site in self._by_block.get(block, ()) if site.kind in ("q", "k", "v")}
        if len(found) < 3:
            return None
        return Attention(found["q"].heads, found["k"].heads, found["q"].head_dim, found["v"].head_dim)

    @cached_property
    def attentions(self) -> tuple[Attention | None, ...]:
        """The sizes of every block's attention."""
        return tuple(self.attention(block) for block in range(self.blocks))

    @property
    def cached(self) -> int:
        """Numbers that a token leaves in the cache, over all blocks; 0 where the model keeps none."""
        own = sum(one.cached for one in self.attentions if one is not None)
        return own + self.plumbing.cached if self.causal else 0

    def in_block(self, block: int | None) -> Iterator[Site]:
        return iter(self._by_block.get(block, ()))

    def slots(self, block: int | None) -> dict[str, Slot]:
        """Canonical tensor name → slot, for one block (None: embeddings, last norm and head)."""
        found: dict[str, Slot | None] = {}
        for site in self.in_block(block):
            found |= {f"{site.name}.weight": site.weight, f"{site.name}.bias": site.bias}
        for norm in self.norms:
            if norm.block == block:
                found |= {f"{norm.name}.{word}": slot for word, slot in norm.slots.items()}
        return {name: slot for name, slot in found.items() if slot is not None}

    def with_(self, **changes: object) -> Anatomy:
        return replace(self, **changes)  # type: ignore[arg-type]  # dataclasses.replace is untyped by field
