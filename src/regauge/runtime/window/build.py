"""Builds a windowed model: from an artifact (converted block by block into a scratch file) or a plain checkpoint (read
in place, unless its dtype changes).

Converting first costs one pass over the disk while loading; in return what is read for each token is exactly what the
multiplication wants, in one run, and nothing is unpacked again. What is resident in any case (embeddings, norms,
biases, head, rotary tables) is loaded before; norms and biases of the blocks are under a thousandth of their bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regauge.anatomy.model import Anatomy
from regauge.errors import ArtifactError
from regauge.kernels.cpu.machine import anonymous_bytes, trim
from regauge.runtime.window.disk import Block, Disk, Entry, Extent, Spool, aligned
from regauge.runtime.window.figure import Figure, check_exists, check_room
from regauge.runtime.window.plan import Plan, make_plan
from regauge.runtime.window.resident import Window

Like = tuple[object, ...]
"""What decides the size of a block: equal for blocks of equal size."""


@dataclass(eq=False)
class Loading:
    """One windowed model in the making.

    Attributes:
        model: the skeleton.
        stem: path of its list of blocks.
        anatomy: of the model that is loaded.
        figure, size: what the user allows, and in bytes.
        loading: bytes that one matrix needs while it is converted, beside what is outside the blocks.
        near: directory of the model.
        dtype: of activations.
        packed: sites that are held in a layout of ours.
        before: anonymous bytes before anything was read.
    """

    model: Any
    stem: str
    anatomy: Anatomy
    figure: Figure
    size: int
    near: Path
    dtype: torch.dtype
    loading: int = 0
    packed: frozenset[str] = frozenset()
    before: int = field(default_factory=anonymous_bytes)

    def __post_init__(self) -> None:
        check_exists(self.figure, self.size)
        self.fixed = {id(buffer) for buffer in self.model.buffers() if not buffer.is_meta}

    def layer(self, number: int) -> nn.Module:
        found: nn.Module = self.model.get_submodule(f"{self.stem}.{number}")
        return found

    def owner(self, key: str) -> int | None:
        """The block that a tensor in the files belongs to."""
        for start in (f"{self.stem}.", "blocks."):
            head = key.removeprefix(start).partition(".")[0]
            if key.startswith(start) and head.isdigit():
                return int(head)
        return None

    def workspace(self) -> int:
        """Bytes of cache and activations at the context of the figure, batch 1, with room for the largest full matrix
        (oneDNN multiplies by a reordered copy of it) and for sampling (float32 copies of a token's logits)."""
        anatomy, item = self.anatomy, self.dtype.itemsize
        limit = getattr(self.model.config, "max_position_embeddings", None) or self.figure.context
        tokens = min(self.figure.context, int(limit))
        inside = [site.shape for site in anatomy.sites if site.block is not None]
        full = [s.shape for s in anatomy.sites if s.tap is not None and s.name not in self.packed]
        widest = max(rows for rows, _ in inside)
        vocabulary = max((site.shape[0] for site in anatomy.sites if site.kind == "head"), default=0)
        matrix = max((rows * columns for rows, columns in full), default=0)
        return item * (tokens * (anatomy.cached + 8 * anatomy.hidden + 3 * widest) + matrix) + 32 * vocabulary

    def outer(self) -> int:
        """Bytes that are resident now, of tensors of the model."""
        seen: dict[int, int] = {}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if not tensor.is_meta:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(seen.values())

    def plan(self, outer: int, sizes: Iterable[int]) -> Plan:
        plan = make_plan(self.size, outer, self.workspace(), tuple(sizes), self.figure.text, outer + self.loading)
        check_room(f"{self.near} with {self.figure.text}", plan.weights - outer + plan.workspace, hint=False)
        return plan

    def attach(self, plan: Plan, disk: Disk, blocks: list[Block]) -> None:
        """The rest, once every block is on disk as it will be held."""
        trim()
        Window(plan, disk, self.before).attach(self.model, self.stem, blocks)

    def streams(self, module: nn.Module) -> list[tuple[Entry, Tensor]]:
        """The tensors of a block that leave memory: all but norms, biases and what no file holds."""
        found: list[tuple[Entry, Tensor]] = []
        at, seen = 0, {}
        for path, child in module.named_modules():
            for name, tensor in (*child._parameters.items(), *child._buffers.items()):
                parameter = name in child._parameters
                if tensor is None or id(tensor) in self.fixed or (parameter and tensor.dim() < 2):
                    continue
                if id(tensor) not in seen:
                    seen[id(tensor)] = at
                    at = aligned(at + tensor.numel() * tensor.element_size())
                entry = Entry(path, name, parameter, tensor.dtype, tuple(tensor.shape), seen[id(tensor)])
                found.append((entry, tensor))
        return found

    def spool(self, convert: Callable[[int], None], likes: Mapping[int, Like]) -> None:
        """Converts every block, one of each kind first so that a figure that is too small is refused early, and leaves
        them in a scratch file.

        Args:
            convert: puts a block's tensors into its modules.
            likes: block → its kind.
        """
        outer = self.outer()
        spool, disk = Spool(self.near), Disk()
        blocks: dict[int, Block] = {}
        sizes: dict[Like, int] = {}

        def one(number: int) -> None:
            convert(number)
            layer = self.layer(number)
            found = self.streams(layer)
            lost = [entry for entry, tensor in found if tensor.is_meta]
            if lost:
                key = f"{self.stem}.{number}.{lost[0].module}.{lost[0].name}"
                raise ArtifactError(
                    f"the artifact lacks the tensor {key} ({len(lost)} in all); build or fetch it again."
                )
            entries = tuple(entry for entry, _ in found)
            size = max((entry.to + tensor.numel() * tensor.element_size() for entry, tensor in found), default=0)
            extent = spool.append({entry.to: tensor for entry, tensor in found}, size)
            blocks[number] = Block(number, size, entries, (extent,))
            sizes[likes[number]] = size
            for entry, tensor in found:
                _clear(layer, entry, tensor)

        try:
            for number, like in likes.items():
                if like not in sizes:
                    one(number)
            norms = (self.outer() - outer) * len(likes) // len(blocks)
            self.plan(outer + norms, (sizes[likes[number]] for number in sorted(likes)))
            spool.check(sum(sizes[like] for like in likes.values()))
            for number in likes:
                if number not in blocks:
                    one(number)
            ordered = [blocks[number] for number in sorted(blocks)]
            plan = self.plan(self.outer(), (block.size for block in ordered))
            spool.give(disk)
            self.attach(plan, disk, ordered)
        except BaseException:
            spool.close()
            disk.close()
            raise

    def in_place(self, place: Callable[[str], list[Extent]], disk: Disk) -> None:
        """Leaves every block where it lies in the files.

        Args:
            place: the bytes of a parameter by its key, `to` counted from 0.
        """
        blocks = []
        for number in range(self.anatomy.blocks):
            entries, extents, size = [], [], 0
            for entry, tensor in self.streams(self.layer(number)):
                key = f"{self.stem}.{number}.{entry.module}.{entry.name}"
                entries.append(entry)
                extents += [replace(extent, to=extent.to + entry.to) for extent in place(key)]
                size = max(size, entry.to + tensor.numel() * tensor.element_size())
            blocks.append(Block(number, size, tuple(entries), tuple(extents)))
        try:
            self.attach(self.plan(self.outer(), (block.size for block in blocks)), disk, blocks)
        except BaseException:
            disk.close()
            raise


def _clear(layer: nn.Module, entry: Entry, tensor: Tensor) -> None:
    module = layer.get_submodule(entry.module)
    empty = torch.empty_like(tensor, device="meta")
    if entry.parameter:
        module._parameters[entry.name] = nn.Parameter(empty, requires_grad=False)
    else:
        module._buffers[entry.name] = empty
