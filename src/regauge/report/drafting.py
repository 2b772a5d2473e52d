"""What is told of drafts: in a word, in a sentence, as a table."""

from __future__ import annotations

from regauge.engine.drafting import NONE, Drafting, Way
from regauge.report.view import Table

CALLED = {"lookup": "look-up"}


def called(drafts: str) -> str:
    """As it is told."""
    return CALLED.get(drafts, drafts)


def told(way: Way) -> str:
    """`1.12x [1.05, 1.20], 38 % of guesses right`."""
    gain = way.gain
    return f"{gain.value:.2f}x [{gain.low:.2f}, {gain.high:.2f}], {100 * way.accepted:.0f} % of guesses right"


def chosen(found: Drafting) -> str:
    """The choice in a sentence."""
    way = found.way
    if way is None:
        return f"no drafts: {found.why}"
    said = f"{called(found.drafts)}, {100 * way.accepted:.0f} % of whose guesses were right on {found.text}"
    if found.measured is None:
        return f"{said}: {found.why}"
    return f"{found.measured.value:.2f}x from {said}"


def table(found: Drafting) -> Table:
    """What was weighed."""
    rows = tuple(
        (
            f"{called(way.drafts)}{' (chosen)' if way.drafts == found.drafts else ''}",
            f"{100 * way.accepted:.0f} %",
            f"{way.tokens:.2f}",
            f"{way.gain.value:.2f} [{way.gain.low:.2f}, {way.gain.high:.2f}]",
            ""
            if found.measured is None or way.drafts != found.drafts
            else f"{found.measured.value:.2f} [{found.measured.low:.2f}, {found.measured.high:.2f}]",
        )
        for way in found.ways
    )
    steps = ", ".join(f"{one:.2f}" for one in found.steps)
    caption = (
        f"Guesses that are checked several in a step; the text is the same. {found.texts} texts of {found.text}, which "
        f"the model wrote on {found.how}; as many others chose. Steps of 1 to {len(found.steps)} tokens take {steps} "
        "times one of one. Intervals are over texts and rounds of timing."
    )
    return Table(
        "Drafts",
        caption if found.ways else "Guesses that are checked several in a step; the text is the same.",
        ("drafts", "guesses right", "tokens a step", "times as many tokens a second", "through generate"),
        rows,
        found.why or NONE,
    )
