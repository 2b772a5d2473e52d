"""Every option of every site, rounded once and kept on disk: what sensitivity, trials and resumption read.

One safetensors file a block, written whole and renamed with its hash beside it, so a search that was killed rounds
nothing twice, and what was cut or changed since is rounded again. Codes take a byte an element; at a dozen options a
site that is six times the source in bf16, which `room` says before it starts.
Legend: O output channels, I input channels, G groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from regauge import parts
from regauge.anatomy.model import Weights
from regauge.artifact import files
from regauge.formats.base import Codes, Step
from regauge.rounding.base import Stats
from regauge.search.kept import seal, whole
from regauge.search.options import Option, SiteGroup


@dataclass(frozen=True, eq=False)
class Shelf:
    """Rounded options under a folder.

    Attributes:
        folder: of the files `options-3.safetensors`, `options-outer.safetensors`.
        groups: as allocated over.
    """

    folder: Path
    groups: tuple[SiteGroup, ...]
    _open: dict[Path, Any] = field(default_factory=dict, repr=False)
    _whole: set[Path] = field(default_factory=set, repr=False)

    def path(self, block: int | None) -> Path:
        return self.folder / f"options-{'outer' if block is None else block}.safetensors"

    def has(self, block: int | None) -> bool:
        """Whether a block's options are there as they were written; hashed once."""
        path = self.path(block)
        if path not in self._whole and whole(path):
            self._whole.add(path)
        return path in self._whole

    def complete(self, blocks: int) -> bool:
        """Whether nothing has to be rounded."""
        return all(self.has(block) for block in (None, *range(blocks)))

    def fill(self, block: int | None, weights: Weights, stats: Mapping[str, Stats]) -> None:
        """Rounds every option of every site of a block, and writes the file."""
        tensors: dict[str, Tensor] = {}
        for group in self.groups:
            if group.block != block:
                continue
            for site in group.sites:
                w_OI = weights[f"{site.name}.weight"].float()
                for option in group.options:
                    if option.choice is None:
                        continue
                    fmt, rounder = parts.format_of(option.choice), parts.rounder_of(option.choice)
                    codes = rounder(w_OI, fmt, stats.get(site.name, {}))
                    key = f"{site.name}|{option.name}"
                    tensors[f"{key}|codes"] = codes.codes_OI.contiguous()
                    tensors[f"{key}|scale"] = codes.step.scale_G1.contiguous()
                    if codes.step.zero_G1 is not None:
                        tensors[f"{key}|zero"] = codes.step.zero_G1.contiguous()
        seal(self.path(block), lambda part: files.write(part, tensors))
        self._whole.add(self.path(block))

    def weight(self, site: str, option: Option, block: int | None) -> Tensor:
        """The rounded weight, float32 (O, I). Full-precision options have none here."""
        if option.choice is None:
            raise KeyError(site)
        file = self._handle(self.path(block))
        key = f"{site}|{option.name}"
        zero_G1 = file.get_tensor(f"{key}|zero") if f"{key}|zero" in self._names(self.path(block)) else None
        step = Step(scale_G1=file.get_tensor(f"{key}|scale"), zero_G1=zero_G1, fields={})
        return parts.format_of(option.choice).decode(Codes(file.get_tensor(f"{key}|codes"), step))

    def replaced(self, picks: Mapping[str, Option], block: int | None) -> Weights:
        """The tensors of a block that a choice of options changes."""
        found: Weights = {}
        for group in self.groups:
            option = picks.get(group.name)
            if group.block == block and option is not None and option.choice is not None:
                for site in group.sites:
                    found[f"{site.name}.weight"] = self.weight(site.name, option, block)
        return found

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(str(path), framework="pt")
        return self._open[path]

    def _names(self, path: Path) -> frozenset[str]:
        key = path.with_suffix(".names")
        if key not in self._open:
            self._open[key] = frozenset(self._handle(path).keys())
        names: frozenset[str] = self._open[key]
        return names


def room(groups: Iterable[SiteGroup]) -> int:
    """Bytes that the shelf of these groups takes on disk, steps not counted."""
    return sum(
        site.shape[0] * site.shape[1] * sum(option.choice is not None for option in group.options)
        for group in groups
        for site in group.sites
    )


def deltas(
    shelf: Shelf, site: str, weight_OI: Tensor, options: Iterable[Option], block: int | None
) -> dict[str, Tensor]:
    """Option → Ŵ − W, float32; zero for full precision is left out."""
    return {
        option.name: shelf.weight(site, option, block) - weight_OI.float()
        for option in options
        if option.choice is not None
    }
