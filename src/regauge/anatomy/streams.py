"""The streams of a model, built from its sites, its norms and a few facts (`Plumbing`).

A family table fills an `Anatomy` without streams; `with_streams(anatomy)` adds them, with what each admits and why it
refuses the rest. Nothing here knows a family. What is told by the sites and norms themselves is read from them:

* gated unit: a `gate` site beside `up`; mixture of experts: sites `blocks.3.moe.5.up`, each expert a stream of its own
  while gate and up of every expert and the `router` read the norm's output;
* one norm for attention and feed-forward (phi, gptj): the block has no `mlp.norm`, so `mlp` reads `attn.norm`;
* KV groups: rows of `q`, `k` and `v` over `head_dim`; norms on q and k: norms `blocks.3.attn.q.norm`, `.k.norm`,
  shared by the heads where their size is `head_dim`, one long vector (olmo2) where it is not.

Kinds of sites and how they meet the residual: `embed position type class` are tables (N, D) and write along axis 1;
`patch`, `o` and `down` write along axis 0, with their biases; `q k v gate up router head` read along axis 1; a site of
kind `other` (BERT's transform in front of a tied decoder) meets no stream.

Cost: none to speak of; `moves.transform` builds the streams anew after each change of the anatomy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from regauge.anatomy.model import Anatomy, Norm, Plumbing, Port, Site, Stream

TABLES = ("embed", "position", "type", "class")
WRITERS = ("patch", "o", "down")
READERS = ("q", "k", "v", "gate", "up", "router", "head")
KINDS = (*TABLES, *WRITERS, *READERS, "other")

FIXED_BIAS = ("router",)
"""Kinds of sites whose module cannot be given a bias (the router's code multiplies by a bare parameter)."""


def with_streams(anatomy: Anatomy) -> Anatomy:
    """The same anatomy with its streams built (or built anew)."""
    return replace(anatomy, streams=build_streams(anatomy))


def build_streams(anatomy: Anatomy) -> tuple[Stream, ...]:
    """Every stream of the model, residual first, then block by block, then `head.in`."""
    for site in anatomy.sites:
        if site.kind not in KINDS:
            raise ValueError(f"site {site.name} has kind {site.kind!r}; the kinds are {', '.join(KINDS)}")
    streams = [_residual(anatomy)]
    sites: dict[int | None, list[Site]] = defaultdict(list)
    norms: dict[int | None, list[Norm]] = defaultdict(list)
    for site in anatomy.sites:
        sites[site.block].append(site)
    for norm in anatomy.norms:
        norms[norm.block].append(norm)
    for block in range(anatomy.blocks):
        streams += _norm_outputs(anatomy.plumbing, sites[block], norms[block], block)
        streams += _attention(anatomy, sites[block], norms[block], block)
        streams += _feed_forward(anatomy.plumbing, sites[block], block)
    last = [norm for norm in norms[None] if norm.name == "norm"]
    heads = [site for site in sites[None] if site.kind == "head"]
    streams += [_norm_output("head.in", norm, heads, None) for norm in last if heads]
    return tuple(streams)


def may_have_bias(site: Site) -> bool:
    """Whether a site has a bias or its module can be given one: a linear layer can, an expert stack cannot."""
    return site.bias is not None or (site.weight.index is None and site.kind not in FIXED_BIAS)


def input_norms(anatomy: Anatomy) -> tuple[Norm, ...]:
    """The norms through which the residual of a pre-norm or sandwich model is read."""
    return tuple(n for n in anatomy.norms if n.name == "norm" or n.name.endswith((".attn.norm", ".mlp.norm")))


def post_norms(anatomy: Anatomy) -> tuple[Norm, ...]:
    """The norms that write the residual: post-norms, and a norm on the embeddings."""
    return tuple(n for n in anatomy.norms if n.name == "embed.norm" or n.name.endswith(".post"))


def _ports(site: Site, axis: int, start: int = 0, width: int = 1) -> list[Port]:
    """A site's weight, and its bias where the site writes (axis 0 of its weight)."""
    ports = [Port(f"{site.name}.weight", axis, start, width)]
    if axis == 0 and site.bias is not None:
        ports.append(Port(f"{site.name}.bias", 0, start, width))
    return ports


def _norm_ports(norm: Norm, start: int = 0, width: int = 1) -> list[Port]:
    ports = [Port(f"{norm.name}.gain", 0, start, width)] if norm.gain is not None else []
    return ports + ([Port(f"{norm.name}.bias", 0, start, width)] if norm.bias is not None else [])


def _flat(ports: Iterable[Sequence[Port]]) -> tuple[Port, ...]:
    return tuple(port for some in ports for port in some)


def _residual(anatomy: Anatomy) -> Stream:
    sites = anatomy.sites
    writers = [_ports(s, 1) for s in sites if s.kind in TABLES] + [_ports(s, 0) for s in sites if s.kind in WRITERS]
    readers = [_ports(s, 1) for s in sites if s.kind in READERS]
    inputs, posts = input_norms(anatomy), post_norms(anatomy)
    admits = {"permute": "", "select": ""}
    stops = {
        "scale": "a norm reads the residual, and scaling its channels changes the root mean square",
        "shift": "a norm reads the residual, and shifting its channels changes the root mean square",
        "affine": "a norm reads the residual, and only an orthogonal map keeps the root mean square (use rotate)",
        "fold": "fold the norms' outputs: blocks.N.attn.in, blocks.N.mlp.in, head.in",
    }
    for kind, why in (("rotate", _why_not_rotate(anatomy)), ("centre", _why_not_centre(anatomy))):
        (stops if why else admits)[kind] = why
    if anatomy.plumbing.fixed:
        for kind in admits.keys() & {"permute", "select", "rotate"}:
            del admits[kind]
            stops[kind] = anatomy.plumbing.fixed
    return Stream(
        name="residual",
        kind="residual",
        size=anatomy.hidden,
        writers=_flat(writers),
        readers=_flat(readers),
        through=_flat(_norm_ports(norm) for norm in (*inputs, *posts)),
        admits=admits,
        stops=stops,
    )


def _why_not_rotate(anatomy: Anatomy) -> str:
    if anatomy.plumbing.arrangement == "post":
        return "in a post-norm model the norm's output is the residual, so its gain acts channel by channel"
    for norm in post_norms(anatomy):
        if norm.kind == "layer":
            return f"the LayerNorm {norm.name} writes the residual, and its mean is taken channel by channel"
        if not _is_plain(norm):
            return f"the gain of the post-norm {norm.name} writes the residual channel by channel"
    for norm in input_norms(anatomy):
        if norm.kind == "layer":
            return f"{norm.name} is a LayerNorm: centre the writers of the residual first (rewrite `centre`)"
        if not _is_plain(norm):
            return f"{norm.name} has a gain: fold it into its readers first (rewrite `fold-norm`)"
    return ""


def _why_not_centre(anatomy: Anatomy) -> str:
    if anatomy.plumbing.arrangement == "post":
        return "in a post-norm model the norm's output is the residual, and centring it would change what readers see"
    for norm in post_norms(anatomy):
        return f"the norm {norm.name} writes the residual, and centring cannot be moved through it"
    if all(norm.kind == "rms" for norm in input_norms(anatomy)):
        return "its norms are RMSNorm already"
    return ""


def _is_plain(norm: Norm) -> bool:
    return norm.plain or (norm.gain is None and norm.bias is None)


def _norm_outputs(plumbing: Plumbing, sites: Sequence[Site], norms: Sequence[Norm], block: int) -> list[Stream]:
    attention = [site for site in sites if site.kind in ("q", "k", "v")]
    feed = [site for site in sites if site.kind in ("gate", "up", "router")]
    by_place = {norm.name.removeprefix(f"blocks.{block}."): norm for norm in norms}
    if plumbing.arrangement == "post":
        why = "in a post-norm model the norm's output is the residual: the next sum reads it too"
        stops = dict.fromkeys(("scale", "shift", "rotate", "affine", "fold", "permute", "select"), why)
        return [
            Stream(f"blocks.{block}.{place}.in", "norm", readers[0].shape[1], (), _readers(readers), {}, stops, block)
            for place, readers in (("attn", attention), ("mlp", feed))
            if readers
        ]
    if "mlp.norm" not in by_place:
        attention, feed = attention + feed, []
    return [
        _norm_output(f"blocks.{block}.{place}.in", by_place[f"{place}.norm"], readers, block)
        for place, readers in (("attn", attention), ("mlp", feed))
        if readers
    ]


def _readers(sites: Iterable[Site]) -> tuple[Port, ...]:
    return tuple(Port(f"{site.name}.weight", 1) for site in sites)


def _norm_output(name: str, norm: Norm, readers: Sequence[Site], block: int | None) -> Stream:
    mixing = "a norm writes channel by channel: mixing its output takes an online operator in front of the readers"
    order = "the channels of a norm's output stand in the order of the residual: permute or select that"
    admits: dict[str, str] = {}
    stops = {"rotate": mixing, "affine": mixing, "permute": order, "select": order, "centre": "centre the residual"}
    fixed = [site.name for site in readers if not may_have_bias(site)]
    if norm.gain is None:
        stops |= {"scale": f"{norm.name} has no gain to write a scale into", "fold": f"{norm.name} has no gain"}
    else:
        admits["scale"] = "nonzero"
    if fixed:
        stops["shift"] = f"{fixed[0]} reads it and cannot be given a bias"
    elif norm.gain is None:
        stops["shift"] = f"{norm.name} has no parameters to write a shift into"
    else:
        admits["shift"] = ""
    if norm.bias is not None and not norm.plain and fixed:
        stops["fold"] = f"{norm.name} has a bias, and {fixed[0]} reads it and cannot be given one"
    elif norm.gain is not None:
        admits["fold"] = ""
    return Stream(name, "norm", norm.size, tuple(_norm_ports(norm)), _readers(readers), admits, stops, block)


def _attention(anatomy: Anatomy, sites: Sequence[Site], norms: Sequence[Norm], block: int) -> list[Stream]:
    found = {site.kind: site for site in sites if site.kind in ("q", "k", "v", "o")}
    if len(found) < 4:
        return []
    q, k, v, o = (found[kind] for kind in "qkvo")
    size = anatomy.head_dim
    groups = k.shape[0] // size
    repeat = q.shape[0] // size // groups
    gains = {kind: [n for n in norms if n.name == f"{found[kind].name}.norm"] for kind in "qk"}
    shared = any(norm.size == size and q.shape[0] != size for some in gains.values() for norm in some)
    admits, stops = _score_moves(anatomy.plumbing, size)
    streams: list[Stream] = []
    for group in range(groups):
        heads = [group * repeat + i for i in range(repeat)]
        streams.append(_values(v, o, group, heads, size, block))
        name = f"blocks.{block}.qk.{group}"
        if shared:
            why = (
                f"the norms on q and k divide it away and their gains are shared by the heads: "
                f"move blocks.{block}.qk instead"
            )
            stops_here = dict.fromkeys(("scale", "rotate", "affine", "permute", "shift", "select"), why)
            streams.append(Stream(name, "qk", size, (), (), {}, stops_here, block))
            continue
        q_side = [_norm_ports(n, head * size) for n in gains["q"] for head in heads] or [
            _ports(q, 0, head * size) for head in heads
        ]
        k_side = [_norm_ports(n, group * size) for n in gains["k"]] or [_ports(k, 0, group * size)]
        here = (_gains_only(admits), _gains_stops(stops)) if gains["q"] or gains["k"] else (admits, stops)
        streams.append(Stream(name, "qk", size, _flat(q_side), _flat(k_side), *here, block))
    if shared:
        q_gains, k_gains = (_flat(_norm_ports(norm) for norm in gains[kind]) for kind in "qk")
        name = f"blocks.{block}.qk"
        streams.append(Stream(name, "qk", size, q_gains, k_gains, _gains_only(admits), _gains_stops(stops), block))
    long_gains = [_norm_ports(n, 0, n.size // groups) for some in gains.values() for n in some if not shared]
    streams.append(
        Stream(
            name=f"blocks.{block}.heads",
            kind="heads",
            size=groups,
            writers=_flat([_ports(q, 0, 0, repeat * size), _ports(k, 0, 0, size), _ports(v, 0, 0, size)]),
            readers=(Port(f"{o.name}.weight", 1, 0, repeat * size),),
            admits={"permute": "", "select": ""},
            stops=dict.fromkeys(
                ("scale", "shift", "rotate", "affine", "fold", "centre"), "heads are whole: move value or qk streams"
            ),
            block=block,
            through=_flat(long_gains),
        )
    )
    return streams


def _values(v: Site, o: Site, group: int, heads: Sequence[int], size: int, block: int) -> Stream:
    admits = {"scale": "nonzero", "permute": "", "rotate": "", "affine": ""}
    stops = {"select": f"heads keep one size: select whole groups on blocks.{block}.heads"}
    if may_have_bias(v) and may_have_bias(o):
        admits["shift"] = ""  # a row of attention weights sums to one
    else:
        stops["shift"] = f"{v.name} or {o.name} cannot be given a bias"
    return Stream(
        name=f"blocks.{block}.value.{group}",
        kind="value",
        size=size,
        writers=tuple(_ports(v, 0, group * size)),
        readers=tuple(Port(f"{o.name}.weight", 1, head * size) for head in heads),
        admits=admits,
        stops=stops,
        block=block,
    )


def _score_moves(plumbing: Plumbing, size: int) -> tuple[dict[str, str], dict[str, str]]:
    stops = {
        "shift": "the score is a product of queries and keys: a shift of one leaves a term in the other",
        "select": "heads keep one size: select whole groups on the stream `heads`",
    }
    if plumbing.rotary == 0:
        return {"scale": "nonzero", "permute": "", "rotate": "", "affine": ""}, stops
    admits = {"scale": "pairs", "rotate": "pairs", "affine": "pairs", "permute": "free"}
    if plumbing.rotary >= size:
        stops["permute"] = "rotary embeddings turn each pair of channels at its own frequency: the order is fixed"
        del admits["permute"]
    return admits, stops


def _gains_only(admits: dict[str, str]) -> dict[str, str]:
    return {kind: condition for kind, condition in admits.items() if kind == "scale"}


def _gains_stops(stops: dict[str, str]) -> dict[str, str]:
    mixing = "the gain of a norm on q or k acts channel by channel"
    return stops | dict.fromkeys(("rotate", "affine", "permute"), mixing)


def _feed_forward(plumbing: Plumbing, sites: Sequence[Site], block: int) -> list[Stream]:
    units: dict[str, dict[str, Site]] = defaultdict(dict)
    for site in sites:
        if site.kind in ("up", "gate", "down"):
            units[site.name.rpartition(".")[0]][site.kind] = site
    streams = []
    for prefix, unit in units.items():
        if "up" not in unit or "down" not in unit:
            raise ValueError(f"{prefix} has sites {', '.join(sorted(unit))}; a feed-forward unit needs up and down")
        name = f"{prefix.removesuffix('.mlp')}.ffn" if prefix.endswith(".mlp") else f"{prefix}.ffn"
        per_neuron = "the activation acts neuron by neuron"
        admits = {"permute": "", "select": ""}
        stops = dict.fromkeys(("rotate", "affine", "shift"), per_neuron)
        if "gate" in unit:
            admits["scale"] = "nonzero"
        elif plumbing.activation == "relu":
            admits["scale"] = "positive"
        else:
            stops["scale"] = f"{plumbing.activation} does not let a scale through: only ReLU or a gated unit does"
        streams.append(
            Stream(
                name=name,
                kind="ffn",
                size=unit["up"].shape[0],
                writers=tuple(_ports(unit["up"], 0)),
                readers=(Port(f"{unit['down'].name}.weight", 1),),
                admits=admits,
                stops=stops,
                block=block,
                through=tuple(_ports(unit["gate"], 0)) if "gate" in unit else (),
            )
        )
    return streams
