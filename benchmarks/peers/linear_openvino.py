"""OpenVINO's compressed weights: a graph of many products of one input, 4- or 8-bit codes with an f16 scale a group."""

from __future__ import annotations

import os

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from passes import copies, facts, passing
from serve import Loaded, Options, serve


def products(options: Options, count: int) -> ov.Model:
    """y = x (scale · (code − 8))ᵀ for `count` matrices; the plug-in keeps them packed."""
    rows, columns, bits, group = options["rows"], options["columns"], options["nbits"], options["group"]
    random, groups = np.random.default_rng(0), columns // group
    kind = ov.Type.u4 if bits == 4 else ov.Type.u8
    x, outputs = ops.parameter([options["batch"], columns], np.float32, "x"), []
    for _ in range(count):
        raw = random.integers(0, 256, rows * columns * bits // 8, dtype=np.uint8)
        codes = ops.constant(ov.Tensor(raw, [rows, groups, group], kind), shared_memory=False)
        zero = ops.constant(np.full((1, 1, 1), 1 << (bits - 1)), dtype=np.float16)
        steps = (0.5 + random.random((rows, groups, 1))) * columns**-0.5 / (1 << bits)
        centred = ops.subtract(ops.convert(codes, "f16"), zero)
        scaled = ops.multiply(centred, ops.constant(steps.astype(np.float16)))
        w = ops.convert(ops.reshape(scaled, np.array([rows, columns]), False), "f32")
        outputs.append(ops.result(ops.matmul(x, w, False, True)))
    return ov.Model(outputs, [x], "products")


def load(options: Options) -> Loaded:
    rows, columns, bits, group = options["rows"], options["columns"], options["nbits"], options["group"]
    count = copies(rows, columns, bits + 16 / group, options["least"])
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0)),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group),
    }
    request = ov.Core().compile_model(products(options, count), "CPU", settings).create_infer_request()
    x = np.random.default_rng(1).standard_normal((options["batch"], columns), dtype=np.float32)
    request.set_input_tensor(ov.Tensor(x))
    size = count * rows * (columns * bits // 8 + columns // group * 2)
    return Loaded(passing(request.infer), facts(options, size, count, "int8"))


if __name__ == "__main__":
    serve(load)
