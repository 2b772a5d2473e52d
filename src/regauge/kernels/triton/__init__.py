"""Kernels for GPUs, in Triton. Each is tested against `kernels.reference`, which defines them.

Importing this package imports triton and registers the operators `torch.ops.regauge_triton.*`; `import regauge` does
neither. Without triton (`pip install regauge[gpu]`) the import raises ImportError. The kernels run on CUDA tensors;
with TRITON_INTERPRET=1 set before triton is imported they run on a CPU, element by element, for tests.

    linear      x Wᵀ + b, W packed at 1 to 8 bits (W4A16): integers, with zero points or without, or a table
    w8a8        int8 × int8 with exact int32 sums
    w6a6        the same with weights held as planes of 4 and 2 bits
    packed_int  the same with weights packed at 1 to 8 bits
    fp8         e4m3 weights; inputs in float or e4m3
    dequantise  the weights themselves, for products of many tokens
    cached      `attend`: attention over packed parts of a cache
"""

from __future__ import annotations

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise ImportError("regauge.kernels.triton needs triton; install it with: pip install 'regauge[gpu]'") from error

from regauge.kernels.triton.dequantise import dequantise
from regauge.kernels.triton.floats import fp8
from regauge.kernels.triton.integers import packed_int, split_planes, w6a6, w8a8
from regauge.kernels.triton.weight_only import linear

__all__ = ["dequantise", "fp8", "linear", "packed_int", "split_planes", "w6a6", "w8a8"]
