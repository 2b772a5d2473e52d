"""What a search measured, as the tables that the terminal, the page and README show alike.

Measured on the artifact, measured on a variant in memory, and predicted never share a column. A speed-up is told in its
parts: what compression gave, what the runtime gave, and both together.
"""

from __future__ import annotations

from collections.abc import Mapping

from regauge.amounts import told
from regauge.measure.bootstrap import FEW, Interval
from regauge.measure.cost import COMPRESSED, ORIGINAL, RUNTIME, Costs, Gain, Speed, gains
from regauge.measure.quality import Quality
from regauge.measure.tasks import Score
from regauge.report import kinds
from regauge.report.kinds import KINDS
from regauge.report.kinds import spread as spread
from regauge.report.view import Row, Table
from regauge.report.words import busy
from regauge.search.record import Run

NAMES = {
    ORIGINAL: "original, by transformers",
    RUNTIME: "original, by this runtime",
    COMPRESSED: "compressed",
}
NONE = "–"


def tables(run: Run) -> tuple[Table, ...]:
    """Size, quality and speed; where the speed comes from; and what spending evenly would have given."""
    return measured(run), parts(run.costs, marked(run), run.kind), evenly(run)


def marked(run: Run) -> str:
    """Behind the heading of a table of speeds, where they are those of a busy machine."""
    return ", taken on a busy machine" if busy(run) else ""


def measured(run: Run) -> Table:
    """The source and the artifact, everything measured."""
    whole, of = run.bytes_bf16, KINDS[run.kind]
    size = run.point.bytes_measured
    rows = [
        *(
            [_row("original", told(whole), "1.000×", run.original, run.costs.get(RUNTIME))]
            if of.nats
            else [
                _row(NAMES[ORIGINAL], told(whole), "1.000×", run.original, run.costs.get(ORIGINAL)),
                _row(NAMES[RUNTIME], NONE, NONE, None, run.costs.get(RUNTIME)),
            ]
        ),
        _row(
            asked(run),
            NONE if size is None else told(size),
            NONE if size is None else f"{size / whole:.3f}×",
            run.quality,
            run.costs.get(COMPRESSED),
        ),
    ]
    caption = "The source in bf16 and the artifact as it loads; tokens a second at batch 1, interleaved in one run."
    if of.nats:
        caption = "The source and the artifact as it loads, in float32; speeds interleaved in one run."
    if run.quality is not None:
        read = "" if of.right else f" of {run.quality.documents} {of.drawn}"
        caption += f" {run.quality.tokens:,} {of.scored}{read} of the evaluation {of.text}; "
        caption += over(run.quality)
    return Table(
        "Measured" + (", speeds on a busy machine" if busy(run) else ""),
        caption,
        (
            "",
            "size",
            "of bf16",
            kinds.short(run.kind),
            "KL to the original",
            of.same,
            of.one.replace(" tokens/s", ", tokens/s"),
            of.many.replace(" tokens/s", ", tokens/s"),
        ),
        tuple(rows),
    )


def asked(run: Run) -> str:
    """`fit` with what was asked of it."""
    said = [budget.text for budget in run.budgets] + [f"{name}={amount:g}" for name, amount in run.floor.items()]
    return "fit" + (f", {', '.join(said)}" if said else "")


def _row(name: str, size: str, share: str, quality: Quality | None, costs: Costs | None) -> Row:
    costs = costs or Costs()
    shown = (NONE, NONE, NONE)
    if quality is not None:
        kl = "0" if quality.kl.value == 0 else spread(quality.kl, 4, quality.drawn)
        shown = (kinds.brief(quality), kl, f"{100 * quality.agreement.value:.1f} %")
    return (name, size, share, *shown, rate(costs.decode), rate(costs.prefill))


def amount(value: float, unit: str) -> str:
    """A measurement or its limit, in its unit."""
    return told(value) if unit == "bytes" else f"{value:.4g} {unit}".strip()


def rate(speed: Speed | None) -> str:
    """Tokens a second."""
    return NONE if speed is None else f"{speed.median:,.0f}"


def answered(score: Score, name: str, value: Interval) -> str:
    """`mine.jsonl, out: acc_norm 0.812 [0.780, 0.840] of 500 questions; -0.004 [-0.020, 0.012] to the first`."""
    questions = score.questions
    said = f"{score.task}, {name}: {score.metric} {spread(value, 3, questions)} of {questions:,} questions"
    gap = score.against.get(name)
    return said if gap is None else f"{said}; {spread(gap, 3, questions, '+')} to the first"


def over(quality: Quality) -> str:
    """What stands in brackets behind a figure, or why nothing does."""
    what = KINDS[quality.kind].drawn if quality.units is None else "windows"
    if quality.drawn < FEW:
        return f"no intervals: over {quality.drawn} {what} one would say nothing."
    if quality.units is None:
        return f"95 % bootstrap intervals over {what} in brackets."
    return (
        f"95 % bootstrap intervals over {quality.units} windows in brackets: {quality.documents} "
        f"document{'s are' if quality.documents > 1 else ' is'} too few, and windows of one are alike, so the truth "
        "may lie further off."
    )


def parts(costs: Mapping[str, Costs], mark: str = "", kind: str = "tokens") -> Table:
    """Decode and prefill against the same runtime on the source, and against transformers."""
    words = KINDS[kind]
    ways = dict(zip(("decode", "prefill"), words.ways, strict=True))
    if words.nats:
        return Table(
            "The artifact against the source" + mark,
            "Both as they load, interleaved in one run; 'no faster' where the quartiles overlap.",
            ("", "speed"),
            tuple((ways[name], gain.compression) for name, gain in gains(costs).items()),
            "Speeds were not measured.",
        )
    return Table(
        "Where the speed comes from" + mark,
        "Compression: the artifact against the source in bf16 by the same runtime. Runtime: that source against "
        "transformers' own modules. Together: the artifact against transformers' own modules. All interleaved in one "
        "run; 'no faster' where the quartiles overlap.",
        ("", "compression", "runtime", "together"),
        tuple(gain_row(name, gain) for name, gain in gains(costs).items()),
        "The source was not timed by the same runtime.",
    )


def gain_row(name: str, gain: Gain) -> Row:
    return (name, gain.compression, gain.runtime or NONE, gain.both or NONE)


def evenly(run: Run) -> Table:
    """The chosen point and uniform presets as variants in memory, and the artifact against the presets."""
    of, chosen = KINDS[run.kind], run.point
    few = "some of them" if of.nats else "8,192 tokens of it"
    drawn = 0 if run.quality is None else run.quality.drawn
    rows: list[Row] = []
    for point, name in [(chosen, "the chosen point"), *((one, one.name) for one in run.uniforms)]:
        pair = run.against_uniform.get(point.name) if point.kind == "uniform" else None
        verdict = {"first": "better", "second": "worse"}
        rows.append(
            (
                name,
                told(point.held),
                NONE if point.in_memory is None else spread(point.in_memory.kl, 4, drawn),
                NONE if pair is None else spread(pair.difference, 4, drawn, "+"),
                NONE if pair is None else verdict.get(pair.verdict, "undecided"),
                *([NONE if point.in_memory is None else kinds.right(point.in_memory)] if of.right else []),
            )
        )
    return Table(
        "Against spending evenly",
        "Variants in memory, rounded and not stored; their bytes are counted from formats. Uniform: every site alike, "
        f"with the same rounder. All are rounded from the same calibration {of.text}, {few} at most, while the "
        "artifact reads as many as are enough: how far it is from the chosen point in memory is what that is worth, "
        "and that much of each difference is not the method's. The difference is the KL of the artifact as it loads "
        f"less the preset's in memory, on the same {of.drawn} drawn together; where its interval holds 0, nothing is "
        "claimed. No preset was built: its own artifact would differ from it as the chosen point's does.",
        (
            "variant",
            "bytes, from formats",
            "KL, in memory",
            "artifact less it",
            "the artifact is",
            *(["right, in memory"] if of.right else []),
        ),
        tuple(rows) if run.uniforms else (),
        "No uniform preset was measured beside it.",
    )


def made(run: Run) -> str:
    """Where and how long."""
    machine = run.machine.get("cpu") or "unknown"
    threads = run.machine.get("threads")
    beside = f", {threads} threads" if threads else ""
    if run.machine.get("cpus"):
        beside += f" on the {run.machine['cpus']} CPUs that the process may use"
    if run.load is not None:
        beside += f"; load {run.load:.1f} before speeds were measured"
    speed = f"; memory read at {run.bandwidth / 1e9:.1f} GB/s" if run.bandwidth else ""
    return f"Machine: {machine}{beside}{speed}; {sum(run.seconds.values()):.0f} s in all."
