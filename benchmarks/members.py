"""Members of a family: speed inside the family against their extract, and what a switch costs.

    python benchmarks/members.py                         # the 135M shape, 4-bit matrices
    python benchmarks/members.py --family OUT            # a family of yours
    python benchmarks/members.py --subnet depth=15 --subnet ffn=0.5

Both run the same products over the same bytes, so 1.00 is what to expect. The whole is compared with the same artifact
that offers no members, whose panels therefore lie in one run. Turns are interleaved, on one thread, and seconds are
those of the processor; another process on the machine takes caches and memory all the same.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common.shapes import SHAPES, checkpoint

import regauge as rg
from regauge.artifact.families import FILE
from regauge.engine import apply
from regauge.measure.cost import prompt_of
from regauge.plan import parse
from regauge.runtime.matrices.modules import PackedLinear, PackedMatrix

RECIPE = """
name: members
family: {order: none, depth: [0.5], ffn: [0.5], heads: [1], width: [0.5]}
weights:
  blocks.*: {grid: int4, grain: group:64 else channel, ranger: absmax, scale: f16, rounder: nearest}
"""
SUBNETS = ("depth=0.5", "ffn=0.5", "heads=1", "width=0.5", "depth=0.5,ffn=0.5")


def decode(model: Any, prompt_BT: torch.Tensor) -> Callable[[], float]:
    """Greedy tokens a second of the processor, after the prompt."""

    def run() -> float:
        with torch.inference_mode():
            out = model(input_ids=prompt_BT[:, :16], use_cache=True)
            began = time.process_time()
            for _ in range(16):
                out = model(
                    input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True
                )
            return 16 / (time.process_time() - began)

    return run


def prefill(model: Any, prompt_BT: torch.Tensor) -> Callable[[], float]:
    """Tokens of a prompt a second of the processor."""

    def run() -> float:
        with torch.inference_mode():
            began = time.process_time()
            model(input_ids=prompt_BT, use_cache=True, logits_to_keep=1)
            return prompt_BT.numel() / (time.process_time() - began)

    return run


def turns(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Tokens a second of each, in turn."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            rate = run()
            if turn:
                found[name].append(rate)
    return found


def weights(model: Any) -> int:
    """Bytes of weights that a token reads: codes and steps of packed matrices, and the head."""
    parts = [part for module in model.modules() if isinstance(module, PackedLinear) for part in module.parts]
    packed = sum(part.meta[0] * part.meta[1] * part.meta[2] // 8 + 2 * part.meta[0] * -(-part.meta[1] // part.meta[3])
                 for part in parts if isinstance(part, PackedMatrix) and part.meta is not None)  # fmt: skip
    head = model.get_output_embeddings().weight
    return packed + head.numel() * head.element_size()


def compare(model: Any, out: Path, subnet: str, where: Path, rounds: int) -> None:
    """Prints one member's rows."""
    done = rg.extract(out, subnet, where, force=True)
    alone = rg.load(where)
    began = time.perf_counter()
    member = model.regauge.member(subnet)
    print(
        f"{done.subnet}: built in {1e3 * (time.perf_counter() - began):.0f} ms, {weights(alone) / 1e6:.1f} MB a token"
    )
    rows(done.subnet, member, alone, rounds)


def whole(model: Any, out: Path, where: Path, rounds: int) -> None:
    """Prints the rows of the whole, beside the same tensors where nothing says that they are a family's."""
    shutil.copytree(out, where, ignore=shutil.ignore_patterns(Path(FILE).name))
    rows("the whole", model, rg.load(where), rounds)


def rows(name: str, inside: Any, alone: Any, rounds: int) -> None:
    prompt = prompt_of(inside.config.vocab_size, 256)
    for what, rate in (("decode", decode), ("prefill", prefill)):
        found = turns({"inside": rate(inside, prompt), "alone": rate(alone, prompt)}, rounds)
        middle = {name: statistics.median(rates) for name, rates in found.items()}
        best = {name: max(rates) for name, rates in found.items()}
        pairs = statistics.median(one / other for one, other in zip(found["inside"], found["alone"], strict=True))
        print(
            f"{name:24} {what:8} inside {middle['inside']:8.1f} alone {middle['alone']:8.1f} tokens/s   "
            f"ratio {middle['inside'] / middle['alone']:.3f}, of pairs {pairs:.3f}, "
            f"of the fastest {best['inside'] / best['alone']:.3f}",
            flush=True,
        )


def switching(model: Any, subnet: str) -> None:
    """Prints what a switch and the way back take."""
    ids = torch.ones(1, 1, dtype=torch.int64)

    def switch() -> None:
        with rg.use(model, subnet):
            pass

    with torch.inference_mode():
        for one in (subnet, "full"):
            with rg.use(model, one):
                model(ids)
    micro = min(timeit.repeat(switch, number=1000, repeat=7)) * 1e3
    print(f"a switch and back: {micro:.2f} µs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", type=Path, help="a family; else one of random weights is made")
    parser.add_argument("--shape", default="smollm-135m", choices=SHAPES)
    parser.add_argument("--subnet", action="append", help="which members")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with TemporaryDirectory() as folder:
        out = given.family
        if out is None:
            out = Path(folder) / "family"
            apply(parse(RECIPE), checkpoint(SHAPES[given.shape], Path(folder) / "model"), out)
        model = rg.load(out)
        for subnet in given.subnet or SUBNETS:
            compare(model, out, subnet, Path(folder) / "alone", given.rounds)
        whole(model, out, Path(folder) / "plain", given.rounds)
        switching(model, (given.subnet or SUBNETS)[0])


if __name__ == "__main__":
    main()
