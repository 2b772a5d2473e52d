"""What a search over members found, beside the family that it is of: `regauge/members.json`."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from regauge.amounts import told
from regauge.artifact.disk import put
from regauge.artifact.families import FILE as FAMILY
from regauge.artifact.families import family_json
from regauge.artifact.folder import RECEIPT, read_receipt
from regauge.elastic.family import Family
from regauge.engine.drafting import Drafting
from regauge.engine.receipts import text_of
from regauge.measure.quality import Quality
from regauge.search.budgets import Budget

FILE = "regauge/members.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MemberRecord(_Record):
    """One member, measured.

    Attributes:
        budget: what it was searched for; "" of the whole.
        bytes: of its tensors by the formats, with all that the family has beside its matrices.
        ratio: against the source, every parameter as bf16.
        quality: on the evaluation text, against the original.
        speeds: resource → times the source in bf16 by the same runtime; only where a speed was asked for.
    """

    name: str
    subnet: str
    budget: str = ""
    bytes: int
    ratio: float
    quality: Quality
    speeds: dict[str, float] = Field(default_factory=dict)

    @property
    def own(self) -> str:
        """What it has by itself: perplexity; of images, what is right, or nats."""
        q = self.quality
        if q.right is not None:
            return f"right {100 * q.right.value:.2f} ± {100 * q.error:.2f} %"
        return f"perplexity {q.perplexity.value:.2f}" if q.nats is None else f"{q.nats.value:.3f} nats a token"

    def __str__(self) -> str:
        kl, size = self.quality.kl, f"{told(self.bytes)} ({self.ratio:.3f}x)"
        figures = f"KL {kl.value:.4f} ({kl.low:.4f} to {kl.high:.4f}), {self.own}"
        figures += "".join(f", {name} {ratio:.2f}x" for name, ratio in self.speeds.items())
        return f"{self.name}: {size}, {figures}: {self.subnet or 'all of it'}"


class Chosen(_Record):
    """What a search over members found.

    Attributes:
        weights: the preset by which weights are stored; "": as the source has them.
        members: the whole first.
        measured: members whose KL was measured.
        drafts: what may draft where the whole is decoded, and what that gives.
        tried: way of storing weights → the sum of logarithms of what its members lost on the search text.
    """

    version: int = 1
    source: str
    weights: str = ""
    members: tuple[MemberRecord, ...] = ()
    measured: int = 0
    tried: dict[str, float] = Field(default_factory=dict)
    drafts: Drafting | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self.members))


def name_of(budget: Budget) -> str:
    """The name of the member for a budget: `m0.50x` for `memory=0.5x`, `m2GB` for `memory=2GB`."""
    value = f"{budget.amount:.2f}x" if budget.relative else budget.text.partition("=")[2].strip()
    return budget.resource[0] + value


def record(folder: Path, chosen: Chosen) -> None:
    """Writes the figures."""
    put(folder / FILE, chosen.model_dump_json(indent=1) + "\n")


def finish(folder: Path, family: Family, chosen: Chosen) -> None:
    """Writes members and figures into a family that lies by itself; its receipt, and so its page, tells them."""
    put(folder / FAMILY, family_json(family))
    record(folder, chosen)
    receipt = read_receipt(folder)
    notes = (*(f"member {one}" for one in chosen.members), *receipt.notes)
    put(folder / RECEIPT, text_of(receipt.model_copy(update={"notes": notes})))
