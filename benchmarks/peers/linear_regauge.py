"""Our packed matrices: random codes and steps of a format, unique in every matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
from passes import facts, passing
from serve import Loaded, Options, serve

from regauge.formats.base import Codes, Format, Grain, Scale, Step
from regauge.formats.grains import Channel, Group, Token
from regauge.formats.grids import E2M1, E4M3, NF4, Int, Ternary
from regauge.formats.rangers import AbsMax, Dynamic, MinMax
from regauge.formats.readings import dynamic
from regauge.formats.scales import BFloat16, Float16, Float32, PowerOfTwo, TwoLevel
from regauge.runtime.matrices.modules import PackedMatrix


def format_of(options: Options, columns: int = 0) -> Format:
    """`grid`: int3, int3-asym, nf4, fp4, fp8, ternary; `group`: inputs a step, 0 for a row; `scale`: how it is kept.
    A group that does not divide `columns` is halved."""
    grids: dict[str, Any] = {"nf4": NF4, "fp4": E2M1, "fp8": E4M3, "ternary": Ternary}
    scales: dict[str, Any] = {
        "f16": Float16, "bf16": BFloat16, "f32": Float32, "e8m0": PowerOfTwo, "nv": TwoLevel
    }  # fmt: skip
    name = options["grid"]
    grid = grids[name]() if name in grids else Int(int(name[3]), not name.endswith("asym"))
    group = options["group"]
    group //= 2 if group and columns % group else 1
    grain: Grain = Group(group) if group else Channel()
    scale: Scale = scales[options["scale"]]()
    return Format(grid, grain, AbsMax() if grid.symmetric else MinMax(), scale)


def random_codes(fmt: Format, rows: int, columns: int) -> Codes:
    """Codes that all are numbers, steps around 1 / √inputs of what the grid reaches."""
    groups, _ = fmt.grain.groups((rows, columns))
    codes_OI = torch.randint(len(fmt.grid.table), (rows, columns), dtype=torch.uint8)
    if bool(fmt.grid.table.isnan().any()):  # codes of NaN are never written
        good = (~fmt.grid.table.isnan()).nonzero()[:, 0].to(torch.uint8)
        codes_OI = good[codes_OI.int() % len(good)]
    step_G1 = (0.5 + torch.rand(groups, 1)) * columns**-0.5 / (fmt.grid.high - fmt.grid.low)
    scale_G1, fields = fmt.scale.bind(step_G1, fmt.grid, rows).store(step_G1)
    zero_G1 = None
    if not fmt.grid.symmetric:
        zero_G1 = torch.randint(1 << fmt.grid.bits, (groups, 1)).float()
        fields = {**fields, "zero": fmt.grid.encode(zero_G1)}
    return Codes(codes_OI, Step(scale_G1, zero_G1, fields))


def load(options: Options) -> Loaded:
    rows, columns = options["rows"], options["columns"]
    torch.manual_seed(0)
    fmt = format_of(options, columns)
    inputs = dynamic(Format(Int(8), Token(), Dynamic(), Float32())) if options.get("inputs") == "int8" else None
    stored = fmt.bytes((rows, columns))
    count = max(2, math.ceil(options["least"] / stored))
    matrices = [
        PackedMatrix(random_codes(fmt, rows, columns), fmt, torch.bfloat16, "cpu", inputs) for _ in range(count)
    ]
    x_TI = torch.randn(options["batch"], columns).bfloat16()

    def once() -> None:
        with torch.inference_mode():
            for matrix in matrices:
                matrix(x_TI)

    held = sum(buffer.nbytes for buffer in matrices[0].buffers()) / stored
    notes = [f"holds {held:.3f} of the stored bytes"] if held > 1.03 else []
    if fmt.grain != format_of(options).grain:
        notes.append(f"groups of {options['group'] // 2}, as {options['group']} does not divide {columns}")
    told = facts(options, count * stored, count, "int8")
    return Loaded(passing(once), {**told, "notes": notes})


if __name__ == "__main__":
    serve(load)
