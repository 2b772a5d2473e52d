"""What a comparison finds, as records: a result a recipe, each against its null, and the ranking over all runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from regauge.measure.bootstrap import FEW, Draws, Floats, Interval, Ints, per_document, ratio
from regauge.measure.quality import Quality

YES, NO, UNTOLD = "yes", "no", "not told"


@dataclass(frozen=True, eq=False)
class Windowed:
    """Scores of the windows of a text, in its order.

    Attributes:
        kl_W: nats, summed over the window; tokens_W: tokens scored in it; unit_W: which document it is drawn with, or
            which window where documents are few.
    """

    kl_W: Floats
    tokens_W: Ints
    unit_W: Ints


class Result(BaseModel):
    """One recipe on one model and text.

    Attributes:
        model: digest of the model; name: how the user called it.
        text: digest of the windows that are scored.
        recipe: digest of the plan; method: its name; setting: `w4a16`.
        null: digest of the plan of its null; "" where it is its own.
        bytes: of the artifact's tensors; bits: bits a weight in the blocks, steps and all.
        seconds, peak: of making it; memory in bytes (anonymous).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    model: str
    name: str
    text: str
    read: str
    recipe: str
    method: str
    setting: str
    null: str
    seed: int
    quality: Quality
    bytes: int
    bits: float
    seconds: float
    peak: int
    windows: Windowed = Field(exclude=True, repr=False)

    @property
    def group(self) -> tuple[str, str]:
        """What results must share to be held against each other window by window."""
        return self.model, self.text


class Row(BaseModel):
    """A result beside its null.

    Attributes:
        difference: its mean KL less the null's, nats a token, documents drawn for both at once; None where it is its
            own null, or the null was refused.
        beats: `yes`, `no`, or `not told` where the interval holds 0 or documents are few; "" without a null.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    result: Result
    null: str = ""
    null_kl: Interval | None = None
    difference: Interval | None = None
    beats: str = ""


class Rank(BaseModel):
    """One method's place.

    Attributes:
        strength: log of its Plackett-Luce worth, of mean 0 over those ranked together; higher = nearer to the original.
        runs: on how many models and texts it was measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    place: int
    strength: float
    runs: int


class Ranking(BaseModel):
    """Methods of one setting over all models and texts in the store.

    Attributes:
        pools: methods that met, best first; several where no chain of runs joins them.
        next: the run that would decide most, as (method, model); None where every one was made.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    setting: str
    runs: int
    pools: tuple[tuple[Rank, ...], ...]
    next: tuple[str, str] | None = None


class Standing(BaseModel):
    """What `compare` found.

    Attributes:
        rows: of this model and text, by setting and within it by KL, the nearest first.
        refused: method → why it cannot be made of this model.
        made: results that this run made; the others were in the store.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    read: str
    tokens: int
    rows: tuple[Row, ...]
    rankings: tuple[Ranking, ...]
    refused: dict[str, str]
    made: int
    notes: tuple[str, ...] = ()
    folder: str = ""

    def __str__(self) -> str:
        lines = [f"{self.model}, {self.tokens:,} tokens of {self.read}"]
        for row in self.rows:
            one = row.result
            told = f"; beats its null: {row.beats}" if row.beats else ""
            lines.append(f"  {one.setting} {one.method}: KL {one.quality.kl.value:.5f}, {one.bits:.2f} bits{told}")
        return "\n".join(lines)


def against(result: Result, null: Result, seed: int) -> Row:
    """A result beside its null, on the same windows."""
    a, b = result.windows, null.windows
    assert np.array_equal(a.unit_W, b.unit_W), "of one group"
    units = int(a.unit_W.max()) + 1
    gap_D = per_document(a.kl_W - b.kl_W, a.unit_W, units)
    tokens_D = per_document(a.tokens_W.astype(np.float64), a.unit_W, units)
    gap = ratio(gap_D, tokens_D, Draws.make(units, seed))
    beats = UNTOLD if units < FEW else YES if gap.high < 0 else NO if gap.low > 0 else UNTOLD
    return Row(result=result, null=null.method, null_kl=null.quality.kl, difference=gap, beats=beats)
