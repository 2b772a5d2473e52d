"""What a model keeps of the past, in a file of an artifact whose config.json is read by others too.

The header of regauge's own format lists stores among its places; compressed-tensors, and a checkpoint in which nothing
is rounded, have no header of ours, and there the same list lies in `regauge/cache.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

from regauge.anatomy.model import Anatomy
from regauge.artifact.codec.base import Layout
from regauge.artifact.header import fitting, grouped, read_points
from regauge.documents import ordinary, read_json
from regauge.errors import ArtifactError
from regauge.parts import CACHE, Point

FILE = "regauge/cache.json"


def cache_json(layout: Layout) -> str:
    """The points of stores as JSON."""
    return json.dumps({CACHE: grouped(layout.cache)}, indent=1, ensure_ascii=False) + "\n"


def read_cache(folder: Path, anatomy: Anatomy) -> dict[str, Point]:
    """Store → point, of a directory; empty where it says nothing of caches.

    Raises:
        ArtifactError: the file is damaged, or does not fit the model; in a sentence.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    ordinary(folder, ArtifactError)
    raw = read_json(path, ArtifactError)
    if raw.keys() != {CACHE}:
        raise ArtifactError(f"{path} lists no stores; fetch or build the artifact again.")
    return fitting(read_points(raw, CACHE), anatomy)
