"""A part of a model as a model: some of its blocks, the first units of its streams, the middle of its kernels.

Pure data. A member's anatomy says what any anatomy says; blocks are numbered anew, and so are the paths and keys of
their modules. Every canonical tensor of a member is the first rows and columns of the whole's, of a convolution the
middle places of each channel, so a member is a view of the whole wherever storage lets it be one.

Legend: O output channels, I input channels, K side of a kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isqrt

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy, Norm, Site, Slot, Weights
from regauge.anatomy.moves import Move, transform
from regauge.anatomy.streams import with_streams

KERNELS = 4
"""Axes of a convolution's tensor."""


@dataclass(frozen=True, eq=False)
class Member:
    """A member of a model.

    Attributes:
        whole: the anatomy of the whole.
        anatomy: its own.
        blocks: the block of the whole that each of its blocks is.
        paths: path of each block of the whole.
        bits: of each of its blocks' weights; None: as many as the whole's.
    """

    whole: Anatomy
    anatomy: Anatomy
    blocks: tuple[int, ...]
    paths: tuple[str, ...]
    bits: tuple[int, ...] | None = None

    def bits_of(self, site: Site) -> int | None:
        """Of a site of the member; outside of blocks the most that any block has."""
        if self.bits is None:
            return None
        return max(self.bits) if site.block is None else self.bits[site.block]

    def window(self, site: Site) -> int:
        """Places of each channel in the whole's matrix of a site of the member, where it has others; else 0."""
        whole = self.whole.site(self.origin(site.name)).window
        return whole if whole != site.window else 0

    @cached_property
    def _numbers(self) -> dict[str, str]:
        return {str(new): str(old) for new, old in enumerate(self.blocks)}

    def origin(self, name: str) -> str:
        """The whole's name of a place or tensor of the member."""
        head, _, rest = name.partition(".")
        if head != "blocks":
            return name
        number, _, place = rest.partition(".")
        return f"blocks.{self._numbers[number]}.{place}"

    def key(self, key: str) -> str:
        """The whole's key (or path) of a module's tensor of the member."""
        for new, old in enumerate(self.blocks):
            path = self.paths[new]
            if key == path or key.startswith(f"{path}."):
                return self.paths[old] + key[len(path) :]
        return key

    def name(self, old: str) -> str | None:
        """The member's name of a place or tensor of the whole; None where its block is left out."""
        head, _, rest = old.partition(".")
        if head != "blocks":
            return old
        number, _, place = rest.partition(".")
        new = self._new.get(number)
        return None if new is None else f"blocks.{new}.{place}"

    def moved(self, old: str) -> str | None:
        """The member's key (or path) of a module's tensor of the whole; None where its block is left out."""
        for number, path in enumerate(self.paths):
            if old == path or old.startswith(f"{path}."):
                new = self._new.get(str(number))
                return None if new is None else self.paths[int(new)] + old[len(path) :]
        return old

    @cached_property
    def _new(self) -> dict[str, str]:
        return {old: new for new, old in self._numbers.items()}

    def cut(self, weights: Mapping[str, Tensor]) -> Weights:
        """Canonical tensors of the member, views of those of the whole, of whichever are given."""
        found: Weights = {}
        for site in self.anatomy.sites:
            weight, bias = f"{site.name}.weight", f"{site.name}.bias"
            if (old := self.origin(weight)) in weights:
                found[weight] = part(weights[old], site, self.window(site))
            if (old := self.origin(bias)) in weights:
                found[bias] = first(weights[old], site.shape[:1])
        for norm in self.anatomy.norms:
            for name in (f"{norm.name}.{word}" for word in norm.slots):
                if (old := self.origin(name)) in weights:
                    found[name] = first(weights[old], (norm.size,))
        return found


def first(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The first entries of a tensor along each axis, as a view; of a convolution's, (O, I, K, K), the middle of each
    kernel."""
    for axis, size in enumerate(shape):
        if (most := tensor.shape[axis]) != size:
            tensor = tensor.narrow(axis, (most - size) // 2 if len(shape) == KERNELS and axis > 1 else 0, size)
    return tensor


def part(tensor_OI: Tensor, site: Site, window: int = 0) -> Tensor:
    """The part of a whole's matrix, or of what lies as it does, that a member's site has.

    Args:
        window: places of each channel in the whole, where the member has others: its part is new memory then.
    """
    rows, columns = site.shape
    if not window:
        return first(tensor_OI, (rows, columns))
    whole, side = isqrt(window), isqrt(site.window)
    kernels = tensor_OI.reshape(len(tensor_OI), -1, whole, whole)
    return first(kernels, (rows, columns // site.window, side, side)).reshape(rows, columns)


def sides(anatomy: Anatomy) -> dict[int, int]:
    """Block → side of the kernels of its convolutions, of those that have any; 0: they differ, or are no squares."""
    found: dict[int, set[int]] = {}
    for site in anatomy.sites:
        if site.window and site.block is not None:
            side = isqrt(site.window)
            found.setdefault(site.block, set()).add(side if side**2 == site.window else 0)
    return {block: some.pop() if len(some) == 1 else 0 for block, some in found.items()}


def member_of(
    anatomy: Anatomy,
    blocks: Sequence[int],
    kept: Mapping[str, int],
    routed: int | None = None,
    kernels: Mapping[int, int] | None = None,
) -> Member:
    """The member of some blocks, with the first units of some streams and the middle of some kernels.

    Args:
        blocks: those of the whole that run, rising.
        kept: stream of the whole → units; absent: all.
        routed: experts that a token goes to; None: as many as in the whole.
        kernels: block of the whole → side of its convolutions' kernels; absent: as in the whole.

    Raises:
        MoveError: a stream does not admit that units are left out.
        ValueError: blocks do not lie one after another at paths that end in their number.
    """
    paths = tuple(path_of(anatomy, block) for block in range(anatomy.blocks))
    stems = {path.rpartition(".")[0] for path in paths}
    if tuple(blocks) != tuple(range(anatomy.blocks)) and len(stems) != 1:
        raise ValueError(f"the blocks of a {anatomy.family} lie in {len(stems)} stacks, which are not thinned out")
    here = {name: count for name, count in kept.items() if anatomy.stream(name).block in (None, *blocks)}
    moves = [Move("select", name, torch.arange(count, dtype=torch.int64, device="cpu")) for name, count in here.items()]
    cut = _narrowed(transform(moves, anatomy), kernels or {})
    if routed is not None:
        cut = replace(cut, plumbing=replace(cut.plumbing, routed=routed))
    return Member(anatomy, _thinned(cut, tuple(blocks), paths), tuple(blocks), paths)


def _narrowed(anatomy: Anatomy, kernels: Mapping[int, int]) -> Anatomy:
    """The anatomy with kernels of other sides in some blocks."""

    def site(found: Site) -> Site:
        side = None if found.block is None else kernels.get(found.block)
        if side is None or not found.window:
            return found
        rows, columns = found.shape
        return replace(found, shape=(rows, columns // found.window * side**2), window=side**2)

    if not kernels:
        return anatomy
    return with_streams(replace(anatomy, sites=tuple(site(one) for one in anatomy.sites)))


def path_of(anatomy: Anatomy, block: int) -> str:
    """The path of a block: what the paths of all its modules begin with, up to its number.

    Raises:
        ValueError: they do not.
    """
    modules = [site.module for site in anatomy.in_block(block)]
    modules += [norm.module for norm in anatomy.norms if norm.block == block]
    common = modules[0].split(".") if modules else []
    for path in modules:
        pieces = path.split(".")
        same = next((i for i, (a, b) in enumerate(zip(common, pieces, strict=False)) if a != b), len(common))
        common = common[:same]
    while common and not common[-1].isdecimal():
        common.pop()
    if not common:
        raise ValueError(f"the modules of block {block} of a {anatomy.family} lie at no path of their own")
    return ".".join(common)


def _thinned(anatomy: Anatomy, blocks: tuple[int, ...], paths: tuple[str, ...]) -> Anatomy:
    """The anatomy with some blocks only, numbered anew."""
    if blocks == tuple(range(anatomy.blocks)):
        return anatomy
    new = {old: number for number, old in enumerate(blocks)}

    def path(text: str, old: int) -> str:
        return paths[new[old]] + text.removeprefix(paths[old])

    def slot(found: Slot | None, old: int) -> Slot | None:
        return None if found is None else replace(found, key=path(found.key, old))

    def name(text: str, old: int) -> str:
        return f"blocks.{new[old]}.{text.removeprefix(f'blocks.{old}.')}"

    def site(found: Site) -> Site:
        old = found.block
        if old is None:
            return found
        weight = slot(found.weight, old)
        assert weight is not None, "every site has a weight"
        return replace(
            found,
            name=name(found.name, old),
            weight=weight,
            bias=slot(found.bias, old),
            block=new[old],
            tap=None if found.tap is None else name(found.tap, old),
            module=path(found.module, old),
        )

    def norm(found: Norm) -> Norm:
        old = found.block
        if old is None:
            return found
        parts = {word: slot(one, old) for word, one in found.slots.items()}
        return replace(found, name=name(found.name, old), module=path(found.module, old), block=new[old], **parts)  # type: ignore[arg-type]  # slots

    plumbing = anatomy.plumbing
    sliding = tuple(new[block] for block in plumbing.sliding if block in new)
    stays = tuple(new[block] for block in plumbing.stays if block in new)
    cached = plumbing.cached * len(blocks) // max(anatomy.blocks, 1)
    return with_streams(
        replace(
            anatomy,
            blocks=len(blocks),
            sites=tuple(site(one) for one in anatomy.sites if one.block is None or one.block in new),
            norms=tuple(norm(one) for one in anatomy.norms if one.block is None or one.block in new),
            plumbing=replace(plumbing, sliding=sliding, cached=cached, stays=stays),
        )
    )
