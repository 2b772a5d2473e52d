"""The receipt: what the engine did and measured, per place and per move. Pure data, JSON on disk."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from regauge.amounts import told
from regauge.artifact import short


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SiteReceipt(_Record):
    """One weight matrix.

    `bits` counts everything stored for the site over its weights. `error` is ‖(W − Ŵ)X‖ / ‖WX‖ on the calibration
    text (‖W − Ŵ‖ / ‖W‖ where no text was needed). `tokens` is how many calibration tokens reached the site. `runs` is
    how it is multiplied on each kind of device: `native (kernel)` or `simulated (why)`; empty where it stays whole.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    choice: dict[str, object] | None
    bits: float
    bytes_before: int
    bytes_after: int
    error: float | None = None
    tokens: int | None = None
    fallback: str | None = None
    kept: str | None = None  # why it stays in full precision
    runs: dict[str, str] = {}


class TapReceipt(_Record):
    """One activation that is rounded.

    `reading` is its point, axis by axis; `sites` are those that read it so; `bits` are those of an element.
    """

    name: str
    reading: dict[str, object]
    sites: tuple[str, ...]
    bits: int


class StoreReceipt(_Record):
    """What one block keeps of the past.

    `keeping` is its point, axis by axis. Bytes are those of another token of a long text, by the formats, as bf16 and
    as it is kept.
    """

    name: str
    keeping: dict[str, object]
    bytes_before: float
    bytes_after: float


class MoveReceipt(_Record):
    """The certificate of the exact moves on one block: relative maximum error in float64 and after storage."""

    rewrite: str
    block: int | None
    streams: tuple[str, ...]
    exact: float
    stored: float
    tolerance: float
    tolerance_stored: float
    proof: str = "certified"


class SelectReceipt(_Record):
    """What was taken out of one block, which keeps no function: measured, not certified.

    `error` is ‖f′(x) − f(x)‖ / ‖f(x)‖ of the block's output f over `tokens` of the calibration text, x being what the
    compressed model makes of it up to there; `added` is the same over what the block adds, ‖f(x) − x‖. Before rounding.
    """

    block: int
    streams: tuple[str, ...]
    how: dict[str, object]
    before: int  # units
    after: int
    error: float
    added: float
    tokens: int
    proof: str = "measured"


class Errors(_Record):
    """The error of one member on text held out, before it was trained and after."""

    before: float
    after: float


class RoutedReceipt(_Record):
    """What a router does with prompts held out. Losses are nats a token of what follows a prompt.

    Attributes:
        budget: the mean share of the whole's products that was asked for; `compute`: the one that prompts had.
        shares: member → its share of the prompts; alone: what it loses if all prompts are its own.
        routed: what is lost as the router chooses; by_lot: with the same shares, by lot.
    """

    budget: float
    compute: float
    prompts: int
    shares: dict[str, float]
    alone: dict[str, float]
    routed: float
    by_lot: float


class GatedReceipt(_Record):
    """What gates do with tokens held out. Losses are nats a token.

    Attributes:
        budget: the mean share of neurons that was asked for; `compute`: the one that tokens ran through.
        shares: share of neurons → of the tokens that ran through it, over all blocks.
        alone: what is lost if all tokens run through one share.
        gated: what is lost as gates choose; by_lot: through gates that were not trained, at the same budget.
    """

    budget: float
    compute: float
    shares: dict[str, float]
    alone: dict[str, float]
    gated: float
    by_lot: float


class TrainedReceipt(_Record):
    """How a family was trained.

    Attributes:
        text: in words; `tokens` of it were read, `held_out` others were scored.
        how: the recipe's `train`.
        sharded: whether each of the processes held a part of every tensor.
        device: where members ran.
        members: as the family says them; the whole is `full`. Errors are in `unit`.
        losses: of steps, evenly thinned.
        looks: step → mean error on what was held out.
        ended: why, in words.
        routed, gated: what a router and gates make of it, where it has them.
    """

    text: str
    tokens: int
    held_out: int
    how: dict[str, object]
    processes: int
    sharded: bool = False
    device: str = "cpu"
    steps: int = Field(ge=0)
    members: dict[str, Errors]
    unit: str
    losses: tuple[float, ...]
    looks: tuple[tuple[int, float], ...] = Field(min_length=1)
    ended: str
    routed: RoutedReceipt | None = None
    gated: GatedReceipt | None = None

    @property
    def counted(self) -> str:
        """What `tokens` and `held_out` count."""
        return "images" if self.unit.endswith("an image") else "tokens"


class DraftsReceipt(_Record):
    """What drafts where an artifact is decoded.

    Attributes:
        drafts: as a request says it.
        gain: times as many tokens a second as without them, through `generate`.
        accepted: share of guesses that were right where the artifact wrote `text` on, `how` it chose its tokens.
        weights: times the source's decoding by the same runtime without drafts, where that was measured.
    """

    drafts: str
    gain: float
    accepted: float
    text: str
    how: str
    weights: float | None = None

    def __str__(self) -> str:
        """`1.62x: 1.45x from the weights, 1.12x from look-up (accepted 38 % of guesses on TEXT)`."""
        name = {"lookup": "look-up"}.get(self.drafts, self.drafts)
        said = f"{self.gain:.2f}x from {name} (accepted {100 * self.accepted:.0f} % of guesses on {self.text})"
        if self.weights is None:
            return said
        return f"{self.weights * self.gain:.2f}x: {self.weights:.2f}x from the weights, {said}"


class Receipt(_Record):
    """Everything that `apply` did."""

    regauge: str
    plan: str
    plan_hash: str
    source: str
    source_hash: str
    family: str
    wire: str  # compressed-tensors | regauge
    refusals: tuple[str, ...] = ()  # why not compressed-tensors
    command: str = ""
    seed: int = 0
    calibration: dict[str, object] = Field(default_factory=dict)
    sites: tuple[SiteReceipt, ...] = ()
    taps: tuple[TapReceipt, ...] = ()  # beside them, in receipts of before, each site named the grid of its input
    caches: tuple[StoreReceipt, ...] = ()
    moves: tuple[MoveReceipt, ...] = ()
    selects: tuple[SelectReceipt, ...] = ()
    searched: tuple[dict[str, object], ...] = ()  # strengths chosen by the whole model's loss, with the grid tried
    learnt: tuple[dict[str, object], ...] = ()  # a block each: sites, steps, its error before and after, why it ended
    recovered: dict[str, object] = Field(default_factory=dict)  # text, steps, KL on what was held out, before and after
    trained: Annotated[TrainedReceipt | None, BeforeValidator(lambda found: None if found == {} else found)] = None
    drafts: DraftsReceipt | None = None
    logits_error: float | None = None  # whole model after all exact moves, before rounding, relative maximum
    notes: tuple[str, ...] = ()
    bytes_bf16: int = 0  # the source, every tensor counted as bf16
    bytes_after: int = 0  # tensors of the artifact as stored
    ratio: float = 0.0
    seconds: float = 0.0  # this run only; excluded from the artifact's identity
    peak_bytes: int = 0  # peak anonymous resident bytes
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, object] = Field(default_factory=dict)

    def __str__(self) -> str:
        return short.text(*self._short())

    def _repr_html_(self) -> str:
        return short.page(*self._short())

    def _short(self) -> short.Short:
        """A title, heads and a row for each kind of site."""
        kinds: dict[str, list[SiteReceipt]] = {}
        for site in self.sites:
            kinds.setdefault(site.kind, []).append(site)
        rows: list[tuple[str, ...]] = []
        for kind, sites in kinds.items():
            weights = sum(site.shape[0] * site.shape[1] for site in sites)
            before, after = (sum(getattr(site, name) for site in sites) for name in ("bytes_before", "bytes_after"))
            rows.append((kind, str(len(sites)), told(before), told(after), f"{8 * after / max(1, weights):.2f}"))
        title = f"{self.plan} of {self.source}: {told(self.bytes_bf16)} as bf16 → {told(self.bytes_after)}, {self.wire}"
        return title, ("kind", "sites", "before", "after", "bits a weight"), rows
