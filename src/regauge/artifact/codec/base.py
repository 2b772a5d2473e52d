"""What a wire is, and what both wires share: which rows of a module belong to which site.

A wire turns the tensors of one block (canonical names, and the codes of the quantised sites) into what a shard holds,
and back. Legend: O output channels, I input channels, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from regauge import parts
from regauge.anatomy.model import Anatomy, Site, Weights
from regauge.anatomy.storage import rows_of, scatter
from regauge.errors import ArtifactError
from regauge.formats.base import Codes, Format
from regauge.formats.rangers import AbsMax
from regauge.parts import PLACES, WEIGHTS, Point

COMPRESSED_TENSORS = "compressed-tensors"
REGAUGE = "regauge"
WIRES = (COMPRESSED_TENSORS, REGAUGE)
DECODES = tuple(axis.name for axis in PLACES[WEIGHTS].axes if axis.decodes)
"""What codes are decoded by; the other coordinates say how they came about."""


@dataclass(frozen=True)
class Layout:
    """Everything that decides what an artifact's tensors are.

    Attributes:
        source: the anatomy of the checkpoint.
        anatomy: the anatomy after every move; the same object where there is none.
        choices: site → its point with every fallback resolved; None or absent: full precision.
        dtype: of full-precision tensors, the source's.
        shapes: parameter key → shape, of those with other than two axes (patches, class token).
        inputs: tap → how all sites that read it read it; absent: as it is.
        config: what config.json must say otherwise than the source's, so that stock code builds the sizes; `unsaid` is
            why it cannot say them, where sizes were changed and it cannot.
        apart: site → how it reads its tap (None: as it is), where that is not how the tap is read. Only artifacts of
            format version 1 and checkpoints of others have such sites.
        cache: store → what it keeps of the past; absent: everything, as it comes.
        attention: block's attention → how it attends; absent: by itself, to everything.
        tokens: residual → what the block that reads it passes by; absent: nothing.
        cut: site → the inputs that its matrix had before it was cut to a member of a family: by these its panels are
            grouped, so that a member computes alike wherever it lies.
        widths: site → the numbers of its first inputs that members of a family read, in a model that runs as any.
        by_columns: whether the head in full precision lies column by column in memory, so that its first columns are
            one piece: in a family that offers fewer channels of the residual, and in its members.
    """

    source: Anatomy
    anatomy: Anatomy
    choices: Mapping[str, Point | None]
    dtype: torch.dtype
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    inputs: Mapping[str, Point] = field(default_factory=dict)
    apart: Mapping[str, Point | None] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    unsaid: str = ""
    cache: Mapping[str, Point] = field(default_factory=dict)
    attention: Mapping[str, Point] = field(default_factory=dict)
    tokens: Mapping[str, Point] = field(default_factory=dict)
    cut: Mapping[str, int] = field(default_factory=dict)
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    by_columns: bool = False

    @property
    def gone(self) -> frozenset[str]:
        """Sites that an artifact does not hold: queries and keys of blocks that take another's attention map."""
        taking = [name.rpartition(".")[0] for name, point in self.attention.items() if point["share"] is not None]
        return frozenset(f"{block}.attn.{kind}" for block in taking for kind in ("q", "k"))

    def held(self, name: str) -> bool:
        """Whether an artifact holds a canonical tensor, or a site: what lies at a site that is gone, its norm too, is
        gone with it."""
        return not any(name == site or name.startswith(f"{site}.") for site in self.gone)

    def reading(self, site: Site) -> Point | None:
        """How a site reads its tap; None: as it is."""
        if site.name in self.apart:
            return self.apart[site.name]
        return None if site.tap is None else self.inputs.get(site.tap)

    @property
    def quantised(self) -> dict[str, Point]:
        """Sites with a point, in the anatomy's order."""
        found = ((site.name, self.choices.get(site.name)) for site in self.anatomy.sites)
        return {name: choice for name, choice in found if choice is not None}

    def modules(self) -> dict[str, list[Site]]:
        """Module path → the sites it computes, of the modules that have a quantised one."""
        found: dict[str, list[Site]] = {}
        for site in self.anatomy.sites:
            found.setdefault(site.module, []).append(site)
        quantised = self.quantised
        return {path: sites for path, sites in found.items() if any(site.name in quantised for site in sites)}


@runtime_checkable
class Wire(Protocol):
    """One way to lay tensors out."""

    @property
    def name(self) -> str: ...
    @property
    def layout(self) -> Layout: ...

    def shard(self, index: int, total: int) -> str:
        """File name of a shard, counted from 0."""

    def pack(self, weights: Weights, codes: Mapping[str, Codes]) -> dict[str, Tensor]:
        """What a shard holds.

        Args:
            weights: canonical tensors that stay in full precision: norms, biases, full sites.
            codes: site → codes, for the quantised sites.
        """

    def unpack(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Codes]]:
        """The inverse of `pack`: full-precision parameters by module key, and codes by site.

        Where only some sites of a fused parameter are quantised, the others come under `{site}.weight`.
        """

    def config(self) -> dict[str, object]:
        """`quantization_config` of config.json; empty where nothing needs one."""


def decoder(choice: Point) -> Format:
    """The format that decodes a site. The ranger is of no use here, and parts of other packages are never imported.

    Raises:
        ArtifactError: grid, grain or scale is a part of another package.
    """
    for axis in DECODES:
        spec = choice.spec(axis)
        if parts.foreign(spec.part):
            raise ArtifactError(
                f"a matrix is stored with the {axis} {spec.part!r} of another package, which an artifact cannot make "
                "regauge import; load it where you trust it, through that package."
            )
    return Format(
        grid=parts.build("grid", choice.spec("grid")),
        grain=parts.build("grain", choice.spec("grain")),
        ranger=AbsMax(),
        scale=parts.build("scale", choice.spec("scale")),
    )


def join(sites: list[Site], tensors: Mapping[str, Tensor]) -> Tensor:
    """One tensor of a module's rows from those of its sites."""
    first = tensors[sites[0].name]
    if len(sites) == 1:
        return first
    total = sum(site.shape[0] for site in sites)
    whole = first.new_empty((total, *first.shape[1:]))
    for site in sites:
        whole[rows_of(site.weight, total)] = tensors[site.name]
    return whole


def split(sites: list[Site], whole: Tensor) -> dict[str, Tensor]:
    """The inverse of `join`."""
    if len(sites) == 1:
        return {sites[0].name: whole}
    return {site.name: whole[rows_of(site.weight, whole.shape[0])] for site in sites}


def full_parameters(layout: Layout, weights: Weights) -> dict[str, Tensor]:
    """Full-precision canonical tensors by module key; parts of a fused parameter that is partly quantised keep their
    canonical name. Gains with an offset go back to the source's dtype."""
    quantised = layout.quantised
    mixed = {site.weight.key for site in layout.anatomy.sites if site.name in quantised}
    alone = {f"{s.name}.weight" for s in layout.anatomy.sites if s.weight.key in mixed and s.name not in quantised}
    found = scatter(layout.anatomy, {n: t for n, t in weights.items() if n not in alone}, layout.shapes)
    for norm in layout.anatomy.norms:
        if norm.offset and norm.gain is not None and norm.gain.key in found:
            found[norm.gain.key] = found[norm.gain.key].to(layout.dtype)
    return found | {name: weights[name].contiguous() for name in sorted(alone & weights.keys())}
