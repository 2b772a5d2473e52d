"""Pruning of neurons: what each part is worth, and what a smaller feed-forward layer gives in bytes and in speed.

    python benchmarks/pruning.py                       # novel-llama-8m, a quarter of the neurons
    python benchmarks/pruning.py --keep 0.5 --rows activation,random

Each row is one recipe through `apply`: by lot, by magnitude, by activation, each bare and with the weights that read
what stays solved anew; one threshold for all blocks; and int4 weights with and without the cut. Quality is the mean KL
to the original on held-out text in nats a token, with a 95% interval over documents, computed in float32; the gap to
the row above it of the same kind is paired on the same tokens. Speeds are tokens a second, all rows interleaved in each
round (medians and quartiles): full precision on transformers' own modules in bfloat16, int4 by the native step.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import regauge as rg
from regauge.engine import apply
from regauge.hosts.transformers.source import read_tokenizer
from regauge.measure.cost import Speed, prompt_of, speeds, verdict
from regauge.measure.machine import machine
from regauge.measure.quality import Scores, compare_many, paired, summarise
from regauge.measure.subject import logits
from regauge.plan import Plan, parse
from regauge.text.windows import Windows, cut

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
INT4 = "weights:\n  blocks.*: {grid: int4-asym, grain: group:32, ranger: search, scale: bf16, rounder: gptq}\n"
ROWS = {
    "random": ("random", "uniform", "none", ""),
    "random, repaired": ("random", "uniform", "least-squares", ""),
    "magnitude": ("magnitude", "uniform", "none", ""),
    "magnitude, repaired": ("magnitude", "uniform", "least-squares", ""),
    "activation": ("activation", "uniform", "none", ""),
    "activation, repaired": ("activation", "uniform", "least-squares", ""),
    "activation, global, repaired": ("activation", "global", "least-squares", ""),
    "activation, repaired, int4": ("activation", "uniform", "least-squares", INT4),
}
WHOLE = "int4"
"""The row that quantises and takes nothing out."""
PAIRS = (
    ("activation", "random"),
    ("activation", "magnitude"),
    ("random, repaired", "random"),
    ("magnitude, repaired", "magnitude"),
    ("activation, repaired", "activation"),
    ("activation, repaired", "random, repaired"),
    ("activation, global, repaired", "activation, repaired"),
    ("activation, repaired, int4", WHOLE),
)
"""(row, its null)."""


def recipe(name: str, keep: float) -> Plan:
    """The plan of a row."""
    if name == WHOLE:
        return parse(f"name: {WHOLE}\n{INT4}")
    score, allocation, repair, weights = ROWS[name]
    row = f"{{unit: neuron, score: {score}, allocation: {allocation}:{keep}, repair: {repair}}}"
    return parse(f"name: {name.replace(', ', '-')}\nshape:\n  blocks.*.ffn: {row}\n{weights}")


def held_out(folder: Path, model: Path, tokens: int, length: int) -> Windows:
    """Windows of the texts, evenly spread."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    return cut(texts, read_tokenizer(model), length, description=folder.name).take(tokens)


def quality(windows: Windows, source: Path, outs: dict[str, Path]) -> dict[str, Scores]:
    """Scores of every row against the source."""
    batches = [batch.ids_BT for batch in windows.batches(2048)]
    with torch.inference_mode():
        original = rg.load(source, dtype=torch.float32)
        models = [rg.load(out, dtype=torch.float32, **({"activations": "float32"} if WHOLE in name else {}))
                  for name, out in outs.items()]  # fmt: skip
        found = compare_many(windows, logits(original, batches), [logits(model, batches) for model in models], 2048)
    return dict(zip(outs, found, strict=True))


def told(speed: Speed) -> str:
    """`412 [401, 420]`."""
    return f"{speed.median:,.0f} [{speed.low:,.0f}, {speed.high:,.0f}]"


def print_speeds(source: Path, outs: dict[str, Path], rounds: int) -> None:
    """Speeds of the rows whose sizes differ, and what the cut gave."""
    models = {"bf16 source": source, "bf16 cut": outs.get("activation, repaired")}
    models |= {"int4 source": outs.get(WHOLE), "int4 cut": outs.get("activation, repaired, int4")}
    loaded = {name: rg.load(path, dtype=torch.bfloat16) for name, path in models.items() if path is not None}
    any_model = loaded["bf16 source"]
    prompt = prompt_of(any_model.config.vocab_size, any_model.config.max_position_embeddings)
    found = speeds(loaded, prompt, rounds)
    print("\n| tokens a second | decode | prefill |\n|---|---|---|")
    for name in loaded:
        print(f"| {name} | {told(found['decode'][name])} | {told(found['prefill'][name])} |")
    for kind in ("bf16", "int4"):
        if f"{kind} cut" in loaded and f"{kind} source" in loaded:
            verdicts = ", ".join(
                f"{what} {verdict(found[what][f'{kind} cut'], found[what][f'{kind} source'])}"
                for what in ("decode", "prefill")
            )
            print(f"{kind}, cut against whole: {verdicts}")
    steps = {name: model.regauge_step.steps for name, model in loaded.items() if hasattr(model, "regauge_step")}
    print(f"tokens that went through the native step: {steps}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "novel-llama-8m")
    parser.add_argument("--calibration", type=Path, default=SHARED / "data" / "novels")
    parser.add_argument("--eval", type=Path, default=SHARED / "data" / "novels-heldout")
    parser.add_argument("--keep", type=float, default=0.75)
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration")
    parser.add_argument("--length", type=int, default=256, help="of a window; the model was trained at 256")
    parser.add_argument("--scored", type=int, default=16384, help="tokens that quality is measured on")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=lambda text: text.split(";"), default=[*ROWS, WHOLE], help="separated by ;")
    args = parser.parse_args(arguments)
    print(f"{args.model.name}, {args.keep:.0%} of the neurons stay; {machine().cpu}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        outs, receipts = {}, {}
        for name in args.rows:
            outs[name] = Path(folder) / name.replace(", ", "-")
            receipts[name] = apply(recipe(name, args.keep), args.model, outs[name], calibration=args.calibration,
                                   tokens=args.tokens, length=args.length)  # fmt: skip
        windows = held_out(args.eval, args.model, args.scored, args.length)
        scores = quality(windows, args.model, outs)
        print(f"\n{windows.predicted:,} tokens of {windows.documents} held-out novels\n")
        print("| row | KL, nats a token | perplexity | bytes | of bf16 | widths | a block's output moves |")
        print("|---|---|---|---|---|---|---|")
        for name, receipt in receipts.items():
            figures, selects = summarise(scores[name]), receipt.selects
            kl = figures.kl
            widths = f"{min(s.after for s in selects)}-{max(s.after for s in selects)}" if selects else "as they were"
            moved = f"{sum(s.error for s in selects) / len(selects):.4f}" if selects else ""
            print(
                f"| {name} | {kl.value:.4f} [{kl.low:.4f}, {kl.high:.4f}] | {figures.perplexity.value:.2f} "
                f"| {receipt.bytes_after:,} | {receipt.ratio:.3f} | {widths} | {moved} |"
            )
        print()
        for name, null in PAIRS:
            if name in scores and null in scores:
                gap = paired(scores[name], scores[null])
                between = f"{gap.difference.value:+.4f} [{gap.difference.low:+.4f}, {gap.difference.high:+.4f}]"
                nearer = {"first": name, "second": null}.get(gap.verdict, "neither")
                print(f"{name} less {null}: {between}; nearer to the original: {nearer}")
        print_speeds(args.model, outs, args.rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
