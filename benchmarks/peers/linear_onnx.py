"""ONNX Runtime's MatMulNBits: a graph of many products of one input, symmetric 4- or 8-bit codes in groups.

`accuracy` 4 lets it round activations to int8, its fast way; spinning between runs is off, as other peers have turns.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from passes import copies, facts, passing
from serve import Loaded, Options, serve


def graph(options: Options, count: int) -> tuple[onnx.ModelProto, int]:
    """The model and the bytes of its weights."""
    rows, columns, bits, group = options["rows"], options["columns"], options["nbits"], options["group"]
    random, nodes, weights, outputs = np.random.default_rng(0), [], [], []
    groups = -(-columns // group)
    for number in range(count):
        codes = random.integers(0, 256, (rows, groups, group * bits // 8), dtype=np.uint8)
        steps = ((0.5 + random.random((rows, groups), dtype=np.float32)) * columns**-0.5 / (1 << bits)).astype("f4")
        weights += [numpy_helper.from_array(codes, f"b{number}"), numpy_helper.from_array(steps, f"s{number}")]
        node = helper.make_node(
            "MatMulNBits", ["x", f"b{number}", f"s{number}"], [f"y{number}"], domain="com.microsoft",
            K=columns, N=rows, bits=bits, block_size=group, accuracy_level=options["accuracy"],
        )  # fmt: skip
        nodes.append(node)
        outputs.append(helper.make_tensor_value_info(f"y{number}", TensorProto.FLOAT, [options["batch"], rows]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [options["batch"], columns])
    made = helper.make_graph(nodes, "products", [x], outputs, weights)
    model = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10
    )
    return model, count * rows * groups * (group * bits // 8 + 4)


def load(options: Options) -> Loaded:
    rows, columns, group = options["rows"], options["columns"], options["group"]
    count = copies(rows, columns, options["nbits"] + 32 / group, options["least"])
    model, size = graph(options, count)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))
    settings.inter_op_num_threads = 1
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1")
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    settings.log_severity_level = 3
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.onnx"
        onnx.save(model, path, save_as_external_data=True, location="weights")
        del model
        session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    x = {"x": np.random.default_rng(1).standard_normal((options["batch"], columns), dtype=np.float32)}
    return Loaded(passing(lambda: session.run(None, x)), facts(options, size, count, "int8"))


if __name__ == "__main__":
    serve(load)
