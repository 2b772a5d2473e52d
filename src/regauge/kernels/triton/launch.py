"""How a kernel is started: the sizes of its tiles, how many programs share a row, and what is refused first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from regauge.errors import RegaugeError
from regauge.kernels.triton.tiles import combine

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
E4M3 = torch.float8_e4m3fn
Grid = tuple[int, ...]
Size = dict[str, int]


def interpreted() -> bool:
    """Whether kernels run under triton's interpreter, element by element on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def launch(device: torch.device, kernel: Any, grid: Grid, *args: object, **constants: object) -> None:
    """Starts a kernel on the device of its tensors. All launches pass here."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*args, **constants)
    else:
        kernel[grid](*args, **constants)


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache
def native_fp8(device: torch.device) -> bool:
    """Whether the GPU multiplies e4m3 itself: NVIDIA, compute capability 8.9 or more."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def compute_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of the dtype in which inputs of this one are multiplied.

    It is their own, but for bfloat16 in the interpreter, which would multiply the bits as integers: float32 there.
    """
    if dtype == torch.bfloat16 and interpreted():
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]


@dataclass(frozen=True)
class Blocks:
    """Tile of outputs, programs sharing each row, warps of a program, tiles on their way from memory at once."""

    m: int
    n: int
    split: int
    warps: int
    stages: int

    def constants(self) -> Size:
        return {"M": self.m, "N": self.n, "SPLIT": self.split}


def blocks(
    device: torch.device, tokens: int, outputs: int, steps: int, split: int, wide: bool = False, narrow: bool = False
) -> Blocks:
    """Small tiles for few tokens, where reading the weights is the cost; large ones for many, where products are.

    Args:
        steps: tiles along a row. split: 0 chooses so that two programs fall on each multiprocessor, up to 16.
        wide: operands are float32, so tiles are small.
        narrow: codes are looked up in a table, for which a large tile would pass the 64 KB of a CDNA processor.
    """
    if tokens <= 16:
        m, n, warps, stages = 16, 32, 4, 3
    elif tokens <= 64 or wide:
        m, n, warps, stages = 32 if wide else triton.next_power_of_2(tokens), 32 if wide else 64, 4, 2
    else:
        m, n, warps, stages = 64, 64 if narrow else 128, 8, 2
    if not split:
        programs = triton.cdiv(tokens, m) * triton.cdiv(outputs, n)
        split = min(16, steps, max(1, 2 * processors(device) // programs))
    return Blocks(m, n, max(1, min(split, steps)), warps, 1 if wide else stages)


def multiply(
    kernel: Any,
    y_TO: Tensor,
    block: Blocks,
    accumulator: torch.dtype,
    operands: tuple[object, ...],
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    **constants: object,
) -> Tensor:
    """Runs a product into `y`: in one kernel, or in parts of each row that a second kernel adds up.

    The kernel takes its operands, then y, x_scale, w_scale and bias (None where they wait for the second kernel), T, O,
    T · O, then its constants.
    """
    tokens, outputs = y_TO.shape
    grid = (triton.cdiv(tokens, block.m), triton.cdiv(outputs, block.n))
    per_row = w_scale is not None and w_scale.shape[0] > 1
    constants = (
        constants | block.constants() | {"PER_ROW": per_row, "num_warps": block.warps, "num_stages": block.stages}
    )
    finish = (x_scale, w_scale, bias)
    sizes = (tokens, outputs, tokens * outputs)
    if block.split == 1:
        launch(y_TO.device, kernel, (*grid, 1), *operands, y_TO, *finish, *sizes, **constants)
    else:
        parts = y_TO.new_empty((block.split, tokens, outputs), dtype=accumulator)
        launch(y_TO.device, kernel, (*grid, block.split), *operands, parts, *(None,) * 3, *sizes, **constants)
        last = block.constants() | {"PER_ROW": per_row, "num_warps": 4}
        launch(y_TO.device, combine, grid, parts, y_TO, *finish, *sizes, **last)
    return y_TO


def units(packed_OB: Tensor, bits: int) -> Tensor:
    """Packed rows as the widest words that divide both a row and eight codes, so that few loads fetch them."""
    for size, dtype in ((8, torch.uint64), (4, torch.uint32), (2, torch.uint16)):
        if bits % size == 0 and packed_OB.shape[1] % size == 0 and packed_OB.data_ptr() % size == 0:
            return packed_OB.view(dtype)
    return packed_OB


def need(condition: bool, message: Callable[[], str]) -> None:
    """Refuses wrong operands before anything runs."""
    if not condition:
        raise RegaugeError(message())


def shape(tensor: Tensor) -> str:
    return "(" + ", ".join(map(str, tensor.shape)) + ")"


def check(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], wanted: tuple[int | None, ...]) -> None:
    """One operand's dtype, shape (None: any edge) and layout (dense), in one sentence if it is wrong."""
    need(
        tensor.dtype in dtypes,
        lambda: f"{name} is {_short(tensor.dtype)}; these kernels take {' or '.join(map(_short, dtypes))}",
    )
    fits = len(tensor.shape) == len(wanted) and all(
        b is None or a == b for a, b in zip(tensor.shape, wanted, strict=True)
    )
    sizes = ", ".join("any" if edge is None else str(edge) for edge in wanted)
    need(fits, lambda: f"{name} has shape {shape(tensor)}, but the other operands make it ({sizes})")
    need(tensor.is_contiguous(), lambda: f"{name} is not contiguous; pass {name}.contiguous(), made once")


def check_device(*tensors: Tensor | None) -> None:
    """All operands on one device, and that one where kernels run."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    need(len(devices) == 1, lambda: f"operands lie on {', '.join(sorted(map(str, devices)))}; move them to one device")
    kind = next(iter(devices)).type
    need(
        kind in ("cuda", "meta") or (kind == "cpu" and interpreted()),
        lambda: f"the GPU kernels take CUDA tensors, not {kind} ones; on a CPU use regauge.kernels.reference",
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
