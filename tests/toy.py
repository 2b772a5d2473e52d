"""A transformer read straight off an anatomy and its canonical tensors: plain torch, float64, no host.

Why: the laws of moves must not depend on the host that maps canonical tensors to a real module; this is the smallest
thing that runs an `Anatomy`. Real modules of every family are tested beside it.
Legend: B batch, T tokens, D residual, H heads, G KV heads, S channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy, Norm, Plumbing, Site, Slot, Weights
from regauge.anatomy.streams import with_streams

ACTIVATIONS = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}


@dataclass(frozen=True)
class Shape:
    """What to build. Sizes are prime and unequal where the architecture lets them be."""

    arrangement: str = "pre"
    norm: str = "rms"
    activation: str = "silu"
    gated: bool = True
    biased: bool = False
    parallel: bool = False
    one_norm: bool = False
    rotary: int = 6
    pairing: str = "half"
    qk_norm: str = ""  # "", "shared" or "long"
    experts: int = 0
    tied: bool = False
    embed_norm: bool = False
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 10
    hidden: int = 23
    neurons: int = 37
    vocab: int = 29
    blocks: int = 2


SHAPES = {
    "llama": Shape(),
    "llama-tied": Shape(tied=True, rotary=10),
    "qwen2": Shape(biased=True, rotary=10, pairing="half"),
    "qwen3": Shape(qk_norm="shared", rotary=10),
    "olmo2": Shape(qk_norm="long", rotary=10),
    "gemma": Shape(arrangement="sandwich", tied=True, activation="gelu", rotary=10),
    "gpt2": Shape(norm="layer", gated=False, biased=True, rotary=0, activation="gelu", tied=True, kv_heads=6),
    "neox": Shape(norm="layer", gated=False, biased=True, parallel=True, rotary=4, activation="gelu", kv_heads=6),
    "gptj": Shape(norm="layer", gated=False, parallel=True, one_norm=True, rotary=6, pairing="interleaved"),
    "opt": Shape(norm="layer", gated=False, biased=True, activation="relu", rotary=0, kv_heads=6),
    "bert": Shape(arrangement="post", norm="layer", gated=False, biased=True, rotary=0, embed_norm=True, kv_heads=6),
    "bloom": Shape(norm="layer", gated=False, biased=True, rotary=0, embed_norm=True, kv_heads=6),
    "moe": Shape(experts=3),
    "alibi": Shape(rotary=0),
}


def build(shape: Shape, seed: int = 0) -> tuple[Anatomy, Weights]:
    """A random model: its anatomy and every canonical tensor, gains away from one and biases away from zero."""
    sites: list[Site] = []
    norms: list[Norm] = []

    def site(name: str, kind: str, o: int, i: int, block: int | None, bias: bool, expert: int | None = None) -> None:
        slot = Slot(f"{name}.weight", index=expert)
        heads = {"q": shape.heads, "o": shape.heads, "k": shape.kv_heads, "v": shape.kv_heads}.get(kind, 0)
        bias_slot = Slot(f"{name}.bias") if bias else None
        sites.append(Site(name, kind, (o, i), slot, bias_slot, block, expert=expert, heads=heads))

    def norm(name: str, size: int, block: int | None, kind: str = shape.norm) -> None:
        bias = Slot(f"{name}.bias") if kind == "layer" else None
        norms.append(Norm(name, kind, size, name, Slot(f"{name}.weight"), bias, block=block, source_kind=kind))

    d, s = shape.hidden, shape.head_dim
    site("embed", "embed", shape.vocab, d, None, False)
    if shape.rotary == 0:
        site("embed.position", "position", 17, d, None, False)
    if shape.embed_norm:
        norm("embed.norm", d, None)
    for b in range(shape.blocks):
        for kind, o, i in (("q", shape.heads * s, d), ("k", shape.kv_heads * s, d), ("v", shape.kv_heads * s, d)):
            site(f"blocks.{b}.attn.{kind}", kind, o, i, b, shape.biased)
        site(f"blocks.{b}.attn.o", "o", d, shape.heads * s, b, shape.biased)
        for kind, count in (("q", shape.heads), ("k", shape.kv_heads)):
            if shape.qk_norm:
                norm(f"blocks.{b}.attn.{kind}.norm", s if shape.qk_norm == "shared" else count * s, b, "rms")
        if shape.arrangement != "post":
            norm(f"blocks.{b}.attn.norm", d, b)
            if not shape.one_norm:
                norm(f"blocks.{b}.mlp.norm", d, b)
        if shape.arrangement != "pre":
            norm(f"blocks.{b}.attn.post", d, b)
            norm(f"blocks.{b}.mlp.post", d, b)
        if shape.experts:
            site(f"blocks.{b}.moe.router", "router", shape.experts, d, b, False)
        for e in range(max(shape.experts, 1)):
            prefix = f"blocks.{b}.moe.{e}" if shape.experts else f"blocks.{b}.mlp"
            which = e if shape.experts else None
            for kind in ("gate", "up") if shape.gated else ("up",):
                site(f"{prefix}.{kind}", kind, shape.neurons + 2 * e, d, b, shape.biased, which)
            site(f"{prefix}.down", "down", d, shape.neurons + 2 * e, b, shape.biased, which)
    if shape.arrangement != "post":
        norm("norm", d, None)
    site("head", "head", shape.vocab, d, None, False)
    anatomy = Anatomy(
        family="toy",
        blocks=shape.blocks,
        hidden=d,
        sites=tuple(sites),
        norms=tuple(norms),
        streams=(),
        tied=shape.tied,
        plumbing=Plumbing(shape.arrangement, shape.activation, shape.rotary, shape.pairing),
    )
    anatomy = with_streams(anatomy)
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    weights: Weights = {}
    for x in sites:
        weights[f"{x.name}.weight"] = draw(*x.shape) / x.shape[1] ** 0.5
        if x.bias is not None:
            weights[f"{x.name}.bias"] = 0.3 * draw(x.shape[0])
    for n in norms:
        weights[f"{n.name}.gain"] = 0.4 + draw(n.size).abs()
        if n.bias is not None:
            weights[f"{n.name}.bias"] = 0.3 * draw(n.size)
    if shape.tied:
        weights["head.weight"] = weights["embed.weight"]
    return anatomy, weights


def normalise(anatomy: Anatomy, w: Weights, name: str, x: Tensor) -> Tensor:
    """One norm, of the kind that the anatomy says."""
    norm = anatomy.norm(name)
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * w[f"{name}.gain"]
    return x + w[f"{name}.bias"] if norm.bias is not None else x


SEEN: list[Callable[[str, Tensor], Tensor]] = []


@contextmanager
def seeing(look: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Within, every site's input goes through `look`, which may note it or change it."""
    SEEN.append(look)
    try:
        yield
    finally:
        SEEN.pop()


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """A site, with its bias if it has one now."""
    for look in SEEN:
        x = look(name, x)
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def rotate(x_BHTS: Tensor, plumbing: Plumbing) -> Tensor:
    """Rotary embedding, written with complex numbers (unlike the package, which speaks of pairs)."""
    n = plumbing.rotary
    if n == 0:
        return x_BHTS
    turn, rest = x_BHTS[..., :n], x_BHTS[..., n:]
    half = plumbing.pairing == "half"
    real, imaginary = (turn[..., : n // 2], turn[..., n // 2 :]) if half else (turn[..., ::2], turn[..., 1::2])
    frequency = 10.0 ** (-torch.arange(n // 2, dtype=torch.float64) / 3)
    angle = torch.arange(x_BHTS.shape[2], dtype=torch.float64)[:, None] * frequency
    z = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    turned = torch.cat([z.real, z.imag], -1) if half else torch.stack([z.real, z.imag], -1).flatten(-2)
    return torch.cat([turned, rest], -1)


def attention(anatomy: Anatomy, w: Weights, p: str, x: Tensor) -> Tensor:
    """Causal grouped-query attention."""
    s = anatomy.site(f"{p}.attn.q").head_dim
    names = {norm.name: norm for norm in anatomy.norms}
    y = {kind: linear(w, f"{p}.attn.{kind}", x) for kind in "qkv"}
    for kind in "qk":
        name = f"{p}.attn.{kind}.norm"
        if name in names:
            parts = y[kind].unflatten(-1, (-1, names[name].size))
            y[kind] = normalise(anatomy, w, name, parts).flatten(-2)
    q, k, v = (y[kind].unflatten(-1, (-1, s)).transpose(1, 2) for kind in "qkv")
    repeat = q.shape[1] // k.shape[1]
    q, k = rotate(q, anatomy.plumbing), rotate(k, anatomy.plumbing)
    k, v = (t.repeat_interleave(repeat, 1) for t in (k, v))
    score = q @ k.mT / s**0.5
    score = score.masked_fill(torch.ones_like(score, dtype=torch.bool).triu(1), float("-inf"))
    return linear(w, f"{p}.attn.o", (score.softmax(-1) @ v).transpose(1, 2).flatten(-2))


def unit(anatomy: Anatomy, w: Weights, p: str, x: Tensor) -> Tensor:
    """One feed-forward unit."""
    act = ACTIVATIONS[anatomy.plumbing.activation]
    up = linear(w, f"{p}.up", x)
    hidden = act(linear(w, f"{p}.gate", x)) * up if f"{p}.gate.weight" in w else act(up)
    return linear(w, f"{p}.down", hidden)


def feed(anatomy: Anatomy, w: Weights, p: str, x: Tensor) -> Tensor:
    """The feed-forward layer; a mixture weighs every expert by its routing probability."""
    if f"{p}.moe.router.weight" not in w:
        return unit(anatomy, w, f"{p}.mlp", x)
    route = linear(w, f"{p}.moe.router", x).softmax(-1)
    outputs = [unit(anatomy, w, f"{p}.moe.{e}", x) for e in range(route.shape[-1])]
    return sum((route[..., e, None] * y for e, y in enumerate(outputs)), torch.zeros_like(x))


def block(anatomy: Anatomy, w: Weights, b: int, x: Tensor, parallel: bool = False) -> Tensor:
    """One block in any of the three arrangements."""
    p, kind = f"blocks.{b}", anatomy.plumbing.arrangement
    if kind == "post":
        x = normalise(anatomy, w, f"{p}.attn.post", x + attention(anatomy, w, p, x))
        return normalise(anatomy, w, f"{p}.mlp.post", x + feed(anatomy, w, p, x))
    a_in = normalise(anatomy, w, f"{p}.attn.norm", x)
    two = f"{p}.mlp.norm.gain" in w
    if parallel:
        m_in = normalise(anatomy, w, f"{p}.mlp.norm", x) if two else a_in
        return x + attention(anatomy, w, p, a_in) + feed(anatomy, w, p, m_in)
    a = attention(anatomy, w, p, a_in)
    x = x + (normalise(anatomy, w, f"{p}.attn.post", a) if kind == "sandwich" else a)
    m = feed(anatomy, w, p, normalise(anatomy, w, f"{p}.mlp.norm", x))
    return x + (normalise(anatomy, w, f"{p}.mlp.post", m) if kind == "sandwich" else m)


def forward(anatomy: Anatomy, w: Weights, ids_BT: Tensor, parallel: bool = False) -> Tensor:
    """Logits (B, T, V) in float64."""
    w = {name: tensor.to(torch.float64) for name, tensor in w.items()}
    x = w["embed.weight"][ids_BT]
    if "embed.position.weight" in w:
        x = x + w["embed.position.weight"][: ids_BT.shape[1]]
    if "embed.norm.gain" in w:
        x = normalise(anatomy, w, "embed.norm", x)
    for b in range(anatomy.blocks):
        x = block(anatomy, w, b, x, parallel)
    if "norm.gain" in w:
        x = normalise(anatomy, w, "norm", x)
    return linear({**w, "head.weight": w["embed.weight"]} if anatomy.tied else w, "head", x)
