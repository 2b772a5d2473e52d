"""llama.cpp, driven through its C interface: greedy decoding and prefill of token ids.

Runs in an environment of its own (`setup.py llama`), without torch. `route` is `decode` or `prefill`.
"""

from __future__ import annotations

import ctypes
import os
import time
from functools import lru_cache
from typing import Any

import llama_cpp as cpp
from gguf import GGUFReader
from serve import Loaded, Options, serve


@lru_cache
def quiet() -> Any:  # a ctypes callback, which must outlive the library's use of it
    callback = cpp.llama_log_callback(lambda *_: None)
    cpp.llama_log_set(callback, ctypes.c_void_p(0))
    cpp.llama_backend_init()
    return callback


def weights(path: str) -> tuple[int, float]:
    """(bytes of weights that one token reads, bits a weight): a table that is only looked up does not count."""
    found = [tensor for tensor in GGUFReader(path).tensors if len(tensor.shape) == 2]
    if any(tensor.name == "output.weight" for tensor in found):
        found = [tensor for tensor in found if tensor.name != "token_embd.weight"]
    size = sum(int(tensor.n_bytes) for tensor in found)
    return size, 8 * size / sum(int(tensor.n_elements) for tensor in found)


class Model:
    """One file with a context of its own; `settings` are fields of llama.cpp's parameters of a context."""

    def __init__(self, path: str, context: int, **settings: int) -> None:
        quiet()
        self.model = cpp.llama_load_model_from_file(path.encode(), cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {os.path.basename(path)}")
        given = cpp.llama_context_default_params()
        threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))
        given.n_ctx = given.n_batch = given.n_ubatch = context
        given.n_threads = given.n_threads_batch = threads
        given.no_perf = True
        for name, value in settings.items():
            setattr(given, name, value)
        self.context = cpp.llama_new_context_with_model(self.model, given)
        if not self.context:
            raise RuntimeError(f"llama.cpp made no context of {context} tokens with {settings}")
        self.greedy = cpp.llama_sampler_chain_init(cpp.llama_sampler_chain_default_params())
        cpp.llama_sampler_chain_add(self.greedy, cpp.llama_sampler_init_greedy())

    def feed(self, tokens: list[int]) -> None:
        """Tokens through the model, behind those before; logits of the last."""
        array = (cpp.llama_token * len(tokens))(*tokens)
        if code := cpp.llama_decode(self.context, cpp.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError(f"llama_decode returned {code}")

    def clear(self) -> None:
        cpp.llama_memory_clear(cpp.llama_get_memory(self.context), True)

    def __del__(self) -> None:
        if getattr(self, "context", None):
            cpp.llama_sampler_free(self.greedy)
            cpp.llama_free(self.context)
        if getattr(self, "model", None):
            cpp.llama_free_model(self.model)


def load(options: Options) -> Loaded:
    prompt, tokens, route = options["prompt"], options.get("tokens", 1), options["route"]
    model = Model(options["path"], -(-(len(prompt) + tokens) // 256) * 256)
    size, bits = weights(options["path"])
    facts: dict[str, Any] = {"bytes": size, "bits": bits, "kind": "bf16" if bits == 16 else "int8"}

    def decode() -> list[float]:
        model.clear()
        model.feed(prompt)
        made, times = [], []
        for _ in range(tokens):
            made.append(int(cpp.llama_sampler_sample(model.greedy, model.context, -1)))
            times.append(time.perf_counter())
            model.feed([made[-1]])
        facts["ids"] = made
        return [(times[-1] - times[0]) / (len(times) - 1)]

    def prefill() -> list[float]:
        model.clear()
        start = time.perf_counter()
        model.feed(prompt)
        cpp.llama_synchronize(model.context)
        return [time.perf_counter() - start]

    return Loaded(prefill if route == "prefill" else decode, facts)


if __name__ == "__main__":
    serve(load)
