"""Safetensors files, written in one pass that also hashes them, and read without trusting them.

Our own writer, some forty lines, because the library's holds a second copy of a shard in memory, hides the cause of
a failed write, and cannot hash on the way. What it writes is read by the library (a test does).
Layout: 8 bytes little-endian length of the header, the header in JSON, the tensors one after another.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from regauge.errors import ArtifactError

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
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


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


def header(path: Path) -> Header:
    """What a file holds, checked against the length of the file. Reads the header only.

    Raises:
        ArtifactError: the file is missing, truncated, or not safetensors.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            raw = file.read(length) if 0 < length <= size - 8 else b""
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}.") from error
    if not raw:
        raise ArtifactError(f"{path} is truncated or not a safetensors file; fetch or build it again.")
    try:
        entries: dict[str, dict[str, object]] = json.loads(raw)
    except ValueError as error:
        raise ArtifactError(f"{path} has a corrupt header; fetch or build it again.") from error
    found: Header = {}
    start = 8 + length
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        found[name] = _entry(path, name, entry, start)
    last = max((end for *_, end in found.values()), default=start)
    if last != size:
        raise ArtifactError(
            f"{path} is {size:,} bytes long and its header promises {last:,}: it is "
            f"{'truncated' if size < last else 'not what was written'}; fetch or build it again."
        )
    return found


def _entry(
    path: Path, name: str, entry: Mapping[str, object], start: int
) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    try:
        dtype = DTYPES[str(entry["dtype"])]
        shape = tuple(int(n) for n in entry["shape"])  # type: ignore[attr-defined]  # JSON; checked by the except
        first, last = (int(n) for n in entry["data_offsets"])  # type: ignore[attr-defined]  # the same
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: the header's entry for {name!r} cannot be read.") from error
    count = 1
    for n in shape:
        count *= n
    if last - first != count * torch.empty(0, dtype=dtype).element_size():
        raise ArtifactError(f"{path}: {name!r} has shape {shape} and {last - first} bytes, which contradict.")
    return dtype, shape, start + first, start + last


def read(path: Path, names: set[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a file (or those named), owned: nothing stays mapped."""
    found = header(path)
    tensors: dict[str, Tensor] = {}
    with open(path, "rb") as file:
        for name, (dtype, shape, first, last) in sorted(found.items(), key=lambda item: item[1][2]):
            if names is not None and name not in names:
                continue
            flat = torch.empty(last - first, dtype=torch.uint8)
            file.seek(first)
            got = file.readinto(flat.numpy().data) if last > first else 0
            if got != last - first:
                raise ArtifactError(f"{path} is truncated inside {name!r}; fetch or build it again.")
            tensors[name] = flat.view(dtype).reshape(shape)
    return tensors
