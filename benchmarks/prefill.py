"""Prefill: prompt tokens a second through one forward pass of 512 tokens that fills a cache.

    python benchmarks/prefill.py                             # the quick profile, both shapes
    python benchmarks/prefill.py --profile full --tokens 512

Checkpoints, artifacts and peers as in decode.py. Only the last token's logits are computed, by every runner. Results:
out/bench/prefill.json, read by scripts/write_speed.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from common import artifacts, models, run
from common.rounds import Entry
from common.shapes import SHAPES, Shape, prompt

QUICK = {
    "regauge": ("int8 x int8", "int4 g32", "int4-asym g128", "int2-asym g64"),
    "llama": ("Q8_0", "Q4_0", "Q2_K"),
    "torch": ("bf16", "torch int4"),
}
FULL = {
    "regauge": tuple(artifacts.BODY),
    "llama": ("BF16", "Q8_0", "Q6_K", "Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K"),
    "torch": ("bf16", "torch int8", "torch int4", "torchao int8", "torchao int4"),
}
PROFILES = {"quick": (QUICK, 3), "full": (FULL, 7)}


def entries(shape: Shape, variants: dict[str, tuple[str, ...]], tokens: int) -> list[Entry]:
    """A row each."""
    options: dict[str, Any] = {"prompt": prompt(shape, tokens), "route": "prefill"}
    found = [models.transformers(shape, variant, dict(options)) for variant in variants["torch"]]
    found += [models.regauge(shape, variant, dict(options)) for variant in variants["regauge"]]
    found += [models.llama(shape, variant, dict(options)) for variant in variants["llama"]]
    for entry in found:
        row = entry.row
        row.route, row.batch, row.items, row.operations = "", tokens, tokens, shape.operations(tokens, 1)
    return found


def main() -> int:
    words = run.words(__doc__)
    words.add_argument("--models", nargs="+", choices=SHAPES, default=["smollm-135m", "tinyllama-1.1b"])
    words.add_argument("--tokens", type=int, default=512)
    words.add_argument("--only", nargs="+", default=[], help="rows whose name contains one of these")
    given = words.parse_args()
    variants, rounds = PROFILES[given.profile]
    groups = [entries(SHAPES[name], variants, given.tokens) for name in given.models]
    return run.run("prefill", given, groups, given.rounds or rounds, Path(__file__))


if __name__ == "__main__":
    sys.exit(main())
