"""Drafts that an artifact is decoded with, where a call does not say otherwise: in its generation settings, from where
`generate`, `stream` and a server read them; and in its receipt and card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from regauge.artifact.disk import put
from regauge.artifact.ownership import LISTED, listing
from regauge.documents import read_json
from regauge.errors import ArtifactError

SETTINGS = "generation_config.json"
REQUEST = "drafts"
"""The name of the setting, as of the argument of `generate`."""
DERIVED = "_from_model_config"
"""What the library writes into settings that nobody set; where it reads that, it reads no names but its own."""


def prefer(folder: Path, drafts: str, settings: Mapping[str, object]) -> None:
    """Writes what drafts into the generation settings of an artifact that lies by itself.

    Args:
        settings: what the library takes where the artifact has no such file.
    """
    path, known = folder / SETTINGS, (folder / SETTINGS).exists()
    found = read_json(path, ArtifactError) if known else dict(settings)
    found.pop(DERIVED, None)
    put(path, json.dumps(found | {REQUEST: drafts}, indent=2, sort_keys=True) + "\n")
    if not known and (folder / LISTED).exists():
        files = read_json(folder / LISTED, ArtifactError)["files"]
        put(folder / LISTED, listing([*files, SETTINGS]))


def unprefer(text: str) -> str:
    """Generation settings without what drafts: of what is cut out of an artifact, for which that was not measured."""
    found = json.loads(text)
    return (
        json.dumps({name: value for name, value in found.items() if name != REQUEST}, indent=2, sort_keys=True) + "\n"
    )
