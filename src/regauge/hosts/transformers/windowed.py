"""A windowed model from an artifact, and from a plain checkpoint: which bytes of which files make which block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regauge.artifact import files
from regauge.artifact.codec.base import Wire
from regauge.artifact.codec.taps import of_tied_head
from regauge.artifact.reader import Owners
from regauge.errors import ArtifactError, BudgetError, SettingError
from regauge.hosts.transformers.install import release
from regauge.hosts.transformers.placing import assign, place, tie
from regauge.hosts.transformers.skeleton import block_paths
from regauge.hosts.transformers.source import Source
from regauge.kernels.cpu.library import available
from regauge.runtime.window.build import Like, Loading
from regauge.runtime.window.disk import Disk, Extent, drop_all
from regauge.runtime.window.figure import Figure

CONVERT = {True: 4, False: 6}
"""Bytes for each weight of a matrix while it is converted, with the C++ kernels and without: packed, as codes, as held,
and in between; torch's int4 kernel wants four bytes a code."""
SLACK = 1.1
"""Bytes held in memory for each byte stored, at most, before they are known."""


def _stem(model: Any) -> str:
    stems = sorted({path.rpartition(".")[0] for path in block_paths(model)})
    if len(stems) > 1:
        raise BudgetError(
            f"a {model.config.model_type} has {len(stems)} stacks of blocks, and a window runs over one; load it "
            "without memory="
        )
    return stems[0]


def window_of_artifact(
    model: Any, wire: Wire, shards: Sequence[Path], folder: Path, dtype: torch.dtype, figure: Figure
) -> bool:
    """Fills the skeleton of an artifact and attaches a window; False, with nothing done, where everything fits.

    Args:
        shards: checked files.

    Raises:
        ArtifactError: a tensor is missing or contradicts the config.
        BudgetError: the figure is too little, or more than there is.
    """
    layout = wire.layout
    if of_tied_head(layout):
        raise SettingError("a tied head that rounds its input is not for models in a window; leave memory= out")
    weights = [
        CONVERT[available()] * s.shape[0] * s.shape[1] for s in layout.anatomy.sites if s.name in layout.quantised
    ]
    tied = model.all_tied_weights_keys
    bytes_bf16 = 2 * sum(tensor.numel() for key, tensor in model.state_dict().items() if key not in tied)
    loading = Loading(
        model, _stem(model), layout.anatomy, figure, figure.bytes(bytes_bf16), folder, dtype,
        loading=max(weights, default=0), packed=frozenset(layout.quantised),
    )  # fmt: skip
    headers = {path: files.header(path) for path in shards}
    stored = sum(last - first for header in headers.values() for *_, first, last in header.values())
    if SLACK * stored + loading.workspace() + loading.loading <= loading.size:
        return False
    where: dict[int | None, dict[Path, list[str]]] = {}
    for path, header in headers.items():
        for key in header:
            where.setdefault(loading.owner(key), {}).setdefault(path, []).append(key)
    modules = _modules(wire)
    missing = set(layout.quantised)

    def convert(number: int | None) -> None:
        for path, keys in where.get(number, {}).items():
            parts: dict[str, set[str]] = {}
            for key in keys:
                parts.setdefault(_module(key, modules), set()).add(key)
            for names in parts.values():
                missing.difference_update(place(model, wire, files.read(path, names), dtype, "cpu", path))
            drop_all(path)
        release(model)  # a chunk that two blocks share would keep the one that leaves memory
        lost = [site.name for site in layout.anatomy.in_block(number) if site.name in missing]
        if lost:
            raise ArtifactError(f"the artifact lacks the codes of {lost[0]}; build or fetch it again.")

    def like(number: int) -> Like:
        found = {
            (key.replace(f".{number}.", ".", 1), *headers[path][key][:2])
            for path, keys in where.get(number, {}).items()
            for key in keys
        }
        sites = layout.anatomy.in_block(number)
        return frozenset(found), *((layout.choices.get(site.name), layout.reading(site)) for site in sites)

    convert(None)
    tie(model)
    _check_outer(model, loading)
    loading.spool(convert, {number: like(number) for number in range(layout.anatomy.blocks)})
    return True


def by_block(wire: Wire, keys: Iterable[str]) -> list[set[str]]:
    """The tensors of a file in parts that are read at once: those of a module together, and no more than a block.

    A file may hold a whole model, which would else be in memory twice.
    """
    modules, owners = _modules(wire), Owners(wire.layout.anatomy)
    blocks = {path: sites[0].block for path, sites in wire.layout.modules().items()}
    found: dict[int | None, set[str]] = {}
    for key in keys:
        module = _module(key, modules)
        found.setdefault(blocks[module] if module else owners.of(key), set()).add(key)
    return list(found.values())


def _modules(wire: Wire) -> Mapping[str, str]:
    """What a key may begin with → the module that must be read at once."""
    found: dict[str, str] = {}
    for path, sites in wire.layout.modules().items():
        found |= {path: path} | {site.name: path for site in sites}
    return found


def _module(key: str, modules: Mapping[str, str]) -> str:
    start = key
    while start:
        start = start.rpartition(".")[0]
        if start in modules:
            return modules[start]
    return ""


def _check_outer(model: Any, loading: Loading) -> None:
    state = model.state_dict()
    lost = [key for key, tensor in state.items() if tensor.is_meta and loading.owner(key) is None]
    if lost:
        raise ArtifactError(f"the artifact lacks the tensor {lost[0]} ({len(lost)} in all); build or fetch it again.")


def window_of_checkpoint(source: Source, dtype: torch.dtype | None, figure: Figure) -> Any:
    """The windowed model of a plain checkpoint; None, with nothing done, where everything fits.

    Raises:
        BudgetError: the figure is too little, or more than there is.
    """
    model = source.model
    asked = dtype or getattr(torch, str(getattr(source.config, "dtype", None) or source.dtype).removeprefix("torch."))
    size = figure.bytes(source.bytes_bf16())
    loading = Loading(model, _stem(model), source.anatomy, figure, size, source.path, asked)
    if source.parameters() * asked.itemsize + loading.workspace() <= size:
        return None
    headers = {path: files.header(path) for path in source.files}
    disk = Disk()

    def extents(key: str) -> list[Extent]:
        """Experts and parts of a stack lie one after another in the parameter."""
        found, at = [], 0
        for piece in sorted(source.pieces[key], key=lambda piece: (piece.index or 0, piece.part)):
            _, _, first, last = headers[piece.stored.file][piece.stored.key]
            found.append(Extent(disk.open(piece.stored.file), first, last - first, at))
            at += last - first
        return found

    def read(key: str) -> None:
        present = key if key in source.pieces else _swapped(source, key)
        if present is None:
            return  # tied to another, or rebuilt
        some = extents(present)
        stored = headers[source.pieces[present][0].stored.file][source.pieces[present][0].stored.key][0]
        flat = torch.empty(sum(extent.size for extent in some), dtype=torch.uint8, device="cpu")
        disk.fill(some, flat.numpy().data)
        tensor: Tensor = flat.view(stored).view(source.shapes[key])
        assign(model, key, tensor, asked, source.pieces[present][0].stored.file)

    def keys(number: int) -> list[str]:
        return [f"{loading.stem}.{number}.{e.module}.{e.name}" for e, _ in loading.streams(loading.layer(number))]

    streamed = {key for number in range(source.anatomy.blocks) for key in keys(number)}
    for key in source.shapes:
        if key not in streamed and not (key in source.tied and source.tied[key] in source.pieces):
            read(key)
    tie(model)
    _check_outer(model, loading)
    stored = {headers[p.stored.file][p.stored.key][0] for key in streamed for p in source.pieces[key]}
    if stored == {asked}:
        for number in range(source.anatomy.blocks):  # what it is stored in is what is held
            _as_stored(loading, number, asked)
        loading.in_place(extents, disk)
        return model

    def convert(number: int) -> None:
        for key in keys(number):
            read(key)

    shapes = {n: tuple(source.shapes[key] for key in keys(n)) for n in range(source.anatomy.blocks)}
    loading.loading = 8 * max(torch.Size(shape).numel() for some in shapes.values() for shape in some)
    loading.spool(convert, shapes)
    disk.close()
    return model


def _as_stored(loading: Loading, number: int, dtype: torch.dtype) -> None:
    """Gives the skeleton's empty tensors the dtype that they will have."""
    layer = loading.layer(number)
    for entry, tensor in loading.streams(layer):
        module = layer.get_submodule(entry.module)
        if tensor.is_floating_point() and entry.parameter:
            module._parameters[entry.name] = torch.nn.Parameter(tensor.to(dtype), requires_grad=False)


def _swapped(source: Source, key: str) -> str | None:
    """The stored parameter that is tied to this one, where the file has it under the other's name."""
    return next((target for target, other in source.tied.items() if other == key and target in source.pieces), None)
