"""One interpreter for the family tables in `families/`: a config goes in, an `Anatomy` comes out.

A table says which module has which role, how fused storage splits, what kind of norm there is and what is added to its
gain, how positions enter, and which attributes of the config hold the sizes. Rows whose module the skeleton lacks are
left out (a dense layer of a mixture of experts, a bias, a last norm); in return every parameter of the body must be
described by some row or be named in `outside` or `kept`, so that a mistyped row cannot pass. Columns: see
`columns.Table`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from regauge.anatomy.model import Anatomy, Norm, Plumbing, Site, Slot, Stop
from regauge.anatomy.streams import TABLES, feeds, with_streams
from regauge.errors import ModelError
from regauge.hosts.transformers.columns import Arrangement, NormRow, Row, Table
from regauge.hosts.transformers.experts import routed
from regauge.hosts.transformers.settings import holds, lookup, own_config, refuse, sliding_blocks
from regauge.hosts.transformers.sharing import Heads, slots
from regauge.hosts.transformers.skeleton import block_paths, body_prefix, parameters, skeleton
from regauge.hosts.transformers.tables import table_for

NOT_NORMS = ("Identity",)
"""Modules that stand where some blocks have a norm, and do nothing."""
MANY = 8
"""Tensors of a part of the model that are named one by one."""


def anatomy_of(config: Any, model: Any = None) -> Anatomy:
    """The anatomy of a transformers config.

    Args:
        model: its meta skeleton, where the caller has one already.
    """
    table = table_for(config)
    refuse(table, config)
    model = skeleton(config) if model is None else model
    return _Reader(table, config, model).anatomy()


class _Reader:
    """Reads one table against one config and the shapes of one skeleton."""

    def __init__(self, table: Table, config: Any, model: Any) -> None:
        self.table, self.config, self.model, self.whole = table, own_config(table, config), model, config
        self.family, self.body, self.shapes = config.model_type, body_prefix(model), parameters(model)
        self.tied = dict(model.all_tied_weights_keys)
        self.modules = {path: type(module).__name__ for path, module in model.named_modules()}
        self.paths = block_paths(model)
        self.stack_of = [n for n, some in enumerate(table.stacks) for _ in model.get_submodule(f"{self.body}{some}")]
        self.hidden: int = self._number(table.config.hidden, len(table.stacks) - 1)

    def _number(self, names: str | list[str], stack: int) -> Any:
        """An attribute of the config, of one stack of blocks."""
        return lookup(self.config, names if isinstance(names, str) else names[stack], None)

    def anatomy(self) -> Anatomy:
        table = self.table
        sites = [site for name, row in table.outer.items() for site in self._sites(name, row, self.body, None)]
        norms = [norm for name, row in table.outer_norms.items() for norm in self._norm(name, row, self.body, None)]
        for block, path in enumerate(self.paths):
            for name, row in table.sites.items():
                sites += self._sites(name, row, f"{path}.", block)
            for name, norm in table.norms.items():
                norms += self._norm(f"blocks.{block}.{name}", norm, f"{path}.", block)
        sites += (head := list(self._sites("head", table.head, "", None)) if table.head else [])
        outside, kept = self._outside(sites, norms)
        plumbing = Plumbing(
            arrangement=self._arrangement(),
            activation=table.activation or str(lookup(self.config, table.config.activation, "none")),
            rotary=self._turned(),
            pairing=table.rotary.pairing if table.rotary else "half",
            fixed=_why_fixed(outside, bool(head), table.body),
            cached=self._cached(sites),
            sliding=sliding_blocks(self.whole, len(self.paths)) if table.causal else (),
            scales=table.scales,
            stays=tuple(lookup(self.config, table.config.stays or "", ())),
            routed=routed(table, self.config, sites),
            stops=tuple(
                Stop(tuple(row.streams), row.why, tuple(row.moves))
                for row in table.stops
                if holds(self.config, row.when)
            ),
        )
        return with_streams(
            Anatomy(
                family=self.family,
                blocks=len(self.paths),
                hidden=self.hidden,
                sites=tuple(sites),
                norms=tuple(norms),
                streams=(),
                tied=bool(head) and head[0].weight.key in self.tied,
                causal=table.causal,
                notes=_notes(outside, kept, self.body),
                plumbing=plumbing,
            )
        )

    def _arrangement(self) -> Arrangement:
        found = self.table.arrangement
        return found if isinstance(found, str) else next(kind for kind in found if holds(self.config, found[kind]))

    def _cached(self, sites: list[Site]) -> int:
        """Numbers that a token leaves in all caches beside one key and one value for each head of them: those of
        attention that is taken as it is, by the config, and copies for heads of queries."""
        columns = self.table.config
        found = len(self.paths) * sum(int(lookup(self.config, name, 0)) for name in columns.cached)
        if columns.repeats and holds(self.config, columns.repeats):
            queries = {site.block: site.heads for site in sites if site.kind == "q"}
            found += sum((queries[s.block] - s.heads) * s.head_dim for s in sites if s.kind in ("k", "v"))
        return found

    def _turned(self) -> int:
        """Channels of a head that rotary embeddings turn: two for each frequency, whatever a config says."""
        rotary = self.table.rotary
        if rotary is None:
            return 0
        if rotary.at is None:
            return int(lookup(self.config, str(rotary.channels), 0))
        if self.body + rotary.at not in self.modules:
            return 0
        module = self.model.get_submodule(self.body + rotary.at)
        found: set[int] = {2 * buffer.numel() for name, buffer in module.named_buffers() if name.endswith("inv_freq")}
        if len(found) != 1:
            raise ModelError(
                f"a {type(module).__name__} turns {sorted(found)} channels of a head where one number is wanted"
            )
        return found.pop()

    def _heads(self, prefix: str, block: int) -> Heads:
        """What a block's own matrices say, and the config of what they do not."""
        names, stack = self.table.config, self.stack_of[block]
        if names.heads is None:
            return Heads(0, 0, 0)
        queries = int(self._number(names.heads, stack) or 0)
        keys = int((self._number(names.kv_heads, stack) if names.kv_heads else None) or queries)
        dim = int(lookup(self.config, names.head_dim, self._number(names.hidden, stack) // max(queries, 1)))
        if (read := self._alone("attn.o", prefix)) is not None:
            dim = read[1] // max(queries, 1)
        asked = self._alone("attn.q", prefix)
        if (made := self._alone("attn.k", prefix)) is not None and dim:
            keys = max(1, made[0] // (dim if asked is None else max(1, asked[0] // max(queries, 1))))
        elif (fused := self._alone("attn.q attn.k attn.v", prefix)) is not None and dim:
            keys = max(1, (fused[0] // dim - queries) // 2)
        return Heads(queries, keys, dim)

    def _alone(self, name: str, prefix: str) -> tuple[int, ...] | None:
        """(O, I) of a site of a block that has a matrix to itself; None where it has not."""
        row = self._row(self.table.sites.get(name, []), prefix)
        if row is None:
            return None
        held = self.shapes[f"{prefix}{row.at}.{row.parameter}"].shape
        return tuple(held[::-1] if row.transposed else held)

    def _row(self, row: Row | str | list[Row | str], prefix: str) -> Row | None:
        """The row that holds with this config; None where its parameter is not there."""
        some = [Row(at=one) if isinstance(one, str) else one for one in (row if isinstance(row, list) else [row])]
        there = (one for one in some if holds(self.config, one.when))
        return next((one for one in there if f"{prefix}{one.at}.{one.parameter}" in self.shapes), None)

    def _sites(self, names: str, rows: Row | str | list[Row | str], prefix: str, block: int | None) -> Iterator[Site]:
        row = self._row(rows, prefix)
        if row is None:
            return
        key = f"{prefix}{row.at}.{row.parameter}"
        shape = tuple(self.shapes[key].shape)
        heads = Heads(0, 0, 0) if block is None else self._heads(prefix, block)
        bias = f"{prefix}{row.at}.{row.bias}" if row.bias else f"{prefix}{row.at}.bias" * (row.parameter == "weight")
        for expert in range(shape[0]) if "*" in names else [None]:
            inner = shape if expert is None else shape[1:]
            for slot, name in slots(names.split(), row, key, inner, heads):
                slot = replace(slot, index=expert)
                yield self._site(name.replace("*", str(expert)), slot, inner, (prefix + row.at, bias), block, heads)

    def _site(
        self, name: str, slot: Slot, shape: tuple[int, ...], at: tuple[str, str], block: int | None, heads: Heads
    ) -> Site:
        kind, (module, bias_key) = name.rpartition(".")[2], at
        out, rest = _matrix(kind, shape[::-1] if slot.transposed else shape)
        if slot.heads is not None:
            out = out // slot.heads[1] * slot.span
        if slot.rows is not None:
            out = slot.rows[1] - slot.rows[0]
        bias = None
        if bias_key in self.shapes:
            bias = Slot(key=bias_key, index=slot.index, heads=slot.heads, rows=slot.rows, span=slot.span)
        site = Site(
            name=name if block is None else f"blocks.{block}.{name}",
            kind=kind,
            shape=(out, rest),
            weight=slot,
            bias=bias,
            block=block,
            module=module,
            expert=slot.index,
            heads=heads.of(kind),
            window=shape[2] * shape[3] if block is not None and len(shape) == 4 else 0,
        )
        table = kind in TABLES or "Embedding" in self.modules[module]
        return replace(site, tap=None if table else _tap(site, name))

    def _norm(self, name: str, row: NormRow | str | list[str], prefix: str, block: int | None) -> list[Norm]:
        if isinstance(row, list):
            row = next((path for path in row if prefix + path in self.modules), row[0])
        row = NormRow(at=row) if isinstance(row, str) else row
        columns, path = self.table.norm, prefix + row.at
        gain, bias = f"{path}.weight", f"{path}.bias"
        if self.modules.get(path, NOT_NORMS[0]) in NOT_NORMS or (
            row.beside and prefix + row.beside not in self.modules
        ):
            return []
        if not holds(self.config, row.when):
            return []
        eps = columns.eps if row.eps is None else row.eps
        return [
            Norm(
                name=name,
                kind=row.kind or columns.kind,
                size=self.shapes[gain].numel() if gain in self.shapes else self.hidden,
                module=path,
                gain=Slot(gain) if gain in self.shapes else None,
                bias=Slot(bias) if bias in self.shapes else None,
                offset=columns.offset if row.offset is None else row.offset,
                eps=float(eps if isinstance(eps, float) else lookup(self.config, eps, 1e-6)),
                block=block,
                source_kind=row.kind or columns.kind,
                mean=Slot(f"{path}.mean") if f"{path}.mean" in self.shapes else None,
                var=Slot(f"{path}.var") if f"{path}.var" in self.shapes else None,
            )
        ]

    def _outside(self, sites: list[Site], norms: list[Norm]) -> tuple[list[str], list[str]]:
        """Keys that no row describes: outside the blocks, and in them; an error where the table does not say so."""
        slots = [s for site in sites for s in (site.weight, site.bias)] + [s for n in norms for s in n.slots.values()]
        described = {slot.key for slot in slots if slot is not None}
        outside, kept = list[str](), list[str]()
        for key in self.shapes:
            if key in described or (key.startswith(self.body) and key in self.tied):
                continue
            block = next((path for path in self.paths if key.startswith(f"{path}.")), None)
            inner = key.removeprefix(self.body if block is None else f"{block}.")
            allowed = self.table.outside if block is None else self.table.kept
            if key.startswith(self.body) and not inner.startswith(tuple(allowed)):
                raise ModelError(
                    f"the family table of {self.family} describes no parameter {key!r}: add a row for it, or name "
                    f"{inner!r} in `{'outside' if block is None else 'kept'}`"
                )
            (outside if block is None else kept).append(key)
        return outside, kept


def _matrix(kind: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(O, I) of a parameter of any rank: tables keep their last axis, the others their first (patches, class token)."""
    total = 1
    for size in shape:
        total *= size
    return (total // shape[-1], shape[-1]) if kind in TABLES else (shape[0], total // shape[0])


def _tap(site: Site, name: str) -> str | None:
    """The activation that a site reads which is no table looked up by index."""
    if site.block is None:
        return f"{name}.in"
    place = {"q": "attn.in", "k": "attn.in", "v": "attn.in", "o": "attn.mixed", "router": "mlp.in"}
    if site.kind in place:
        return f"blocks.{site.block}.{place[site.kind]}"
    if site.kind == "in":
        return f"blocks.{site.block}.{'mlp' if feeds(site) else 'attn'}.in"
    end = {"down": "hidden", "out": "mixed", "inner": "inner"}.get(site.kind, "in")
    return f"blocks.{site.block}.{name.rpartition('.')[0]}.{end}"


def _why_fixed(outside: list[str], head: bool, body: str) -> str:
    if body and outside:
        return f"{'.'.join(outside[0].split('.')[:2])}, which stays as it is, writes what it makes of images into it"
    if outside:
        return f"{outside[0]}, which is no site, reads it"
    return "" if head else "the model has no head: the residual is what it returns"


def _notes(outside: list[str], kept: list[str], body: str) -> tuple[str, ...]:
    """What stays as it is: of the blocks once, of other parts of the model once a part."""
    parts: dict[str, list[str]] = {}
    for key in outside:
        inside = key.startswith(body)
        inner = key.removeprefix(body) if inside else key
        parts.setdefault(body * inside + ".".join(inner.split(".")[:2]), []).append(key)
    said: list[str] = []
    for part, keys in parts.items():
        if len(keys) > MANY:
            said.append(f"{part} is outside of what is described: its {len(keys)} tensors stay as they are")
        else:
            said += [f"{key} is no site: it stays as it is" for key in keys]
    within = dict.fromkeys(re.sub(r"\.\d+\.", ".N.", key) for key in kept)
    return (*said, *(f"{key} is no site: it stays as it is" for key in within))
