"""llama.cpp's types: an importance matrix over the windows, `llama-quantize` with it, all decoded by gguf's own code.

The token embedding stays at 16 bits, as in the other rows; matrices whose width a type does not take get what
llama.cpp gives them instead, and their bits are counted so. KIND: q4_k_s, iq2_xxs, ... Arguments and answer:
`windows.py`.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()

import json  # noqa: E402
import os  # noqa: E402

import gguf  # noqa: E402
import gguf_neox  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from calibrate_llama import ran, read, vocabulary  # noqa: E402
from gguf_files import renamed, write_bf16  # noqa: E402
from plain import matrices, stored, write  # noqa: E402
from setup import LLAMA, tool  # noqa: E402
from torch import Tensor  # noqa: E402
from windows import given  # noqa: E402


def halves(w_OI: Tensor, heads: int) -> Tensor:
    """Rows of q or k in the order of transformers again."""
    rows, columns = w_OI.shape
    return w_OI.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def back(name: str, w_OI: Tensor, config: dict[str, int]) -> Tensor:
    """A decoded matrix of a llama in the order of transformers."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    turned = next((count for part, count in heads.items() if part in name), 0)
    return halves(w_OI, turned) if turned else w_OI


def main() -> None:
    job = given(__doc__, BEGAN)
    config = json.loads((job.model / "config.json").read_text(encoding="utf-8"))
    neox = config["model_type"] == "gpt_neox"
    written, called, turned = (gguf_neox.write_bf16, gguf_neox.renamed, gguf_neox.back) if neox else (
        write_bf16, renamed, back
    )  # fmt: skip
    full, importance, out = (job.out / name for name in ("bf16.gguf", "imatrix.gguf", "quantised.gguf"))
    text = read(job)
    written(job.model, full, vocabulary)
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))
    job.ends("convert")
    batch = max(1, 2048 // job.length) * job.length
    lengths = ("-c", job.length, "-b", batch, "-ub", min(batch, 2048), "--chunks", job.count)
    ran(tool("imatrix"), "-m", full, "-f", text, "-o", importance, *lengths, "-t", threads, "--no-ppl")
    kept = ("--token-embedding-type", "bf16", "--output-tensor-type", "bf16")
    ran(tool("quantize"), "--imatrix", importance, *kept, full, out, job.kind.upper(), threads)
    job.ends("made")
    named = {called(name): name for name in stored(job.model)}
    inside = matrices(job.model)
    decoded: dict[str, Tensor] = {}
    bits: dict[str, float] = {}
    for tensor in gguf.GGUFReader(out).tensors:
        name = named[tensor.name]
        if name not in inside:
            continue
        values = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        w_OI = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(inside[name].shape)
        decoded[name] = turned(name, w_OI, config)
        bits[name] = 8 * tensor.n_bytes / w_OI.numel()
    for path in (full, importance, out, text):
        path.unlink()
    write(job, decoded, bits, source=LLAMA)


if __name__ == "__main__":
    main()
