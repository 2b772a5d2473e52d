"""Decoding with drafts against plain decoding, in turn: tokens a second, and whether the text is the same.

    python benchmarks/drafts.py                                   # the bundled model on held-out sources, at 4 bits
    python benchmarks/drafts.py --model DIR --texts NOVELS        # any model on any texts

Two tasks. `text`: each document is cut and the model goes on. `edit`: the prompt is a document, then the first part of
it once more, and the model goes on copying it. Greedy, through `generate`: `plain` is transformers' own loop on the
native step, `none` ours without guesses, `lookup` ours with prompt look-up. Times are the sums over prompts of the
least of `--rounds` interleaved runs; with `--cpu` CPU seconds, for a machine that others use too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import regauge as rg
from regauge.hosts.transformers.source import read_tokenizer

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("plain", "none", "lookup")


def prompts(given: argparse.Namespace, task: str) -> Iterator[torch.Tensor]:
    """(1, T) ids of so many documents."""
    tokenizer, found = read_tokenizer(given.model), 0
    files = sorted(path for end in ("*.py", "*.txt") for path in given.texts.rglob(end))
    for file in files:
        ids = tokenizer(file.read_text(encoding="utf-8")).input_ids
        half = given.prompt // 2
        if len(ids) < given.prompt + 2 * given.new or found == given.count:
            continue
        found += 1
        if task == "text":
            yield torch.tensor([ids[: given.prompt]])
        else:  # what is left to copy is as long as what is asked for
            document = ids[half : half + given.new + half]
            yield torch.tensor([document + tokenizer("\n").input_ids[-1:] + document[:half]])


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    words.add_argument("--model", type=Path, default=ROOT / "bundled" / "code-llama-5m")
    words.add_argument("--texts", type=Path, default=ROOT / "tests")
    words.add_argument("--preset", default="rtn-w4")
    words.add_argument("--count", type=int, default=10, help="prompts")
    words.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    words.add_argument("--new", type=int, default=128, help="tokens to make")
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--cpu", action="store_true", help="CPU seconds of this process, where others are busy")
    given = words.parse_args()
    clock = time.process_time if given.cpu else time.perf_counter
    with tempfile.TemporaryDirectory() as scratch:
        rg.apply(given.preset, given.model, Path(scratch) / "out")
        model = rg.load(Path(scratch) / "out")
        for task in ("text", "edit"):
            spent, same, made = dict.fromkeys(WAYS, 0.0), True, 0
            before = (model.regauge_drafts.drafted, model.regauge_drafts.accepted)
            for ids in prompts(given, task):
                took, texts = {way: [] for way in WAYS}, {}
                for _ in range(given.rounds):
                    for way in WAYS:
                        began = clock()
                        texts[way] = model.generate(
                            ids,
                            attention_mask=torch.ones_like(ids),
                            max_new_tokens=given.new,
                            do_sample=False,
                            drafts=None if way == "plain" else way,
                        )
                        took[way].append(clock() - began)
                made += texts["plain"].shape[1] - ids.shape[1]
                same = same and all(text.equal(texts["plain"]) for text in texts.values())
                for way in WAYS:
                    spent[way] += min(took[way])
            drafted, accepted = (
                now - then
                for now, then in zip((model.regauge_drafts.drafted, model.regauge_drafts.accepted), before, strict=True)
            )
            rates = ", ".join(f"{way} {made / spent[way]:.0f}" for way in WAYS)
            print(
                f"{task}: tokens/s {rates}; lookup is {spent['plain'] / spent['lookup']:.2f} of plain, "
                f"{spent['none'] / spent['lookup']:.2f} of none; {accepted} of {drafted} guesses right; "
                f"text {'the same' if same else 'DIFFERS'}",
                flush=True,
            )
        seconds = model.regauge_drafts.seconds
        print("steps of 1 to 8 tokens, ms:", " ".join(f"{1e3 * one:.2f}" for one in seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
