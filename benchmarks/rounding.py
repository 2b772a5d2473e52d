"""How fast rounding is: nearest and GPTQ, packing included, on one core and a 2048 × 5632 matrix (11.5M weights).

    python benchmarks/rounding.py

Seconds are CPU time, medians of the repeats with their least and greatest, per 100M weights; rows are interleaved.
Beside each stands the floor: for nearest, the bytes that must move (bf16 weights read once, packed codes and steps
written once) at the bandwidth just measured; for GPTQ, the multiply-adds of one factor (I³/3) and of the feedback
(O·I²/2) at the speed of a float32 matrix product just measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.formats.base import Codes, Format
from regauge.formats.grains import Channel, Group
from regauge.formats.grids import E2M1, E4M3, NF4, Int
from regauge.formats.rangers import AbsMax, MinMax, Search
from regauge.formats.scales import BFloat16, Float32, PowerOfTwo, TwoLevel
from regauge.kernels.reference import pack
from regauge.measure.machine import bandwidth, machine
from regauge.rounding.base import Rounder
from regauge.rounding.rounders import GPTQ, Nearest

O, I = 2048, 5632
INT4 = Format(Int(4), Group(128), AbsMax(), BFloat16())


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    rounder: Rounder
    fmt: Format

    def run(self, w_OI: Tensor, stats: dict[str, Tensor]) -> Codes:
        codes = self.rounder(w_OI, self.fmt, stats)
        pack(codes.codes_OI, self.fmt.grid.bits)
        return codes


ROWS = [
    Row("nearest int4 g128", Nearest(), INT4),
    Row("nearest int4-asym g128", Nearest(), Format(Int(4, False), Group(128), MinMax(), BFloat16())),
    Row("nearest int3 channel", Nearest(), Format(Int(3), Channel(), AbsMax(), BFloat16())),
    Row("nearest int8 channel", Nearest(), Format(Int(8), Channel(), AbsMax(), BFloat16())),
    Row("nearest fp8 channel", Nearest(), Format(E4M3(), Channel(), AbsMax(), Float32())),
    Row("nearest nvfp4", Nearest(), Format(E2M1(), Group(16), AbsMax(), TwoLevel())),
    Row("nearest mxfp4", Nearest(), Format(E2M1(), Group(32), AbsMax(), PowerOfTwo())),
    Row("nearest nf4 g64", Nearest(), Format(NF4(), Group(64), AbsMax(), BFloat16())),
    Row("nearest int4 g128, step searched", Nearest(), Format(Int(4), Group(128), Search(), BFloat16())),
    Row("gptq int4 g128", GPTQ(), INT4),
    Row("gptq int4 g128 static, activation order", GPTQ(order="activation", static_groups=True), INT4),
    Row("gptq nvfp4", GPTQ(), Format(E2M1(), Group(16), AbsMax(), TwoLevel())),
    Row("gptq int4 g128, float64 factor", GPTQ(precision="float64"), INT4),
]


def cpu(work: Callable[[], object]) -> float:
    """Seconds of CPU time."""
    start = time.process_time()
    work()
    return time.process_time() - start


def product_speed(size: int = 2048) -> float:
    """Multiply-adds a second of a float32 matrix product, the best of three."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return size**3 / min(cpu(lambda: a @ b) for _ in range(3))


def floor(row: Row, w_OI: Tensor, speed: float, rate: float) -> float:
    """Seconds below which this row cannot go here."""
    moved = w_OI.numel() * w_OI.element_size() + row.fmt.bytes((O, I))
    flops = I**3 / 3 + O * I**2 / 2 if row.rounder.needs else 0
    return moved / rate + flops / speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x_TI = torch.randn(4096, I) @ (torch.randn(I, I) / I**0.5) + 0.1 * torch.randn(4096, I)
    stats = {"hessian": x_TI.T @ x_TI / len(x_TI)}
    w_OI = (torch.randn(O, I) * 0.02).bfloat16()
    speed, rate = product_speed(), bandwidth()
    print(f"{machine().cpu}, one thread: {rate / 1e9:.0f} GB/s, {2 * speed / 1e9:.0f} GFLOP/s in float32 products")
    times: dict[str, list[float]] = {row.name: [] for row in ROWS}
    for _ in range(repeats):
        for row in ROWS:
            times[row.name].append(cpu(lambda row=row: row.run(w_OI, stats)))  # type: ignore[misc]  # bound by default
    scale = 1e8 / (O * I)
    print(f"{'CPU seconds per 100M weights':42}{'median':>8}{'least':>8}{'most':>8}{'floor':>8}")
    for row in ROWS:
        took = [second * scale for second in times[row.name]]
        least = floor(row, w_OI, speed, rate) * scale
        print(f"{row.name:42}{statistics.median(took):8.2f}{min(took):8.2f}{max(took):8.2f}{least:8.2f}")


if __name__ == "__main__":
    main()
