"""The model to compress: checked once when it is opened, then read tensor by tensor.

`Source.open` finds every fault that can be found without reading weights: no such model, no config, an unknown or
remote architecture, pickle files, truncated files, missing shards, tensors that do not fit the config, a source that is
quantised already. `read` maps the files into memory and touches only the bytes that are asked for; it names the tensor
that holds NaN. Peak memory: what the caller keeps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy, Weights
from regauge.anatomy.storage import Place, places, scatter, take
from regauge.artifact.config import left_behind
from regauge.errors import CorruptWeights, ModelError
from regauge.hosts.transformers import checkpoint, coded
from regauge.hosts.transformers.checkpoint import Piece
from regauge.hosts.transformers.configs import build_skeleton, coded_by, first_line, read_config
from regauge.hosts.transformers.hub import model_folder
from regauge.hosts.transformers.resize import config_changes
from regauge.hosts.transformers.skeleton import block_paths, silent
from regauge.hosts.transformers.table import anatomy_of
from regauge.hosts.transformers.tables import beside

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "sentencepiece.bpe.model")
CHUNK = 1 << 22  # bytes hashed at a time


@dataclass(frozen=True, eq=False)
class Source:
    """A checked transformers checkpoint.

    Attributes:
        path: its directory.
        config: transformers' config object.
        anatomy: what the model is.
        dtype: the dtype most of its weights are stored in.
        files: its safetensors files.
        model: the meta skeleton; not to be changed.
        pieces: parameter key → where it lies in the files.
        tied: parameter key → key of the parameter whose tensor it shares.
        unused: stored tensors that no parameter takes (masks of old checkpoints).
    """

    path: Path
    config: Any
    anatomy: Anatomy
    dtype: torch.dtype
    files: tuple[Path, ...]
    model: Any
    pieces: Mapping[str, tuple[Piece, ...]]
    tied: Mapping[str, str]
    unused: tuple[str, ...] = ()
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False)
    _checked: set[str] = field(default_factory=set, repr=False)

    @staticmethod
    def open(model: str | Path, revision: str | None = None) -> Source:
        """Opens a directory or hub id, or raises the `ModelError` that says what is wrong with it."""
        try:
            return Source._open(model_folder(str(model), revision))
        except OSError as error:
            raise ModelError(f"{error.filename or model} cannot be read: {error.strerror or error}") from error

    @staticmethod
    def _open(folder: Path) -> Source:
        config = read_config(folder)
        files = checkpoint.weight_files(folder)
        stored = coded.paired(checkpoint.stored_tensors(folder, files), coded_by(folder))
        meta = build_skeleton(silent(config), folder)
        anatomy = anatomy_of(config, meta)
        pieces, unused = checkpoint.locate(meta, stored)
        checkpoint.check_scales(meta, pieces, unused, folder)
        notes = (
            *coded.notes(stored),
            *checkpoint.left_out(unused),
            *_broken_links(folder),
            *_left_behind(folder, files),
        )
        anatomy = anatomy.with_(notes=(*anatomy.notes, *notes))
        checkpoint.check(meta, pieces, meta.all_tied_weights_keys, folder)
        counts: dict[torch.dtype, int] = {}
        for some in pieces.values():
            for piece in some:
                dtype = DTYPES.get(piece.stored.dtype)
                if dtype is not None:
                    counts[dtype] = counts.get(dtype, 0) + _numel(piece.stored.shape)
        if not counts:
            seen = sorted({tensor.dtype for tensor in stored.values()})
            raise ModelError(f"{folder} stores no floating-point weights (seen: {', '.join(seen)})")
        source = Source(
            path=folder,
            config=config,
            anatomy=anatomy,
            dtype=max(counts, key=lambda dtype: counts[dtype]),
            files=tuple(files),
            model=meta,
            pieces=pieces,
            tied=dict(meta.all_tied_weights_keys),
            unused=unused,
        )
        return source._untied() if anatomy.tied else source

    def _untied(self) -> Source:
        """Itself; or not tied, where the file holds a head that differs from the embeddings, as transformers does."""
        head = self.anatomy.site("head").weight.key
        embed = self.tied[head]
        if head not in self.pieces or embed not in self.pieces or torch.equal(self._load(head), self._load(embed)):
            return self
        note = "the config ties the head to the embeddings, but the file holds two different tensors: not tied"
        anatomy = self.anatomy.with_(tied=False, notes=(*self.anatomy.notes, note))
        return replace(self, anatomy=anatomy, tied={k: v for k, v in self.tied.items() if k != head})

    def read(self, names: Iterable[str]) -> Weights:
        """Canonical tensors by name, in the stored dtype, as views of the mapped files where possible.

        Where the model is tied, `head.weight` is the tensor of `embed.weight`. A gain with an offset is float32.
        """
        wanted = list(names)
        known = {name: place for block in blocks_in(wanted) for name, place in self._places(block).items()}
        lost = [name for name in wanted if name not in known]
        if lost:
            raise ModelError(f"the model has no tensor {lost[0]!r}")
        found: Weights = {}
        for name in wanted:
            found[name] = self._read_one(name, known[name])
        return found

    def block(self, index: int | None) -> Weights:
        """Every canonical tensor of a block (None: embeddings, last norm and head)."""
        return self.read(self._places(index))

    def extras(self, index: int | None) -> dict[str, Tensor]:
        """Parameters and buffers that are in no site or norm, by module key (None: those outside the blocks)."""
        keys = [key for key in self._outside if self._block_of(key) == index]
        return {key: self._load(self._present(key)) for key in keys}

    def scatter(self, anatomy: Anatomy, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Canonical tensors → parameters by module key; see `scatter.scatter`."""
        return scatter(anatomy, weights, self.shapes)

    def config_changes(self, anatomy: Anatomy) -> tuple[Mapping[str, int], str]:
        """What config.json must say so that stock code builds these sizes, or why it cannot; see `resize`."""
        return config_changes(self.config, self.anatomy, anatomy)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter key → shape, in the source."""
        return {key: tuple(tensor.shape) for key, tensor in self.model.state_dict().items()}

    @property
    def beside(self) -> dict[str, str]:
        """Files that an artifact must hold beside its own: see `tables.beside`."""
        return beside(self.config)

    def digest(self) -> str:
        """sha256 over the config and every weight file, in order of their names. Reads all of them once."""
        total = hashlib.sha256("".join(self.beside.values()).encode())
        for path in (self.path / "config.json", *sorted(self.files)):
            total.update(path.name.encode() + b"\0" + str(path.stat().st_size).encode() + b"\0")
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    total.update(chunk)
        return total.hexdigest()

    def bytes_bf16(self) -> int:
        """The size of the model with every parameter counted as two bytes, tied ones once."""
        return 2 * self.parameters()

    def parameters(self) -> int:
        """How many numbers the model has, tied ones counted once."""
        return sum(_numel(shape) for key, shape in self.shapes.items() if key not in self.tied)

    def tokenizer(self) -> Any:
        """The tokenizer; an error where there is none."""
        return read_tokenizer(self.path)

    def _places(self, block: int | None) -> dict[str, Place]:
        return places(self.anatomy, block)

    @cached_property
    def _outside(self) -> tuple[str, ...]:
        described = {p.slot.key for b in (None, *range(self.anatomy.blocks)) for p in self._places(b).values()}
        return tuple(key for key in self.shapes if key not in described and key not in self.tied)

    def _block_of(self, key: str) -> int | None:
        return next((number for path, number in self._paths if key.startswith(path)), None)

    @cached_property
    def _paths(self) -> tuple[tuple[str, int], ...]:
        """What the keys of each block begin with."""
        return tuple((f"{path}.", number) for number, path in enumerate(block_paths(self.model)))

    def _read_one(self, name: str, place: Place) -> Tensor:
        key, slot = self._present(place.slot.key), place.slot
        some = self.pieces[key]
        if some[0].index is None:
            stored, index = some[0].stored.key, slot.index if some[0].stored.steps is not None else None
            one = place if index is None else replace(place, slot=replace(slot, index=None))
            tensor = take(self._tensor(some[0], index), one)
        else:
            part = 0 if slot.rows is None else slot.rows[0] // (slot.rows[1] - slot.rows[0])
            piece = next(p for p in some if p.index == slot.index and p.part == part)
            tensor, stored = self._tensor(piece), piece.stored.key
        self._check(name, stored, tensor)
        return tensor

    def _present(self, key: str) -> str:
        """The key under which a parameter is stored: its own, or that of the one it is tied to."""
        if key in self.pieces:
            return key
        others = (self.tied.get(key), *(target for target, source in self.tied.items() if source == key))
        return next(other for other in others if other is not None and other in self.pieces)

    def _load(self, key: str) -> Tensor:
        """A whole parameter."""
        some = self.pieces[key]
        if some[0].index is None:
            tensor = self._tensor(some[0])
        else:
            rows: dict[int, list[Piece]] = {}
            for piece in some:
                rows.setdefault(piece.index or 0, []).append(piece)
            ordered = [sorted(parts, key=lambda p: p.part) for _, parts in sorted(rows.items())]
            tensor = torch.stack([torch.cat([self._tensor(p) for p in parts]) for parts in ordered])
        self._check(key, some[0].stored.key, tensor)
        return tensor

    def _tensor(self, piece: Piece, index: int | None = None) -> Tensor:
        return coded.tensor(self._handles, piece.stored, index)

    def _check(self, name: str, stored: str, tensor: Tensor) -> None:
        if name in self._checked:
            return
        if not checkpoint.finite(tensor):
            bad = int((~tensor.isfinite()).sum())
            raise CorruptWeights(
                f"the tensor {stored} ({name}) in {self.path} holds NaN or infinity in {bad} of {tensor.numel()} places"
            )
        self._checked.add(name)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's directory; an error where there is none."""
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in TOKENIZERS):
        raise ModelError(
            f"{folder} has no tokenizer (looked for {', '.join(TOKENIZERS[:3])}, …), and text needs one; "
            f"copy the tokenizer files of the model there"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        tokenizer.decode(tokenizer.encode("a"))  # what its files contradict shows here
    except BaseException as error:  # the tokenizers library raises plain Exceptions, and panics, which are none
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise ModelError(f"the tokenizer in {folder} cannot be read: {first_line(error)}") from error
    # Texts are encoded whole and cut into windows afterwards; the model's own limit would only be warned about.
    tokenizer.model_max_length = 10**30
    return tokenizer


def _broken_links(folder: Path) -> Iterator[str]:
    """A note for each file of the directory that is not there."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists():
            yield f"{path.name} is a link that leads nowhere ({path.readlink()}): it is not carried over"


def _left_behind(folder: Path, weights: list[Path]) -> Iterator[str]:
    """A note on the files of the directory that an artifact will not hold."""
    names = left_behind(folder, [path.name for path in weights])
    if names:
        some = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
        yield f"not carried over from {folder.name}, where it is no part of the model's weights or tokenizer: {some}"


def blocks_in(names: Iterable[str]) -> list[int | None]:
    """The blocks that some canonical names belong to."""
    parts = [name.split(".") for name in names]
    return list({int(p[1]) if p[0] == "blocks" and len(p) > 1 and p[1].isdigit() else None for p in parts})


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
