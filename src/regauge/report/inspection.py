"""What a model is made of, before anything is done to it: sites, bytes, streams, and the moves each stream admits."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from regauge.anatomy.model import Anatomy, Attention, Site, Stream
from regauge.artifact.folder import ANATOMY, read_config
from regauge.artifact.reader import open_artifact
from regauge.hosts import host_of
from regauge.plan.keeping import rate
from regauge.plan.select import pattern
from regauge.report.fits import Size, caches, sizes


@dataclass(frozen=True)
class SiteGroup:
    """Sites that differ in their block or expert alone. `select` matches them in a recipe (and those of other sizes
    too, where blocks differ; `blocks` says which blocks these are in)."""

    select: str
    kind: str
    shape: tuple[int, int]
    count: int
    bytes_bf16: int
    share: float  # of the model's bytes
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class StreamGroup:
    """Streams that differ in their block, head or expert alone. `admits` and `stops`: move → condition or reason."""

    name: str
    kind: str
    size: int
    count: int
    admits: Mapping[str, str]
    stops: Mapping[str, str]


@dataclass(frozen=True)
class AttentionGroup:
    """The blocks whose attention has these sizes. `value_dim` differs from `head_dim` where values have other heads."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Inspection:
    """A model as counted. Bytes are as bf16, every number two, tied ones once."""

    model: str
    family: str
    blocks: int
    hidden: int
    attention: tuple[AttentionGroup, ...]  # one, unless blocks differ
    tied: bool
    dtype: str
    parameters: int
    bytes_stored: int
    bytes_bf16: int
    block_bytes_bf16: tuple[int, ...]
    cache_bytes_a_token: int | None  # keys and values in bf16 over all blocks, from shapes; None: no cache
    sites: tuple[SiteGroup, ...]
    streams: tuple[StreamGroup, ...]
    notes: tuple[str, ...]
    sizes: tuple[Size, ...] = ()  # under the presets people choose; of an artifact none
    caches: Mapping[str, float] = field(
        default_factory=dict
    )  # preset → bytes of a token of a long text, by its formats


def inspect(model: str | Path, revision: str | None = None) -> Inspection:
    """Counts a model, or what an artifact stands for. Reads configuration and headers of files, not weights."""
    if os.path.isfile(Path(model) / ANATOMY) and "quantization_config" in read_config(Path(model)):
        made = open_artifact(model)
        held = made.layout.anatomy
        return _counted(str(model), held, made.layout.dtype, _parameters(held), made.shards)
    source = host_of(model).open(model, revision)
    found = _counted(str(model), source.anatomy, source.dtype, source.parameters(), source.files)
    counted = sizes(source.anatomy, source.parameters(), found.cache_bytes_a_token)
    return replace(found, sizes=counted)


def _counted(model: str, anatomy: Anatomy, dtype: object, parameters: int, files: Iterable[Path]) -> Inspection:
    kept = caches(anatomy) if anatomy.cached else {}
    return Inspection(
        model=model,
        family=anatomy.family,
        blocks=anatomy.blocks,
        hidden=anatomy.hidden,
        attention=_attention_groups(anatomy),
        tied=anatomy.tied,
        dtype=str(dtype).removeprefix("torch."),
        parameters=parameters,
        bytes_stored=sum(path.stat().st_size for path in files),
        bytes_bf16=2 * parameters,
        block_bytes_bf16=tuple(sum(map(_bytes, anatomy.in_block(block))) for block in range(anatomy.blocks)),
        cache_bytes_a_token=cache_bytes(anatomy),
        sites=_site_groups(anatomy, 2 * parameters),
        streams=_stream_groups(anatomy.streams),
        notes=anatomy.notes,
        caches={name: rate(plan, anatomy) for name, plan in kept.items()},
    )


def _parameters(anatomy: Anatomy) -> int:
    """Numbers in sites and norms, a tied head once."""
    sites = sum(_bytes(site) // 2 for site in anatomy.sites if not (site.name == "head" and anatomy.tied))
    return sites + sum(n.size * len(n.slots) for n in anatomy.norms)


def cache_bytes(anatomy: Anatomy) -> int | None:
    """Keys and values of one token in bf16 over all blocks, where a window does not cut them."""
    return 2 * anatomy.cached if anatomy.causal else None


def _attention_groups(anatomy: Anatomy) -> tuple[AttentionGroup, ...]:
    grouped: dict[Attention, list[int]] = {}
    for block, found in enumerate(anatomy.attentions):
        if found is not None:
            grouped.setdefault(found, []).append(block)
    return tuple(
        AttentionGroup(one.heads, one.kv_heads, one.head_dim, one.value_dim, tuple(blocks))
        for one, blocks in grouped.items()
    )


def _bytes(site: Site) -> int:
    return 2 * (site.shape[0] * site.shape[1] + (site.shape[0] if site.bias is not None else 0))


def _site_groups(anatomy: Anatomy, total: int) -> tuple[SiteGroup, ...]:
    grouped: dict[tuple[str, str, tuple[int, int]], list[Site]] = {}
    for site in anatomy.sites:
        if site.name == "head" and anatomy.tied:
            continue
        grouped.setdefault((pattern(site.name), site.kind, site.shape), []).append(site)
    return tuple(
        SiteGroup(
            *key,
            count=len(sites),
            bytes_bf16=sum(map(_bytes, sites)),
            share=sum(map(_bytes, sites)) / total,
            blocks=tuple(dict.fromkeys(site.block for site in sites if site.block is not None)),
        )
        for key, sites in grouped.items()
    )


def _stream_groups(streams: Iterable[Stream]) -> tuple[StreamGroup, ...]:
    grouped: dict[tuple[object, ...], list[Stream]] = {}
    for stream in streams:
        stops = {move: _general(why) for move, why in stream.stops.items()}
        key = (pattern(stream.name), stream.kind, stream.size, tuple(stream.admits.items()), tuple(stops.items()))
        grouped.setdefault(key, []).append(stream)
    return tuple(
        StreamGroup(
            pattern(found[0].name),
            found[0].kind,
            found[0].size,
            len(found),
            dict(found[0].admits),
            {move: _general(why) for move, why in found[0].stops.items()},
        )
        for found in grouped.values()
    )


def _general(sentence: str) -> str:
    """A reason without the numbers of its block and expert, so that those of different blocks are alike."""
    return re.sub(r"\bblocks\.\d+(\.moe\.\d+)?", lambda found: "blocks.*.moe.*" if found[1] else "blocks.*", sentence)
