"""Reads an artifact as data, block by block, without building a module and without any model library.

`open_artifact(path)` checks the config, the header and every shard, and gives what stands in them: the layout (a point
for each place), recipe, receipt, and an iterator over blocks. A block's quantised sites come as codes with their terms,
its other tensors under their canonical names. What the model is made of (its anatomy) lies in `regauge/anatomy.json`,
which artifacts have since format version 2; older ones, and checkpoints that others quantised, do not say it, and it
must be given.

Memory: one block at a time. Legend: O output channels, I input channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from regauge.anatomy.model import Anatomy, Site, Weights
from regauge.anatomy.storage import Place, places, take
from regauge.artifact import files
from regauge.artifact.codec.base import Layout, Wire, decoder
from regauge.artifact.folder import (
    RECEIPT,
    RECIPE,
    dtype_of,
    linear_modules,
    read_anatomy,
    read_config,
    read_receipt,
    shards,
    wire_of,
)
from regauge.artifact.receipt import Receipt
from regauge.documents import read_text
from regauge.errors import ArtifactError
from regauge.formats.base import Codes
from regauge.formats.terms import summed


@dataclass(frozen=True, eq=False)
class Block:
    """The tensors of one block, or of what lies outside the blocks.

    Attributes:
        index: its number; None: embeddings, last norm and head.
        weights: canonical name → tensor, of everything in full precision. A tied head is not there twice.
        codes: site → codes, steps and terms, of the quantised sites.
        extras: tensors that are in no site or norm, by module key.
    """

    index: int | None
    weights: Weights
    codes: Mapping[str, Codes]
    extras: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Artifact:
    """An artifact as data.

    Attributes:
        path: its directory.
        wire: how its tensors are laid out; `layout` says what each place is.
        config: its config.json.
        recipe: the YAML of the recipe, or None where the checkpoint is not ours.
        shards: its weight files, whose headers were checked.
    """

    path: Path
    wire: Wire
    config: Mapping[str, Any]
    recipe: str | None
    shards: tuple[Path, ...]

    @property
    def layout(self) -> Layout:
        return self.wire.layout

    @cached_property
    def receipt(self) -> Receipt | None:
        """What was done and measured; None where the checkpoint is not ours."""
        return read_receipt(self.path) if (self.path / RECEIPT).exists() else None

    @cached_property
    def where(self) -> dict[int | None, dict[Path, list[str]]]:
        """Block → file → the names of its tensors there."""
        owners = Owners(self.layout.anatomy)
        found: dict[int | None, dict[Path, list[str]]] = {}
        for path in self.shards:
            for key in files.header(path):
                found.setdefault(owners.of(key), {}).setdefault(path, []).append(key)
        return found

    def block(self, index: int | None) -> Block:
        """One block, read from the files.

        Raises:
            ArtifactError: a tensor is missing, or contradicts the layout.
        """
        tensors: dict[str, Tensor] = {}
        for path, keys in self.where.get(index, {}).items():
            tensors |= files.read(path, set(keys))
        full, codes = self.wire.unpack(tensors)
        weights: Weights = {}
        used: set[str] = set()
        for name, place in places(self.layout.anatomy, index).items():
            key = name if name in full else place.slot.key
            if key in full:
                weights[name] = full[key] if key == name else self._taken(name, full[key], place)
                used.add(key)
        block = Block(index, weights, codes, {key: tensor for key, tensor in full.items() if key not in used})
        self._whole(block)
        return block

    def blocks(self) -> Iterator[Block]:
        """Embeddings, last norm and head first (`index` None), then block by block."""
        for index in (None, *range(self.layout.anatomy.blocks)):
            yield self.block(index)

    def dense(self, block: Block, site: str) -> Tensor:
        """What a site's matrix is worth (O, I), float32: decoded, with its terms, or as it is stored."""
        if site not in block.codes:
            return block.weights[f"{site}.weight"].float()
        return _decoded(block.codes[site], self.layout, site)

    def _taken(self, name: str, parameter: Tensor, place: Place) -> Tensor:
        try:
            return take(parameter, place)
        except (RuntimeError, IndexError) as error:
            raise ArtifactError(f"{self.path}: {name} has another shape than the layout gives it: {error}.") from error

    def _whole(self, block: Block) -> None:
        anatomy = self.layout.anatomy
        for site in anatomy.in_block(block.index):
            there = site.name in block.codes or f"{site.name}.weight" in block.weights
            if not there and not (site.name == "head" and anatomy.tied):
                what = "codes" if site.name in self.layout.quantised else "weights"
                raise ArtifactError(f"the artifact lacks the {what} of {site.name}; build or fetch it again.")


def open_artifact(path: str | Path, anatomy: Anatomy | None = None) -> Artifact:
    """An artifact as data: regauge's own format, or compressed-tensors.

    Args:
        path: its directory.
        anatomy: of the model before compression, for artifacts that do not say it: those of format version 1, and
            checkpoints that others made.

    Raises:
        ArtifactError: it is no artifact, is damaged, of a newer format, or does not say what it is made of.
    """
    folder = Path(path)
    config = read_config(folder)
    quantisation = config.get("quantization_config")
    if type(quantisation) is not dict:
        raise ArtifactError(f"{folder} is no artifact: its config.json has no quantization_config.")
    source = read_anatomy(folder) if anatomy is None else anatomy
    wire = wire_of(quantisation, source, dtype_of(config), linear_modules(source))
    recipe = folder / RECIPE
    return Artifact(
        path=folder,
        wire=wire,
        config=config,
        recipe=read_text(recipe, ArtifactError) if recipe.exists() else None,
        shards=shards(folder, wire),
    )


class Owners:
    """Which block a stored tensor belongs to, by its name."""

    def __init__(self, anatomy: Anatomy) -> None:
        self._exact: dict[str, int | None] = {}
        self._starts: dict[str, int] = {}
        for block in (None, *range(anatomy.blocks)):
            sites = list(anatomy.in_block(block))
            self._exact |= {slot.key: block for slot in anatomy.slots(block).values()}
            if block is not None:
                self._starts |= {f"blocks.{block}": block, _stem(sites): block}

    def of(self, key: str) -> int | None:
        if key in self._exact:
            return self._exact[key]
        start = key
        while start:
            if start in self._starts:
                return self._starts[start]
            start = start.rpartition(".")[0]
        return None


def _stem(sites: list[Site]) -> str:
    """The path that all the modules of a block lie under: `model.layers.3`."""
    shared: list[str] = []
    for names in zip(*(site.module.split(".")[:-1] for site in sites), strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def _decoded(codes: Codes, layout: Layout, site: str) -> Tensor:
    return summed(codes, decoder(layout.quantised[site]))
