"""How the tensors of a family are laid out, whether it is stored in codes or as its source was."""

from __future__ import annotations

from pathlib import Path

from regauge.artifact.codec.base import Layout
from regauge.artifact.folder import dtype_of, read_anatomy, read_config
from regauge.artifact.reader import open_artifact


def layout_at(folder: Path) -> Layout:
    """The layout of an artifact.

    Raises:
        ArtifactError: it cannot be read.
    """
    config = read_config(folder)
    if config.get("quantization_config"):
        return open_artifact(folder).layout
    anatomy = read_anatomy(folder)
    return Layout(anatomy, anatomy, {}, dtype_of(config))
