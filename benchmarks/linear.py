"""Linear layers alone: how much of the memory's bandwidth each format gets here, ours and others', interleaved.

    python benchmarks/linear.py                              # the quick profile: under eight minutes
    python benchmarks/linear.py --profile full --shapes 2048x5632 1536x576
    python benchmarks/linear.py --only int4 --batches 1 4 16

A row goes through as many unique matrices of one shape as hold 256 MiB, so that every pass reads memory. Figures: bytes
stored (codes, steps, zero points) over the time, and over the bandwidth of the same moment. llama.cpp is measured as a
whole model only (decode.py). Results: out/bench/linear.json, read by scripts/write_speed.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from common import run
from common.records import Row
from common.rounds import Entry

LEAST = 256 << 20  # bytes of matrices in turn
SHAPES = ("5632x2048", "2048x5632", "2048x2048", "1536x576", "576x1536")
QUICK_SHAPES = ("5632x2048", "1536x576")
FLOATS = {
    "nf4 g32": ("nf4", 32, "bf16"),
    "mxfp4": ("fp4", 32, "e8m0"),
    "nvfp4": ("fp4", 16, "nv"),
    "fp8 channel": ("fp8", 0, "f32"),
    "ternary g128": ("ternary", 128, "f16"),
}
SPREAD = ("int8 channel", "int4 g32", "int2-asym g128")
"""Formats of ours that the quick profile runs at batches above 1."""


def quick() -> dict[str, dict[str, Any]]:
    """Ours: every width once, the widths that peers have, floats and code books, int8 activations."""
    found = {f"int{bits}-asym g128": (f"int{bits}-asym", 128, "f16") for bits in range(1, 9)}
    found |= {"int8 channel": ("int8", 0, "bf16"), "int4 g32": ("int4", 32, "f16"), **FLOATS}
    made: dict[str, dict[str, Any]] = {name: _ours(*how) for name, how in found.items()}
    made["int8 x int8"] = _ours("int8", 0, "f32") | {"inputs": "int8"}
    return made


def full(group: int) -> dict[str, dict[str, Any]]:
    """Ours: every width, symmetric and not, at one group (0: a row)."""
    grain = f"g{group}" if group else "channel"
    grids = [f"int{bits}{kind}" for bits in range(1, 9) for kind in ("", "-asym")]
    found: dict[str, dict[str, Any]] = {f"{grid} {grain}": _ours(grid, group, "f16") for grid in grids}
    return found


def _ours(grid: str, group: int, scale: str) -> dict[str, Any]:
    return {"grid": grid, "group": group, "scale": scale}


PEERS: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("torch", "bf16"): ("linear_torch", {"variant": "bf16", "about": 16.0}),
    ("torch", "int8 channel"): ("linear_torch", {"variant": "torch int8", "about": 8.0}),
    ("torch", "int4 g32"): ("linear_torch", {"variant": "torch int4", "about": 5.0, "group": 32}),
    ("torchao", "int8 channel"): ("linear_torchao", {"variant": "torchao int8", "about": 8.0}),
    ("torchao", "int4 g32"): ("linear_torchao", {"variant": "torchao int4", "about": 5.0, "group": 32}),
    ("onnxruntime", "int4 g32"): ("linear_onnx", {"nbits": 4, "group": 32, "accuracy": 4}),
    ("onnxruntime", "int8 g32"): ("linear_onnx", {"nbits": 8, "group": 32, "accuracy": 4}),
    ("openvino", "int4 g32"): ("linear_openvino", {"nbits": 4, "group": 32}),
}


def entries(
    shape: str, batch: int, ours: dict[str, dict[str, Any]], peers: dict[tuple[str, str], Any], least: int
) -> list[Entry]:
    """A row each."""
    rows, columns = (int(part) for part in shape.split("x"))
    base: dict[str, Any] = {"rows": rows, "columns": columns, "batch": batch, "least": least}
    found = []
    for variant, how in ours.items():
        row = Row(model=shape, runner="regauge", variant=variant, batch=batch)
        found.append(Entry(row, "linear_regauge", lambda told={**base, **how}: told, memory=2 * least))
    for (runner, variant), (peer, how) in peers.items():
        row = Row(model=shape, runner=runner, variant=variant, batch=batch)
        found.append(Entry(row, peer, lambda told={**base, **how}: told, memory=3 * least))
    return found


def groups(profile: str, shapes: list[str], batches: list[int], least: int) -> list[list[Entry]]:
    """Rows that are interleaved with one another."""
    found = []
    for shape in shapes:
        for batch in batches:
            if profile == "quick":
                ours = quick() if batch == 1 else {name: quick()[name] for name in SPREAD}
                found.append(entries(shape, batch, ours, PEERS, least))
            else:
                found.append(entries(shape, batch, quick(), PEERS, least))
                found += [entries(shape, batch, full(group), {}, least) for group in (32, 128, 0)]
    return found


def main() -> int:
    words = run.words(__doc__)
    words.add_argument("--shapes", nargs="+", default=None, help=f"OxI; of {', '.join(SHAPES)} by default")
    words.add_argument("--batches", nargs="+", type=int, default=None)
    words.add_argument("--only", nargs="+", default=[], help="rows whose name contains one of these")
    words.add_argument("--least", type=int, default=LEAST, help="bytes of matrices in turn")
    given = words.parse_args()
    is_quick = given.profile == "quick"
    shapes = given.shapes or list(QUICK_SHAPES if is_quick else SHAPES)
    made = groups(given.profile, shapes, given.batches or [1, 4, 16], given.least)
    return run.run("linear", given, made, given.rounds or (5 if is_quick else 9), Path(__file__))


if __name__ == "__main__":
    sys.exit(main())
