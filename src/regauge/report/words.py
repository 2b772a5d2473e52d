"""The last words of a command: how small, how good, how fast, how much memory, what can load it, what to do next.

Every figure is one that was measured, in the units in which people read it; what was not measured is left out.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from regauge.amounts import figure, told
from regauge.artifact.codec.base import COMPRESSED_TENSORS
from regauge.artifact.loading import drawing, ours
from regauge.artifact.receipt import Receipt
from regauge.measure.cost import COMPRESSED, ORIGINAL, RUNTIME, Costs, Speed, verdict
from regauge.measure.quality import Quality
from regauge.report.kinds import KINDS, right
from regauge.search.record import Point, Run

CONTEXTS = (1024, 8192, 32768)
BUSY = 0.5  # processes that wanted each CPU, from which a speed is one of a busy machine
EMBED = "embed"


@dataclass(frozen=True)
class Words:
    """One line: what it is about, and what is said.

    Attributes:
        line: the part of it to copy, which it then begins with.
    """

    about: str
    said: str
    line: str = ""


def of_run(run: Run, receipt: Receipt, out: str) -> tuple[Words, ...]:
    """Of a search.

    Args:
        out: the artifact's place, as the reader would type it.
    """
    lines = [_size(run.point.bytes_measured or receipt.bytes_after, run.bytes_bf16)]
    if run.quality is not None and run.original is not None:
        lines.append(Words("quality", quality(run.quality, run.original)))
    lines += _speeds(run)
    lines += _drafts(receipt, run)
    lines += _memory(run)
    lines += _cache(receipt)
    lines += _stores(run)
    lines += _even(run)
    lines += _loads(receipt, out)
    return (*lines, *_next(_met(receipt, out, run.source), _others(run, out)))


def of_receipt(receipt: Receipt, out: str) -> tuple[Words, ...]:
    """Of one preset or recipe; nothing was run on other text, so quality is what `measure` will say."""
    lines = [_size(receipt.bytes_after, receipt.bytes_bf16), *_cache(receipt)]
    whole = [site.name for site in receipt.sites if site.choice is None and site.name in (EMBED, "head")]
    whole = [name for name in whole if name != "head" or EMBED not in whole]
    share = sum(site.bytes_after for site in receipt.sites if site.name in whole) / max(1, receipt.bytes_after)
    if whole and share > 0.1:
        said = f"{' and '.join(whole)}, {100 * share:.0f} % of it; --{whole[0]} int8 halves it"
        lines.append(Words("left whole", said))
    lines += _loads(receipt, out)
    return (
        *lines,
        *_next(_met(receipt, out, receipt.source), [f"regauge measure {_typed(receipt.source)} {_typed(out)}"]),
    )


def _size(after: int, before: int) -> Words:
    times = before / max(1, after)
    return Words("size", f"{told(before)} as bf16 → {told(after)}, {times:.1f} times smaller ({after / before:.3f}x)")


def _cache(receipt: Receipt) -> list[Words]:
    """What the cache takes by its rules, where it has any."""
    if not receipt.caches:
        return []
    before, after = (sum(getattr(one, name) for one in receipt.caches) for name in ("bytes_before", "bytes_after"))
    said = f"{before:,.0f} bytes a token → {after:,.0f} in {len(receipt.caches)} blocks, by the formats"
    return [Words("cache", said)]


def _stores(run: Run) -> list[Words]:
    """Bits of keys and of values, block by block, where the search chose them; and their bytes."""
    if not run.caches:
        return []
    tokens, size = run.caches[0].tokens, sum(one.bytes for one in run.caches)
    lines = [
        Words(name, " ".join(str(bits) for bits in found) + " bits, block by block")
        for name, found in (("  keys", [c.keys for c in run.caches]), ("  values", [c.values for c in run.caches]))
    ]
    whole = run.costs.get(ORIGINAL, Costs()).cache_bytes
    before = f"{told(tokens * whole)} → " if whole else ""
    return [*lines, Words("", f"{before}{told(size)} at {tokens:,} tokens")]


def quality(found: Quality, original: Quality) -> str:
    """`of 100 next tokens 96 stay the same; perplexity 13.7 → 13.8; KL 0.0056 nats a token`."""
    if found.nats is not None and original.nats is not None:
        of, was, now, share = KINDS[found.kind], original.nats.value, found.nats.value, ""
        if found.right is not None:
            same = f"{100 * found.agreement.value:.0f}"
            share = f"of 100 images {same} keep their class; right {right(original)} → {right(found)}; "
        said = f"{of.nats} {was:.3f} → {now:.3f}; KL {found.kl.value:.2g} nats {of.each}"
        return f"{share}{said}, on {found.documents:,} images it never saw"
    before, after = original.perplexity.value, found.perplexity.value
    places = 1 if min(before, after) >= 10 else 2
    if f"{before:.{places}f}" == f"{after:.{places}f}":
        places += 1
    return (
        f"of 100 next tokens {100 * found.agreement.value:.0f} stay the same; perplexity {figure(before, places)} → "
        f"{figure(after, places)}; KL {found.kl.value:.2g} nats a token, on {found.tokens:,} tokens it never saw"
    )


def busy(run: Run) -> bool:
    """Whether much else ran while speeds were taken."""
    cpus = run.machine.get("cpus")
    return run.load is not None and isinstance(cpus, int) and run.load > (1 + BUSY) * cpus


def _speeds(run: Run) -> list[Words]:
    made, runtime, own = (run.costs.get(name, Costs()) for name in (COMPRESSED, RUNTIME, ORIGINAL))
    of = KINDS[run.kind]
    if busy(run):
        said = f"taken while {run.load:.0f} processes wanted {run.machine.get('cpus')} CPUs, so not told here: "
        return [Words("speed", said + "regauge measure, on an idle machine")] if made.decode is not None else []
    rows = (
        (of.ways[0], made.decode, runtime.decode, own.decode),
        (of.ways[1], made.prefill, runtime.prefill, own.prefill),
    )
    lines = [Words(name, _rate(speed, base, stock, of.rate)) for name, speed, base, stock in rows if speed is not None]
    grown, beside = contexts(made.decode_at), contexts(runtime.decode_at)
    if grown:
        lines.insert(1, Words("  context", f"decoding at {grown}" + (f"; uncompressed {beside}" if beside else "")))
    return lines


def _drafts(receipt: Receipt, run: Run) -> list[Words]:
    """What guesses that are checked several in a step give beside the weights."""
    if receipt.drafts is not None:
        return [Words("drafts", f"decode {receipt.drafts}; the text is the same")]
    return [] if run.drafts is None else [Words("drafts", f"none: {run.drafts.why}")]


def contexts(found: Mapping[int, Speed]) -> str:
    """`1k 118, 4k 97 tokens a second`; empty where nothing was measured."""
    told = ", ".join(f"{length // 1024}k {speed.median:,.0f}" for length, speed in found.items())
    return f"{told} tokens a second" if told else ""


def _rate(speed: Speed, runtime: Speed | None, own: Speed | None, unit: str) -> str:
    said = f"{speed.median:,.{int(speed.median < 10)}f} {unit.replace('/s', ' a second')}"
    beside = [(runtime, "the same runtime uncompressed"), (own, "transformers")]
    apart = [f"{_times(verdict(speed, other))} {name}" for other, name in beside if other is not None]
    return said + (": " + ", ".join(apart) if apart else "")


def _times(found: str) -> str:
    return f"{found} than" if found == "no faster" else found.removesuffix(", slower")


def _memory(run: Run) -> list[Words]:
    """At load, and with the cache at some lengths of context."""
    made, own = run.costs.get(COMPRESSED, Costs()), run.costs.get(ORIGINAL, Costs())
    lines = []
    for name, costs in (("memory", made), ("  original", own)):
        if costs.memory is None:
            continue
        held = costs.memory.anonymous + costs.memory.file
        said = f"{told(held)} at load"
        if costs.cache_bytes and run.kind == "tokens":
            grown = ", ".join(f"{told(held + n * costs.cache_bytes)} at {n // 1024}k" for n in CONTEXTS)
            said += f"; with its cache {grown} tokens of context"
        lines.append(Words(name, said))
    return lines


def _even(run: Run) -> list[Words]:
    """Against the best preset that spends evenly and is no larger than a tenth more."""
    if run.quality is None or not run.uniforms:
        return []
    size = (run.point.bytes_measured or run.point.bytes_predicted) + run.point.cache_bytes
    near = [one for one in run.uniforms if one.in_memory is not None and one.held <= 1.1 * size]
    if not near:
        return []
    best = min(near, key=_kl)
    mine = run.quality.kl.value if run.point.in_memory is None else _kl(run.point)  # both in memory, where both were
    ratio = _kl(best) / max(mine, 1e-12)
    less = f"{ratio:.1f} times less KL" if ratio > 1 else f"{1 / max(ratio, 1e-12):.1f} times more KL"
    beside = f"than {best.name} everywhere, which takes {told(best.held)}"
    return [Words("against", f"{less} {beside} ({mine:.2g} and {_kl(best):.2g}, in memory)")]


def _kl(point: Point) -> float:
    assert point.in_memory is not None, "chosen for it"
    return point.in_memory.kl.value


def _loads(receipt: Receipt, out: str) -> list[Words]:
    """What can load it, and with which line."""
    if ours(receipt.family):
        how = f", or regauge sample {_typed(out)}" if drawing(receipt.family) else ""
        return [Words("loads in", f"regauge: rg.load({out!r}){how}; no other library")]
    lines = [Words("loads in", f"regauge: rg.load({out!r}), or regauge serve {_typed(out)}")]
    opened = f"from_pretrained({out!r}"
    if receipt.wire == COMPRESSED_TENSORS:
        lines.append(Words("", f"transformers: {opened}); vllm serve {_typed(out)}"))
    else:
        why = receipt.refusals[0] if receipt.refusals else "regauge's own format was asked for"
        lines.append(Words("", f"transformers, where regauge is installed: {opened}, trust_remote_code=True)"))
        lines.append(Words("", f"not vLLM: {why}"))
    return lines


def _others(run: Run, out: str) -> list[str]:
    """The points beside the chosen one, as `pick` takes them."""
    found = []
    for index, what in ((run.chosen - 1, "smaller"), (run.chosen + 1, "better")):
        if 0 <= index < len(run.points):
            point = run.points[index]
            kl = point.kl_trial if point.kl_trial is not None else point.kl_predicted
            found.append(f"{pick(out, index)}   # {what}: {told(point.bytes_predicted)}, KL about {kl:.2g}")
    return found


def pick(out: str, index: int) -> str:
    """The line that builds a point of the frontier."""
    return f"regauge pick {_typed(out)} {index} -o {_typed(f'{out}-{index}')}"


def _met(receipt: Receipt, out: str, source: str) -> str:
    """The line by which a person meets a model beside its original, or reads of it where it gives classes alone."""
    if ours(receipt.family) and not drawing(receipt.family):
        return f"regauge report {_typed(out)}"
    return f"regauge {'sample' if ours(receipt.family) else 'chat'} {_typed(out)} --against {_typed(source)}"


def _next(first: str, more: list[str]) -> list[Words]:
    lines = [first, *more]
    return [Words("next" if place == 0 else "", said, said.split("   #")[0]) for place, said in enumerate(lines)]


def _typed(path: str) -> str:
    """A path as a shell takes it, short where it lies below here."""
    full, here = Path(path).absolute(), Path.cwd()
    return shlex.quote(str(full.relative_to(here)) if Path(path).exists() and full.is_relative_to(here) else path)
