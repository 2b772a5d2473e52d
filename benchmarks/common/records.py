"""Results as data: a file a benchmark, a row a runner, every sample with the probes around it."""

from __future__ import annotations

import statistics
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Spread(_Record):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: list[float]) -> Spread:
    """Median and quartiles of one value or more."""
    if len(values) == 1:
        return Spread(median=values[0], low=values[0], high=values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median=middle, low=low, high=high)


class Row(_Record):
    """One runner on one piece of work.

    Attributes:
        model: shape, `tinyllama-1.1b`, or of a matrix, `5632x2048`.
        runner: who did it.
        variant: how its weights are stored.
        route: how it was called, where there is more than one way.
        batch: tokens that go through together.
        seconds: of each unit: a pass over the matrices, a token, a prompt.
        probes: GB/s, of each sample: the mean of the probe just before and just after.
        busy: of each sample: cores that others on this machine kept busy.
        items: tokens a unit.
        bytes: of weights read a unit, as stored.
        bits: stored a weight, steps included.
        operations: additions and multiplications a unit.
        kind: of the products, `int8` or `bf16`: which peak they are held against.
        skipped: why there are no samples.
        notes: what must be said of this row.
    """

    model: str
    runner: str
    variant: str
    route: str = ""
    batch: int = 1
    seconds: list[float] = Field(default_factory=list)
    probes: list[float] = Field(default_factory=list)
    busy: list[float] = Field(default_factory=list)
    items: int = 1
    bytes: int = 0
    bits: float = 0.0
    operations: float = 0.0
    kind: str = "bf16"
    skipped: str = ""
    notes: list[str] = Field(default_factory=list)

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.runner, self.variant, self.route) if part)

    def rate(self) -> Spread:
        """Tokens a second."""
        return spread([self.items / second for second in self.seconds])

    def fractions(self) -> Spread:
        """Bytes a second over the bandwidth of the same moment, sample by sample."""
        pairs = zip(self.seconds, self.probes, strict=True)
        return spread([self.bytes / second / (probe * 1e9) for second, probe in pairs])

    def intensity(self) -> float:
        """Operations a byte of weights."""
        return self.operations / self.bytes


class Peaks(_Record):
    """The most that this machine was seen to do in this run, in operations a second."""

    bf16: float
    int8: float


class Result(_Record):
    """One run of a benchmark."""

    bench: str
    profile: str
    started: str
    command: str
    machine: dict[str, object]
    versions: dict[str, str] = Field(default_factory=dict)
    probe: str = "native"
    peaks: Peaks | None = None
    rows: list[Row] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)


def write(result: Result, path: Path) -> Path:
    """Writes through a temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".partial")
    part.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def read(path: Path) -> Result:
    return Result.model_validate_json(path.read_text(encoding="utf-8"))
