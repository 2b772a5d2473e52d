"""The streams of a model, built from its sites, its norms and a few facts (`Plumbing`).

A family table fills an `Anatomy` without streams; `with_streams(anatomy)` adds them, with what each admits and why it
refuses the rest. Nothing here knows a family. What is told by the sites and norms themselves is read from them:

* gated unit: a `gate` site beside `up`; mixture of experts: sites `blocks.3.moe.5.up`, each expert a stream of its own
  while gate and up of every expert and the `router` read the norm's output;
* one norm for attention and feed-forward (phi, gptj): the block has no `mlp.norm`, so `mlp` reads `attn.norm`;
* KV groups: the heads of `k` (each site says how many it has); norms on q and k: norms `blocks.3.attn.q.norm`,
  `.k.norm`, shared by the heads where their size is that of a head, one long vector (olmo2) where it is not.

Kinds of sites and how they meet the residual: `embed position type class` are tables (N, D) and write along axis 1;
`patch`, `o`, `down` and `out` write along axis 0, with their biases; `q k v gate up router in head` read along axis 1;
a site of kind `inner` meets no stream. `in`, `inner` and `out` are the layers of a mixer that is taken as it is (a
recurrence, a convolution, latent attention): what happens between them is its own, so it has no streams inside.

What a family does not admit for reasons of its own (ALiBi gives each head its own slope) stands in `Plumbing.stops`.

Cost: none to speak of; `moves.transform` builds the streams anew after each change of the anatomy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from regauge.anatomy.heads import attention_streams
from regauge.anatomy.model import Anatomy, Norm, Plumbing, Port, Site, Stream
from regauge.anatomy.ports import flat, may_have_bias, norm_ports, ports, statistics_ports

TABLES = ("embed", "position", "type", "class")
WRITERS = ("patch", "o", "down", "out")
READERS = ("q", "k", "v", "gate", "up", "router", "in", "head")
KINDS = (*TABLES, *WRITERS, *READERS, "inner")
FEEDING = ("mlp", "moe")
"""First words, in a block, of the sites that read what the norm of the feed-forward layer gives."""


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
        streams += attention_streams(anatomy, sites[block], norms[block], block)
        streams += _feed_forward(anatomy.plumbing, sites[block], norms[block], block)
    streams += [_convolved(anatomy, norm) for norm in anatomy.norms if norm.kind == "batch" and norm.mean is not None]
    last = [norm for norm in norms[None] if norm.name == "norm"]
    heads = [site for site in sites[None] if site.kind == "head"]
    streams += [_norm_output("head.in", norm, heads, None) for norm in last if heads]
    return tuple(_stopped(stream, anatomy.plumbing) for stream in streams)


def _stopped(stream: Stream, plumbing: Plumbing) -> Stream:
    """The stream without the moves that its family does not admit."""
    place = stream.name.removeprefix(f"blocks.{stream.block}.")
    admits, stops = dict(stream.admits), dict(stream.stops)
    for stop in plumbing.stops:
        if stream.kind in stop.streams or place in stop.streams:
            for kind in stop.moves or tuple(admits):
                if admits.pop(kind, None) is not None:
                    stops[kind] = stop.why
    return replace(stream, admits=admits, stops=stops)


def input_norms(anatomy: Anatomy) -> tuple[Norm, ...]:
    """The norms through which the residual of a pre-norm or sandwich model is read."""
    return tuple(n for n in anatomy.norms if n.name == "norm" or n.name.endswith((".attn.norm", ".mlp.norm")))


def post_norms(anatomy: Anatomy) -> tuple[Norm, ...]:
    """The norms that write the residual: post-norms, and a norm on the embeddings."""
    return tuple(n for n in anatomy.norms if n.name == "embed.norm" or n.name.endswith(".post"))


def _residual(anatomy: Anatomy) -> Stream:
    sites = anatomy.sites
    writers = [ports(s, 1) for s in sites if s.kind in TABLES] + [ports(s, 0) for s in sites if s.kind in WRITERS]
    readers = [ports(s, 1) for s in sites if s.kind in READERS]
    inputs, posts = input_norms(anatomy), post_norms(anatomy)
    fixed = anatomy.plumbing.fixed
    admits: dict[str, str] = {}
    stops = {
        "scale": "a norm reads the residual, and scaling its channels changes the root mean square",
        "shift": "a norm reads the residual, and shifting its channels changes the root mean square",
        "affine": "a norm reads the residual, and only an orthogonal map keeps the root mean square (use rotate)",
        "fold": "fold the norms' outputs: blocks.N.attn.in, blocks.N.mlp.in, head.in",
    }
    turn, centre = _why_not_rotate(anatomy), _why_not_centre(anatomy)
    for kind, why in (("permute", fixed), ("select", fixed), ("rotate", turn), ("centre", centre)):
        (stops if why else admits)[kind] = why
    return Stream(
        name="residual",
        kind="residual",
        size=anatomy.hidden,
        writers=flat(writers),
        readers=flat(readers),
        through=flat(norm_ports(norm) for norm in (*inputs, *posts)),
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
    if anatomy.plumbing.fixed:
        return anatomy.plumbing.fixed
    for norm in input_norms(anatomy):
        if norm.kind == "layer":
            return f"{norm.name} is a LayerNorm: centre the writers of the residual first (rewrite `layernorm-to-rms`)"
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
    attention = [site for site in sites if site.kind in ("q", "k", "v") or (site.kind == "in" and not feeds(site))]
    feed = [site for site in sites if site.kind in ("gate", "up", "router") or (site.kind == "in" and feeds(site))]
    by_place = {norm.name.removeprefix(f"blocks.{block}."): norm for norm in norms}
    post = plumbing.arrangement == "post"
    if not post and "mlp.norm" not in by_place and "attn.norm" in by_place and attention:
        attention, feed = attention + feed, []
    return [
        _raw(f"blocks.{block}.{place}.in", readers, block, post)
        if post or f"{place}.norm" not in by_place
        else _norm_output(f"blocks.{block}.{place}.in", by_place[f"{place}.norm"], readers, block)
        for place, readers in (("attn", attention), ("mlp", feed))
        if readers
    ]


def feeds(site: Site) -> bool:
    """Whether a site of a block stands in its feed-forward layer."""
    return site.name.removeprefix(f"blocks.{site.block}.").partition(".")[0] in FEEDING


def _raw(name: str, readers: Sequence[Site], block: int, post: bool) -> Stream:
    """What is read of the residual itself: nothing can be written into a norm in between."""
    why = "in a post-norm model the norm's output is the residual: the next sum reads it too"
    if not post:
        why = "no norm stands in front of it: it is the residual, which the next sum reads too"
    stops = dict.fromkeys(("scale", "shift", "rotate", "affine", "fold", "permute", "select"), why)
    return Stream(name, "norm", readers[0].shape[1], (), _readers(readers), {}, stops, block)


def _readers(sites: Iterable[Site]) -> tuple[Port, ...]:
    return tuple(Port(f"{site.name}.weight", 1) for site in sites)


def _norm_output(name: str, norm: Norm, readers: Sequence[Site], block: int | None) -> Stream:
    mixing = "a norm writes channel by channel: mixing its output takes an online operator in front of the readers"
    order = "the channels of a norm's output stand in the order of the residual: permute or select that"
    admits: dict[str, str] = {}
    stops = {
        "rotate": mixing,
        "affine": mixing,
        "permute": order,
        "select": order,
        "centre": "centre the residual, for all its norms at once",
    }
    fixed = [site.name for site in readers if not may_have_bias(site)]
    if norm.gain is None:
        stops["scale"] = f"{norm.name} has no gain to write a scale into"
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
    else:
        admits["fold"] = ""
    return Stream(name, "norm", norm.size, tuple(norm_ports(norm)), _readers(readers), admits, stops, block)


def _convolved(anatomy: Anatomy, norm: Norm) -> Stream:
    """What a convolution gives, before the batch norm behind it."""
    why = "a batch norm holds statistics of each of its channels: fold it first (rewrite `fold-batch-norm`)"
    stops = dict.fromkeys(("scale", "shift", "rotate", "affine", "permute", "select"), why)
    site = anatomy.site(norm.name.removesuffix(".norm"))
    readers = (*norm_ports(norm), *statistics_ports(norm))
    return Stream(
        f"{site.name}.out", "batch", norm.size, tuple(ports(site, 0)), readers, {"fold": ""}, stops, site.block
    )


def _feed_forward(plumbing: Plumbing, sites: Sequence[Site], norms: Sequence[Norm], block: int) -> list[Stream]:
    behind = {norm.name.removesuffix(".norm"): norm for norm in norms if norm.kind == "batch" and norm.mean is not None}
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
        writers, through = ports(unit["up"], 0), ports(unit["gate"], 0) if "gate" in unit else []
        if (norm := behind.get(unit["up"].name)) is not None:  # which takes out any scale of what it reads
            writers, through = norm_ports(norm), [*writers, *statistics_ports(norm)]
        streams.append(
            Stream(
                name=name,
                kind="ffn",
                size=unit["up"].shape[0],
                writers=tuple(writers),
                readers=(Port(f"{unit['down'].name}.weight", 1, width=unit["down"].window or 1),),
                admits=admits,
                stops=stops,
                block=block,
                through=tuple(through),
            )
        )
    return streams
