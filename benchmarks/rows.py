"""What each preset gains over rounding to nearest at the same bits, on the bundled model and text that it never saw.

    python benchmarks/rows.py                 # print the table: every preset, about half an hour on one core
    python benchmarks/rows.py --write         # and keep it where `regauge methods` reads it

Text is the standard library of the Python that runs this (`scripts/stdlib_text.py`): the part that the model was
trained on calibrates, the part that it never saw is scored. For every preset: KL of its artifact to the original, in
nats a token, with a 95 % interval over documents. Beside it stands its null: the same bits, the same grain and the same
inputs, integers rounded to nearest, nothing rewritten and nothing added back; of a preset that prunes, as many units
drawn by lot and nothing repaired; of a latent in place of keys and values, the cheapest key heads dropped, until the
cache of a token is as small. Presets that are their own null have none. Of caches see `cache_rows.py`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import cache_rows
import torch
from latent import cheapest, dropped

from regauge import apply
from regauge.hosts import host_of
from regauge.hosts.transformers.load import load as load_model
from regauge.hosts.transformers.source import read_tokenizer
from regauge.measure.machine import machine
from regauge.measure.quality import Scores, compare, paired, summarise
from regauge.measure.subject import logits
from regauge.parts import CACHE, SHAPE, WEIGHTS
from regauge.plan import Plan, digest, load, presets
from regauge.plan.caches import of_caches
from regauge.ranking.null import null
from regauge.text.corpora import corpus
from regauge.text.split import pieces
from regauge.text.tokens import frame
from regauge.text.windows import Windows, cut

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "bundled" / "code-llama-5m"
KEPT = ROOT / "src" / "regauge" / "presets" / "measured.json"
TEXT = "text"
LATENT = "transmla-r"
"""Of presets whose caches hold a latent; then the hundredths of the cache that stay."""
BEHIND = "of each window the second half, behind its cache"
CALIBRATED, SCORED, LENGTH, BATCH = 8192, 8192, 256, 2048


def scores(plan: Plan, windows: Windows, original: list[torch.Tensor], folder: Path) -> tuple[Scores, float]:
    """Scores of a plan's artifact, and its bits a weight: of quantised sites, or of the source's where none is. One
    that rounds its cache is scored on the second half of each window, which it reads behind the cache."""
    out = folder / plan.name
    receipt = apply(plan, MODEL, out, calibration=folder / TEXT / "train", tokens=CALIBRATED, length=LENGTH)
    behind = bool(plan.of(CACHE))
    texts, most = replace(windows, halved=behind), 1 if behind else BATCH
    batches = [batch.ids_BT for batch in texts.batches(most)]
    with torch.inference_mode():
        before = logits(load_model(MODEL, dtype=torch.float32), batches) if behind else iter(original)
        made = host_of(MODEL).outputs(out, [{"input_ids": ids_BT} for ids_BT in batches])()
        found = compare(texts, before, made, most)
    shutil.rmtree(out)
    sites = [site for site in receipt.sites if site.choice is not None]
    if not sites:
        return found, 16 * receipt.ratio
    weights = [site.shape[0] * site.shape[1] for site in sites]
    bits = sum(site.bits * count for site, count in zip(sites, weights, strict=True)) / sum(weights)
    return found, bits


@cache
def ranked(folder: Path) -> list[tuple[int, int]]:
    """The key heads, the cheapest first, by the text that calibrates."""
    read, tokenizer = corpus(folder / TEXT / "train"), read_tokenizer(MODEL)
    text = cut(pieces(read), tokenizer, LENGTH, description=read.description, before=frame(tokenizer)[0])
    whole = [batch.ids_BT for batch in text.take(CALIBRATED, 0).batches(LENGTH) if batch.ids_BT.shape[1] == LENGTH]
    return cheapest(load_model(MODEL, dtype=torch.float32), whole)


def fewer_heads(share: float, windows: Windows, original: list[torch.Tensor], folder: Path) -> tuple[Scores, float]:
    """Scores of the model without its cheapest key heads, of which such a share stay, and bits a weight."""
    heads, model = ranked(folder), load_model(MODEL, dtype=torch.float32)
    dropped(model, heads[: round(len(heads) * (1 - share))])
    made = logits(model, [batch.ids_BT for batch in windows.batches(BATCH)])
    return compare(windows, iter(original), made, BATCH), 16.0


Kept = dict[str, Any]


def measure(chosen: list[str], keep: Callable[[Kept], None]) -> None:
    """Prints and hands over what is kept, after every preset."""
    tokenizer = read_tokenizer(MODEL)
    rows: dict[str, Any] = {}
    known: dict[str, tuple[Scores, float]] = {}
    with tempfile.TemporaryDirectory() as where:
        text = Path(where) / TEXT
        subprocess.run(
            [sys.executable, ROOT / "scripts" / "stdlib_text.py", text], check=True, stdout=subprocess.DEVNULL
        )
        read = corpus(text / "heldout")
        documents, before = pieces(read), frame(tokenizer)[0]
        windows = cut(documents, tokenizer, LENGTH, description=read.description, before=before).take(SCORED, 0)
        head = _head(windows.predicted)

        def kept(row: dict[str, Any]) -> None:
            rows.update(row)
            for name, one in row.items():
                print(f"{name:<26}{told(one)}", flush=True)
            keep(head | {"rows": rows})

        caches = [name for name in chosen if name in of_caches()]
        if caches:
            size = cache_rows.LENGTH
            long = cut(documents, tokenizer, size, size, read.description, before)
            cache_rows.measure(caches, MODEL, long.take(cache_rows.COUNT * (size - 1), 0), kept)
        chosen = [name for name in chosen if name not in caches]
        if not chosen:
            return
        with torch.inference_mode():
            batches = [batch.ids_BT for batch in windows.batches(BATCH)]
            original = list(logits(load_model(MODEL, dtype=torch.float32), batches))

        def found(plan: Plan) -> tuple[Scores, float]:
            key = digest(replace(plan, calibration={}))
            if key not in known:
                known[key] = scores(plan, windows, original, Path(where))
            return known[key]

        def null_of(name: str, plan: Plan) -> tuple[dict[str, str], tuple[Scores, float]] | None:
            if name.startswith(LATENT):
                share = int(name.removeprefix(LATENT)) / 100
                with torch.no_grad():
                    return {"null": "heads dropped"}, fewer_heads(share, windows, original, Path(where))
            other = null(plan)
            return other and ({"null": "by lot"} if other.of(SHAPE) else {}, found(other))

        for name in chosen:
            plan = load(name)
            ours, bits = found(plan)
            row: dict[str, Any] = {"bits": round(bits, 3), "kl": _three(summarise(ours).kl)}
            if plan.of(CACHE):
                row["as"] = BEHIND
            against = null_of(name, plan)
            if against is not None:
                row |= against[0]
                base, row["null_bits"] = against[1][0], round(against[1][1], 3)
                row["null_kl"] = _three(summarise(base).kl)
                row["verdict"] = {"first": "better", "second": "worse", "neither": "no different"}[
                    paired(ours, base).verdict
                ]
            kept({name: row})


def _head(tokens: int) -> Kept:
    """How it is measured."""
    return {
        "command": "python benchmarks/rows.py",
        "unit": "KL to the original, nats a token; 95 % interval over documents",
        "model": MODEL.name,
        "text": (
            f"{tokens} tokens of the standard library of Python {sys.version.split()[0]} that it never saw; "
            f"{CALIBRATED} tokens of the rest calibrate"
        ),
        "null": "nearest rounding at the same bits and grain",
        "caches": cache_rows.READ,
        "machine": machine().cpu,
    }


def _three(figure: Any) -> list[float]:
    return [float(f"{value:.4g}") for value in (figure.value, figure.low, figure.high)]


def _write(found: Kept) -> None:
    """JSON with a line a preset. Rows of others that were measured in the same way stay."""
    was = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    rows = found["rows"]
    if all(was.get(key) == found[key] for key in ("model", "text", "null")):
        rows = was["rows"] | rows
    KEPT.write_text(_spelt(found, rows), encoding="utf-8")


def _spelt(found: Kept, rows: dict[str, Any]) -> str:
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(rows[name])}" for name in presets() if name in rows)
    head = json.dumps({key: found[key] for key in found if key != "rows"}, indent=1, ensure_ascii=False)
    head = head.removesuffix("\n}")
    return f'{head},\n "rows": {{\n{lines}\n }}\n}}\n'


def told(row: dict[str, Any]) -> str:
    text = f"{row['bits']:6.2f} bits  KL {row['kl'][0]:.2g} [{row['kl'][1]:.2g}, {row['kl'][2]:.2g}]"
    if "null_kl" in row:
        text += f"  {row.get('null', 'nearest')} {row['null_bits']:5.2f} bits {row['null_kl'][0]:.2g}: {row['verdict']}"
    return text


def measurable(plan: Plan) -> bool:
    """Whether it does something that is measured here."""
    return any(plan.of(place) for place in (WEIGHTS, SHAPE, CACHE))


def main() -> int:
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("--write", action="store_true", help=f"keep it in {KEPT.name}")
    words.add_argument("--only", nargs="*", default=[], help="presets of these names, in this order")
    given = words.parse_args()
    chosen = given.only or [name for name in presets() if name.startswith(LATENT) or measurable(load(name))]
    measure(chosen, _write if given.write else lambda _: None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
