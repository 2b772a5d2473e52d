"""The members of a family as a table and as a page: size, speed and quality of each, the whole first."""

from __future__ import annotations

from pathlib import Path

from regauge.amounts import told
from regauge.engine.subnets import MemberFigures, Subnets
from regauge.report import drafting, figures, page
from regauge.report.view import Table, View, uniform
from regauge.report.words import Words

CAPTION = (
    "Each member runs over the family's memory. Size is what `regauge extract` writes; speeds are interleaved over all "
    "members on this machine; KL is to the whole, nats a token, with its 95 % interval over documents. As a draft: how "
    "many times as many tokens a second its guesses promise (`drafts=` of generate), by how often they are right where "
    "the whole goes on with this text and what steps of one and more tokens took here."
)
DOTS = "Each dot is a member, its KL to the whole: lower and further left is better; lines are 95 % intervals."
NO_TEXT = "give --eval TEXT for quality"


def table(found: Subnets) -> Table:
    """A row a member; without text no columns of quality."""
    header = ("subnet", "name", "size", "decode tokens/s", "prefill tokens/s")
    quality = ("perplexity", "KL to the whole", "same next token", "as a draft") if found.text else ()
    return Table("Members", CAPTION, header + quality, tuple(map(_row, found.members)))


def _row(one: MemberFigures) -> tuple[str, ...]:
    row = (one.subnet, one.name, told(one.bytes), f"{one.decode.median:.0f}", f"{one.prefill.median:.0f}")
    if one.quality is None:
        return row
    kl = figures.spread(one.quality.kl, 3, one.quality.drawn)
    return (*row, f"{one.quality.perplexity.value:.2f}", kl, f"{100 * one.quality.agreement.value:.1f} %", _draft(one))


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
    quick = max(found.members, key=lambda one: one.decode.median)
    words = (
        Words("whole", f"{told(whole.bytes)}, {whole.decode.median:.0f} tokens/s"),
        Words("fastest", f"{quick.subnet}: {quick.decode.median / whole.decode.median:.2f} times the whole's decode"),
    )
    points = tuple(
        uniform(one.name or one.subnet, one.bytes, one.quality.kl)
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
        notes=() if found.text else (NO_TEXT,),
        facts=(("family", found.path), ("text", found.text or "none")),
        dots=DOTS,
    )


def write(found: Subnets, path: Path) -> Path:
    """The page.

    Raises:
        OutputError: it cannot be written.
    """
    return page.write(view(found), path)
