"""OpenVINO's CPU plug-in, one token after another behind a filled cache (`f16`, `u8`, `u4`, `... keys by channel`).

The graph is built here, with random weights of 4 bits in groups of 32, in the form of stateful models that the plug-in
fuses: keys and values of all tokens in variables, attention over them in one operation. The variables are set to random
numbers before the first token. Embedding is left out, the head is not.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset6 as ops6
from openvino import opset13 as ops
from openvino.op.util import Variable, VariableInfo
from serve import Loaded, Options, serve

GROUP = 32
LONG = 0.7
"""Seconds after which a sample ends, however few tokens it has."""
Node = Any  # a node of a graph


def whole(*numbers: int) -> Node:
    return ops.constant(np.array(numbers, dtype=np.int64))


def linear(x: Node, rows: int, columns: int, random: np.random.Generator) -> Node:
    """x Wᵀ by a matrix of 4 bits."""
    groups = columns // GROUP
    raw = random.integers(0, 256, rows * columns // 2, dtype=np.uint8)
    codes = ops.constant(ov.Tensor(raw, [rows, groups, GROUP], ov.Type.u4), shared_memory=False)
    steps = ((0.5 + random.random((rows, groups, 1))) * columns**-0.5 / 16).astype(np.float16)
    centred = ops.subtract(ops.convert(codes, "f16"), ops.constant(np.full((1, 1, 1), 8), dtype=np.float16))
    scaled = ops.reshape(ops.multiply(centred, ops.constant(steps)), whole(rows, columns), False)
    return ops.matmul(x, ops.convert(scaled, "f32"), False, True)


def norm(x: Node, channels: int) -> Node:
    """Root mean square, as transformers' exports write it."""
    mean = ops.reduce_mean(ops.power(x, np.float32(2)), whole(-1), True)
    unit = ops.multiply(x, ops.divide(np.float32(1), ops.sqrt(ops.add(mean, np.float32(1e-5)))))
    return ops.multiply(unit, ops.constant(np.ones((1, 1, channels), dtype=np.float32)))


def rotated(x: Node, cosines: Node, sines: Node, size: int) -> Node:
    halves = ops.split(x, ops.constant(np.int64(-1)), 2)
    turned = ops.concat([ops.multiply(halves.output(1), np.float32(-1)), halves.output(0)], -1)
    return ops.add(ops.multiply(x, cosines), ops.multiply(turned, sines))


class Graph:
    """The model: a token's states in, logits out."""

    def __init__(self, shape: dict[str, int]) -> None:
        self.shape, self.random, self.sinks = shape, np.random.default_rng(0), []
        self.x = ops.parameter([-1, -1, shape["hidden"]], np.float32, "x")
        self.cosines, self.sines = (ops.parameter([-1, 1, -1, shape["head"]], np.float32, n) for n in ("cos", "sin"))
        self.beams = ops.parameter([-1], np.int32, "beam_idx")

    def past(self, name: str, new: Node) -> Node:
        """All keys or values (B, K, T, D), the new ones last, kept in a variable."""
        heads, size = self.shape["kv_heads"], self.shape["head"]
        info = VariableInfo()
        info.data_shape, info.data_type = ov.PartialShape([-1, heads, -1, size]), ov.Type.f32
        info.variable_id = name
        variable = Variable(info)
        batch = ops.gather(ops.shape_of(self.x), whole(0), ops.constant(np.int64(0)))
        first = ops.broadcast(np.float32(0), ops.concat([batch, whole(heads), whole(0), whole(size)], 0))
        before = ops6.read_value(first, variable)
        both = ops.concat([ops.gather(before, self.beams, ops.constant(np.int64(0))), new], 2)
        self.sinks.append(ops6.assign(both, variable))
        return both

    def heads(self, x: Node, count: int) -> Node:
        return ops.transpose(ops.reshape(x, whole(0, 0, count, self.shape["head"]), True), whole(0, 2, 1, 3))

    def shared(self, x: Node) -> Node:
        """(B, K, T, D) as (B, H, T, D), for queries that share keys."""
        many, kv, size = self.shape["heads"], self.shape["kv_heads"], self.shape["head"]
        wide = ops.broadcast(
            ops.unsqueeze(x, whole(2)),
            ops.concat([ops.gather(ops.shape_of(x), whole(0, 1), ops.constant(np.int64(0))), whole(many // kv),
                        ops.gather(ops.shape_of(x), whole(2, 3), ops.constant(np.int64(0)))], 0),
            "BIDIRECTIONAL",
        )  # fmt: skip
        return ops.reshape(wide, whole(0, many, -1, size), True)

    def block(self, x: Node, number: int) -> Node:
        d, f, size = self.shape["hidden"], self.shape["ffn"], self.shape["head"]
        kv = self.shape["kv_heads"] * size
        read = norm(x, d)
        q = rotated(self.heads(self.line(read, d, d), self.shape["heads"]), self.cosines, self.sines, size)
        k = rotated(self.heads(self.line(read, kv, d), self.shape["kv_heads"]), self.cosines, self.sines, size)
        v = self.heads(self.line(read, kv, d), self.shape["kv_heads"])
        keys, values = self.past(f"keys.{number}", k), self.past(f"values.{number}", v)
        seen = ops.scaled_dot_product_attention(q, self.shared(keys), self.shared(values), causal=False)
        joined = ops.reshape(ops.transpose(seen, whole(0, 2, 1, 3)), whole(0, 0, d), True)
        x = ops.add(x, self.line(joined, d, d))
        read = norm(x, d)
        gated = ops.multiply(ops.swish(self.line(read, f, d)), self.line(read, f, d))
        return ops.add(x, self.line(gated, d, f))

    def line(self, x: Node, rows: int, columns: int) -> Node:
        return linear(x, rows, columns, self.random)

    def model(self) -> ov.Model:
        x = self.x
        for number in range(self.shape["layers"]):
            x = self.block(x, number)
        logits = self.line(norm(x, self.shape["hidden"]), self.shape["vocabulary"], self.shape["hidden"])
        inputs = [self.x, self.cosines, self.sines, self.beams]
        for node, name in zip(inputs, ("x", "cos", "sin", "beam_idx"), strict=True):
            node.output(0).get_tensor().set_names({name})
        return ov.Model([ops.result(logits)], self.sinks, inputs, "decoder")


GRAPHS: dict[str, ov.Model] = {}


def load(options: Options) -> Loaded:
    shape, tokens, row = options["shape"], options["context"], options["row"]
    core, kind = ov.Core(), row.split(" ")[0]
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0)),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(GROUP),
        "KV_CACHE_PRECISION": kind,
    }
    if "by channel" in row:
        raise RuntimeError("the plug-in has keys by channel under paged attention alone, not in stateful models")
    name = str(shape)
    if name not in GRAPHS:
        GRAPHS[name] = Graph(shape).model()
    compiled = core.compile_model(GRAPHS[name], "CPU", settings)
    got = compiled.get_property("KV_CACHE_PRECISION").to_string()
    if got != kind:
        raise RuntimeError(f"the plug-in holds the cache in {got} where {kind} is asked for")
    request = compiled.create_infer_request()
    some = np.random.default_rng(1).standard_normal((1, shape["kv_heads"], tokens, shape["head"]), dtype=np.float32)
    inputs = {
        "x": np.random.default_rng(2).standard_normal((1, 1, shape["hidden"]), dtype=np.float32),
        "cos": np.ones((1, 1, 1, shape["head"]), dtype=np.float32),
        "sin": np.zeros((1, 1, 1, shape["head"]), dtype=np.float32),
        "beam_idx": np.zeros(1, dtype=np.int32),
    }
    request.infer(inputs)
    for state in request.query_state():
        state.state = ov.Tensor(some)
    request.infer(inputs)
    facts: dict[str, Any] = {"kind": "int8"}

    def run() -> list[float]:
        start, count = time.perf_counter(), 0
        while count < options["tokens"] and (not count or time.perf_counter() - start < LONG):
            request.infer(inputs)
            count += 1
        return [(time.perf_counter() - start) / count]

    return Loaded(run, facts)


if __name__ == "__main__":
    serve(load)
