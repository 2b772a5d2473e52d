"""The members of a family as a table and as a page: size, speed and quality of each, the whole first."""

from __future__ import annotations

from pathlib import Path

from regauge.amounts import told
from regauge.engine.subnets import MemberFigures, Subnets
from regauge.report import drafting, page
from regauge.report.kinds import KINDS, own, spread
from regauge.report.view import Table, View, uniform
from regauge.report.words import Words

CAPTION = (
    "Each member runs over the family's memory. Size is what `regauge extract` writes; speeds are interleaved over all "
    "members on this machine; KL is to the whole, nats {}, with its 95 % interval over {}."
)
DRAFTS = (
    " As a draft: how many times as many tokens a second its guesses promise (`drafts=` of generate), by how often "
    "they are right where the whole goes on with this text and what steps of one and more tokens took here."
)
LATE = (
    " Late: the member runs on the late scales of an image and the whole on those before, as it is trained, so it "
    "takes what the whole takes."
)
DOTS = "Each dot is a member, its KL to the whole: lower and further left is better; lines are 95 % intervals."
NO_TEXT = {
    "tokens": "give --eval TEXT for quality",
    "classes": "give --eval images.npz for quality",
    "scales": "give --eval images.npz for quality",
}


def table(found: Subnets) -> Table:
    """A row a member; without text no columns of quality."""
    kind = KINDS[found.kind]
    header: tuple[str, ...] = ("subnet", "name", "size", kind.one, kind.many)
    if found.text and found.kind == "tokens":
        header = (*header, "perplexity", "KL to the whole", kind.same, "as a draft")
    elif found.text:
        header = (*header, *([kind.nats] if not kind.right else ["right", "less than the whole"]), "KL to the whole")
        header = (*header, kind.same)
    caption = CAPTION.format(kind.each, kind.drawn) + (DRAFTS if found.kind == "tokens" else "")
    return Table(
        "Members", caption + LATE * any(one.late for one in found.members), header, tuple(map(_row, found.members))
    )


def _row(one: MemberFigures) -> tuple[str, ...]:
    low = min(one.decode.median, one.prefill.median) < 10
    rates = (f"{one.decode.median:.{int(low)}f}", f"{one.prefill.median:.{int(low)}f}")
    row = (titled(one), one.name, told(one.bytes), *rates)
    if one.quality is None:
        return row
    kl, same = spread(one.quality.kl, 3, one.quality.drawn), f"{100 * one.quality.agreement.value:.1f} %"
    if one.quality.bits_per_byte is not None:
        return (*row, f"{one.quality.perplexity.value:.2f}", kl, same, _draft(one))
    first = own(one.quality)
    return (*row, *(first[1:] if one.quality.right is not None else first), kl, same)


def titled(one: MemberFigures) -> str:
    """Its subnet, and where it runs."""
    return one.subnet + ", late" * one.late


def _draft(one: MemberFigures) -> str:
    """What it is worth as a draft of the whole."""
    return "" if one.drafts is None else drafting.told(one.drafts)


def offers(found: Subnets) -> str:
    """What may be chosen, in one line."""
    said = "; ".join(f"{name} {', '.join(some)}" for name, some in found.offers.items())
    return said + f" ({found.layers} blocks)" * ("depth" in found.offers)


def view(found: Subnets) -> View:
    """What the page shows: the whole has no KL and no dot."""
    whole = found.members[0]
    kind, places = KINDS[found.kind], int(whole.decode.median < 10)
    what = f"{kind.rate}, {kind.ways[0]}" if kind.nats else kind.ways[0]
    quick = max(found.members, key=lambda one: one.decode.median)
    words = (
        Words("whole", f"{told(whole.bytes)}, {whole.decode.median:.{places}f} {kind.rate}"),
        Words("fastest", f"{titled(quick)}: {quick.decode.median / whole.decode.median:.2f} times the whole's {what}"),
    )
    points = tuple(
        uniform(one.name or titled(one), one.bytes, one.quality.kl)
        for one in found.members[1:]
        if one.quality is not None
    )
    return View(
        title="Members of a family",
        subtitle=f"{found.path} offers {offers(found)}.",
        words=words,
        points=points,
        sites=(),
        first=(table(found), *(() if found.drafting is None else (drafting.table(found.drafting),))),
        tables=(),
        notes=(*found.notes, *(() if found.text else (NO_TEXT[found.kind],))),
        facts=(("family", found.path), (kind.text, found.text or "none")),
        dots=DOTS,
    )


def write(found: Subnets, path: Path) -> Path:
    """The page.

    Raises:
        OutputError: it cannot be written.
    """
    return page.write(view(found), path)
