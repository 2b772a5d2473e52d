"""Which images a model is measured on: an .npz with their classes, as the model reads them. Refused before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from regauge.errors import ModelError, SettingError, TextError
from regauge.hosts import host_of
from regauge.measure.images import Seen, classified, coded
from regauge.measure.subject import SCALES, Facts, Subject
from regauge.text.arrays import header, named
from regauge.text.calibration import PARTS, Calibration, classes, images
from regauge.text.corpora import Where

IMAGES, TOKENS = 4096, 1 << 15
"""Images that a classifier is measured on at most, and tokens of images of a model that draws."""
SAME = 4
"""Images whose tokens two models must agree on."""
WANTED = "an .npz with 'x' (N, H, W, {}) of uint8 and 'y' (N), classes counted from 0"


def count_of(facts: Facts) -> int:
    """Images that a model is measured on at most."""
    image = facts.image
    return IMAGES if image is None or not image.tokens else max(1, TOKENS // image.tokens)


def labelled(
    name: str, given: Where | None, facts: Facts, rows: Sequence[int] | None = None, part: str = "test"
) -> tuple[Calibration, torch.Tensor]:
    """Images and their classes (N), as many as a model is measured on at most.

    Args:
        rows: which images, in rising order; None: as many as a model is measured on, spread over the file.
        part: whose arrays are read where a file has several.

    Raises:
        TextError: there is no such file, or it holds something else, or classes that are none of the model's.
    """
    image, count = facts.image, count_of(facts) if rows is None else rows
    assert image is not None, "of a model of images"
    if not named(given):
        raise TextError(f"{name} is a model of images, and samples none of its own: give --eval "
                        f"{WANTED.format(image.channels)}.")  # fmt: skip
    path = Path(given).expanduser()
    found = images(path, count, (image.channels, image.side), (image.mean, image.spread), part)
    y_N = classes(path, count, part)
    least, most = int(y_N.min()), int(y_N.max())
    if least < 0 or most >= facts.labels:
        raise TextError(f"{path} has classes {least} to {most}, and {name} knows 0 to {facts.labels - 1}.")
    return found, y_N


def images_of(
    name: str,
    path: str | Path,
    given: Where | None,
    facts: Facts,
    rows: Sequence[int] | None = None,
    part: str = "test",
) -> Seen:
    """What one model is measured on; one that draws has made tokens of it.

    Args:
        rows, part: as `labelled`.

    Raises:
        TextError: as `labelled`.
    """
    return _made(path, labelled(name, given, facts, rows, part), facts)


def _made(path: str | Path, images: tuple[Calibration, torch.Tensor], facts: Facts) -> Seen:
    found, y_N = images
    if facts.gives != SCALES:
        return classified(found.inputs, y_N, found.description, found.notes)
    return coded(host_of(path).ids_of_images(path, found.inputs, y_N), facts.vocabulary, found.description, found.notes)


def seen(subjects: Sequence[Subject], given: Where | None, facts: Facts) -> Seen:
    """What models are measured on.

    Raises:
        TextError: as `labelled`.
        ModelError: a model makes other tokens of an image than the first.
    """
    first, *others = subjects
    found, y_N = labelled(first.name, given, facts)
    made = _made(first.path, (found, y_N), facts)
    if facts.gives == SCALES and others:
        x_NChw, y_N, tokens_NL = found.inputs[:SAME], y_N[:SAME], torch.cat(made.targets)[:SAME]
        for one in others:
            if not torch.equal(host_of(one.path).ids_of_images(one.path, x_NChw, y_N)[:, 1:], tokens_NL):
                raise ModelError(
                    f"{one.name} makes other tokens of images than {first.name}, so theirs are not compared: measure "
                    "models that share a tokenizer."
                )
    return made


def rows_in(path: Path, channels: int, part: str = "train") -> int:
    """How many images a file holds.

    Raises:
        TextError: none, or it is no such file.
    """
    seen = header(path, [f"x{ending}" for ending in PARTS[part]], WANTED.format(channels))
    if not seen.shape or not seen.shape[0]:
        raise TextError(f"{path} holds no image: 'x' has shape {seen.shape}.")
    return seen.shape[0]


def refuse_asked(name: str, given: Mapping[str, object], whose: str = "models of text") -> None:
    """
    Raises:
        SettingError: something is asked for that only models of text have.
    """
    wrong = [f"--{option}" for option, value in given.items() if value]
    if wrong:
        raise SettingError(
            f"{name} is a model of images, and {' and '.join(wrong)} "
            f"{'is' if len(wrong) == 1 else 'are'} for {whose}; leave {'it' if len(wrong) == 1 else 'them'} out."
        )


def refuse_images(name: str, given: Where | None) -> None:
    """
    Raises:
        TextError: a model of text is given images.
    """
    if named(given):
        raise TextError(f"{given} holds arrays, such as images, and {name} reads text; give plain text in UTF-8.")
