"""One interpreter for the family tables in `families/`: a config goes in, an `Anatomy` comes out.

A table says which module has which role, how fused storage splits, what kind of norm there is and what is added to its
gain, how positions enter, and which attributes of the config hold the sizes. Rows whose module the skeleton lacks are
left out (a dense layer of a mixture of experts, a bias, a last norm); in return every parameter of the body must be
described by some row or be named in `outside`, so that a mistyped row cannot pass. Columns: see `Table`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field

from regauge.anatomy.model import Anatomy, Norm, Plumbing, Site, Slot
from regauge.anatomy.streams import TABLES, with_streams
from regauge.errors import ModelError, UnknownArchitecture, nearest

FAMILIES = Path(__file__).parent / "families"


class _Columns(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Columns):
    """Where the matrix of a site lies.

    Attributes:
        at: path of the module, from the block (or from the body for the outer sites).
        parameter: its parameter; a `*` in the site's name runs over the first axis of a stacked one.
        part: how several sites share it: `rows` one after another, `heads` interleaved a head at a time.
        transposed: stored (in, out).
    """

    at: str
    parameter: str = "weight"
    part: Literal["rows", "heads"] | None = None
    transposed: bool = False


class Attributes(_Columns):
    """Names of the config's attributes. Where `head_dim` is absent it is hidden / heads."""

    hidden: str
    heads: str
    kv_heads: str
    activation: str
    head_dim: str = "head_dim"
    blocks: str = "num_hidden_layers"


class NormColumns(_Columns):
    """Kind, epsilon (an attribute of the config, or the number) and what the module adds to its stored gain."""

    kind: Literal["rms", "layer"]
    eps: str | float
    offset: float = 0.0


class Rotary(_Columns):
    """Which channels turn together, and where the config says what share of a head turns (absent: all of it)."""

    pairing: Literal["half", "interleaved"]
    fraction: str


class Refusal(_Columns):
    """A setting that the table does not describe."""

    attribute: str
    why: str
    must_be: bool | int | str | None = None
    must_match: str | None = None


class Table(_Columns):
    """One family.

    Attributes:
        types: values of `model_type`.
        arrangement: `pre`, `post` or `sandwich`; see `Plumbing`.
        blocks: path of the list of blocks in the body.
        outer, outer_norms: sites and norms outside the blocks; paths from the body.
        head: path of the head, from the top.
        sites, norms: of a block; paths from the block. Several names before one row share its storage.
        outside: prefixes of parameters of the body that are no site and stay as they are.
        refuse: settings refused with their reason.
    """

    types: list[str]
    config: Attributes
    norm: NormColumns
    blocks: str
    outer: dict[str, Row | str]
    sites: dict[str, Row | str]
    norms: dict[str, str]
    outer_norms: dict[str, str] = Field(default_factory=dict)
    arrangement: Literal["pre", "post", "sandwich"] = "pre"
    causal: bool = True
    rotary: Rotary | None = None
    head: str | None = None
    outside: list[str] = Field(default_factory=list)
    refuse: list[Refusal] = Field(default_factory=list)


@cache
def tables() -> Mapping[str, Table]:
    """Every table by `model_type`."""
    found: dict[str, Table] = {}
    for path in sorted(FAMILIES.glob("*.yaml")):
        table = Table.model_validate(yaml.safe_load(path.read_text()))
        found |= dict.fromkeys(table.types, table)
    return found


def table_for(model_type: str) -> Table:
    """The table of an architecture, or an error that names the file to write."""
    if model_type not in tables():
        raise UnknownArchitecture(
            f"no family table describes model_type {model_type!r}{nearest(model_type, tables())}; "
            f"to add it, write src/regauge/hosts/transformers/families/{model_type}.yaml"
        )
    return tables()[model_type]


def anatomy_of(config: Any, model: Any = None) -> Anatomy:
    """The anatomy of a transformers config.

    Args:
        model: its meta skeleton, where the caller has one already.
    """
    from regauge.hosts.transformers.skeleton import body_prefix, parameters, skeleton

    table = table_for(config.model_type)
    _refuse(table, config)
    model = skeleton(config) if model is None else model
    return _Reader(table, config, body_prefix(model), parameters(model), dict(model.all_tied_weights_keys)).anatomy()


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

    def __init__(
        self, table: Table, config: Any, body: str, shapes: dict[str, torch.Tensor], tied: dict[str, str]
    ) -> None:
        self.table, self.config, self.body, self.shapes, self.tied = table, config, body, shapes, tied
        names = table.config
        self.hidden: int = getattr(config, names.hidden)
        self.heads: int = getattr(config, names.heads)
        self.kv_heads: int = getattr(config, names.kv_heads)
        self.head_dim: int = _lookup(config, names.head_dim, self.hidden // self.heads)
        self.blocks: int = getattr(config, names.blocks)
        self.rows = {"q": self.heads * self.head_dim, "k": self.kv_heads * self.head_dim}
        self.rows["v"] = self.rows["k"]

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
            rotary=int(self.head_dim * _lookup(self.config, rotary.fraction, 1.0)) if rotary else 0,
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
                heads=self.heads,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
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
        )

    def _norm(self, name: str, path: str, block: int | None) -> list[Norm]:
        columns = self.table.norm
        gain, bias = f"{path}.weight", f"{path}.bias"
        if gain not in self.shapes:
            return []
        return [
            Norm(
                name=name,
                kind=columns.kind,
                size=self.shapes[gain].shape[0],
                module=path,
                gain=Slot(gain),
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
