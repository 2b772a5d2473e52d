"""The streams of one block's attention: values, query-key and whole groups of heads.

Values pass from `v` to `o` through the repetition of KV heads: `o` reads each KV head once a query head of its group.
Queries and keys meet in a product, q·k = (M q)·(M⁻ᵀ k): so `q` counts as writer and `k` as reader of one stream.
Rotary embeddings turn pairs of channels between the two, so M must commute with the turn: on each pair a turn with one
scale, which leaves one scale a pair and no reflection; the channels that rotary leaves alone may be mixed at will.
Norms on q and k (qwen3) stand between: their gains become the writers and readers.
"""

from __future__ import annotations

from collections.abc import Sequence

from regauge.anatomy.model import Anatomy, Norm, Plumbing, Port, Site, Stream
from regauge.anatomy.ports import flat, may_have_bias, norm_ports, ports


def attention_streams(anatomy: Anatomy, sites: Sequence[Site], norms: Sequence[Norm], block: int) -> list[Stream]:
    found = {site.kind: site for site in sites if site.kind in ("q", "k", "v", "o")}
    if len(found) < 4:
        return []
    q, k, v, o = (found[kind] for kind in "qkvo")
    size, wide = k.head_dim, v.head_dim
    groups = k.heads
    repeat = q.heads // groups
    gains = {kind: [n for n in norms if n.name == f"{found[kind].name}.norm"] for kind in "qk"}
    shared = any(norm.size == size and q.shape[0] != size for some in gains.values() for norm in some)
    admits, stops = _score_moves(anatomy.plumbing, size)
    streams: list[Stream] = []
    for group in range(groups):
        heads = [group * repeat + i for i in range(repeat)]
        streams.append(_values(v, o, group, heads, wide, block))
        name = f"blocks.{block}.qk.{group}"
        if shared:
            why = (
                f"the norms on q and k divide it away and their gains are shared by the heads: "
                f"move blocks.{block}.qk instead"
            )
            stops_here = dict.fromkeys(("scale", "rotate", "affine", "permute", "shift", "select"), why)
            streams.append(Stream(name, "qk", size, (), (), {}, stops_here, block))
            continue
        q_side = [norm_ports(n, head * size) for n in gains["q"] for head in heads] or [
            ports(q, 0, head * size) for head in heads
        ]
        k_side = [norm_ports(n, group * size) for n in gains["k"]] or [ports(k, 0, group * size)]
        here = (_gains_only(admits), _gains_stops(stops)) if gains["q"] or gains["k"] else (admits, stops)
        streams.append(Stream(name, "qk", size, flat(q_side), flat(k_side), *here, block))
    if shared:
        q_gains, k_gains = (flat(norm_ports(norm) for norm in gains[kind]) for kind in "qk")
        name = f"blocks.{block}.qk"
        streams.append(Stream(name, "qk", size, q_gains, k_gains, _gains_only(admits), _gains_stops(stops), block))
    long_gains = [n for some in gains.values() for n in some if not shared]
    whole = "the norms on q and k are over all heads at once, and would be over fewer"
    long_ports = [norm_ports(n, 0, n.size // groups) for n in long_gains]
    streams.append(
        Stream(
            name=f"blocks.{block}.heads",
            kind="heads",
            size=groups,
            writers=flat([ports(q, 0, 0, repeat * size), ports(k, 0, 0, size), ports(v, 0, 0, wide)]),
            readers=(Port(f"{o.name}.weight", 1, 0, repeat * wide),),
            admits={"permute": ""} if long_gains else {"permute": "", "select": ""},
            stops=dict.fromkeys(
                ("scale", "shift", "rotate", "affine", "fold", "centre"), "heads are whole: move value or qk streams"
            )
            | ({"select": whole} if long_gains else {}),
            block=block,
            through=flat(long_ports),
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
        writers=tuple(ports(v, 0, group * size)),
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
