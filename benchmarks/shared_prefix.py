"""One prefix and its continuations: time and peak memory of the shared pass against the plain batch.

    python benchmarks/shared_prefix.py                       # 8 continuations of 128 tokens, a prefix of 2k
    python benchmarks/shared_prefix.py --layers 30 --score   # the whole 135M shape, without a backward pass

The 135M shape with random weights in float32, a few of its layers: what a backward pass keeps grows with them, and the
ratio does not. Each way runs in a process of its own, so that its peak is its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch
from common.shapes import SHAPES, config
from transformers import LlamaConfig, LlamaForCausalLM

import regauge as rg

WAYS = ("shared", "plain")


def one(way: str, given: argparse.Namespace) -> None:
    """Runs one way, and prints seconds of processors and MB above what the model takes."""
    shape = SHAPES["smollm-135m"]
    settings = {name: value for name, value in config(shape).items() if name not in ("architectures", "model_type")}
    settings |= {"num_hidden_layers": given.layers, "dtype": "float32"}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings))  # type: ignore[arg-type]
    prefix = torch.randint(shape.vocabulary, (given.prefix,))
    some = torch.randint(shape.vocabulary, (given.count, given.length))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with torch.set_grad_enabled(not given.score):
        if way == "shared":
            with rg.shared_prefix(model, prefix, list(some)) as shared:
                told = torch.cat(shared.log_probs(model(**shared.inputs).logits)).mean()
        else:
            ids = torch.cat((prefix.expand(given.count, -1), some), 1)
            logits = model(ids, use_cache=False, logits_to_keep=given.length + 1).logits[:, :-1]
            told = logits.log_softmax(-1).gather(2, some.unsqueeze(2)).mean()
        if not given.score:
            told.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(
        f"{way:7} {time.process_time() - began:8.1f} s {peak / 1024:9.0f} MB   mean log-probability {told:.6f}",
        flush=True,
    )


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    words.add_argument("--prefix", type=int, default=2048)
    words.add_argument("--count", type=int, default=8)
    words.add_argument("--length", type=int, default=128)
    words.add_argument("--layers", type=int, default=4)
    words.add_argument("--score", action="store_true", help="no backward pass")
    words.add_argument("--way", choices=WAYS, help="this one alone, in this process")
    given = words.parse_args()
    if given.way:
        one(given.way, given)
        return 0
    return max(subprocess.run([sys.executable, *sys.argv, "--way", way], check=False).returncode for way in WAYS)


if __name__ == "__main__":
    sys.exit(main())
