"""The exception tree. Every message says what was written, what was seen, and what to do, in one sentence or two.

RegaugeError                 anything that regauge raises on purpose; the command line prints it without a traceback
├── ModelError               the source model cannot be used
│   ├── UnknownArchitecture  no family table for this model_type
│   ├── UnsafeWeights        pickle weights, or a source that asks for remote code
│   └── CorruptWeights       a truncated or corrupt file, missing tensors, NaN
├── TextError                calibration or evaluation text is empty, binary or too short
├── RecipeError              a recipe, preset or selector is wrong
├── BudgetError              a budget is malformed, unknown, negative or out of reach
├── MoveError                a move that the stream does not admit, with the reason
├── ExactnessError           an exact move changed the function by more than its tolerance
├── RefusedError             a target cannot say this plan; carries every reason
├── OutputError              the output directory exists, cannot be written, or the disk is full
│   └── ResumeError          the staged output belongs to another run
├── ArtifactError            an artifact cannot be read: newer version, truncated, contradicting itself
└── SettingError             an environment variable has a value that means nothing, or cannot be had here

FallbackWarning              a slower way computes than the one that was meant; said once a process
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from unicodedata import category

LONGEST, WORD = 4000, 300
"""Characters of a message, and of a stretch of it without a blank: what is quoted may be of any length."""


class RegaugeError(Exception):
    """Base of every error that regauge raises on purpose. Its message is one line, whatever it quotes."""

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """Text as a sentence can hold it: no breaks, nothing that a terminal acts on, no half characters, no walls."""
    text = " ".join(line.strip() for line in text.splitlines()) if "\n" in text or "\r" in text else text
    text = printable(text)
    text = re.sub(rf"\S{{{WORD + 1},}}", lambda found: found[0][: WORD - 1] + "…", text)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def printable(text: str, keep: str = "") -> str:
    """Text without what a terminal acts on: control characters and half ones as escapes, those of `keep` apart."""
    if text.isprintable():
        return text
    return "".join(c if c in keep or category(c)[0] != "C" else ascii(c)[1:-1] for c in text)


class ModelError(RegaugeError):
    """The source model cannot be used."""


class UnknownArchitecture(ModelError):
    """No family table describes this architecture."""


class UnsafeWeights(ModelError):
    """The source has only pickle weights, or asks to run code of its own."""


class CorruptWeights(ModelError):
    """A weight file is truncated or corrupt, lacks tensors, or holds NaN or infinity."""


class TextError(RegaugeError):
    """Calibration or evaluation text is missing, empty, binary or too short."""


class RecipeError(RegaugeError):
    """A recipe, preset, part name or selector is wrong."""


class BudgetError(RegaugeError):
    """A budget is malformed, unknown, negative or out of reach."""


class MoveError(RegaugeError):
    """A move that the stream does not admit."""


class ExactnessError(RegaugeError):
    """A move that must keep the function changed it; names the stream and the block."""


class RefusedError(RegaugeError):
    """A target cannot express the plan.

    Attributes:
        reasons: every reason, found before any work was done.
    """

    def __init__(self, target: str, reasons: Iterable[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(f"{target} cannot express this plan: " + "; ".join(self.reasons))


class OutputError(RegaugeError):
    """The output directory exists, cannot be written, or the disk is full."""


class ResumeError(OutputError):
    """The staged output belongs to another plan, source, text, seed or version."""


class ArtifactError(RegaugeError):
    """An artifact cannot be read."""


class SettingError(RegaugeError):
    """An environment variable has a value that means nothing, or that this machine cannot give."""


class FallbackWarning(UserWarning):
    """A slower way computes than the one that was meant, with the same results."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a mistyped word: ``" (did you mean 'x'?)"``, or the list of what is known when nothing is near."""
    options = sorted(known)
    word = word[:100]  # its cost grows with the square of a word's length
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known: {', '.join(options)})"
