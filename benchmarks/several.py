"""Several tokens for one reading of the weights: what a step of 1 to 8 tokens of one sequence costs.

    python benchmarks/several.py                        # the 1.1B shape at 4 bits, all numbers of tokens in turn
    python benchmarks/several.py --shape smollm-135m --rounds 31

The decode step of a shape of `common/shapes.py` on random weights of 4 bits (groups of 32, 8-bit activations) with a
cache of `--past` tokens in bf16. Beside each number of tokens: milliseconds, how many times a step of one token, and
how many times the floor, which is every byte of weights once at the bandwidth of the same round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from common.shapes import SHAPES
from decode_cached import program, window

from regauge.kernels.cpu.machine import bandwidth
from regauge.kernels.cpu.store import Store

TOKENS = (1, 2, 3, 4, 5, 6, 7, 8)


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    words.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    words.add_argument("--past", type=int, default=256)
    words.add_argument("--rounds", type=int, default=15)
    given = words.parse_args()
    shape = SHAPES[given.shape]
    torch.manual_seed(0)
    step = program(shape, "int8")
    held = [window(shape, given.past + max(TOKENS)) for _ in range(shape.layers)]
    step.keep([Store(keys, values) for keys, values in held])
    angles = torch.outer(torch.arange(given.past + 8.0), 1e4 ** -torch.linspace(0, 1, shape.head // 2))
    tables = [(angles.cos().contiguous(), angles.sin().contiguous())]
    size, spent, floors = shape.weights() * 4.5 / 8, {new: [] for new in TOKENS}, []
    inputs = {new: torch.randn(new, shape.hidden) for new in TOKENS}
    for _ in range(given.rounds):
        floors.append(size / bandwidth(torch.get_num_threads()))
        for new in TOKENS:
            positions, past = list(range(given.past, given.past + new)), [given.past] * shape.layers
            began = time.perf_counter()
            step(inputs[new], positions, [0], tables, past, False)
            spent[new].append(time.perf_counter() - began)
    one, floor = statistics.median(spent[1]), statistics.median(floors)
    print(f"{shape.name}, {torch.get_num_threads()} threads, medians (least) of {given.rounds} rounds")
    print("tokens        ms   (least)  of one token  (of the least)  of the floor")
    for new in TOKENS:
        took, least = statistics.median(spent[new]), min(spent[new])
        print(
            f"{new:6} {1e3 * took:9.2f} {1e3 * least:9.2f} {took / one:13.2f} {least / min(spent[1]):15.2f} "
            f"{took / floor:13.2f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
