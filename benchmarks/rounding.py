"""How fast rounding is: nearest and GPTQ, packing included, on one core and a 2048 × 5632 matrix (11.5M weights).

    python benchmarks/rounding.py
    python benchmarks/rounding.py --feedback    # error feedback alone, in C++ and in torch

Seconds are CPU time, medians of the repeats with their least and greatest, per 100M weights; rows are interleaved.
Beside each stands the floor: for nearest, the bytes that must move (bf16 weights read once, packed codes and steps
written once) at the bandwidth just measured; for GPTQ, the multiply-adds of one factor (I³/3) and of the feedback
(O·I²/2) at the speed of a float32 matrix product just measured. With `--feedback`: shapes of small and of large models
without the factor; GFLOP/s count O·I² operations, half of them multiplications.
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
from regauge.kernels.cpu.machine import bandwidth
from regauge.kernels.reference import pack
from regauge.measure.machine import machine
from regauge.rounding.base import Rounder
from regauge.rounding.feedback import Factor, factor
from regauge.rounding.rounders import GPTQ, Nearest, _fixed, _refitted
from regauge.rounding.sweep import swept

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


SHAPES = ((256, 256), (768, 256), (256, 768), (2048, 2048), (2048, 5632))
SWEPT = (
    Format(Int(4), Group(128), AbsMax(), BFloat16()),
    Format(Int(4, False), Group(32), Search(), BFloat16()),
    Format(Int(8), Channel(), AbsMax(), BFloat16()),
)


def feedback(repeats: int) -> None:
    """Error feedback alone: milliseconds of the C++ kernels and of torch, the least of the repeats."""
    print(f"{product_speed() * 2e-9:.0f} GFLOP/s in float32 products of 2048")
    print(f"{'rows x columns':14}{'format':32}{'C++, ms':>10}{'GFLOP/s':>10}{'torch, ms':>12}")
    for rows, columns in SHAPES:
        x_TI = torch.randn(columns + 200, columns)
        made = factor(x_TI.T @ x_TI / len(x_TI), 0.01, None)
        for fmt in SWEPT:
            took, other = swept_in(torch.randn(rows, columns) * 0.05, fmt, made, repeats)
            name = f"{fmt.grid.name} {fmt.grain.name} {fmt.ranger.name}"
            rate = rows * columns**2 / took / 1e9
            print(f"{f'{rows} x {columns}':14}{name:32}{took * 1e3:10.2f}{rate:10.0f}{other * 1e3:12.1f}")


def swept_in(w_OI: Tensor, fmt: Format, made: Factor, repeats: int) -> tuple[float, float]:
    """CPU seconds of the kernels and of torch; steps of whole rows are known before."""
    step = fmt.fit(w_OI) if fmt.grain.span((w_OI.shape[0], w_OI.shape[1])) == w_OI.shape[1] else None

    def ours() -> None:
        assert swept(w_OI, fmt, step, made, None) is not None, "the kernels are here"

    def theirs() -> None:
        w = w_OI.clone()
        _ = _refitted(w, fmt, made, 128) if step is None else _fixed(w, fmt, step, made, None, 128)

    ours()
    return min(cpu(ours) for _ in range(repeats)), min(cpu(theirs) for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--feedback", action="store_true")
    asked = parser.parse_args()
    repeats = asked.repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if asked.feedback:
        feedback(repeats)
        return
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
