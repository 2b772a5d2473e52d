"""How figures of texts, of classes of images and of tokens of images are called, and their columns."""

from __future__ import annotations

from dataclasses import dataclass

from regauge.amounts import figure
from regauge.measure.bootstrap import FEW, Interval
from regauge.measure.images import DRAWN, MANY
from regauge.measure.quality import Quality


@dataclass(frozen=True)
class Kind:
    """The words of one kind of figures.

    Attributes:
        each: what KL and nats are of. scored: what is counted; drawn: what intervals are over.
        one, many: headings of the two speeds; ways: the same in short; rate: their unit. cache: what a
            cache's bytes are of; text: what is read.
        nats, right: whether figures have these, in place of perplexity and bits a byte.
    """

    each: str
    scored: str
    drawn: str
    same: str
    one: str
    many: str
    rate: str
    cache: str
    ways: tuple[str, str] = ("decode", "prefill")
    text: str = "text"
    nats: str = ""
    right: bool = False


KINDS = {
    "tokens": Kind(
        "a token", "tokens", "documents", "same next token", "decode tokens/s", "prefill tokens/s", "tokens/s",
        "cache a token",
    ),
    "classes": Kind(
        "an image", "images", "images", "same class", "images/s, one at a time", f"images/s, {MANY} together",
        "images/s", "cache", ("one by one", "together"), "images", "nats an image", right=True,
    ),
    "scales": Kind(
        "a token", "tokens of images", "images", "same likeliest token", "pictures/s, one at a time",
        f"pictures/s, {DRAWN} together", "pictures/s", "cache a picture",
        ("one by one", "together"), "images", "nats a token",
    ),
}  # fmt: skip
"""By `Quality.kind`."""


def header(kind: str) -> tuple[str, ...]:
    """Columns of quality."""
    words = KINDS[kind]
    first = (words.nats, *(("right", "less than the first") if words.right else ())) if words.nats else ()
    return (*(first or ("perplexity", "bits a byte")), f"KL {words.each}", "KL 99%", words.same)


def row(found: Quality) -> tuple[str, ...]:
    """One model's figures, as `header` has them."""
    last = (
        spread(found.kl, 5, found.drawn),
        f"{found.kl99.value:.4f}",
        f"{100 * found.agreement.value:.1f} %",
    )
    return (*own(found), *last)


def short(kind: str) -> str:
    """The one column of `brief`."""
    words = KINDS[kind]
    return "right" if words.right else words.nats or "bits a byte"


def brief(found: Quality) -> str:
    """What a model has by itself, in one figure."""
    if found.right is not None:
        return right(found)
    own = found.bits_per_byte or found.nats
    return "" if own is None else f"{own.value:.3f}"


def own(found: Quality) -> tuple[str, ...]:
    """Of those, what a model has by itself."""
    if found.nats is None:
        bits = found.bits_per_byte
        return (figure(found.perplexity.value, 3), "" if bits is None else f"{bits.value:.4f}")
    if found.right is None:
        return (spread(found.nats, 4, found.drawn),)
    gap = "" if found.right_gap is None else share(found.right_gap, found.drawn)
    return (spread(found.nats, 4, found.drawn), right(found), gap)


def right(found: Quality) -> str:
    """`80.45 ± 0.89 %`: the share of classes that are right, and its standard error."""
    value = 0.0 if found.right is None else found.right.value
    return f"{100 * value:.2f} ± {100 * found.error:.2f} %"


def share(gap: Interval, drawn: int) -> str:
    """`-0.35 [-0.90, 0.20]`: a difference of shares, in hundredths."""
    return spread(Interval(value=100 * gap.value, low=100 * gap.low, high=100 * gap.high), 2, drawn, "+")


def spread(interval: Interval, places: int, drawn: int, sign: str = "") -> str:
    """`0.0057 [0.0054, 0.0061]`; the figure alone where what was drawn is too little for an interval over it."""
    value, low, high = (figure(one, places, sign) for one in (interval.value, interval.low, interval.high))
    return value if drawn < FEW else f"{value} [{low}, {high}]"
