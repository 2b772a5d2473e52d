"""Compiles every kernel for GPUs that need not be here, with the arguments that the operators pass; prints one a line.

    PYTHONPATH=tests python -m gpu.compiling sm_80 sm_90 gfx942     one or two minutes each
    PYTHONPATH=tests python -m gpu.compiling --brief sm_90          one launch of each kernel

The interpreter takes programs that a compiler refuses (products too narrow, dtypes a GPU lacks). Triton brings its own
assemblers, so machine code is made without a driver or a GPU; that it is right, only a GPU can show.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from parts import part_of, with_rows
from regauge.kernels import reference
from regauge.kernels import triton as kernels
from regauge.kernels.attention import Window
from regauge.kernels.blocks import BlockLayout
from regauge.kernels.triton import floats, launch
from regauge.kernels.triton.cached import attend

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BINARY = {"cuda": "cubin", "hip": "hsaco"}
SHARED = {"cuda": 99 << 10, "hip": 64 << 10}
"""Bytes of shared memory that a program may take: the least of compute capability 8.x, and of CDNA."""


def compile_for(
    kernel: JITFunction[Any], target: GPUTarget, args: tuple[object, ...], options: dict[str, Any]
) -> tuple[int, int]:
    """Bytes of machine code and of shared memory of one launch, with 1 and None as constants."""
    named = dict(zip(kernel.arg_names, args, strict=False))
    settings = {key: options.pop(key) for key in ("num_warps", "num_stages") if key in options}
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = options[name] if name in options else named[name]
        if name in options or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
        else:
            signature[name] = mangle_type(value)
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=target, options=settings)
    return len(made.asm[BINARY[target.backend]]), made.metadata.shared


def every_launch() -> None:
    """Each operator with each of its ways: few and many tokens, whole and split rows, every width and dtype."""
    ops, on = torch.ops.regauge_triton, {}
    for bits in range(1, 9):
        on[bits] = torch.zeros(64, reference.packed_bytes(384, bits), dtype=torch.uint8)
    step, row = torch.ones(64, 1), torch.ones(64)
    for tokens, dtype in itertools.product((1, 17, 70), (torch.float16, torch.bfloat16, torch.float32)):
        x = torch.ones(tokens, 384, dtype=dtype)
        ops.linear(x, on[4], 4, step, -8, None, None, None, 1)
        ops.linear(x, on[4], 4, torch.ones(64, 12), 0, torch.ones(16), None, row, 3)
        ops.fp8(x, torch.zeros(64, 384, dtype=torch.uint8), step, None, row, dtype, 1)
    x = torch.ones(1, 384, dtype=torch.float16)
    for bits, groups in itertools.product(range(1, 9), (3, 12)):
        ops.linear(x, on[bits], bits, torch.ones(64, groups), 0, None, torch.ones(64, groups), row, 2)
        for few in (x, x.expand(2, -1)):
            ops.linear(few, on[bits], bits, torch.ones(64, groups), 0, None, torch.ones(64, groups), row, 0)
        ops.dequantise(on[bits], bits, 384, torch.ones(64, groups), 0, None, torch.ones(64, groups), torch.float16)
    x = torch.ones(17, 384, dtype=torch.int8)
    for bits in range(1, 9):
        ops.integer(x, row[:17], [on[bits]], [bits], -1, row, None, torch.float16, 2)
    for tokens in (1, 17, 70):
        x = torch.ones(tokens, 384, dtype=torch.int8)
        ops.integer(x, None, [on[4], on[2]], [4, 2], -32, None, None, torch.float32, 1)
        ops.integer(x, torch.ones(tokens), [torch.ones(64, 384, dtype=torch.int8)], [], 0, row, row, torch.bfloat16, 1)
        x = torch.zeros(tokens, 384, dtype=torch.uint8).view(launch.E4M3)
        w = torch.zeros(64, 384, dtype=torch.uint8)
        for groups in (1, 3, 12):
            ops.fp8(x, w, torch.ones(64, groups), torch.ones(tokens), None, torch.float16, 2)


def a_launch_of_each() -> None:
    ops = torch.ops.regauge_triton
    x, w = torch.ones(1, 256, dtype=torch.bfloat16), torch.zeros(32, 256, dtype=torch.uint8)
    for split in (0, 2):
        ops.linear(x, w[:, :96].contiguous(), 3, torch.ones(32, 8), 0, None, torch.ones(32, 8), None, split)
    ops.dequantise(w[:, :96].contiguous(), 3, 256, torch.ones(32, 8), 0, None, torch.ones(32, 8), torch.bfloat16)
    planes = [w[:, :128].contiguous(), w[:, :64].contiguous()]
    ops.integer(x.to(torch.int8), None, planes, [4, 2], -32, None, None, torch.float32, 1)
    ops.integer(x.to(torch.int8), torch.ones(1), [w.to(torch.int8)], [], 0, torch.ones(32), None, torch.float32, 1)
    ops.fp8(w.view(launch.E4M3)[:1], w, torch.ones(32, 1), torch.ones(1), None, torch.bfloat16, 1)
    ops.fp8(x, w, torch.ones(32, 8), None, None, torch.bfloat16, 1)


def cached_launches(widths: tuple[int, ...]) -> None:
    """Attention over packed parts: keys by time and values by token, with multipliers and padding, and a cap."""
    for bits, dtype in itertools.product(widths, (torch.float16, torch.bfloat16, torch.float32)):
        draw, lengths = torch.Generator().manual_seed(0), torch.full((1, 2), 256)
        keys = BlockLayout("keys", 32, 64, bits, "time", 32, low=bits != 16)
        values = BlockLayout("values", 32, 64, bits, "channels", 64, offset=0 if bits == 16 else 1 << (bits - 1))
        part = with_rows(part_of(keys, values, lengths, draw), draw)
        part = replace(part, firsts_BK=torch.zeros(1, 2, dtype=torch.int32))
        window = Window(*(torch.zeros(1, 2, 8, 64, dtype=dtype) for _ in range(2)))
        attend(torch.ones(1, 1, 6, 64, dtype=dtype), [part], window, 0.1, softcap=3.0)


def main(names: list[str]) -> None:
    assert kernels.linear is not None
    assert not launch.interpreted(), "unset TRITON_INTERPRET: the interpreter compiles nothing"
    launches = a_launch_of_each if "--brief" in names else every_launch
    for name in names:
        if name == "--brief":
            continue
        target = TARGETS[name]
        found: dict[str, list[tuple[int, int]]] = {}

        def run(kernel: JITFunction[Any], *args: object, grid: Any, warmup: bool, **options: Any) -> None:
            found.setdefault(kernel.__name__, []).append(compile_for(kernel, target, args, options))  # noqa: B023

        JITFunction.run = run
        floats.native_fp8 = lambda _, on=target: on == TARGETS["sm_90"]
        launches()
        cached_launches((4,) if launches is a_launch_of_each else (1, 2, 3, 4, 8, 16))
        for kernel, sizes in sorted(found.items()):
            code, memory = (max(size) for size in zip(*sizes, strict=True))
            print(
                f"{name} {kernel.lstrip('_')}: {len(sizes)} launches, code {code}, shared memory {memory} bytes at most"
            )
            assert memory <= SHARED[target.backend], f"{kernel} needs {memory} bytes of shared memory"


if __name__ == "__main__":
    main(sys.argv[1:])
