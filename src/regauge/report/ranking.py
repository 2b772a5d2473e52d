"""A comparison of methods as tables and as a page: KL, size and cost a row, each beside its null, and the ranking."""

from __future__ import annotations

from pathlib import Path

from regauge.amounts import figure
from regauge.amounts import told as amount
from regauge.ranking.record import Ranking, Row, Standing
from regauge.report import figures, page
from regauge.report.view import Table, View, uniform
from regauge.report.words import Words

PAGE = "ranking.html"
HEADER = (
    "method",
    "KL a token",
    "perplexity",
    "same next token",
    "bits in blocks",
    "bytes",
    "seconds",
    "memory",
    "less its null",
    "beats its null",
)


def tables(found: Standing) -> tuple[Table, ...]:
    """One a setting, the least KL first."""
    caption = (
        "Its null: the same bits, grains and inputs, rounded to nearest. `less its null`: mean KL less the null's, on "
        "the same documents; `not told`: the interval holds 0, or documents are few."
    )
    settings = dict.fromkeys(row.result.setting for row in found.rows)
    return tuple(
        Table(at, caption, HEADER, tuple(_row(row) for row in found.rows if row.result.setting == at))
        for at in settings
    )


def _row(row: Row) -> tuple[str, ...]:
    one, quality = row.result, row.result.quality
    gap = "" if row.difference is None else figures.spread(row.difference, 5, quality.drawn, "+")
    return (
        one.method,
        figures.spread(quality.kl, 5, quality.drawn),
        figure(quality.perplexity.value, 3),
        f"{100 * quality.agreement.value:.1f} %",
        f"{one.bits:.2f}",
        amount(one.bytes),
        f"{one.seconds:.1f}",
        amount(one.peak) if one.peak > 0 else "",
        gap,
        row.beats,
    )


def told(found: Standing) -> tuple[str, ...]:
    """The rankings over several models and texts, a sentence each."""
    return tuple(text for one in found.rankings if one.runs > 1 for text in _told(one))


def _told(one: Ranking) -> list[str]:
    said = [
        f"{one.setting} over {one.runs} models and texts: {', '.join(r.method for r in pool)}" for pool in one.pools
    ]
    if len(one.pools) > 1:
        said.append(f"{one.setting}: these {len(one.pools)} lists never met in one run, so they have no common order")
    if one.next is not None:
        said.append(f"{one.setting}: {one.next[0]} on {one.next[1]} would decide most next")
    return said


def view(found: Standing) -> View:
    """What the page shows."""
    best = {row.result.setting: row.result for row in reversed(found.rows)}
    words = tuple(
        Words(f"best at {at}", f"{one.method}: KL {one.quality.kl.value:.5f}, {one.bits:.2f} bits a weight in blocks")
        for at, one in sorted(best.items(), key=lambda pair: [row.result.setting for row in found.rows].index(pair[0]))
    )
    points = tuple(
        uniform(f"{row.result.setting} {row.result.method}", row.result.bytes, row.result.quality.kl)
        for row in found.rows
    )
    places = tuple(_places(one) for one in found.rankings)
    refused = tuple(f"{name} was refused: {why}" for name, why in found.refused.items())
    return View(
        title="Methods side by side",
        subtitle=f"{found.model}, {found.tokens:,} tokens of {found.read}.",
        words=words,
        points=points,
        sites=(),
        first=tables(found),
        tables=places,
        notes=(*found.notes, *refused),
        facts=(("model", found.model), ("text", found.read), ("tokens scored", f"{found.tokens:,}")),
        dots="Each dot is a method's artifact: lower and further left is better; lines are 95 % intervals.",
    )


def _places(one: Ranking) -> Table:
    rows = tuple(
        (str(rank.place), rank.method, f"{rank.strength:+.2f}", str(rank.runs), str(number))
        for number, pool in enumerate(one.pools, 1)
        for rank in pool
    )
    more = "" if one.next is None else f" Would decide most next: {one.next[0]} on {one.next[1]}."
    return Table(
        f"Ranking at {one.setting}",
        f"Over {one.runs} models and texts in this folder, by who is nearer on each window (Plackett-Luce; ONEBench, "
        f"2412.06745). Methods of different pools never met.{more}",
        ("place", "method", "log worth", "runs", "pool"),
        rows,
    )


def write(found: Standing) -> Path:
    """The page, in the folder of the results.

    Raises:
        OutputError: it cannot be written.
    """
    return page.write(view(found), Path(found.folder) / PAGE)
