"""The model card of an artifact: README.md with the front matter that hubs read, from the receipt alone.

No date, no path of the machine that made it: the same run gives the same bytes. Names come from others' files, so what
is shown stands in code spans, and the front matter is JSON strings, which YAML reads as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from regauge.amounts import told
from regauge.artifact.codec.base import COMPRESSED_TENSORS
from regauge.artifact.loading import CAUSAL, auto_class, ways
from regauge.artifact.receipt import Receipt, SiteReceipt

CARD = "README.md"
PLACE = "PATH"
"""Where the reader keeps the artifact, in lines to copy."""
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HUB = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def card(receipt: Receipt, source: Path, config: Mapping[str, object]) -> str:
    """The card as Markdown.

    Args:
        source: directory of the source model, whose own card may name a licence.
        config: config.json of the artifact.
    """
    auto = auto_class(config)
    base = base_model(receipt.source)
    lines = ["---", *_front(receipt, base, auto, licence(source)), "---", ""]
    lines += [f"# {_code(base)}, compressed", ""]
    times = receipt.bytes_bf16 / max(1, receipt.bytes_after)
    lines += [
        f"{_code(base)} as bf16 takes {told(receipt.bytes_bf16)}; this is {told(receipt.bytes_after)}, {times:.1f} "
        f"times smaller. It was made by regauge {receipt.regauge} with the plan {_code(receipt.plan)}.",
        "",
        "## What loads it",
        "",
        "| | line | needs |",
        "|---|---|---|",
    ]
    for way in ways(receipt.wire, receipt.refusals, PLACE, auto):
        lines.append(f"| {way.runtime} | {_code(way.line) if way.line else ''} | {_plain(way.note)} |")
    lines += ["", "## What was done", "", "| matrices | how many | bits a weight | before | after |"]
    lines += ["|---|---|---|---|---|", *_kinds(receipt.sites), ""]
    lines += [f"- {said}" for said in _done(receipt)]
    lines += [
        "",
        "Bits count everything stored for a weight. What was lost is measured by `regauge measure MODEL PATH`. Every "
        "matrix, choice and error is in `regauge/receipt.json`; `regauge apply regauge/recipe.yaml MODEL -o OUT` makes "
        "it again.",
    ]
    if (source / CARD).is_file():
        lines += ["", "The card of the source is in `regauge/SOURCE_README.md`."]
    return "\n".join(lines) + "\n"


def base_model(source: str) -> str:
    """A hub's name where the source came from one; else the last part of its path."""
    found = _HUB.search(source)
    if found:
        return f"{found[1]}/{found[2]}"
    own = source.rstrip("/").rsplit("/", 1)[-1]
    return source if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists() else own


def licence(source: Path) -> str | None:
    """What the front matter of the source's own card says; None where it says nothing that can be repeated."""
    try:
        text = (source / CARD).read_text(encoding="utf-8")
        front = text.split("---", 2)[1] if text.startswith("---") else ""
        found = yaml.safe_load(front) if len(front) < 1 << 16 else None
    except (OSError, ValueError, IndexError, yaml.YAMLError, RecursionError):
        return None
    said = found.get("license") if type(found) is dict else None
    return said if type(said) is str and _LICENCE.fullmatch(said) else None


def _front(receipt: Receipt, base: str, auto: str, said: str | None) -> list[str]:
    front = [f"base_model: {json.dumps(base)}", "base_model_relation: quantized", "library_name: transformers"]
    front += [f"license: {json.dumps(said)}"] if said else []
    front += ["pipeline_tag: text-generation"] if auto == CAUSAL else []
    tags = ["regauge", "quantized", *(["compressed-tensors"] if receipt.wire == COMPRESSED_TENSORS else [])]
    return [*front, "tags:", *(f"- {tag}" for tag in tags)]


def _kinds(sites: tuple[SiteReceipt, ...]) -> list[str]:
    kinds: dict[str, list[SiteReceipt]] = {}
    for site in sites:
        kinds.setdefault(site.kind, []).append(site)
    found = []
    for kind, some in kinds.items():
        weights = sum(site.shape[0] * site.shape[1] for site in some)
        before, after = (sum(getattr(site, name) for site in some) for name in ("bytes_before", "bytes_after"))
        bits = f"{8 * after / max(1, weights):.2f}" if any(site.choice for site in some) else "whole"
        found.append(f"| {_code(kind)} | {len(some)} | {bits} | {told(before)} | {told(after)} |")
    return found


def _done(receipt: Receipt) -> list[str]:
    said = []
    for tap in receipt.taps[:1]:
        said.append(f"Activations are rounded to {tap.bits} bits where {len(receipt.taps)} inputs are read.")
    if receipt.caches:
        before, after = (sum(getattr(one, name) for one in receipt.caches) for name in ("bytes_before", "bytes_after"))
        kept = " ".join(f"{axis} {part}" for axis, part in receipt.caches[0].keeping.items())
        said.append(
            f"The cache of {len(receipt.caches)} blocks is kept as {_code(kept)}: {before:,.0f} bytes a token become "
            f"{after:,.0f}. It is so when regauge loads the model; `rg.load(PATH, cache=...)` keeps another."
        )
    if receipt.moves:
        worst = max(move.exact for move in receipt.moves)
        said.append(
            f"{len(receipt.moves)} moves that keep the function were certified: {worst:.0e} at most in float64."
        )
    if receipt.selects:
        before, after = (sum(getattr(one, name) for one in receipt.selects) for name in ("before", "after"))
        said.append(f"{after:,} of {before:,} units stay in {len(receipt.selects)} blocks.")
    if receipt.learnt:
        said.append(f"{len(receipt.learnt)} blocks had their rounding learnt.")
    if receipt.recovered:
        before, after = (float(str(receipt.recovered[when])) for when in ("before", "after"))
        said.append(
            f"Its steps, gains and biases were then trained towards the original: KL on text held out fell from "
            f"{before:.4f} to {after:.4f} nats a token. The recipe alone makes it as it was before."
        )
    if receipt.drafts is not None:
        said.append(
            f"It is decoded with drafts where regauge loads it, which leave its text as it is: decode "
            f'{_plain(str(receipt.drafts))}. `generate(..., drafts="none")` is without them.'
        )
    whole = sum(site.choice is None for site in receipt.sites)
    return [*said, f"{whole} of {len(receipt.sites)} matrices stay in full precision."]


def _code(text: str) -> str:
    return f"`{_plain(text)}`"


def _plain(text: str) -> str:
    """Text of others in a cell: nothing in it ends a line, a cell or a span, or is markup."""
    kept = "".join(char if char.isprintable() else " " for char in text)
    return kept.replace("`", "'").replace("|", "/").replace("<", "‹").replace(">", "›").strip() or "?"
