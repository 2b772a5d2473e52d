"""Safetensors files, written in one pass that also hashes them, and read without trusting them.

Our own writer, some forty lines, because the library's holds a second copy of a shard in memory, hides the cause of
a failed write, and cannot hash on the way. What it writes is read by the library (a test does).
Layout: 8 bytes little-endian length of the header, the header in JSON, the tensors one after another.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from regauge.documents import ordinary, read_json
from regauge.errors import ArtifactError, RegaugeError

NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


INDEX = "model.safetensors.index.json"


def weight_bytes(folder: str | Path) -> int:
    """Bytes of the tensors that loading a directory reads: data only, headers not counted.

    Those are an artifact's own shards, else the single file, else the files that the index names, as transformers has
    it; weights in another form beside them, and other models in folders below, are not this model's.
    """
    found = (header(path) for path in weight_files(Path(folder)))
    return sum(last - first for tensors in found for _, _, first, last in tensors.values())


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that loading a directory reads."""
    own = sorted(folder.glob("regauge-*-of-*.safetensors"))
    single, index = folder / "model.safetensors", folder / INDEX
    if own or single.exists():
        return own or [single]
    if index.exists():
        return [folder / name for name in sorted(set(weight_map(folder).values()))]
    return sorted(folder.glob("model-*-of-*.safetensors"))


def weight_map(folder: Path, error: type[RegaugeError] = ArtifactError) -> dict[str, str]:
    """Tensor → file, by the index of a folder: the one reader of such an index.

    Raises:
        error: it is no index, or names what is no file of that folder.
    """
    index = folder / INDEX
    found = read_json(index, error).get("weight_map")
    if type(found) is not dict:
        raise error(f"{index} is not an index of weights: weight_map is no mapping; download it again")
    for name in found.values():
        if type(name) is not str or name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
            raise error(f"{index} names {str(name)[:80]!r}, which is no file of that folder")
    return found


def write(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, str] | None = None) -> str:
    """Writes one file, fsyncs it, and returns its sha256. The same tensors give the same bytes.

    Widest elements come first, so that every tensor is aligned to its own element.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted((meta or {"format": "pt"}).items()))}
    at = 0
    for name in order:
        tensor = tensors[name]
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for piece in (len(head).to_bytes(8, "little"), head):
            digest.update(piece)
            file.write(piece)
        for name in order:
            data = _bytes(tensors[name])
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def sha256(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


Header = dict[str, tuple[torch.dtype, tuple[int, ...], int, int]]
"""Tensor → dtype, shape, and where it begins and ends in the file."""

MOST = 100_000_000  # bytes of a header: the format's own limit
AXES = 16  # of a tensor
ENTRY = {"dtype", "shape", "data_offsets"}


def header(path: Path, error: type[RegaugeError] = ArtifactError) -> Header:
    """What a file holds, every number of it checked: the one reader of safetensors headers. Reads the header only.

    Tensors lie one after another, without a gap, from the end of the header to the end of the file.

    Args:
        error: what is raised.

    Raises:
        ArtifactError: the file is missing, truncated, longer than it says, or not safetensors.
    """
    try:
        if not path.is_file() and path.exists():
            raise error(f"{path} is no file; fetch or build it again.")
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 0 < length <= min(size - 8, MOST):
                raise error(f"{path} is truncated or cut off in its header ({size:,} bytes), or no safetensors file.")
            raw = file.read(length)
    except OSError as seen:
        raise error(f"{path} cannot be read: {seen.strerror}.") from seen
    try:
        entries = json.loads(raw, object_pairs_hook=_once)
        if type(entries) is not dict:
            raise ValueError(f"it is a {type(entries).__name__}, not a mapping")
        meta = entries.pop("__metadata__", {})
        if type(meta) is not dict or any(type(value) is not str for value in meta.values()):
            raise ValueError("its __metadata__ is no mapping of texts")
        found = {name: _entry(name, entry) for name, entry in entries.items()}
        end = _end(found)
    except (ValueError, RecursionError) as seen:
        raise error(f"the header of {path} is corrupt ({seen}); fetch or build it again.") from seen
    start = 8 + length
    if start + end != size:
        raise error(
            f"{path} is {'truncated' if size < start + end else 'too long, and not what was written'}: "
            f"its header promises {start + end:,} bytes and it has {size:,}; fetch or build it again."
        )
    return {name: (dtype, shape, start + a, start + b) for name, (dtype, shape, a, b) in found.items()}


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A mapping whose names are there once: of two, each reader would believe another."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it names something twice")
    return found


def _entry(name: str, entry: object) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """One tensor, with offsets from the end of the header."""
    if type(entry) is not dict or entry.keys() != ENTRY:
        raise ValueError(f"its entry for {name[:80]!r} is not dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if type(entry["dtype"]) is str else None
    if dtype is None:
        raise ValueError(f"{name[:80]!r} has the dtype {str(entry['dtype'])[:20]!r}, which is not read")
    shape, offsets = _counts(name, entry["shape"], AXES), _counts(name, entry["data_offsets"], 2)
    if len(offsets) != 2:
        raise ValueError(f"{name[:80]!r} has {len(offsets)} data_offsets")
    first, last = offsets
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name[:80]!r} has shape {list(shape)} and {last - first} bytes, which contradict")
    return dtype, shape, first, last


def _counts(name: str, found: object, most: int) -> tuple[int, ...]:
    """A list of counts: whole, not negative, not beyond what a file can have."""
    if type(found) is not list or len(found) > most or any(type(n) is not int or not 0 <= n < 1 << 62 for n in found):
        raise ValueError(f"{name[:80]!r} has a shape or offsets that are no short list of counts: {str(found)[:60]}")
    return tuple(found)


def _end(found: Header) -> int:
    """Where the last tensor ends.

    Raises:
        ValueError: two share bytes, or some bytes belong to none.
    """
    end = 0
    for name, (_, _, first, last) in sorted(found.items(), key=lambda item: item[1][2:]):
        if first != end:
            raise ValueError(f"{name[:80]!r} begins at {first} where the tensor before it ends at {end}")
        end = last
    return end


def read(path: Path, names: set[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a file (or those named), owned: nothing stays mapped."""
    found = header(path)
    tensors: dict[str, Tensor] = {}
    with open(path, "rb") as file:
        for name, (dtype, shape, first, last) in sorted(found.items(), key=lambda item: item[1][2]):
            if names is not None and name not in names:
                continue
            flat = torch.empty(last - first, dtype=torch.uint8, device="cpu")
            file.seek(first)
            got = file.readinto(flat.numpy().data) if last > first else 0
            if got != last - first:
                raise ArtifactError(f"{path} is truncated inside {name!r}; fetch or build it again.")
            tensors[name] = flat.view(dtype).reshape(shape)
    return tensors


def beside(folder: Path, name: str) -> dict[str, Tensor] | None:
    """The tensors of a file that lies beside those of an artifact; None where it has no such file.

    Raises:
        ArtifactError: it is damaged.
    """
    if not (folder / name).is_file():
        return None
    ordinary(folder, ArtifactError)
    return read(folder / name)
