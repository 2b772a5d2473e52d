"""Decoding, batch 1: tokens a second of whole models of random weights, ours and others', interleaved in one run.

    python benchmarks/decode.py                              # the quick profile, both shapes, under eight minutes each
    python benchmarks/decode.py --profile full --models tinyllama-1.1b
    python benchmarks/decode.py --list                       # the rows, without running them

The first run writes checkpoints, artifacts and GGUF files under out/bench/models (some 12 GB); peers are installed by
`benchmarks/peers/setup.py`, and one that is missing is a row that says so. Greedy, after a short prompt; the first
token pays for the prompt and does not count. Results: out/bench/decode.json, read by scripts/write_speed.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from common import models, run
from common.rounds import Entry
from common.shapes import SHAPES, Shape, prompt

PROMPT = 16
QUICK = {
    "regauge": ("int8 channel", "int4 g32", "int4-asym g128", "int3-asym g64", "int2-asym g64"),
    "llama": ("Q8_0", "Q4_0", "Q3_K_M", "Q2_K"),
    "torch": ("bf16", "torch int4"),
}
FULL = {
    "regauge": ("int8 channel", "int6 g32", "int4 g32", "int4-asym g128", "int3-asym g64", "int2-asym g64"),
    "llama": ("BF16", "Q8_0", "Q6_K", "Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K"),
    "torch": ("bf16", "torch int8", "torch int4", "torchao int8", "torchao int4"),
}
PROFILES = {"quick": (QUICK, 5), "full": (FULL, 9)}
TOKENS = {"smollm-135m": 128, "tinyllama-1.1b": 64, "pico": 16}


def entries(shape: Shape, variants: dict[str, tuple[str, ...]], tokens: int) -> list[Entry]:
    """A row each; ours twice, once a route."""
    options: dict[str, Any] = {"prompt": prompt(shape, PROMPT), "tokens": tokens or TOKENS[shape.name]}
    found = []
    for variant in variants["torch"]:
        found.append(models.transformers(shape, variant, {**options, "route": "generate"}))
    for variant in variants["regauge"]:
        found += [models.regauge(shape, variant, {**options, "route": route}) for route in ("generate", "stream")]
    found += [models.llama(shape, variant, {**options, "route": "decode"}) for variant in variants["llama"]]
    for entry in found:
        entry.row.operations = shape.operations()
    return found


def main() -> int:
    words = run.words(__doc__)
    words.add_argument("--models", nargs="+", choices=SHAPES, default=["smollm-135m", "tinyllama-1.1b"])
    words.add_argument("--only", nargs="+", default=[], help="rows whose name contains one of these")
    words.add_argument(
        "--tokens", type=int, default=0, help="new tokens a sample; 0: 128 of the small, 64 of the large"
    )
    given = words.parse_args()
    variants, rounds = PROFILES[given.profile]
    groups = [entries(SHAPES[name], variants, given.tokens) for name in given.models]
    return run.run("decode", given, groups, given.rounds or rounds, Path(__file__))


if __name__ == "__main__":
    sys.exit(main())
