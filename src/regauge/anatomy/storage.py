"""Between canonical tensors and the parameters of transformers' modules, exactly, in both directions.

`gather` takes the canonical tensors out of parameters, `scatter` puts them back: fused, interleaved, transposed and
stacked storage, and norms whose stored gain lacks an offset. `scatter(gather(p)) == p` for every family. Where a site
gained a bias and shares its module with one that has none, the others' rows of the bias are zero.

A gain with an offset comes out in float32 at least: 1 + w in bfloat16 would lose w. It is the value that the module
itself computes, so it goes back to one that gives the same gain bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy, Norm, Site, Slot, Weights
from regauge.errors import ModelError


@dataclass(frozen=True)
class Place:
    """A canonical tensor's slot, its shape, and what the module adds to the stored value."""

    slot: Slot
    shape: tuple[int, ...]
    offset: float = 0.0


def places(anatomy: Anatomy, block: int | None) -> dict[str, Place]:
    """Canonical name → place, for one block (None: what lies outside the blocks)."""
    found: dict[str, Place] = {}
    for site in anatomy.in_block(block):
        found |= _site_places(site)
    for norm in anatomy.norms:
        if norm.block == block:
            found |= _norm_places(norm)
    return found


def _site_places(site: Site) -> dict[str, Place]:
    found = {f"{site.name}.weight": Place(site.weight, site.shape)}
    if site.bias is not None:
        found[f"{site.name}.bias"] = Place(site.bias, site.shape[:1])
    return found


def _norm_places(norm: Norm) -> dict[str, Place]:
    found = {}
    if norm.gain is not None:
        found[f"{norm.name}.gain"] = Place(norm.gain, (norm.size,), norm.offset)
    for word, slot in norm.slots.items():
        if word != "gain":
            found[f"{norm.name}.{word}"] = Place(slot, (norm.size,))
    return found


def take(parameter: Tensor, place: Place) -> Tensor:
    """The canonical tensor that lies at a place of a parameter; a view where that is possible."""
    slot, tensor = place.slot, parameter
    if slot.index is not None:
        tensor = tensor[slot.index]
    if slot.transposed:
        tensor = tensor.t()
    if slot.heads is not None:
        count, parts, which = slot.heads
        tensor = tensor.reshape(count, parts, -1, *tensor.shape[1:])[:, which : which + slot.span]
    if slot.rows is not None:
        tensor = tensor[slot.rows[0] : slot.rows[1]]
    tensor = tensor.reshape(place.shape)
    if place.offset:
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) + place.offset
    return tensor


def rows_of(slot: Slot, total: int) -> Tensor:
    """Which of a module's `total` output rows belong to a site."""
    if slot.heads is not None:
        count, pieces, which = slot.heads
        rows = torch.arange(total, dtype=torch.int64, device="cpu").reshape(count, pieces, -1)
        return rows[:, which : which + slot.span].reshape(-1)
    return torch.arange(*(slot.rows or (0, total)), dtype=torch.int64, device="cpu")


def gather(anatomy: Anatomy, parameters: Mapping[str, Tensor]) -> Weights:
    """Every canonical tensor whose parameter is given."""
    blocks = [None, *range(anatomy.blocks)]
    found = {name: place for block in blocks for name, place in places(anatomy, block).items()}
    return {name: take(parameters[p.slot.key], p) for name, p in found.items() if p.slot.key in parameters}


def scatter(
    anatomy: Anatomy, weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor]:
    """Parameters by module key, of every parameter that some given tensor belongs to.

    Args:
        shapes: the parameters' own shapes, for those of more or fewer axes than two (patches, class token).
    """
    out: dict[str, Tensor] = {}
    for block in blocks_of(anatomy, weights):
        for key, parts in _groups(anatomy, block).items():
            if not any(name in weights for name, _ in parts):
                continue
            value = _assemble(parts, _fill(key, parts, weights))
            like = shapes.get(key) if shapes else None
            out[key] = value if like is None or len(like) == value.dim() else value.reshape(_shape(value, like))
    return out


def _shape(value: Tensor, like: tuple[int, ...]) -> tuple[int, ...]:
    """The parameter's shape: as in the source, but for the axes along which channels may have been cut."""
    if value.numel() == torch.Size(like).numel():
        return like
    if len(like) == 4:
        return (value.shape[0], value.shape[1] // (like[2] * like[3]), *like[2:])
    return (*like[:-1], value.shape[-1])


def blocks_of(anatomy: Anatomy, weights: Mapping[str, Tensor]) -> list[int | None]:
    """The blocks that some tensors belong to, by their names."""
    numbers = {name.split(".")[1] if name.startswith("blocks.") else None for name in weights}
    return [None] * (None in numbers) + sorted(int(number) for number in numbers if number is not None)


def _groups(anatomy: Anatomy, block: int | None) -> dict[str, list[tuple[str, Place]]]:
    """Parameter key → the canonical tensors it holds. A bias that only some of its sites have is listed for all."""
    sites = list(anatomy.in_block(block))
    bias_keys = {site.weight.key: site.bias.key for site in sites if site.bias is not None}
    groups: dict[str, list[tuple[str, Place]]] = {}
    for site in sites:
        groups.setdefault(site.weight.key, []).append((f"{site.name}.weight", Place(site.weight, site.shape)))
        if site.weight.key in bias_keys:
            slot = replace(site.weight, key=bias_keys[site.weight.key], transposed=False)
            groups.setdefault(slot.key, []).append((f"{site.name}.bias", Place(slot, site.shape[:1])))
    for norm in anatomy.norms:
        if norm.block == block:
            for name, place in _norm_places(norm).items():
                groups.setdefault(place.slot.key, []).append((name, place))
    return groups


def _fill(key: str, parts: list[tuple[str, Place]], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of one parameter; a bias that is not there is zero, a weight that is not there is an error."""
    like = next(weights[name] for name, _ in parts if name in weights)
    filled = {}
    for name, place in parts:
        if name in weights:
            filled[name] = weights[name] - place.offset if place.offset else weights[name]
        elif name.endswith(".bias"):
            filled[name] = like.new_zeros(place.shape)
        else:
            raise ModelError(f"cannot fill {key}: the tensor {name} is missing among those given")
    return filled


def _assemble(parts: list[tuple[str, Place]], tensors: Mapping[str, Tensor]) -> Tensor:
    """Inverse of `take` for all the tensors of one parameter together."""
    experts: dict[int, list[tuple[str, Place]]] = {}
    for name, place in parts:
        experts.setdefault(-1 if place.slot.index is None else place.slot.index, []).append((name, place))
    stack = [_join([(tensors[name], place.slot) for name, place in some]) for _, some in sorted(experts.items())]
    return stack[0] if -1 in experts else torch.stack(stack)


def _join(parts: list[tuple[Tensor, Slot]]) -> Tensor:
    first = parts[0][1]
    if first.heads is not None:
        count = first.heads[0]
        ordered = sorted(parts, key=lambda part: part[1].heads or (0, 0, 0))
        joined = torch.cat([t.reshape(count, slot.span, -1, *t.shape[1:]) for t, slot in ordered], dim=1)
        whole = joined.flatten(0, 2)
    elif first.rows is not None:
        whole = torch.cat([tensor for tensor, _ in sorted(parts, key=lambda part: part[1].rows or (0, 0))])
    else:
        whole = parts[0][0]
    return whole.t() if first.transposed else whole


def outer_names(anatomy: Anatomy) -> tuple[list[str], list[str]]:
    """Canonical tensors outside the blocks: those before the first block, and those after the last (norm and head)."""
    names = list(anatomy.slots(None))
    last = [name for name in names if name.startswith(("norm.", "head."))]
    if anatomy.tied:
        last = [name for name in last if name != "head.weight"]
    return [name for name in names if not name.startswith(("norm.", "head."))], last
