"""Which text a job reads: the user's, images, sound, or what the model samples from itself; and what identifies it.

The recipe says how many tokens in which windows; the user may say otherwise; the model's context caps the length.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from regauge.artifact.staging import Staging
from regauge.engine.enough import bound
from regauge.engine.job import Job
from regauge.engine.renorming import refuse
from regauge.engine.watchdog import Clock
from regauge.errors import ModelError, TextError
from regauge.text.arrays import named
from regauge.text.calibration import Calibration, draw, images, noted
from regauge.text.corpora import Where, corpus
from regauge.text.sounds import sounds
from regauge.text.tokens import within

TOKENS, LENGTH = 65536, 512  # where neither recipe nor user says
SAMPLED = 32768  # most tokens that a model samples from itself unless it is told to
KEPT = "self-sampled"
UNUSED = "the recipe reads no text, so the calibration text was not used"


@dataclass(frozen=True)
class Amount:
    """How much is read.

    Attributes:
        exact: the user gave the number, so less is an error.
        notes: what differs from what was asked for.
    """

    tokens: int
    length: int
    exact: bool
    notes: tuple[str, ...] = ()


def amount(job: Job, tokens: int | None, length: int | None) -> Amount:
    """Tokens and window length.

    Raises:
        TextError: the user asks for windows longer than the model reads, or for a number that is none.
    """
    for name, value in (("tokens", tokens), ("length", length)):
        if value is not None and value < 1:
            raise TextError(f"{name} must be 1 or more; you wrote {value}.")
    most, notes = job.host.context(job.source), []
    wanted = length or job.plan.calibration.get("length", LENGTH)
    if most is not None and wanted > most:
        if length is not None:
            raise TextError(f"windows of {length} tokens are longer than the {most} that the model reads at once.")
        notes.append(f"windows have {most} tokens, the most the model reads at once; the recipe asks for {wanted}")
        wanted = most
    recipe = job.plan.calibration.get("tokens", TOKENS)
    top = bound(job.source.parameters(), recipe)
    if tokens is None and top < recipe:
        notes.append(f"of a model of this size {top:,} tokens are read at most; the recipe asks for {recipe:,}")
    return Amount(tokens or top, wanted, tokens is not None, tuple(notes))


@dataclass(frozen=True, eq=False)
class Reading:
    """The text of a job, or the promise of one.

    Attributes:
        windows: what is read; None where the model still has to sample it, or reads nothing.
        sampled: windows and length that the model samples from itself, or None.
        identity: what it hashes to; JSON.
        fixed: the user said how many tokens; else fewer are read where they are enough.
        notes: a sentence each.
    """

    windows: Calibration | None
    sampled: tuple[int, int] | None
    identity: dict[str, Any]
    notes: tuple[str, ...] = ()
    fixed: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that will be read; for images, images."""
        if self.sampled is not None:
            return self.sampled[0] * self.sampled[1]
        return self.windows.tokens if self.windows is not None else 0


def reading(job: Job, calibration: Where | None, tokens: int | None = None, length: int | None = None) -> Reading:
    """Opens, checks and cuts the text; nothing is sampled yet.

    Raises:
        TextError: missing, empty, binary or too short text, or none where the model cannot sample it.
        ModelError: there is no tokenizer.
        RecipeError: what is to be taken from it is none of the model's.
    """
    refuse(job.plan, job.anatomy)
    if not job.calibrated:
        notes = (UNUSED,) if calibration is not None else ()
        return Reading(None, None, {"kind": "none"}, notes)
    if why := job.host.why_not_fed(job.source):
        raise TextError(
            f"recipe {job.plan.name!r} reads calibration data, and {why}; take one that reads none (rtn-w8)"
        )
    medium = job.host.medium(job.source)
    if medium != "text":
        found = (_images if medium == "images" else _sounds)(job, calibration, tokens)
        return Reading(found, None, {"kind": medium, "sha256": found.sha256})
    much = amount(job, tokens, length)
    if calibration is None:
        return _promise(job, much)
    found = draw(corpus(calibration), job.source.tokenizer(), much.tokens, much.length, job.seed, much.exact)
    within([found.inputs], job.source.anatomy.site("embed").shape[0], job.source.tokenizer())
    found = noted(found, *much.notes)
    return Reading(found, None, {"kind": "text", "sha256": found.sha256}, found.notes, much.exact)


def _promise(job: Job, much: Amount) -> Reading:
    anatomy = job.source.anatomy
    if not anatomy.causal or "head" not in {site.name for site in anatomy.sites}:
        raise TextError(
            f"recipe {job.plan.name!r} reads calibration text, and {anatomy.family} does not generate text to "
            "sample its own; give --calibration a file or directory."
        )
    job.source.tokenizer()
    total, notes = much.tokens, list(much.notes)
    if total > SAMPLED and not much.exact:
        notes.append(f"{SAMPLED:,} calibration tokens are sampled; the recipe asks for {total:,}")
        total = SAMPLED
    count = -(-total // much.length)
    notes.append(
        "no calibration text was given: the model samples its own, at temperature 1; text of your own kind is better"
    )
    return Reading(
        None, (count, much.length), {"kind": KEPT, "windows": count, "length": much.length}, tuple(notes), much.exact
    )


def sampled(job: Job, promised: Reading, staging: Staging, clock: Clock) -> Calibration | None:
    """The windows: those read, or those that the model samples now (once; a resumed run finds them)."""
    if promised.sampled is None:
        return promised.windows
    kept = staging.kept(KEPT)
    if kept is None:
        ids_NT, told = drawn(job, promised, clock)
        staging.keep(KEPT, {"ids": ids_NT})
        staging.note(f"{KEPT} from", told)
    else:
        ids_NT, told = kept["ids"], str(staging.notes[f"{KEPT} from"])
    return self_sampled(job, promised, ids_NT, told)


def drawn(job: Job, promised: Reading, clock: Clock) -> tuple[Tensor, str]:
    """(ids_NT, how they begin) of the windows that are promised, which the model samples now."""
    assert promised.sampled is not None, "a text is given or promised"
    clock.say("text", "; ".join(promised.notes))
    return job.host.sample(
        job.source,
        job.source.tokenizer(),
        *promised.sampled,
        job.seed,
        lambda done, total: clock.show("text", done, total),
    )


def self_sampled(job: Job, promised: Reading, ids_NT: Tensor, told: str) -> Calibration:
    """Windows that a model has sampled, and where they are from."""
    where = f"sampled from the model itself, from {told}"
    return Calibration(ids_NT, where, kind=KEPT, notes=promised.notes, details={"temperature": 1.0, "seed": job.seed})


def _images(job: Job, calibration: Where | None, tokens: int | None) -> Calibration:
    if not named(calibration):
        raise TextError(
            f"recipe {job.plan.name!r} reads calibration data, and {job.source.anatomy.family} reads images; give "
            "--calibration an .npz whose array 'x' is (N, H, W, 3) of uint8."
        )
    try:
        channels, side = job.host.image_shape(job.source)
    except AttributeError as error:
        raise ModelError(f"{job.source.path}: the config does not say how large its images are.") from error
    each = max(1, (side // 16) ** 2)
    count = max(1, (tokens or job.plan.calibration.get("tokens", TOKENS)) // each)
    return images(Path(calibration), min(count, 512), (channels, side), job.host.image_scale(job.source))


def _sounds(job: Job, calibration: Where | None, tokens: int | None) -> Calibration:
    if calibration is None or not isinstance(calibration, str | Path):
        raise TextError(
            f"recipe {job.plan.name!r} reads calibration data, and {job.source.anatomy.family} reads sound; give "
            "--calibration a folder of .wav files, or an .npz whose array 'x' is (N, S) of float32."
        )
    each = job.plan.calibration.get("length", LENGTH)
    samples, stride, rate = job.host.sound_shape(job.source, each)
    count = max(1, (tokens or job.plan.calibration.get("tokens", TOKENS)) // each)
    return sounds(Path(calibration), count, samples, rate, stride)
