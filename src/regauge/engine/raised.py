"""A family written anew with what it learnt: the same files, but for the tensors, the receipt and the card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regauge.artifact import files
from regauge.artifact.folder import read_receipt
from regauge.artifact.receipt import Receipt
from regauge.artifact.staging import Staging
from regauge.engine.recovered import finish
from regauge.hosts.base import Source
from regauge.learn.base import Parameters

SHARDS = "*.safetensors"
POINTS = 256
"""Of a curve that a receipt keeps."""


def stored(folder: Path) -> dict[str, torch.dtype]:
    """Key → in which dtype a family of plain tensors stores it."""
    return {key: dtype for path in sorted(folder.glob(SHARDS)) for key, (dtype, *_) in files.header(path).items()}


def rounded(parameters: Parameters, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """The parameters as they will be stored."""
    return {key: value.to(dtypes.get(key, value.dtype)).to(value.dtype) for key, value in parameters.items()}


def write(
    folder: Path,
    source: Source,
    learnt: Parameters,
    staging: Staging,
    told: Mapping[str, Any],
    log: Mapping[str, Any],
) -> Receipt:
    """Every shard with what was learnt, and the small files; the output is in its place then.

    Args:
        folder: the family before training; source: what it was made of.
        learnt: by the module's key.
        told: what the receipt says of the training.
    """
    for path in sorted(folder.glob(SHARDS)):
        if not staging.has(path.name):
            before = files.read(path)
            staging.write(
                path.name, {key: learnt[key].to(one.dtype) if key in learnt else one for key, one in before.items()}
            )
    receipt = read_receipt(folder).model_copy(update=dict(told))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return finish(folder, receipt, source, config, staging, log)


def thinned(values: tuple[Any, ...]) -> list[Any]:
    """A curve of at most `POINTS`: means of stretches of a length."""
    span = -(-len(values) // POINTS) or 1
    return [sum(part) / len(part) for at in range(0, len(values), span) if (part := values[at : at + span])]
