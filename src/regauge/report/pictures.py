"""What is asked of a model of images, and the picture of it that lies in an artifact: read without torch."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from regauge.errors import SettingError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEPT = "samples.png"
"""In the `regauge` folder of an artifact: what its report shows."""
LARGEST = 4 << 20
"""Bytes of a file that a report takes in."""


@dataclass(frozen=True)
class Drawing:
    """What is drawn and how.

    Attributes:
        labels: classes, a column each; empty: the first ten.
        rows: images of each class.
        guidance, top_k, top_p: which tokens may be drawn, as the model's own `sample` takes them.
        subnet: what runs, for all scales or one for each.
    """

    labels: tuple[int, ...] = ()
    rows: int = 2
    seed: int = 0
    guidance: float = 1.5
    top_k: int = 0
    top_p: float = 0.0
    subnet: tuple[str, ...] = ()


def numbers(text: str) -> tuple[int, ...]:
    """Classes as they are typed: `0,3,7`.

    Raises:
        SettingError: one is no number.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    wrong = [part for part in parts if not (part.isascii() and part.isdecimal() and len(part) < 8)]
    if wrong:
        raise SettingError(f"{wrong[0][:40]!r} is no class; write numbers such as 0,3,7")
    return tuple(int(part) for part in parts)


def shown(folder: Path) -> str:
    """The picture of an artifact, as a page takes it; "" where it has none."""
    path = folder / KEPT
    if not path.is_file() or path.stat().st_size > LARGEST:
        return ""
    data = path.read_bytes()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}" if data.startswith(SIGNATURE) else ""
