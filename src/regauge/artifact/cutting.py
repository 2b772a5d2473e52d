"""A member of a family by itself: the tensors of an artifact, cut to it block by block, and what says that it was cut.

Every matrix of a member is the first rows and columns of the family's, its codes and steps too. How a matrix is laid
out in memory may depend on how many inputs it has, and with it how inputs are rounded; so beside a member that was
taken out stands how wide its matrices were (`regauge/cut.json`), and it computes what it computed among the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from regauge.anatomy.members import Member, member_of, part
from regauge.anatomy.model import Anatomy, Site
from regauge.anatomy.sizes import windowed
from regauge.artifact import files
from regauge.artifact.adapters import Adapters, adapter_of
from regauge.artifact.caches import read_cache
from regauge.artifact.codec.base import Layout, Wire, decoder
from regauge.artifact.codec.compressed import CompressedTensors
from regauge.artifact.codec.schemes import CASTS
from regauge.artifact.folder import dtype_of, read_anatomy, read_config, shards
from regauge.artifact.reader import Artifact, Block, open_artifact
from regauge.documents import ordinary, read_json
from regauge.elastic.subnet import Subnet
from regauge.errors import ArtifactError, SettingError
from regauge.formats.base import Codes, Format, Term
from regauge.formats.planes import level
from regauge.formats.terms import KINDS, LOW_RANK
from regauge.parts import Point, Spec

FILE = "regauge/cut.json"
VERSION, WIDE = 1, 1 << 26


@dataclass(frozen=True, eq=False)
class Taken:
    """What stands beside a member that was taken out.

    Attributes:
        subnet: which member it is.
        columns: site → the inputs that its matrix had.
        by_columns: whether the head lies column by column, as the family's.
    """

    subnet: Subnet
    columns: Mapping[str, int]
    by_columns: bool = False


def opened(folder: Path) -> Artifact:
    """An artifact as data, or a checkpoint of ours in which nothing is rounded.

    Raises:
        ArtifactError: it is neither.
    """
    config = read_config(folder)
    if config.get("quantization_config"):
        found = open_artifact(folder)
    else:
        anatomy = read_anatomy(folder)
        wire = CompressedTensors(Layout(anatomy, anatomy, {}, dtype_of(config)))
        found = Artifact(folder, wire, config, None, shards(folder, wire))
    layout = found.layout
    cache = layout.cache or read_cache(folder, layout.anatomy)
    taken = read_cut(folder, layout.anatomy)
    cut = layout.cut if taken is None else taken.columns
    held = {key: kind for path in found.shards for key, kind in files.header(path).items()}
    shapes = layout.shapes or {key: shape for key, (_, shape, *_) in held.items() if len(shape) > 2}
    steps = _steps(layout, {key: dtype for key, (dtype, *_) in held.items()})
    layout = replace(layout, cache=cache, cut=cut, shapes=shapes, choices=dict(layout.choices) | steps)
    return replace(found, wire=replace(found.wire, layout=layout))  # type: ignore[type-var]  # wires are dataclasses


def _steps(layout: Layout, dtypes: Mapping[str, torch.dtype]) -> dict[str, Point]:
    """Points with the dtype of their steps as files have it, which the config of compressed-tensors does not say."""
    names = {dtype: name for name, dtype in CASTS.items()}
    found = {}
    for path, sites in layout.modules().items():
        name = names.get(dtypes.get(f"{path}.weight_scale", torch.float32))
        for site in sites:
            point = layout.choices.get(site.name)
            if point is not None and name is not None and point.name("scale") == "f32":
                found[site.name] = point.but(scale=Spec(name))
    return found


def layout_of(
    whole: Layout,
    member: Member,
    config: Mapping[str, object] | None = None,
    unsaid: str = "",
    adapters: Adapters | None = None,
) -> Layout:
    """What the tensors of a member are.

    Args:
        config: what config.json says otherwise; `unsaid`: why it cannot say the sizes.
        adapters: what is added to weights at each precision.
    """
    source = member_of(whole.source, member.blocks, {}, kernels=_kernels(member)).anatomy

    def own(points: Mapping[str, Point]) -> dict[str, Point]:
        return {new: point for name, point in points.items() if (new := member.name(name)) is not None}

    def here(points: Mapping[str, Point | None]) -> dict[str, Point | None]:
        return {new: point for name, point in points.items() if (new := member.name(name)) is not None}

    sites = {site.name: site for site in member.anatomy.sites}

    def coded(name: str, point: Point | None) -> Point | None:
        """The point of a member's site: an ordinary one of fewer bits where it has levels and the member says one."""
        bits = member.bits_of(sites[name])
        if point is None or bits is None or decoder(point).grid.coarsest is None:
            return point
        term = adapter_of(adapters or {}, member, sites[name])
        more = {} if term is None else {"compensator": Spec("lorc", (("rank", term.left_OR.shape[1]),))}
        return point.but(grid=Spec(f"int{bits}-asym"), scale=Spec("f16-low"), rounder=None, **more)

    cut: dict[str, int] = {}
    for site in member.anatomy.sites:
        old = member.origin(site.name)
        wide = whole.cut.get(old, member.whole.site(old).shape[1])
        if places := member.window(site):
            wide = wide // places * site.window
        if wide != site.shape[1]:
            cut[site.name] = wide
    return Layout(
        source,
        member.anatomy,
        {name: coded(name, point) for name, point in here(whole.choices).items()},
        whole.dtype,
        shapes=_own_shapes(whole.shapes, member),
        inputs=own(whole.inputs),
        apart=here(whole.apart),
        config=config or {},
        unsaid=unsaid,
        cache=own(whole.cache),
        cut=cut,
        by_columns=whole.by_columns,
    )


def _kernels(member: Member) -> dict[int, int]:
    """Block of the whole → side of the kernels that a member has in it, where that is another."""
    some = (site for site in member.anatomy.sites if member.window(site) and site.block is not None)
    return {member.blocks[site.block or 0]: isqrt(site.window) for site in some}


def _own_shapes(shapes: Mapping[str, tuple[int, ...]], member: Member) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters of more axes than two, by the member's keys; of its convolutions with its kernels."""
    found = {new: shape for key, shape in shapes.items() if (new := member.moved(key)) is not None}
    for site in member.anatomy.sites:
        if member.window(site) and site.weight.key in found:
            found[site.weight.key] = windowed(site.shape, site.window, found[site.weight.key])
    return found


def cut_block(
    block: Block,
    whole: Layout,
    own: Layout,
    member: Member,
    adapters: Adapters | None = None,
    statistics: Mapping[str, Tensor] | None = None,
) -> Block:
    """A block of the family (or what lies outside of all) as the member has it.

    Args:
        statistics: of the member's batch norms, by its own names, where it has them for itself.

    Raises:
        SettingError: something in it does not come apart.
    """
    weights = {name: tensor.contiguous() for name, tensor in member.cut(block.weights).items()}
    weights |= {name: found.to(weights[name].dtype) for name, found in (statistics or {}).items() if name in weights}
    codes: dict[str, Codes] = {}
    for name, found in block.codes.items():
        new = member.name(name)
        if new is not None:
            fmt = decoder(whole.quantised[name])
            site = own.anatomy.site(new)
            codes[new] = cut_codes(found, fmt, site, member.window(site), name)
            bits = member.bits_of(site)
            if bits is not None and fmt.grid.coarsest is not None:
                codes[new], _ = level(codes[new], fmt, bits)
                term = adapter_of(adapters or {}, member, site)
                if term is not None:
                    codes[new] = replace(codes[new], terms=(*codes[new].terms, term))
    taps = {site.tap: site.shape[1] for site in whole.anatomy.sites if site.tap is not None}
    mine = {site.tap: site.shape[1] for site in own.anatomy.sites if site.tap is not None}
    extras: dict[str, Tensor] = {}
    for key, tensor in block.extras.items():
        tap = key.rpartition(".")[0]
        new = member.name(key) if tap in taps else member.moved(key)
        if new is None:
            continue
        if tap in taps and mine.get(new.rpartition(".")[0]) != taps[tap] and tensor.numel() != 1:
            raise SettingError(f"{tap} is read by {tensor.numel()} numbers for its channels, which do not come apart")
        extras[new] = tensor
    index = None if block.index is None else member.blocks.index(block.index)
    return Block(index, weights, codes, extras)


def cut_codes(codes: Codes, fmt: Format, site: Site, window: int = 0, name: str = "a matrix") -> Codes:
    """The part of a quantised matrix that a member's site has: its first rows and inputs, of a convolution the middle
    places of each channel.

    Args:
        window: places of each channel in the whole, where the member has others.

    Raises:
        SettingError: its codes, steps or terms do not come apart there.
    """
    (whole_O, whole_I), shape = codes.codes_OI.shape, site.shape
    rows, columns = shape
    if (whole_O, whole_I) == shape:
        return codes
    groups, span = fmt.grain.groups((whole_O, whole_I))[0], fmt.grain.span((whole_O, whole_I))
    why = fmt.grain.refuses(shape)
    if why or columns % fmt.grid.run or groups not in (1, whole_O * (whole_I // max(span, 1))):
        why = why or f"codes of {fmt.grain.name} go together"
        raise SettingError(f"{name} cannot be cut to {rows} x {columns}: {why}")

    def cut(field_G: Tensor) -> Tensor:
        if groups == 1 or field_G.numel() % whole_O:
            return field_G
        across = field_G.numel() // whole_O
        if window and across > 1:
            raise SettingError(f"{name} has {across} steps a row, each of several places, and kernels of another size "
                               "have their places elsewhere: give it a step a row")  # fmt: skip
        kept, rest = (across, 0) if across == 1 else divmod(across * columns, whole_I)
        if rest:
            raise SettingError(f"{name} cannot be cut to {rows} x {columns}: its steps go together beyond there")
        return field_G.reshape(whole_O, across, *field_G.shape[1:])[:rows, :kept].flatten(0, 1).contiguous()

    fields = {part: cut(tensor) for part, tensor in codes.step.fields.items()}
    terms = tuple(_cut_term(term, site, window, name) for term in codes.terms)
    return Codes(part(codes.codes_OI, site, window).contiguous(), fmt.load(fields), terms, codes.notes)


def _cut_term(term: Term, site: Site, window: int, name: str) -> Term:
    if term.kind != LOW_RANK:
        raise SettingError(f"{name} has a {term.kind} term beside its codes, which does not come apart")
    tensors = term.tensors
    left, right_RI = tensors["left"][: site.shape[0]].contiguous(), tensors["right"]
    right = part(right_RI, replace(site, shape=(len(right_RI), site.shape[1])), window).contiguous()
    return KINDS[term.kind]({"left": left, "right": right})


def cut_json(subnet: Subnet, layout: Layout) -> str:
    """What stands beside a member."""
    columns = {name: count for name, count in layout.cut.items() if name in layout.quantised}
    lies = {"by_columns": True} if layout.by_columns else {}
    return json.dumps({"version": VERSION, "subnet": str(subnet), "columns": columns} | lies, indent=1) + "\n"


def read_cut(folder: Path, anatomy: Anatomy) -> Taken | None:
    """What a directory says of how its model was taken out of a family; None where it says nothing.

    Raises:
        ArtifactError: the file is damaged or does not fit the model; in a sentence.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    ordinary(folder, ArtifactError)
    raw = read_json(path, ArtifactError)
    broken = ArtifactError(f"{path} is none of ours or was changed; fetch or build the artifact again.")
    known = {"version", "subnet", "columns"}
    if raw.keys() - {"by_columns"} != known or raw["version"] != VERSION or type(raw["columns"]) is not dict:
        raise broken
    if raw.get("by_columns", True) is not True:
        raise broken
    sizes = {site.name: site.shape[1] for site in anatomy.sites}
    for name, count in raw["columns"].items():
        if name not in sizes or type(count) is not int or not sizes[name] <= count < WIDE:
            raise broken
    try:
        return Taken(Subnet.parse(raw["subnet"]), raw["columns"], "by_columns" in raw)
    except SettingError as error:
        raise ArtifactError(f"{path} names no member: {error}; fetch or build the artifact again.") from error


def with_cut(wire: Wire, taken: Taken | None) -> Wire:
    """The wire whose matrices are laid out as those that they were cut from."""
    if taken is None:
        return wire
    layout = replace(wire.layout, cut=taken.columns, by_columns=taken.by_columns)
    return replace(wire, layout=layout)  # type: ignore[type-var]  # wires are dataclasses
