"""Options of sites, rounded once and kept on disk: what trials and resumption read.

Only options that are asked for are rounded (see `stock`), so what is here of a large model is two or three options a
site. A safetensors file a block for each time that some were asked for, written whole and renamed with its hash beside
it, so a search that was killed rounds nothing twice, and what was cut or changed since is rounded again. Codes are
packed at their bits, steps as an artifact has them.
Legend: O output channels, I input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from regauge import parts
from regauge.anatomy.model import Site, Weights
from regauge.artifact import files
from regauge.formats.base import Codes
from regauge.hosts.base import Rows
from regauge.kernels.reference import pack, unpack
from regauge.rounding.pieces import of_rows
from regauge.rounding.together import named
from regauge.search.kept import seal, whole
from regauge.search.options import Option, SiteGroup

Pair = tuple[str, str]
"""A group's name and an option's."""


@dataclass(frozen=True, eq=False)
class Shelf:
    """Rounded options under a folder.

    Attributes:
        folder: of the files `options-3.safetensors`, `options-3-1.safetensors`, …, `options-outer.safetensors`.
        groups: as allocated over.
    """

    folder: Path
    groups: tuple[SiteGroup, ...]
    _found: dict[int | None, _Found] = field(default_factory=dict, repr=False)

    def has(self, group: SiteGroup, option: Option) -> bool:
        """Whether a choice is there, as it was written, for all its sites."""
        known = self._known(group.block).parts
        return option.choice is None or all((site.name, option.name) in known for site in group.sites)

    def missing(self, pairs: Iterable[Pair]) -> dict[int | None, list[tuple[SiteGroup, Option]]]:
        """What is not there of some pairs, by block, in the order of the groups."""
        wanted = set(pairs)
        found: dict[int | None, list[tuple[SiteGroup, Option]]] = {}
        for group in self.groups:
            for option in group.options:
                if (group.name, option.name) in wanted and not self.has(group, option):
                    found.setdefault(group.block, []).append((group, option))
        return found

    def fill(self, block: int | None, kept: Mapping[tuple[str, str], Mapping[str, Tensor]]) -> None:
        """Writes what `packed` kept of some (site, option name) of a block as one more file."""
        tensors = {f"{at[0]}|{at[1]}|{part}": t for at, some in kept.items() for part, t in some.items()}
        known = self._known(block)
        path = next(path for path in self._paths(block) if path not in known.files)
        seal(path, lambda part: files.write(part, tensors))
        known.open(path)

    def weight(self, site: str, option: Option, block: int | None) -> Tensor:
        """The rounded weight, float32 (O, I). Full-precision options have none here."""
        return self.rows(site, option, block)(slice(None))

    def rows(self, site: str, option: Option, block: int | None) -> Rows:
        """What makes some rows of the rounded weight, float32; all rows only where they have no steps of their own."""
        found = self._known(block).parts.get((site, option.name))
        if option.choice is None or found is None:
            raise KeyError(site)
        fmt, inputs = parts.format_of(option.choice), self._site(site).shape[1]
        fields = {part: file.get_tensor(f"{site}|{option.name}|{part}") for part, file in found.items()}
        packed = Codes(fields.pop("codes"), fmt.load(fields))

        def make(which: Tensor | slice) -> Tensor:
            some = packed if type(which) is slice and which == slice(None) else of_rows(packed, which)
            return fmt.decode(replace(some, codes_OI=unpack(some.codes_OI, fmt.grid.bits, inputs)))

        return make

    def replaced(self, picks: Mapping[str, Option], block: int | None) -> Weights:
        """The tensors of a block that a choice of options changes."""
        return self.rebuilt([picks], block)[0]

    def rebuilt(
        self, variants: Iterable[Mapping[str, Option]], block: int | None, dtype: torch.dtype = torch.float32
    ) -> list[Weights]:
        """The tensors of a block that each variant changes, in some dtype; those of an option are rebuilt once."""
        variants, made = list(variants), dict[tuple[str, str], Callable[[], Tensor]]()
        groups = [group for group in self.groups if group.block == block]
        chosen = [[(group, picks[group.name]) for group in groups if group.name in picks] for picks in variants]
        chosen = [[(group, option) for group, option in some if option.choice is not None] for some in chosen]
        for some in chosen:
            for group, option in some:
                for site in group.sites:
                    made[site.name, option.name] = self._job(site, option, block, dtype)
        built = named(made)
        return [
            {f"{site.name}.weight": built[site.name, option.name] for group, option in some for site in group.sites}
            for some in chosen
        ]

    def _job(self, site: Site, option: Option, block: int | None, dtype: torch.dtype) -> Callable[[], Tensor]:
        return lambda: self.weight(site.name, option, block).to(dtype)

    def _site(self, name: str) -> Site:
        return next(site for group in self.groups for site in group.sites if site.name == name)

    def _paths(self, block: int | None) -> Iterator[Path]:
        """The files of a block, one for each time that something was written: those that are there, and the next."""
        stem = f"options-{'outer' if block is None else block}"
        yield self.folder / f"{stem}.safetensors"
        count = 1
        while True:
            yield self.folder / f"{stem}-{count}.safetensors"
            count += 1

    def _known(self, block: int | None) -> _Found:
        """What is there of a block; its files are hashed once."""
        if block not in self._found:
            found = self._found[block] = _Found()
            for path in self._paths(block):
                if not path.exists():
                    break
                if whole(path):
                    found.open(path)
        return self._found[block]


@dataclass(frozen=True, eq=False)
class _Found:
    """The files of one block: (site, option name) → part → the file that holds it."""

    files: set[Path] = field(default_factory=set)
    parts: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    def open(self, path: Path) -> None:
        file: Any = safe_open(str(path), framework="pt")
        self.files.add(path)
        for key in file.keys():  # noqa: SIM118  # a handle is no mapping
            site, option, part = key.split("|")
            self.parts.setdefault((site, option), {})[part] = file


def packed(_: Site, option: Option, codes: Codes, rows: slice) -> dict[str, Tensor]:
    """What is kept of the codes of some rows: packed at their bits, with their steps."""
    assert option.choice is not None, "full precision has no codes"
    kept = {"codes": pack(codes.codes_OI, parts.format_of(option.choice).grid.bits)}
    return kept | {part: tensor.clone() for part, tensor in codes.step.fields.items()}


def room(groups: Iterable[SiteGroup], options: float) -> int:
    """Bytes that so many options a site take on disk."""
    total = 0.0
    for group in groups:
        if group.store is not None:
            continue
        sizes = [sum(parts.format_of(o.choice).bytes(s.shape) for s in group.sites) for o in group.options if o.choice]
        total += min(options, len(sizes)) * sum(sizes) / max(1, len(sizes))
    return round(total)
