"""Pictures that a model of images draws, as a grid in a file: those of an artifact beneath those of its original.

Legend: N images, C channels, h w pixels of an image, H W of the grid.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regauge.errors import ModelError, OutputError, SettingError
from regauge.hosts import host_of
from regauge.plan.caches import Asked
from regauge.report.pictures import KEPT, SIGNATURE, Drawing

MOST = 1024
"""Images of one grid."""
GAP, ZOOMED = 2, 56
"""Pixels between two images; the side below which images are shown larger."""


def sample(
    model: str | Path,
    out: str | Path | None = None,
    *,
    against: str | Path | None = None,
    labels: Sequence[int] = (),
    rows: int = 2,
    guidance: float = 1.5,
    top_k: int = 0,
    top_p: float = 0.0,
    subnet: str | Sequence[str] = (),
    cache: Asked | None = None,
    seed: int = 0,
) -> Path:
    """Images of classes as a grid, a column each class; where it was written.

    Args:
        out: a .png; None: where the artifact's report shows it. `against`: draws the same, in rows above.
        subnet: what runs, for all scales or one for each.
        cache: what `model` keeps of earlier scales, as `load` takes it; None: as it says itself.
    """
    stages = (subnet,) if isinstance(subnet, str) else tuple(subnet)
    return draw(model, out, Drawing(tuple(labels), rows, seed, guidance, top_k, top_p, stages), against, cache)


def draw(
    model: str | Path,
    out: str | Path | None,
    drawing: Drawing,
    against: str | Path | None = None,
    cache: Asked | None = None,
) -> Path:
    """Writes a grid of what a model draws, a column each class; rows of `against`, drawn alike, stand above.

    Args:
        out: a .png; None: where the artifact's report finds it. `cache`: what `model` keeps of earlier scales.

    Raises:
        ModelError: a model draws no images.
        SettingError: there is no place for the picture, or too many were asked for.
        OutputError: it cannot be written.
    """
    path = _place(model, out)
    made = [] if against is None else [_images(against, drawing)]
    made.append(_images(model, drawing, cache))
    columns = made[0].shape[0] // drawing.rows
    data = png(grid(torch.cat(made), columns))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise OutputError(f"the picture could not be written to {path}: {error.strerror or error}") from error
    return path


def _place(model: str | Path, out: str | Path | None) -> Path:
    if out is not None:
        return Path(out).expanduser()
    folder = Path(model) / "regauge"
    if not folder.is_dir():
        raise SettingError(f"{model} is no artifact, so say where the picture goes: -o grid.png")
    return folder / KEPT


def _images(model: str | Path, drawing: Drawing, cache: Asked | None = None) -> Tensor:
    """(N, C, h, w) from 0 to 1, row by row."""
    found: Any = host_of(model).load(model, cache=cache)
    taste = getattr(found, "taste", None)
    if taste is None:
        raise ModelError(f"{model} is a {type(found).__name__}, which draws no images")
    classes = int(found.config.num_classes)
    labels = drawing.labels or tuple(range(min(10, classes)))
    if drawing.rows < 1 or drawing.rows * len(labels) > MOST:
        raise SettingError(f"{drawing.rows} rows of {len(labels)} images are not 1 to {MOST}; ask for fewer")
    said = drawing.subnet[0] if len(drawing.subnet) == 1 else drawing.subnet or None
    chosen = taste(drawing.guidance, drawing.top_k, drawing.top_p)
    images: Tensor = found.sample(labels * drawing.rows, drawing.seed, chosen, said).images
    return images.float().cpu()


def grid(images_NChw: Tensor, columns: int) -> Tensor:
    """(H, W, C) bytes: images row by row on white, small ones larger."""
    times = max(1, ZOOMED // images_NChw.shape[-1])
    bytes_NhwC = (images_NChw * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    large = bytes_NhwC.repeat_interleave(times, 1).repeat_interleave(times, 2)
    count, h, w, channels = large.shape
    rows = -(-count // columns)
    shape = (rows * (h + GAP) + GAP, columns * (w + GAP) + GAP, channels)
    found = torch.full(shape, 255, dtype=torch.uint8, device="cpu")
    for number in range(count):
        y, x = (GAP + side * (place + GAP) for side, place in zip(divmod(number, columns), (h, w), strict=True))
        found[y : y + h, x : x + w] = large[number]
    return found


def png(pixels_HWC: Tensor) -> bytes:
    """A PNG of bytes with one channel (grey) or three (red, green, blue)."""
    height, width, channels = pixels_HWC.shape
    kind = {1: 0, 3: 2}.get(channels)
    if kind is None:
        raise SettingError(f"images of {channels} channels are no pictures; 1 or 3 are")
    rows: Sequence[bytes] = [b"\0" + row.numpy().tobytes() for row in pixels_HWC.contiguous()]
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows), 9)), (b"IEND", b""))
    return SIGNATURE + b"".join(_chunk(name, data) for name, data in parts)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
