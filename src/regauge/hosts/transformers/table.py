"""One interpreter for the family tables in `families/`: a config goes in, an `Anatomy` comes out.

A table says which module has which role, how fused storage splits, what kind of norm there is and what is added to its
gain, how positions enter, and which attributes of the config hold the sizes. Rows whose module the skeleton lacks are
left out (a dense layer of a mixture of experts, a bias, a last norm); in return every parameter of the body must be
described by some row or be named in `outside`, so that a mistyped row cannot pass. Columns: see `columns.Table`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from regauge.anatomy.model import Anatomy, Norm, Plumbing, Site, Slot
from regauge.anatomy.streams import TABLES, with_streams
from regauge.errors import ModelError
from regauge.hosts.transformers.columns import Row, Table, table_for
from regauge.hosts.transformers.skeleton import body_prefix, parameters, skeleton


def anatomy_of(config: Any, model: Any = None) -> Anatomy:
    """The anatomy of a transformers config.

    Args:
        model: its meta skeleton, where the caller has one already.
    """
    table = table_for(config.model_type)
    _refuse(table, config)
    model = skeleton(config) if model is None else model
    return _Reader(table, config, body_prefix(model), parameters(model), model).anatomy()


def _refuse(table: Table, config: Any) -> None:
    for refusal in table.refuse:
        seen = getattr(config, refusal.attribute)
        wanted = refusal.must_be if refusal.must_match is None else getattr(config, refusal.must_match)
        if seen != wanted:
            raise ModelError(
                f"{config.model_type} with {refusal.attribute}={seen!r} cannot be used (it must be {wanted!r}): "
                f"{refusal.why}"
            )


def _lookup(config: Any, path: str, default: Any) -> Any:
    """A dotted path through attributes and mappings of a config; the default where a step is missing or None."""
    value = config
    for step in path.split("."):
        value = value.get(step) if isinstance(value, Mapping) else getattr(value, step, None)
        if value is None:
            return default
    return value


class _Reader:
    """Reads one table against one config and the shapes of one skeleton."""

    def __init__(self, table: Table, config: Any, body: str, shapes: dict[str, torch.Tensor], model: Any) -> None:
        self.table, self.config, self.body, self.shapes = table, config, body, shapes
        self.model, self.tied = model, dict(model.all_tied_weights_keys)
        self.modules = {path for path, _ in model.named_modules()}
        names = table.config
        self.hidden: int = getattr(config, names.hidden)
        self.heads: int = getattr(config, names.heads)
        self.kv_heads: int = getattr(config, names.kv_heads)
        self.head_dim: int = self._head_dim(_lookup(config, names.head_dim, self.hidden // self.heads))
        self.blocks: int = getattr(config, names.blocks)
        self.rows = {"q": self.heads * self.head_dim, "k": self.kv_heads * self.head_dim}
        self.rows["v"] = self.rows["k"]

    def _head_dim(self, told: int) -> int:
        """Channels of a head, of what the first block's last attention matrix reads: a config may hold another number,
        which its modules ignore."""
        rows = [row for names, row in self.table.sites.items() if names == "attn.o"]
        for row in (Row(at=row) if isinstance(row, str) else row for row in rows):
            held = self.shapes.get(f"{self.body}{self.table.blocks}.0.{row.at}.{row.parameter}")
            if held is not None:
                return int(held.shape[0 if row.transposed else 1]) // self.heads
        return told

    def anatomy(self) -> Anatomy:
        table = self.table
        sites = [site for name, row in table.outer.items() for site in self._sites(name, row, self.body, None)]
        norms = [norm for name, at in table.outer_norms.items() for norm in self._norm(name, self.body + at, None)]
        for block in range(self.blocks):
            at = f"{self.body}{table.blocks}.{block}."
            for name, row in table.sites.items():
                sites += self._sites(name, row, at, block)
            for name, path in table.norms.items():
                norms += self._norm(f"blocks.{block}.{name}", at + path, block)
        head = list(self._sites("head", table.head, "", None)) if table.head else []
        sites += head
        rotary = table.rotary
        outside = self._outside(sites, norms)
        plumbing = Plumbing(
            arrangement=table.arrangement,
            activation=getattr(self.config, table.config.activation),
            rotary=_turned(self.model.get_submodule(self.body + rotary.at)) if rotary else 0,
            pairing=rotary.pairing if rotary else "half",
            fixed=_why_fixed(outside, bool(head)),
        )
        return with_streams(
            Anatomy(
                family=self.config.model_type,
                blocks=self.blocks,
                hidden=self.hidden,
                sites=tuple(sites),
                norms=tuple(norms),
                streams=(),
                tied=bool(head) and head[0].weight.key in self.tied,
                causal=table.causal,
                notes=tuple(f"{key} is no site: it stays as it is" for key in outside),
                plumbing=plumbing,
            )
        )

    def _sites(self, names: str, row: Row | str, prefix: str, block: int | None) -> Iterator[Site]:
        row = Row(at=row) if isinstance(row, str) else row
        key = f"{prefix}{row.at}.{row.parameter}"
        if key not in self.shapes:
            return
        shape = tuple(self.shapes[key].shape)
        experts = range(shape[0]) if "*" in names else [None]
        bias_key = f"{prefix}{row.at}.bias" if row.parameter == "weight" else ""
        for expert in experts:
            inner = shape if expert is None else shape[1:]
            for slot, name in self._slots(names.split(), row, key, inner, expert):
                yield self._site(name, slot, inner, prefix + row.at, bias_key, block)

    def _slots(
        self, names: list[str], row: Row, key: str, shape: tuple[int, ...], expert: int | None
    ) -> Iterator[tuple[Slot, str]]:
        total = shape[1] if row.transposed else shape[0]
        start = 0
        for which, name in enumerate(names):
            size = self.rows.get(name.rpartition(".")[2], total // len(names))
            yield (
                Slot(
                    key=key,
                    index=expert,
                    transposed=row.transposed,
                    heads=(self.heads, len(names), which) if row.part == "heads" else None,
                    rows=(start, start + size) if row.part == "rows" else None,
                ),
                name.replace("*", str(expert)),
            )
            start += size

    def _site(
        self, name: str, slot: Slot, shape: tuple[int, ...], module: str, bias_key: str, block: int | None
    ) -> Site:
        kind = name.rpartition(".")[2]
        out, rest = _matrix(kind, shape[::-1] if slot.transposed else shape)
        if slot.heads is not None:
            out //= slot.heads[1]
        if slot.rows is not None:
            out = slot.rows[1] - slot.rows[0]
        bias = None
        if bias_key in self.shapes:
            bias = Slot(key=bias_key, heads=slot.heads, rows=slot.rows)
        return Site(
            name=name if block is None else f"blocks.{block}.{name}",
            kind=kind,
            shape=(out, rest),
            weight=slot,
            bias=bias,
            block=block,
            tap=_tap(name, kind, block),
            module=module,
            expert=slot.index,
            heads={"q": self.heads, "o": self.heads, "k": self.kv_heads, "v": self.kv_heads}.get(kind, 0),
        )

    def _norm(self, name: str, path: str, block: int | None) -> list[Norm]:
        columns = self.table.norm
        gain, bias = f"{path}.weight", f"{path}.bias"
        if path not in self.modules:
            return []
        return [
            Norm(
                name=name,
                kind=columns.kind,
                size=self.shapes[gain].shape[0] if gain in self.shapes else self.hidden,
                module=path,
                gain=Slot(gain) if gain in self.shapes else None,
                bias=Slot(bias) if bias in self.shapes else None,
                offset=columns.offset,
                eps=columns.eps if isinstance(columns.eps, float) else getattr(self.config, columns.eps),
                block=block,
                source_kind=columns.kind,
            )
        ]

    def _outside(self, sites: list[Site], norms: list[Norm]) -> list[str]:
        """Keys that no row describes; an error where the table does not say that they are outside."""
        slots = [s for site in sites for s in (site.weight, site.bias)] + [s for n in norms for s in (n.gain, n.bias)]
        described = {slot.key for slot in slots if slot is not None}
        loose = [key for key in self.shapes if key not in described]
        for key in loose:
            inner = key.removeprefix(self.body)
            if key.startswith(self.body) and not inner.startswith(tuple(self.table.outside)):
                raise ModelError(
                    f"the family table of {self.config.model_type} describes no parameter {key!r}: "
                    f"add a row for it in families/, or name it in `outside`"
                )
        return loose


def _turned(module: Any) -> int:
    """Channels of a head that a rotary embedding turns: two for each frequency, whatever a config says."""
    found: set[int] = {2 * buffer.numel() for name, buffer in module.named_buffers() if name.endswith("inv_freq")}
    if len(found) != 1:
        raise ModelError(
            f"a {type(module).__name__} turns {sorted(found)} channels of a head where one number is wanted"
        )
    return found.pop()


def _matrix(kind: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(O, I) of a parameter of any rank: tables keep their last axis, the others their first (patches, class token)."""
    total = 1
    for size in shape:
        total *= size
    return (total // shape[-1], shape[-1]) if kind in TABLES else (shape[0], total // shape[0])


def _tap(name: str, kind: str, block: int | None) -> str | None:
    if block is None:
        return f"{name}.in" if kind in ("head", "patch") else None
    place = {"q": "attn.in", "k": "attn.in", "v": "attn.in", "o": "attn.mixed", "router": "mlp.in"}
    if kind in place:
        return f"blocks.{block}.{place[kind]}"
    return f"blocks.{block}.{name.rpartition('.')[0]}.{'hidden' if kind == 'down' else 'in'}"


def _why_fixed(outside: list[str], head: bool) -> str:
    if outside:
        return f"{outside[0]}, which is no site, reads it"
    return "" if head else "the model has no head: the residual is what it returns"
