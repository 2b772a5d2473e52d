"""llama.cpp, one token after another behind a filled cache of type f16, q8_0 or q4_0; with flash attention, which
it takes by itself and which its quantised caches need, but for `f16 plain`.

It reads 256 tokens; what it holds of them is repeated, in its own form of saved sequences, up to as many as are asked
for. Quantised caches are rotated, as llama.cpp does by itself. Without torch.
"""

from __future__ import annotations

import ctypes
import struct
import time
from typing import Any

import llama_cpp as cpp
from llama import Model, weights
from serve import Loaded, Options, serve

READ = 256
TYPES = {"f16": 1, "f16 plain": 1, "q8_0": 8, "q4_0": 2}
"""Of ggml."""
LONG = 0.7
"""Seconds after which a sample ends, however few tokens it has."""


def longer(data: bytes, tokens: int) -> tuple[bytes, int]:
    """A saved sequence of `READ` tokens as one of so many, a multiple of them; and the bytes of keys and values.

    The form: a head that ends with the number of cells; position, 1 and sequence of each cell; whether values lie
    transposed and the number of layers; then for all layers' keys, and again for their values: type, bytes of a row,
    rows. Of transposed values: type, bytes of a number, channels, and each channel's numbers.
    """
    mark = struct.pack("<iIi", 1, 1, 0)  # of the second cell
    at = data.index(mark) - 12
    if struct.unpack_from("<I", data, at - 4)[0] != READ:
        raise RuntimeError("llama.cpp's saved sequence has another form than is known here")
    parts = [data[: at - 4], struct.pack("<I", tokens)]
    parts += [struct.pack("<iIi", position, 1, 0) for position in range(tokens)]
    at += 12 * READ
    transposed, layers = struct.unpack_from("<II", data, at)
    parts.append(data[at : at + 8])
    at, held = at + 8, 0
    for number in range(2 * layers):
        across = bool(transposed) and number >= layers
        _, size, count = struct.unpack_from("<iII", data, at) if across else (*struct.unpack_from("<iQ", data, at), 1)
        parts.append(data[at : at + 12])
        at += 12
        for _ in range(count):
            parts.append(data[at : at + size * READ] * (tokens // READ))
            held += size * tokens
            at += size * READ
    return b"".join(parts), held


def load(options: Options) -> Loaded:
    tokens, kind = options["context"], TYPES[options["row"]]
    model = Model(
        options["path"], tokens + options["room"], n_batch=512, n_ubatch=512, type_k=kind, type_v=kind,
        flash_attn_type=int(options["row"] != "f16 plain"),
    )  # fmt: skip
    model.feed(list(range(READ)))
    size = cpp.llama_state_seq_get_size(model.context, 0)
    buffer = (ctypes.c_uint8 * size)()
    cpp.llama_state_seq_get_data(model.context, buffer, size, 0)
    data, held = longer(bytes(buffer), tokens)
    filled = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
    if not cpp.llama_state_seq_set_data(model.context, filled, len(data), 0):
        raise RuntimeError("llama.cpp did not take the longer sequence")
    del filled, data, buffer
    size, bits = weights(options["path"])
    facts: dict[str, Any] = {"held": held, "bits": bits, "kind": "int8", "notes": [f"weights in {bits:.2f} bits"]}
    model.feed([7])

    def run() -> list[float]:
        start, count = time.perf_counter(), 0
        while count < options["tokens"] and (not count or time.perf_counter() - start < LONG):
            model.feed([int(cpp.llama_sampler_sample(model.greedy, model.context, -1))])
            count += 1
        cpp.llama_synchronize(model.context)
        return [(time.perf_counter() - start) / count]

    return Loaded(run, facts)


if __name__ == "__main__":
    serve(load)
