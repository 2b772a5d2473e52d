"""What compressed-tensors can say of a plan, and every reason where it cannot. Tried with stock transformers 5.23 and
compressed-tensors 0.20; where the loaders are narrower than the format, the loaders decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from regauge import parts
from regauge.anatomy.fusing import fused
from regauge.anatomy.inner import inner_taps
from regauge.anatomy.model import Anatomy, Site
from regauge.artifact.codec.base import Layout, decoder
from regauge.artifact.loading import ALONE, ours
from regauge.formats.base import Format, Grid
from regauge.parts import INPUTS, Point, axis_of

CASTS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
LOOKED_UP = ("embed", "position", "type", "patch")


@dataclass(frozen=True)
class Scheme:
    """How compressed-tensors says one format.

    Attributes:
        format: its name for the layout of the tensors.
        weights, activations: fields of its `QuantizationArgs`, as sorted pairs; None: not quantised.
    """

    format: str
    weights: tuple[tuple[str, object], ...]
    activations: tuple[tuple[str, object], ...] | None = None

    @property
    def symmetric(self) -> bool:
        return bool(dict(self.weights)["symmetric"])

    def json(self, targets: list[str]) -> dict[str, object]:
        """A config group."""
        return {
            "targets": targets,
            "weights": dict(self.weights),
            "input_activations": None if self.activations is None else dict(self.activations),
            "output_activations": None,
            "format": self.format,
        }


def _weights(**changes: object) -> tuple[tuple[str, object], ...]:
    fields: dict[str, object] = {"dynamic": False, "group_size": None, "symmetric": True, **changes}
    return tuple(sorted(fields.items()))


def _token(kind: str) -> tuple[tuple[str, object], ...]:
    fields: dict[str, object] = {"num_bits": 8, "type": kind, "strategy": "token", "dynamic": True, "symmetric": True}
    return tuple(sorted(fields.items()))


TOKEN = parts.point(INPUTS, grid="int8")
"""How it has activations: a step a token, from each call's own values."""


def scheme_of(choice: Point, shape: tuple[int, int], reading: Point | None = None) -> Scheme | str:
    """The scheme of a site and of how it reads its tap, or why there is none."""
    if choice["compensator"] is not None:
        return f"it has no field for what {choice.name('compensator')!r} adds back"
    if reading is not None and reading.but(grid=TOKEN["grid"]) != TOKEN:
        for axis, spec in reading:
            if axis != "grid" and spec != TOKEN[axis]:
                told = parts.spell(axis_of(INPUTS, axis).parts, spec) or spec.part
                if axis == "transform":  # compressed-tensors 0.20 has `transform_config`, and its loader drops it
                    return f"stock transformers 5.23 reads no transform_config: it would leave {told} out in silence"
                return f"activations with {axis} {told} were not tried (only {axis} {TOKEN.name(axis)})"
    fmt = decoder(choice)
    inputs = None if reading is None else parts.format_of(reading).grid
    grain = fmt.grain.taken(shape).name
    if fmt.grid.kind == "integer":
        return _integers(fmt, grain, inputs)
    if fmt.grid.cast is torch.float8_e4m3fn:
        return _fp8(fmt, grain, inputs)
    if fmt.grid.kind == "float" and fmt.grid.bits == 4:
        return _fp4(fmt, grain, inputs)
    return f"it has no {fmt.grid.name} weights"


def _integers(fmt: Format, grain: str, inputs: Grid | None) -> Scheme | str:
    kind, _, size = grain.partition(":")
    if kind not in ("channel", "group"):
        return f"integers with one step a {kind} were not tried"
    if fmt.scale.name not in CASTS:
        return f"integer steps cannot be stored as {fmt.scale.name}"
    if inputs is not None and not (inputs.kind == "integer" and inputs.bits == 8 and inputs.symmetric):
        return f"integer weights with {inputs.name} activations were not tried"
    if inputs is not None and not fmt.grid.symmetric:
        return "its loader drops the quantisation of activations where weights have zero points"
    weights = _weights(
        num_bits=fmt.grid.bits,
        type="int",
        strategy=kind,
        group_size=int(size) if size else None,
        symmetric=fmt.grid.symmetric,
    )
    wide = inputs is not None and fmt.grid.bits == 8
    return Scheme("int-quantized" if wide else "pack-quantized", weights, None if inputs is None else _token("int"))


def _fp8(fmt: Format, grain: str, inputs: Grid | None) -> Scheme | str:
    if grain != "channel":
        return f"fp8 with one step a {grain.partition(':')[0]} was not tried"
    if fmt.scale.name not in CASTS:
        return f"fp8 steps cannot be stored as {fmt.scale.name}"
    if inputs is not None and inputs.cast is not torch.float8_e4m3fn:
        return f"fp8 weights with {inputs.name} activations were not tried"
    weights = _weights(num_bits=8, type="float", strategy="channel")
    return Scheme("float-quantized", weights, None if inputs is None else _token("float"))


def _fp4(fmt: Format, grain: str, inputs: Grid | None) -> Scheme | str:
    if inputs is not None:
        return f"fp4 weights with {inputs.name} activations were not tried"
    if (fmt.scale.name, grain) == ("nv", "group:16"):
        weights = _weights(
            num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn"
        )
        return Scheme("nvfp4-pack-quantized", weights)
    if (fmt.scale.name, grain) == ("e8m0", "group:32"):
        weights = _weights(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8")
        return Scheme("mxfp4-pack-quantized", weights)
    return f"its fp4 has e4m3 steps in groups of 16 or powers of two in groups of 32, not {fmt.scale.name} in {grain}"


def schemes(layout: Layout) -> dict[str, Scheme]:
    """Module path → scheme, of a layout without refusals."""
    quantised = layout.quantised
    found: dict[str, Scheme] = {}
    for path, sites in layout.modules().items():
        scheme = scheme_of(quantised[sites[0].name], sites[0].shape, layout.reading(sites[0]))
        assert type(scheme) is Scheme, f"{path}: {scheme}"
        found[path] = scheme
    return found


def remarks(layout: Layout) -> list[str]:
    """What a reader must know who serves the artifact elsewhere, a sentence each; of a layout without refusals."""
    found = schemes(layout)
    told: dict[str, list[int | None]] = {}
    for (block, _, stack), sites in fused(layout.anatomy.sites).items():
        if len({site.module for site in sites}) > 1 and len({found.get(site.module) for site in sites}) > 1:
            told.setdefault(stack, []).append(block)
    return [
        f"{stack} of {len(blocks)} block{'s' * (len(blocks) > 1)} (first {blocks[0]}) have different formats: stock "
        "transformers and regauge read them, and runtimes that fuse those matrices (vLLM, SGLang) do not; give them "
        "one format to serve them there"
        for stack, blocks in told.items()
    ] + expanded(layout)


def expanded(layout: Layout) -> list[str]:
    """What stock code does with an encoder: it expands the matrices while it loads them, or cannot run it."""
    whole = schemes(layout).values()
    if not _encoder(layout) or not whole:
        return []
    if not expands(layout):
        return [
            "SentenceTransformer does not run an encoder of several formats; transformers' AutoModel and regauge do"
        ]
    acts = any(scheme.activations is not None for scheme in whole)
    return [
        f"stock transformers and SentenceTransformer expand the matrices to {str(layout.dtype)[6:]} while they load "
        f"them{', and do not round activations' if acts else ''}; regauge.load keeps them packed"
        f"{' and rounds activations' if acts else ''}"
    ]


def expands(layout: Layout) -> bool:
    """Whether stock code is told to decode the matrices while it loads them.

    compressed-tensors 0.20 expects unpacked zero points when it keeps weights compressed, and packed ones when it
    decodes them while loading: only the second can read a file of its own. And sentence-transformers, through which
    encoders are used, runs modules that keep their weights compressed without decoding them (`'Linear' object has no
    attribute 'weight'`).
    """
    whole = set(schemes(layout).values())
    return not all(scheme.symmetric for scheme in whole) or (_encoder(layout) and len(whole) == 1)


def _encoder(layout: Layout) -> bool:
    """Whether it reads text and predicts no next token."""
    return not any(site.kind in ("head", "patch") for site in layout.anatomy.sites)


def refusals(layout: Layout) -> list[str]:
    """Every reason why compressed-tensors cannot say the layout; the same reason of many sites once."""
    reasons: dict[str, list[str]] = {}
    for where, why in _all(layout):
        reasons.setdefault(why, []).append(where)
    return [f"{_names(where)}: {why}" for why, where in reasons.items()]


def _all(layout: Layout) -> Iterator[tuple[str, str]]:
    yield from _changed(layout.source, layout.anatomy)
    if layout.unsaid:
        yield "sizes", layout.unsaid
    if ours(layout.anatomy.family):
        yield "the model", f"{ALONE}{layout.anatomy.family}"
    for name in layout.attention:
        yield name, "a block takes another's attention map, or its heads see a window, which config.json cannot say"
    for name in filter(layout.inputs.__contains__, inner_taps(layout.anatomy)):
        yield name, "it has activations that linear layers read, and none that attention or the residual does"
    quantised = layout.quantised
    found: list[Scheme] = []
    for sites in layout.modules().values():
        for site in sites:
            why = _module(site, sites, quantised, layout.anatomy)
            if why:
                yield site.name, why
        choice = quantised.get(sites[0].name)
        scheme = None if choice is None else scheme_of(choice, sites[0].shape, layout.reading(sites[0]))
        if type(scheme) is str:
            yield sites[0].name, scheme
        elif type(scheme) is Scheme:
            found.append(scheme)
            if scheme.format in ("nvfp4-pack-quantized", "mxfp4-pack-quantized") and layout.dtype != torch.bfloat16:
                yield sites[0].name, f"its loader makes fp4 weights bfloat16, and the model is {layout.dtype}"
    if len(set(found)) > 1 and not all(scheme.symmetric for scheme in found):
        yield "zero points", "its loader reads them only where every quantised matrix has the same format"


def _changed(source: Anatomy, anatomy: Anatomy) -> Iterator[tuple[str, str]]:
    """What stock modules do not have."""
    norms, sites = {norm.name: norm for norm in source.norms}, {site.name: site for site in source.sites}
    for norm in anatomy.norms:
        before = norms[norm.name]
        if norm.kind != before.kind:
            yield norm.name, f"stock modules have a norm of kind {before.kind} there, and it became {norm.kind}"
        elif (norm.gain is None, norm.bias is None) != (before.gain is None, before.bias is None):
            yield norm.name, "it gained or lost a gain or bias, which stock modules do not expect"
    for site in anatomy.sites:
        if (site.bias is None) != (sites[site.name].bias is None):
            yield site.name, "it gained or lost a bias, which stock modules do not expect"


def _module(site: Site, sites: list[Site], quantised: Mapping[str, Point], anatomy: Anatomy) -> str:
    choice = quantised.get(site.name)
    if site.expert is not None:
        return "stacks of experts are not linear layers"
    if site.kind in LOOKED_UP:
        return "stock transformers cannot load a quantised embedding"
    if site.kind == "router":
        return "routers are not linear layers"
    if site.weight.transposed:
        return "it is a Conv1D, not a linear layer"
    if site.name == "head" and anatomy.tied:
        return "the head is tied to the embedding"
    if choice != quantised.get(sites[0].name):
        return f"it shares a matrix with {sites[0].name} and has another choice"
    if len(sites) > 1 and choice is not None and choice.name("scale") == "nv":
        return "it shares a matrix with others, and the global step of NVFP4 is one a matrix"
    return ""


def unsayable(site: Site, choice: Point, anatomy: Anatomy) -> str:
    """Why no format of a site's could be said, in a model whose sizes and norms stay; "" where one can be."""
    sites = [one for one in anatomy.sites if one.module == site.module]
    return _module(site, sites, {one.name: choice for one in sites}, anatomy)


def _names(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-1]} ({len(names)} of them)"
