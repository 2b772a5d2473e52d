"""What the model reads while it is calibrated: tokens in windows of one length, cut from a corpus, images, or sound.

Documents are cut into stretches of a few windows each, and a seeded shuffle decides which stretches are read, so that
only as much text is tokenised as is needed and no document dominates. A window lies inside one document; only where
the text would otherwise not suffice are short ends joined to a window. Where the tokenizer frames a text with special
tokens (BOS; [CLS] … [SEP]), every window is framed so.

Legend: N windows, T tokens in each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from regauge.errors import TextError
from regauge.text import arrays
from regauge.text.corpora import Corpus, Document
from regauge.text.tokens import Tokenizer, frame

BYTES_A_TOKEN = 12  # generous: a stretch of T tokens takes this many bytes a token
LEAST = 256  # fewer tokens than this calibrate nothing


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the model reads.

    Attributes:
        inputs: (N, T) int64 token ids; for images (N, C, H, W) float32 pixels, for sound (N, S) float32 samples.
        description: where they come from.
        sha256: over the tensor: two equal hashes are the same inputs.
        kind: `text`, `self-sampled`, `images` or `sound`.
        notes: what a reader must know.
        details: further entries for the receipt.
        each: tokens that one of them comes to in the blocks; 0: as many as it has ids.
    """

    inputs: Tensor
    description: str
    kind: str = "text"
    notes: tuple[str, ...] = ()
    details: Mapping[str, object] = field(default_factory=dict)
    each: int = 0

    @property
    def sha256(self) -> str:
        data = self.inputs.contiguous()
        head = f"{data.dtype}:{tuple(data.shape)}:".encode()
        return hashlib.sha256(head + data.view(torch.uint8).numpy().tobytes()).hexdigest()

    @property
    def tokens(self) -> int:
        """Tokens in all; for images, images."""
        if self.each:
            return len(self.inputs) * self.each
        return self.inputs.numel() if self.inputs.dim() == 2 else self.inputs.shape[0]

    def batches(self, tokens: int) -> list[Tensor]:
        """The windows in order, several to a batch of at most `tokens` tokens (one window at least)."""
        each = self.each or (self.inputs.shape[1] if self.inputs.dim() == 2 else 256)
        return list(torch.split(self.inputs, max(1, tokens // each)))

    def record(self) -> dict[str, object]:
        """The entry in the receipt."""
        shape = list(self.inputs.shape)
        return {"kind": self.kind, "source": self.description, "shape": shape, "sha256": self.sha256, **self.details}


def draw(
    corpus: Corpus,
    tokenizer: Tokenizer,
    tokens: int,
    length: int,
    seed: int = 0,
    exact: bool = False,
) -> Calibration:
    """At least `tokens` tokens in windows of `length`, drawn from the whole corpus.

    Args:
        exact: an error where the text has fewer tokens; otherwise all that there are, with a note.

    Raises:
        TextError: the text is too short, with the numbers.
    """
    before, after = frame(tokenizer)
    body = length - len(before) - len(after)
    if body < 1:
        raise TextError(f"a window of {length} tokens has no room for text; give --length 16 or more.")
    count = -(-tokens // length)
    found, seen = _draw(corpus.documents, tokenizer, body, count, seed)
    have = len(found) * length
    if len(found) < count and exact:
        raise TextError(
            f"{corpus.description} gives {len(found)} windows of {length} tokens ({seen:,} tokens in all), and "
            f"{count} were asked for ({tokens:,} tokens); give a longer text, or ask for fewer or shorter windows."
        )
    if have < min(LEAST, tokens) or not found:
        raise TextError(
            f"{corpus.description} has {seen:,} tokens, too few to calibrate on: at least {max(LEAST, length):,} are "
            f"needed in windows of {length}; give a longer text or a shorter --length."
        )
    notes = list(corpus.notes)
    if len(found) < count:
        notes.append(f"the text gave {have:,} calibration tokens of the {tokens:,} that the recipe asks for")
    ids_NT = torch.tensor([[*before, *piece, *after] for piece in found], dtype=torch.int64, device="cpu")
    return Calibration(ids_NT, corpus.description, notes=tuple(notes), details={"text_sha256": corpus.sha256})


def _draw(
    documents: Sequence[Document], tokenizer: Tokenizer, body: int, count: int, seed: int
) -> tuple[list[list[int]], int]:
    """Up to `count` pieces of `body` tokens, and how many tokens were seen."""
    size = body * BYTES_A_TOKEN
    stretches = [(d, start) for d, document in enumerate(documents) for start in range(0, document.size, size)]
    order = torch.randperm(
        len(stretches), generator=torch.Generator().manual_seed(seed), dtype=torch.int64, device="cpu"
    ).tolist()
    first: list[list[int]] = []
    rest: list[list[int]] = []
    seen = 0
    for index in order:
        document, start = stretches[index]
        ids = tokenizer.encode(_stretch(documents[document], start, size), add_special_tokens=False)
        seen += len(ids)
        if len(ids) >= body:
            first.append(ids[:body])
            ids = ids[body:]
        rest.append(ids)
        if len(first) == count:
            return first, seen
    ends: list[int] = []
    for ids in rest:
        whole = len(ids) - len(ids) % body
        first += [ids[at : at + body] for at in range(0, whole, body)]
        ends += ids[whole:]
    first += [ends[at : at + body] for at in range(0, len(ends) - len(ends) % body, body)]
    return first[:count], seen


def _stretch(document: Document, start: int, size: int) -> str:
    """Bytes start … start + size, begun at a word."""
    text = document.read(start, start + size)
    if start == 0:
        return text
    space = text.find(" ", 0, 200)
    return text[space + 1 :] if space >= 0 else text


PARTS = {"train": ("", "_train"), "test": ("", "_test", "_train")}
"""Endings of the names of arrays, the first that a file has: to calibrate and learn from, and to be measured on."""


def images(
    path: Path,
    count: int | Sequence[int],
    shape: tuple[int, int],
    scale: tuple[Sequence[float], Sequence[float]],
    part: str = "train",
) -> Calibration:
    """Images for vision models: `x` (or `x_train`) of an .npz, (N, H, W, C) uint8, normalised and resized to what the
    model reads; grey ones may be (N, H, W). Of more than `count` every so many-th is read: files are often sorted.

    Args:
        count: how many at most; or which, in rising order.
        shape: (channels, side) that the model reads; scale: mean and spread of each channel.
        part: one of `PARTS`.

    Raises:
        TextError: the file holds no such array.
    """
    channels, side = shape
    wanted = f"images: an .npz with an array 'x' (N, H, W, {channels}) of uint8"
    names = [f"x{ending}" for ending in PARTS[part]]
    seen = arrays.header(path, names, wanted)
    grey = channels == 1 and len(seen.shape) == 3
    whole = (*seen.shape, 1) if grey else seen.shape
    if seen.dtype != np.uint8 or len(whole) != 4 or whole[-1] != channels:
        raise TextError(
            f"{path}: 'x' has shape {seen.shape} and dtype {seen.dtype}; (N, H, W, {channels}) of uint8 is needed."
        )
    if 0 in whole:
        raise TextError(f"{path} holds no image: 'x' has shape {seen.shape}.")
    x_NHWC = arrays.array(path, names, wanted, _spread(seen.shape, count))
    x_NHWC = x_NHWC[..., None] if grey else x_NHWC
    x_NCHW = torch.from_numpy(x_NHWC).permute(0, 3, 1, 2).float() / 255.0
    was = tuple(x_NCHW.shape[-2:])
    if was != (side, side):
        x_NCHW = torch.nn.functional.interpolate(x_NCHW, size=(side, side), mode="bilinear", antialias=True)
    centre, spread = (
        torch.tensor(list(values), dtype=torch.float32, device="cpu").view(1, -1, 1, 1) for values in scale
    )
    notes = () if was == (side, side) else (f"images of {was[0]} × {was[1]} pixels were resized to {side} × {side}",)
    told = f"{path.name} ({len(x_NCHW)} images)"
    return Calibration((x_NCHW - centre) / spread, told, kind="images", notes=notes)


def classes(path: Path, count: int | Sequence[int], part: str = "train") -> Tensor:
    """(N,) int64: the classes `y` (or `y_train`) of an .npz, of the same images that `images` reads.

    Args:
        count, part: as of `images`.

    Raises:
        TextError: the file holds no such array, or not one for each image.
    """
    wanted = "classes of images: an .npz with 'x' (N, H, W, C) of uint8 and 'y' (N)"
    images, known = (arrays.header(path, [f"{name}{ending}" for ending in PARTS[part]], wanted) for name in ("x", "y"))
    if len(known.shape) != 1 or not np.issubdtype(known.dtype, np.integer) or known.shape != images.shape[:1]:
        raise TextError(
            f"{path}: 'y' has shape {known.shape} and dtype {known.dtype}; {images.shape[0]:,} whole numbers are "
            "needed, one for each image."
        )
    y_N = arrays.array(path, [f"y{ending}" for ending in PARTS[part]], wanted, _spread(known.shape, count))
    return torch.from_numpy(y_N.astype(np.int64))


def _spread(shape: tuple[int, ...], count: int | Sequence[int]) -> list[int] | None:
    """Of more than `count` rows every so many-th; or those that are named."""
    if not isinstance(count, int):
        return list(count)
    return [index * shape[0] // count for index in range(count)] if shape and shape[0] > count else None


def noted(found: Calibration, *notes: str) -> Calibration:
    """The same with more notes."""
    return replace(found, notes=(*found.notes, *notes))
