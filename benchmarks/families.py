"""What sorting, ranking of blocks and gains do to the members of a family: KL to the whole on held-out text.

python benchmarks/families.py MODEL --calibration TEXT --eval TEXT [--members ffn=0.5 depth=6 ...]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import regauge as rg
from regauge.hosts import host_of
from regauge.plan import parse
from regauge.search.members.trials import Trials, member
from regauge.search.subject import reader
from regauge.text.split import Sizes, prepare

OFFERS = "depth: [0.875, 0.75, 0.625], ffn: [0.75, 0.5], heads: [0.75, 0.5], width: [0.75]"
WAYS = {
    "as it lies": "order: none",
    "sorted": "order: activation",
    "ranked": "order: activation, layers: ranked",
}
MEMBERS = ("ffn=0.75", "ffn=0.5", "heads=0.5", "depth=0.875", "depth=0.75", "depth=0.75,ffn=0.5")


def main() -> None:
    """Prints a row for each member and way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--members", nargs="*", default=MEMBERS)
    parser.add_argument("--tokens", type=int, default=4096)
    given = parser.parse_args()
    source = host_of(given.model).open(given.model)
    texts = prepare(reader(source, 0), given.calibration, given.eval, Sizes(given.tokens, 512, given.tokens), 0)
    print(f"{'member':<24}{'way':<12}{'KL':>8}{'with gains':>12}")
    for name, how in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            plan = parse(f"name: benchmark\nfamily: {{{OFFERS}, {how}}}\n")
            text = {"calibration": list(texts.calibration), "tokens": texts.tokens, "length": texts.length}
            rg.apply(plan, given.model, out, quiet=True, **({} if name == "as it lies" else text))
            model = rg.load(out, dtype="float32")
            windows, vocabulary = texts.evaluation, source.anatomy.site("embed").shape[0]
            ids = [batch.ids_BT for batch in windows.batches(Trials.batch(vocabulary))]
            trials = Trials(
                windows, lambda ids=ids, model=model: (model(input_ids=one).logits for one in ids), vocabulary
            )
            for asked in given.members:
                subnet = model.regauge.settled(asked)
                with torch.no_grad():
                    before = trials.kl(member(model, subnet))
                    model.regauge.fit(subnet, model, texts.windows_NT)
                    after = trials.kl(member(model, subnet))
                print(f"{asked:<24}{name:<12}{before:>8.4f}{after:>12.4f}", flush=True)


if __name__ == "__main__":
    main()
