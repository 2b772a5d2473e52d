"""Measure the bundled model on the held-out modules, against what it has to beat.

    python scripts/evaluate_bundled.py [--model DIR]

Every row codes the same held-out files, in bits per UTF-8 byte of their text,
lower is better; model and n-gram code each file's tokens and its end:

* the model, windows of 512 and of 1,024 tokens that move by half a window, so
  every token but a file's first ones has at least half a window before it;
  weights as stored (bfloat16), computed in float32;
* ``xz -9e`` of the held-out files one after another (``lzma`` with
  ``9 | PRESET_EXTREME`` writes what ``xz -9e`` writes);
* the same with the training text for context:
  ``xz(train + heldout) - xz(train)``, which sees all that the model has seen;
* a modified Kneser-Ney 5-gram over the same tokens (``ngram.py``).

And the share of the fixed completions that parse (``completions.py``). The
table is printed and goes into the model's ``training.json``.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import platform
from pathlib import Path

import completions
import ngram
import numpy as np
import torch
from stdlib_text import StdlibFile, of_split, stdlib_files
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = Path(__file__).resolve().parent.parent / "bundled" / "code-llama-5m"
BATCH_TOKENS = 4096


def file_ids(tokenizer, text: str) -> np.ndarray:
    """END, the file, END."""
    end = tokenizer.eos_token_id
    return np.array([end, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], end])


@torch.no_grad()
def model_bits(model, ids: np.ndarray, context: int) -> float:
    """Bits to code ``ids[1:]``: windows of ``context`` that move by half; each token is scored once."""
    stride = context // 2
    spans = []  # (first input, last input + 1, first scored target)
    scored = 1
    while scored < len(ids):
        stop = min(len(ids), max(scored + stride, context + 1))
        spans.append((max(0, stop - 1 - context), stop - 1, scored))
        scored = stop
    total = 0.0
    rows = max(1, BATCH_TOKENS // context)
    for at in range(0, len(spans), rows):
        group = spans[at : at + rows]
        length = max(stop - start for start, stop, _ in group)
        fed = np.zeros((len(group), length), dtype=np.int64)
        for row, (start, stop, _) in enumerate(group):
            fed[row, : stop - start] = ids[start:stop]
        logits = model(input_ids=torch.from_numpy(fed), use_cache=False).logits
        for row, (start, stop, first) in enumerate(group):
            targets = torch.from_numpy(ids[first : stop + 1].astype(np.int64))
            scores = logits[row, first - 1 - start : stop - start].float()
            nats = torch.nn.functional.cross_entropy(scores, targets, reduction="none")
            total += float(nats.double().sum()) / math.log(2)
    return total


def xz_bytes(data: bytes) -> int:
    """Size of ``xz -9e``."""
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def joined(files: list[StdlibFile]) -> bytes:
    """The files' bytes, one after another."""
    return b"".join(file.text.encode("utf-8") for file in files)


def load(folder: Path):
    """Model in float32 and tokenizer, without the network."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def complete(model, tokenizer, train_text: str, sample: bool) -> dict:
    """The completions' part: how many parse, how many were in the training text, and all of them."""
    greedy = completions.run(model, tokenizer)
    sampled = completions.run(model, tokenizer, temperature=0.8) if sample else None
    return {
        "prompts": len(greedy),
        "parse, greedy": sum(row["parses"] for row in greedy),
        "parse, temperature 0.8": sampled and sum(row["parses"] for row in sampled),
        "greedy, kept text is in train word for word": sum(
            len(row["kept"]) > 40 and row["kept"] in train_text for row in greedy
        ),
        "rows": greedy,
    }


def evaluate(folder: Path, sample: bool = False) -> dict:
    """All measurements, as they go into ``training.json``."""
    files = stdlib_files()
    train, heldout = of_split(files, "train"), of_split(files, "heldout")
    model, tokenizer = load(folder)
    n_bytes = sum(file.n_bytes for file in heldout)
    held_ids = {file.module: file_ids(tokenizer, file.text) for file in heldout}
    bits = {c: {name: model_bits(model, ids, c) for name, ids in held_ids.items()} for c in (512, 1024)}
    stream = np.concatenate([file_ids(tokenizer, file.text)[:-1] for file in train] + [[tokenizer.eos_token_id]])
    grams = ngram.fit(stream, len(tokenizer))
    gram_bits = sum(grams.bits_of(ids) for ids in held_ids.values())
    train_text, held_text = joined(train), joined(heldout)
    xz_alone = xz_bytes(held_text)
    xz_after = xz_bytes(train_text + held_text) - xz_bytes(train_text)
    return {
        "interpreter": f"{platform.python_implementation()} {platform.python_version()}",
        "heldout_files": len(heldout),
        "heldout_bytes": n_bytes,
        "heldout_tokens": sum(len(ids) - 1 for ids in held_ids.values()),
        "bits_per_byte": {
            "model, context 1024": round(sum(bits[1024].values()) / n_bytes, 4),
            "model, context 512": round(sum(bits[512].values()) / n_bytes, 4),
            "kneser-ney 5-gram": round(gram_bits / n_bytes, 4),
            "xz -9e": round(8 * xz_alone / n_bytes, 4),
            "xz -9e after train": round(8 * xz_after / n_bytes, 4),
        },
        "completions": complete(model, tokenizer, train_text.decode("utf-8"), sample),
        "bits_per_byte_by_file": {file.module: round(bits[512][file.module] / file.n_bytes, 4) for file in heldout},
    }


def main() -> None:
    """Command line; writes the key ``evaluation`` of ``training.json``."""
    parser = argparse.ArgumentParser(description="Held-out bits per byte and completions of the bundled model.")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--completions-only", action="store_true", help="keep the recorded bits per byte")
    parser.add_argument("--sample", action="store_true", help="complete once more at temperature 0.8")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = args.model / "training.json"
    facts = json.loads(path.read_text())
    if args.completions_only:
        train_text = joined(of_split(stdlib_files(), "train")).decode("utf-8")
        found = facts["evaluation"] | {"completions": complete(*load(args.model), train_text, args.sample)}
    else:
        found = evaluate(args.model, args.sample)
    facts["evaluation"] = found
    path.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"held-out: {found['heldout_files']} files, {found['heldout_bytes']:,} bytes")
    for name, value in sorted(found["bits_per_byte"].items(), key=lambda item: item[1]):
        print(f"  {name:24} {value:.4f} bits per byte")
    for name, value in found["completions"].items():
        if name != "rows":
            print(f"  {name:44} {value}")


if __name__ == "__main__":
    main()
