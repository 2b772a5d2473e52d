"""Results as markdown: a table a model or shape, ratios between rows of one run, what was skipped and why."""

from __future__ import annotations

from itertools import groupby

from common.records import Result, Row, Spread, spread

BUSY = 0.1  # cores taken by others, above which a row is marked

RATIOS: dict[str, tuple[tuple[str, str, float], ...]] = {
    "decode tinyllama-1.1b": (
        ("regauge int4 g32 generate", "llama.cpp Q4_0", 1.3),
        ("regauge int4 g32 generate", "transformers bf16", 6.0),
        ("regauge int3-asym g64 generate", "llama.cpp Q3_K_M", 2.0),
        ("regauge int2-asym g64 generate", "llama.cpp Q2_K", 2.2),
        ("regauge int2-asym g64 generate", "regauge int4 g32 generate", 1.0),
    ),
    "decode smollm-135m": (
        ("regauge int4 g32 generate", "llama.cpp Q4_0", 1.0),
        ("regauge int4 g32 stream", "llama.cpp Q4_0", 1.5),
    ),
    "prefill tinyllama-1.1b": (
        ("regauge int4 g32", "transformers bf16", 1.0),
        ("regauge int8 x int8", "transformers bf16", 1.5),
    ),
}
"""(faster, slower, what is asked) of the speeds of one run."""

FRACTIONS: dict[str, tuple[tuple[str, float], ...]] = {
    "decode tinyllama-1.1b": (
        ("regauge int8 channel generate", 0.65),
        ("regauge int4 g32 generate", 0.65),
        ("regauge int3-asym g64 generate", 0.55),
        ("regauge int2-asym g64 generate", 0.55),
    ),
    "linear 5632x2048": (
        ("regauge int8 channel", 0.85),
        ("regauge int4 g32", 0.85),
        ("regauge int6-asym g128", 0.75),
        ("regauge int3-asym g128", 0.75),
        ("regauge int2-asym g128", 0.75),
    ),
}
"""(row, what is asked) of bytes a second over the probe, batch 1."""


def shown(value: Spread, digits: int = 3) -> str:
    """`1.23 [1.20, 1.27]`: median and quartiles, with so many digits."""
    return f"{_digits(value.median, digits)} [{_digits(value.low, digits)}, {_digits(value.high, digits)}]"


def _digits(value: float, digits: int) -> str:
    places = max(0, digits - len(str(int(abs(value)))) if abs(value) >= 1 else digits - 1)
    return f"{value:.{places}f}"


def versus(first: Row, second: Row) -> Spread:
    """How many times as fast the first was, round by round."""
    pairs = zip(first.seconds, second.seconds, strict=False)
    rates = first.items / second.items
    return spread([rates * theirs / ours for ours, theirs in pairs])


def _speed(bench: str, row: Row) -> str:
    if bench != "linear":
        return shown(row.rate())
    return shown(spread([1e6 * second / row.items for second in row.seconds]))


def _disturbed(row: Row) -> bool:
    return bool(row.busy) and spread(row.busy).median > BUSY


def rows(bench: str, found: list[Row]) -> str:
    """One table: the rows of one model or shape and batch."""
    speed = "µs a matrix" if bench == "linear" else "tokens/s"
    last = "GB/s" if bench == "linear" else "TOP/s" if bench == "prefill" else "MB read a token"
    lines = [f"| runner | weights | bits a weight | {speed} | of the probe | probe, GB/s | {last} |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in found:
        name = f"{row.runner}{f', {row.route}' if row.route else ''}"
        if not row.seconds:
            lines.append(f"| {name} | {row.variant} | | – | {row.skipped or 'not run'} | | |")
            continue
        second, mark = spread(row.seconds).median, " *" if _disturbed(row) else ""
        end = row.bytes / second / 1e9 if bench == "linear" else row.bytes / 1e6
        tail = f"{row.operations / second / 1e12:.2f}" if bench == "prefill" else _digits(end, 3)
        fraction = "" if bench == "prefill" else shown(row.fractions(), 3)
        cells = (name, row.variant, f"{row.bits:.2f}", _speed(bench, row) + mark, fraction)
        lines.append("| " + " | ".join((*cells, f"{spread(row.probes).median:.0f}", tail)) + " |")
    return "\n".join(lines)


def asked(result: Result) -> str:
    """What the project set out to reach, against this run; "" where the run has none of those rows."""
    lines = []
    named = {(row.model, row.batch if result.bench == "linear" else 0, row.name): row for row in result.rows}
    at = 1 if result.bench == "linear" else 0
    for key, pairs in RATIOS.items():
        bench, model = key.split(" ")
        for first, second, least in pairs if bench == result.bench else ():
            one, two = named.get((model, at, first)), named.get((model, at, second))
            if one and two and one.seconds and two.seconds:
                lines.append(_line(f"{model}: {first} / {second}", f"≥ {least:g}×", versus(one, two), least))
    for key, wanted in FRACTIONS.items():
        bench, model = key.split(" ")
        for name, least in wanted if bench == result.bench else ():
            row = named.get((model, at, name))
            if row and row.seconds:
                lines.append(_line(f"{model}: {name}, of the probe", f"≥ {least:g}", row.fractions(), least))
    if not lines:
        return ""
    return "\n".join(["| | asked | measured | |", "|---|---|---|---|", *lines])


def _line(what: str, least: str, found: Spread, limit: float) -> str:
    return f"| {what} | {least} | {shown(found)} | {'reached' if found.median >= limit else '**missed**'} |"


def notes(result: Result) -> list[str]:
    """What must be said below the tables."""
    said = list(result.notes)
    said += [f"{row.model} {row.name}: {note}" for row in result.rows for note in row.notes]
    if any(_disturbed(row) for row in result.rows):
        said.append(f"* others kept more than {BUSY:g} cores busy while this row was measured")
    if result.probe != "native":
        said.append(f"the bandwidth was probed by {result.probe}: fractions are too high")
    return list(dict.fromkeys(said))


def whole(result: Result) -> str:
    """Every table of a run, with what was asked and what must be said."""
    said = result.machine
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    parts = [
        f"{said.get('cpu')}, {said.get('threads')} threads; {versions}; {result.started[:10]}, `{result.command}`."
        " Medians and quartiles of interleaved rounds."
    ]
    if result.peaks is not None:
        parts[0] += f" Square products here: {result.peaks.bf16 / 1e12:.2f} TFLOP/s in bf16, "
        parts[0] += f"{result.peaks.int8 / 1e12:.2f} TOP/s in int8."
    parts += [asked(result)]
    for (model, batch), found in groupby(result.rows, key=lambda row: (row.model, row.batch)):
        title = f"{model}, batch {batch}" if result.bench == "linear" else f"{model}"
        parts.append(f"**{title}**\n\n{rows(result.bench, list(found))}")
    parts.append("\n".join(f"- {note}" for note in notes(result)))
    return "\n\n".join(part for part in parts if part)
