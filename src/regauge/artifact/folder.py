"""What lies in an artifact's directory beside its tensors, read strictly: JSON, anatomy, receipt, wire and shards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from regauge.anatomy.model import Anatomy
from regauge.anatomy.streams import with_streams
from regauge.artifact import files
from regauge.artifact.codec.base import COMPRESSED_TENSORS, REGAUGE, Wire
from regauge.artifact.codec.compressed import CompressedTensors
from regauge.artifact.codec.groups import read_groups
from regauge.artifact.codec.packed import Packed
from regauge.artifact.header import read_header
from regauge.artifact.receipt import Receipt
from regauge.errors import ArtifactError

ANATOMY, RECIPE, RECEIPT = "regauge/anatomy.json", "regauge/recipe.yaml", "regauge/receipt.json"
MOST = 100_000_000
"""Bytes of a JSON file that is read."""
NUMBERED = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
_ANATOMY = TypeAdapter(Anatomy)
LOOKED_UP = ("embed", "position", "type", "patch", "router")
"""Kinds of sites whose modules are no linear layers; a router's is one in some families, and no artifact says in
which."""


def wire_of(quantisation: Mapping[str, Any], source: Anatomy, dtype: torch.dtype, linear: set[str]) -> Wire:
    """The wire that `quantization_config` of config.json names, with its layout.

    Args:
        source: the anatomy before compression.
        linear: paths of the linear modules, which groups of compressed-tensors may mean by `Linear`.

    Raises:
        ArtifactError: nobody here reads it, or it is damaged.
    """
    method = quantisation.get("quant_method")
    if method == REGAUGE:
        return Packed(read_header(quantisation, source, dtype))
    if method == COMPRESSED_TENSORS:
        return CompressedTensors(read_groups(quantisation, source, linear, dtype))
    raise ArtifactError(f"the checkpoint is quantised by {method!r}, which regauge does not read; load the original.")


def linear_modules(anatomy: Anatomy) -> set[str]:
    """Paths of the modules that are linear layers, as far as an anatomy tells: see `LOOKED_UP`."""
    return {
        site.module
        for site in anatomy.sites
        if site.weight.key == f"{site.module}.weight" and not site.weight.transposed and site.kind not in LOOKED_UP
    }


def anatomy_json(anatomy: Anatomy) -> str:
    """What a model is made of, as JSON: sites, norms and plumbing. Streams follow from them."""
    raw = _ANATOMY.dump_python(anatomy.with_(streams=()), mode="json", exclude_defaults=True)
    return json.dumps(raw, separators=(",", ":"), sort_keys=True) + "\n"


def shards(folder: Path, wire: Wire) -> tuple[Path, ...]:
    """Every weight file of an artifact, after checking that none is missing or truncated.

    Raises:
        ArtifactError: one is.
    """
    stem = wire.shard(0, 1).partition("-")[0]
    found = sorted(folder.glob(f"{stem}-?????-of-?????.safetensors")) or sorted(folder.glob(f"{stem}.safetensors"))
    if not found:
        raise ArtifactError(f"{folder} has no {wire.shard(0, 1).replace('00001', '*')} files; build it again.")
    totals = {match[2] for path in found if (match := NUMBERED.search(path.name))}
    if totals and (len(totals) > 1 or int(totals.pop()) != len(found)):
        raise ArtifactError(f"{folder} has {len(found)} shards, and their names speak of more; copy it whole.")
    for path in found:
        files.header(path)
    return tuple(found)


def read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MOST:
            raise ArtifactError(f"{path} is {size:,} bytes long, which no such file is; fetch or build it again.")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ArtifactError(f"{path.parent} has no {path.name}, so it is neither an artifact nor a model.")
    try:
        raw = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from error
    if type(raw) is not dict:
        raise ArtifactError(f"{path} cannot be read: it is no mapping.")
    return raw


def dtype_of(config: Mapping[str, Any]) -> torch.dtype:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    known = {str(dtype).removeprefix("torch."): dtype for dtype in files.DTYPES.values() if dtype.is_floating_point}
    if name not in known:
        raise ArtifactError(f"config.json has the dtype {name[:40]!r}, which no model computes in.")
    return known[name]


def read_anatomy(folder: Path) -> Anatomy:
    path = folder / ANATOMY
    if not path.exists():
        raise ArtifactError(
            f"{folder} does not say what its model is made of (no {ANATOMY}: it is of format version 1, or others made "
            "it); give anatomy=, or load it as a model."
        )
    raw = read_json(path)
    try:
        found = _ANATOMY.validate_json(json.dumps(raw))
        return with_streams(found)
    except (ValidationError, ValueError, KeyError, IndexError) as error:
        first = str(error).strip().split("\n")[0]
        raise ArtifactError(f"{path} cannot be read: {first}; fetch or build it again.") from error


def read_receipt(path: Path) -> Receipt:
    try:
        return Receipt.model_validate(read_json(path))
    except ValidationError as error:
        raise ArtifactError(f"{path} cannot be read: {str(error).splitlines()[0]}.") from error
