"""Puts packed modules where a skeleton's full ones stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from regauge.anatomy.model import Site
from regauge.anatomy.storage import Place, rows_of, take
from regauge.artifact.codec.base import Layout, decoder
from regauge.artifact.codec.taps import EMBED, HEAD, readings
from regauge.errors import ArtifactError, SettingError, nearest
from regauge.formats.base import Codes
from regauge.formats.readings import Reading
from regauge.hosts.transformers.experts import biases, gating
from regauge.kernels.cpu.matrix import ACTIVATIONS
from regauge.runtime.matrices.arena import Arena
from regauge.runtime.matrices.modules import (
    FullMatrix,
    PackedExperts,
    PackedLinear,
    PackedLookup,
    PackedMatrix,
    pack_parameter,
)
from regauge.runtime.modules import put


@dataclass
class _Loading:
    """Where the matrices of a model lie, and the sites that have theirs."""

    arena: Arena = field(default_factory=Arena)
    done: set[str] = field(default_factory=set)


_loading: WeakKeyDictionary[nn.Module, _Loading] = WeakKeyDictionary()
"""Models between their first shard and their last."""


def release(model: nn.Module) -> None:
    """Lets what is packed from now on lie apart from what was, so that parts of a model can leave memory."""
    if model in _loading:
        _loading[model].arena.release()


def install(
    model: Any,
    layout: Layout,
    codes: Mapping[str, Codes],
    full: dict[str, Tensor],
    dtype: torch.dtype,
    device: str,
    activations: str | None = None,
) -> None:
    """Replaces every module some of whose sites have codes. Takes from `full` what a fused or expert module needs.

    Args:
        codes: of the sites of one shard; a module's sites lie in one shard.
        full: full-precision parameters by module key, and `{site}.weight` of sites beside packed ones.
        activations: how products of panels round activations: `int8`, `int16`, `float32` (not at all, and slow);
            None: 16 bits, or 8 beside weights of 4 bits and fewer in a model of 16-bit floats.

    Raises:
        SettingError: `activations` is no such name.
    """
    if activations is not None and activations not in ACTIVATIONS:
        raise SettingError(f"there are no activations {activations!r}{nearest(activations, tuple(ACTIVATIONS))}")
    loading = _loading.setdefault(model, _Loading())
    taps = readings(layout, codes, full)
    make = partial(_matrix, layout=layout, codes=codes, taps=taps, full=full, dtype=dtype, device=device)
    make = partial(make, activations=activations, allocate=loading.arena.allocate)
    quantised = layout.quantised
    for path, all_sites in layout.modules().items():
        if not any(site.name in codes for site in all_sites):
            continue
        module = model.get_submodule(path)
        expert = all_sites[0].expert is not None
        keys = {site.weight.key for site in all_sites if site.name in quantised}
        sites = [site for site in all_sites if expert or site.weight.key in keys]
        made = {site.name: make(site) for site in sites}
        if expert:
            added = biases(sites, full, dtype)
            for key in {slot.key for site in sites for slot in (site.weight, site.bias) if slot is not None}:
                full.pop(key, None)
            put(model, path, _experts(sites, made, added, module))
        elif isinstance(module, nn.Embedding):
            PackedLookup.pack(module, made[sites[0].name])
        elif isinstance(module, nn.Linear) or sites[0].weight.transposed:
            put(model, path, _linear(sites, made, full.pop(f"{path}.bias", None), dtype))
        else:
            for site in sites:
                pack_parameter(module, site.weight.key.rpartition(".")[2], made[site.name])
    loading.done |= codes.keys()
    if loading.done >= quantised.keys():
        loading.arena.trim()
        del _loading[model]


def _matrix(
    site: Site,
    layout: Layout,
    codes: Mapping[str, Codes],
    taps: Mapping[str, Reading],
    full: dict[str, Tensor],
    dtype: torch.dtype,
    device: str,
    activations: str | None,
    allocate: Callable[[int], Tensor],
) -> Any:
    choice = layout.quantised.get(site.name)
    if choice is None:
        weight = full.pop(f"{site.name}.weight", None)
        if weight is None and site.weight.key in full:
            weight = take(full[site.weight.key], Place(site.weight, site.shape))
        if weight is None or tuple(weight.shape) != site.shape:
            raise ArtifactError(f"the artifact lacks the weights of {site.name}, or they have another shape.")
        return FullMatrix(weight, dtype)
    if site.name not in codes:
        raise ArtifactError(f"the artifact lacks the codes of {site.name}.")
    reads = HEAD if site.name == EMBED and layout.anatomy.tied else site.name  # a table is read by no product
    how = (
        dtype,
        device,
        taps.get(reads),
        activations,
        allocate,
        layout.cut.get(site.name),
        layout.widths.get(site.name, ()),
    )
    return PackedMatrix(codes[site.name], decoder(choice), *how)


def _linear(sites: list[Site], made: Mapping[str, Any], bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
    total = sum(site.shape[0] for site in sites)
    order = torch.cat([rows_of(site.weight, total) for site in sites])
    return PackedLinear([made[site.name] for site in sites], order, bias, dtype)


def _experts(sites: list[Site], made: Mapping[str, Any], added: Mapping[str, Tensor], old: Any) -> PackedExperts:
    experts: dict[int, dict[str, Any]] = {}
    for site in sites:
        experts.setdefault(site.expert or 0, {})[site.kind] = made[site.name]
    packed = PackedExperts([experts[number] for number in sorted(experts)], gating(old, sites))
    for site in sites:
        if site.name in added:
            packed.give_bias(site.expert or 0, site.kind, added[site.name])
    return packed
