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
from regauge.documents import ordinary, read_json
from regauge.errors import ArtifactError

ANATOMY, RECIPE, RECEIPT = "regauge/anatomy.json", "regauge/recipe.yaml", "regauge/receipt.json"
RUN_LOG = "regauge/run-log.json"
BLOCKS, WIDE = 4096, 1 << 31
"""The most blocks of a model, and what every size is below."""
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


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        ArtifactError: it is not there, or cannot be read; or the folder holds links out of it.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ArtifactError(f"{folder} has no {path.name}, so it is neither an artifact nor a model.")
    ordinary(folder, ArtifactError)
    return read_json(path, ArtifactError)


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
    raw = read_json(path, ArtifactError)
    try:
        found = _ANATOMY.validate_json(json.dumps(raw))
        _check(found)
        return with_streams(found)
    except ValidationError as error:
        raise ArtifactError(f"{path} cannot be read: {first_fault(error)}; fetch or build it again.") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError) as error:
        told = f"{type(error).__name__} {error}"
        raise ArtifactError(f"{path} describes no model ({told}); fetch or build it again.") from error


def _check(anatomy: Anatomy) -> None:
    """Counts and sizes as a model can have them: streams are built by them, head by head.

    Raises:
        ValueError: says what is not.
    """
    if not 0 <= anatomy.blocks <= BLOCKS:
        raise ValueError(f"it has {anatomy.blocks} blocks")
    if not 0 < anatomy.hidden < WIDE:
        raise ValueError(f"its residual has {anatomy.hidden} channels")
    for site in anatomy.sites:
        across = site.shape[site.kind == "o"]
        if not all(0 < size < WIDE for size in site.shape):
            raise ValueError(f"{site.name} has the shape {site.shape}")
        if not 0 <= site.heads <= across or (site.heads and across % site.heads):
            raise ValueError(f"{site.name} falls into {site.heads} heads of {across} channels")
    blocks = {part.name: part.block for some in (anatomy.sites, anatomy.norms) for part in some}
    for name, block in blocks.items():
        if block is not None and not 0 <= block < anatomy.blocks:
            raise ValueError(f"{name} is of block {block}, of {anatomy.blocks}")
    for norm in anatomy.norms:
        if not 0 < norm.size < WIDE:
            raise ValueError(f"{norm.name} has the size {norm.size}")


def read_receipt(folder: Path) -> Receipt:
    """What was done and measured, with what the run log adds to it.

    Raises:
        ArtifactError: there is no receipt, or none that this version reads.
    """
    path, log = folder / RECEIPT, folder / RUN_LOG
    if not path.exists():
        raise ArtifactError(f"{folder} holds no receipt ({RECEIPT}); give a directory that `apply` or `fit` wrote.")
    raw = read_json(path, ArtifactError) | (read_json(log, ArtifactError) if log.exists() else {})
    try:
        return Receipt.model_validate(raw)
    except ValidationError as error:
        raise ArtifactError(
            f"{path} is not a receipt that this version of regauge reads: {first_fault(error)}."
        ) from error


def first_fault(error: ValidationError) -> str:
    """The first of what a record has wrong: its place and why."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
