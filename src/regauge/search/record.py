"""The run record, `OUT/regauge/run.json`: everything that a search found, for `report`, `pick` and the reader.

Predicted and measured figures stand in separate fields and are never mixed. KL in nats a token to the original; bytes
of tensors; times in seconds unless the name says ms.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from regauge.amounts import told
from regauge.artifact import short
from regauge.artifact.disk import put
from regauge.artifact.folder import first_fault
from regauge.documents import inside, read_json
from regauge.engine.drafting import Drafting
from regauge.errors import ArtifactError
from regauge.measure.cost import Costs
from regauge.measure.long import Long
from regauge.measure.quality import Paired, Quality
from regauge.search.budgets import Budget
from regauge.search.losses.correction import Check
from regauge.text.split import Text


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Point(_Record):
    """One allocation.

    Attributes:
        name: `0`, `1`, … on the frontier, or the preset's name for a uniform baseline.
        picks: group of sites → option, e.g. `blocks.0.attn.q` → `int4-g128`.
        bits: bits a weight over the sites searched, steps and zero points included.
        cache_bytes: of the stores chosen with it, at the context of the budget; 0 where the cache is left as it is.
        kl_trial: true KL on the search text, weights replaced in memory; never the evaluation text.
        measured: on the evaluation text, of the artifact as loaded; only of points that were built.
        in_memory: the same of the variant in memory: rounded weights before they are stored and propagated.
    """

    name: str
    kind: str  # searched | uniform
    picks: dict[str, str]
    bits: float
    bytes_predicted: int
    kl_predicted: float
    cache_bytes: int = 0
    kl_trial: float | None = None
    decode_ms_predicted: float | None = None
    prefill_ms_predicted: float | None = None
    bytes_measured: int | None = None
    measured: Quality | None = None
    in_memory: Quality | None = None

    @property
    def held(self) -> int:
        """Predicted bytes of the artifact and of the stores chosen with it."""
        return self.bytes_predicted + self.cache_bytes

    @model_validator(mode="before")
    @classmethod
    def _older(cls, data: Any) -> Any:
        """Records of 0.1 had one field for both, and another that said which."""
        if type(data) is dict and "measured_on" in data:
            data = dict(data)
            if data.pop("measured_on") == "memory":
                data["in_memory"] = data.pop("measured", None)
        return data


class SitePick(_Record):
    """What one site got, with what was predicted and measured about it."""

    name: str
    kind: str
    block: int | None
    shape: tuple[int, int]
    option: str
    bits: float  # everything stored, a weight
    bytes: int
    group: str
    kl_predicted: float  # of its whole group, after correction


class CachePick(_Record):
    """What one block's store got.

    Attributes:
        keys, values: bits of a code; 16 where nothing is rounded.
        tokens: at which its bytes are counted, by its formats.
    """

    name: str
    block: int
    option: str
    keys: int
    values: int
    tokens: int
    bytes: int
    kl_predicted: float


class Verdict(_Record):
    """One budget or floor, and what was measured against it."""

    text: str
    limit: float
    measured: float
    unit: str
    met: bool
    how: str  # what was measured, in words


class Sample(_Record):
    """One prompt, continued greedily by both models."""

    prompt: str
    original: str
    compressed: str


class Build(_Record):
    """One artifact that was built on the way: what was aimed at, and what came out."""

    point: str
    bytes: int
    kl: float
    decode: str | None = None
    why: str = ""


class Given(_Record):
    """What a search was given to read, as `Run.calibration` keeps it for `pick`.

    Attributes:
        calibration, eval: a file, a directory or a data set; `paths` of some, `texts` themselves, or the number of
            those that were too many to keep.
        sizes: the tokens of each part; length: of a window, where the user said.
        target, methods, contexts: what was allowed, as `search.menus.Menu` has it.
        cache: the recipe of what artifacts keep of the past, where the user named one.
    """

    calibration: str | dict[str, list[str] | int] | None
    eval: str | dict[str, list[str] | int] | None
    revision: str | None = None
    sizes: dict[str, int]
    length: int | None = None
    target: str | None = None
    methods: tuple[str, ...] = ()
    contexts: tuple[int, ...] = ()
    cache: str | None = None


class Run(_Record):
    """A whole search."""

    regauge: str
    command: str
    seed: int
    source: str
    source_hash: str
    family: str
    parameters: int
    bytes_bf16: int
    budgets: tuple[Budget, ...]
    floor: dict[str, float]
    texts: tuple[Text, ...]
    points: tuple[Point, ...]  # the frontier, smallest first
    chosen: int  # index into points
    chosen_why: str
    uniforms: tuple[Point, ...] = ()  # baselines, every site alike, same rounder and first 8,192 tokens, in memory
    against_uniform: dict[str, Paired] = Field(default_factory=dict)  # the artifact less that uniform
    sites: tuple[SitePick, ...] = ()  # of the chosen point
    caches: tuple[CachePick, ...] = ()  # the same of stores, where a budget counts the cache
    quality: Quality | None = None  # of the artifact, on the evaluation text
    original: Quality | None = None  # of the source on the same text (its KL is 0)
    long: Long | None = None  # what the artifact makes of what the source wrote, where a budget is about a context
    costs: dict[str, Costs] = Field(default_factory=dict)  # source in bf16: `original`, `runtime`; `compressed`
    drafts: Drafting | None = None  # what may draft where it is decoded, and what that gives
    verdicts: tuple[Verdict, ...] = ()
    check: Check | None = None
    additivity: float | None = None  # median of true KL of whole allocations / sum of their single-site KLs
    builds: tuple[Build, ...] = ()
    samples: tuple[Sample, ...] = ()
    machine: dict[str, object] = Field(default_factory=dict)
    bandwidth: float | None = None  # bytes a second
    load: float | None = None  # processes that wanted a CPU over the minute before costs were measured, as told
    seconds: dict[str, float] = Field(default_factory=dict)  # step → seconds
    versions: dict[str, str] = Field(default_factory=dict)
    calibration: dict[str, object] = Field(default_factory=dict)  # what `apply` was given, so that `pick` repeats it
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _chosen(self) -> Run:
        if self.points and not 0 <= self.chosen < len(self.points):
            raise ValueError(f"chosen is {self.chosen}, of {len(self.points)} points")
        return self

    def __str__(self) -> str:
        return short.text(*self._short())

    def _repr_html_(self) -> str:
        return short.page(*self._short())

    def _short(self) -> short.Short:
        """A title, heads and a row for each point of the frontier, numbered as `pick` takes them."""
        rows: list[tuple[str, ...]] = [
            (
                f"{index}{' ←' if index == self.chosen else ''}",
                f"{point.bits:.2f}",
                told(point.bytes_measured or point.bytes_predicted),
                f"{point.kl_predicted:.4f}",
                f"{point.measured.kl.value:.4f}" if point.measured is not None else "",
            )
            for index, point in enumerate(self.points)
        ]
        title = f"{self.source}: {told(self.bytes_bf16)} as bf16; {self.chosen_why}"
        return title, ("point", "bits a weight", "size", "KL predicted", "KL measured"), rows

    @property
    def kind(self) -> str:
        """Of its figures, as `Quality` has it."""
        return "tokens" if self.quality is None else self.quality.kind

    @property
    def point(self) -> Point:
        return self.points[self.chosen]


def write(run: Run, out: Path) -> Path:
    """Writes `OUT/regauge/run.json` by one rename."""
    path = out / "regauge" / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    put(path, run.model_dump_json(indent=1))
    return path


def given(run: Run, where: str | Path) -> Given:
    """What a search was given to read.

    Raises:
        ArtifactError: the record does not say.
    """
    try:
        return Given.model_validate(run.calibration)
    except ValidationError as error:
        raise ArtifactError(f"the record in {where} cannot be picked from: {first_fault(error)}.") from error


def read(where: str | Path) -> Run:
    """A run record from its file, or from the directory that `fit` made."""
    path = Path(where)
    if path.is_dir():
        folder, path = path, path / "regauge" / "run.json"
        inside(folder, [one for one in (path.parent, path) if os.path.lexists(one)], ArtifactError)
    if not path.exists():
        raise ArtifactError(f"{where} holds no run record (regauge/run.json); give the directory that `fit` wrote.")
    try:
        return Run.model_validate(read_json(path, ArtifactError))
    except ValidationError as error:
        raise ArtifactError(f"{path} is not a run record that this version reads: {first_fault(error)}.") from error
