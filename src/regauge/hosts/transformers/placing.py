"""Puts tensors of the files where a skeleton has a place for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regauge.artifact import files
from regauge.artifact.codec.base import COMPRESSED_TENSORS, Layout, Wire, decoder
from regauge.artifact.codec.taps import EMBED, inner_readings, of_tied_head
from regauge.errors import ArtifactError
from regauge.formats.base import Codes
from regauge.hosts.transformers.checkpoint import expected
from regauge.hosts.transformers.inside import fill
from regauge.hosts.transformers.install import install
from regauge.kernels.cpu.interface import has
from regauge.runtime.matrices.arena import Arena
from regauge.runtime.matrices.modules import PackedLinear
from regauge.runtime.modules import put
from regauge.runtime.rows import CPU


def place(
    model: Any,
    wire: Wire,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: str,
    path: Path,
    activations: str | None = None,
    head: Mapping[str, Tensor] | None = None,
) -> set[str]:
    """Packed modules first, then every parameter and persistent buffer by its key.

    Args:
        tensors: of one shard, or of some of its modules.
        path: where they come from, for messages.
        activations: as `install` says.
        head: what is kept of how a tied head reads its input, in whatever shard; for the table that it shares.

    Returns:
        the quantised sites that are now there.
    """
    full, codes = wire.unpack({name: tensor for name, tensor in tensors.items() if name not in (head or {})})
    if EMBED in codes:
        full |= head or {}
    return put_in(model, wire, (full, codes), dtype, device, path, activations)


def put_in(
    model: Any,
    wire: Wire,
    found: tuple[dict[str, Tensor], Mapping[str, Codes]],
    dtype: torch.dtype,
    device: str,
    path: Path,
    activations: str | None = None,
) -> set[str]:
    """`place`, of what a wire has unpacked: parameters by module key, and codes by site."""
    layout, (full, codes) = wire.layout, found
    if wire.name == COMPRESSED_TENSORS:
        codes = {name: as_stock(one, dtype, layout, name) for name, one in codes.items()}
    install(model, layout, codes, full, dtype, device, activations)
    fill(model, layout, inner_readings(layout, full))
    halves = [f"{name}." for name in layout.quantised if name not in codes]  # said to lack codes, once all is read
    for key, tensor in full.items():
        if key.startswith(tuple(halves)):
            continue
        assign(model, key, tensor, dtype, path)
    return set(codes)


def of_head(wire: Wire, paths: Sequence[Path]) -> dict[str, Tensor]:
    """What is kept of how a tied head reads its input, wherever it lies."""
    start, found = of_tied_head(wire.layout), dict[str, Tensor]()
    for path in paths if start else ():
        found |= files.read(path, {key for key in files.header(path) if key.startswith(start)})
    return found


def as_stock(codes: Codes, dtype: torch.dtype, layout: Layout, name: str) -> Codes:
    """Steps in the dtype of the model, as stock transformers has them after loading."""
    fields = dict(codes.step.fields)
    decoded_at_once = codes.step.zero_G1 is not None  # then stock code multiplies in the dtype of the steps
    if fields["scale"].dtype in (torch.float32, torch.float16, torch.bfloat16) and not decoded_at_once:
        fields["scale"] = fields["scale"].to(dtype)
    choice = layout.quantised[name]
    return replace(codes, step=decoder(choice).load(fields))


def assign(model: Any, key: str, tensor: Tensor, dtype: torch.dtype, path: Path) -> None:
    """Puts one full-precision tensor where the skeleton has a place for it."""
    parent, _, name = key.rpartition(".")
    try:
        module = model.get_submodule(parent)
        place = module._parameters.get(name, module._buffers.get(name))
    except AttributeError:
        place = None
    if place is None:
        if expected(model, key):
            return
        raise ArtifactError(
            f"{path.name} holds {key}, for which the model of its config.json has no place, so loading it would leave "
            "something out; what wrote it must load it."
        )
    if place.shape != tensor.shape:
        raise ArtifactError(
            f"{path.name}: {key} has shape {list(tensor.shape)}, and the config asks for {list(place.shape)}."
        )
    value = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if not fits(tensor, value):
        raise ArtifactError(
            f"{path.name}: {key} has values up to {float(tensor.abs().max()):.3g}, which "
            f"{str(dtype).removeprefix('torch.')} cannot hold; load it with dtype='bfloat16' or 'float32'."
        )
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[name] = value


def fits(tensor: Tensor, value: Tensor) -> bool:
    """Whether a tensor that was cast is still finite. One pass, only where the new dtype reaches less far."""
    if not value.is_floating_point() or not value.numel():
        return True
    if torch.finfo(value.dtype).max >= torch.finfo(tensor.dtype).max:
        return True
    low, high = value.aminmax()
    return bool(low.isfinite() and high.isfinite())


def tie(model: Any) -> None:
    """Parameters that no file has, tied by transformers to others: one tensor, or one packed table read by both."""
    packed = []
    for target, source in model.all_tied_weights_keys.items():
        path, _, own = target.rpartition(".")
        owner, _, name = source.rpartition(".")
        head, module = model.get_submodule(path), model.get_submodule(owner)
        place = head._parameters.get(own)
        if place is None or not place.is_meta:
            continue
        if module._parameters.get(name) is not None:
            head._parameters[own] = module._parameters[name]
        elif "matrix" in module._modules:
            packed.append((path, module.matrix))
    for path, matrix in packed:
        bias = model.get_submodule(path)._parameters.get("bias")
        put(model, path, PackedLinear([matrix], None, bias, matrix.dtype))


def lay_by_columns(model: Any, layout: Layout, device: str) -> None:
    """Lays the head in full precision, and the table that it may be tied to, column by column where the layout says so.
    It stays torch's own parameter, of other strides: a member's first columns are one piece of memory."""
    module = next((model.get_submodule(site.module) for site in layout.anatomy.sites if site.name == "head"), None)
    if not layout.by_columns or type(module) is not nn.Linear or device != CPU or not has("rg_has_columns"):
        return
    held, arena = module.weight, Arena()
    turned = arena.allocate(held.nbytes).view(held.dtype).view(held.shape[1], held.shape[0]).t()
    arena.trim()
    turned.copy_(held.detach())
    new = nn.Parameter(turned, requires_grad=False)
    for other in model.modules():
        for name, found in other._parameters.items():
            if found is held:
                other._parameters[name] = new
