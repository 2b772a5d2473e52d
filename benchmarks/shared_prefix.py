"""One prefix and its continuations: time, peak memory and gradients of the shared pass against the plain batch.

    python benchmarks/shared_prefix.py                       # 8 continuations of 128 tokens, a prefix of 2k
    python benchmarks/shared_prefix.py --dtype float64       # the same, where gradients agree to more digits
    python benchmarks/shared_prefix.py --layers 30 --score   # the whole 135M shape, without a backward pass

The 135M shape with random weights, a few of its layers: what a backward pass keeps grows with them, and the ratio does
not. Each way runs in a process of its own, so that its peak is its own; gradients are then compared, each parameter's
difference by its norm.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common.shapes import SHAPES, config
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import regauge as rg

WAYS = ("shared", "plain")


def one(way: str, given: argparse.Namespace) -> None:
    """Runs one way, and prints seconds, those of processors, and MB above what the model takes."""
    shape = SHAPES["smollm-135m"]
    settings = {name: value for name, value in config(shape).items() if name not in ("architectures", "model_type")}
    settings |= {"num_hidden_layers": given.layers, "dtype": given.dtype}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings))  # type: ignore[arg-type]
    prefix = torch.randint(shape.vocabulary, (given.prefix,))
    some = torch.randint(shape.vocabulary, (given.count, given.length))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, began = time.perf_counter(), time.process_time()
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
        f"{way:7} {time.perf_counter() - wall:8.1f} s, {time.process_time() - began:6.1f} s of processors "
        f"{peak / 1024:9.0f} MB   mean log-probability {told:.6f}",
        flush=True,
    )
    if given.gradients and not given.score:
        save_file({name: value.grad for name, value in model.named_parameters()}, given.gradients / way)


def apart(folder: Path) -> float:
    """The largest difference of a parameter's gradient, by the norm of the plain batch's."""
    ours, theirs = (load_file(folder / way) for way in WAYS)
    return max(float((ours[name] - one).norm() / one.norm()) for name, one in theirs.items())


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    words.add_argument("--prefix", type=int, default=2048)
    words.add_argument("--count", type=int, default=8)
    words.add_argument("--length", type=int, default=128)
    words.add_argument("--layers", type=int, default=4)
    words.add_argument("--score", action="store_true", help="no backward pass")
    words.add_argument("--dtype", default="float32")
    words.add_argument("--way", choices=WAYS, help="this one alone, in this process")
    words.add_argument("--gradients", type=Path, help="the folder where that one leaves its gradients")
    given = words.parse_args()
    if given.way:
        one(given.way, given)
        return 0
    with TemporaryDirectory() as folder:
        runs = [[sys.executable, *sys.argv, "--way", way, "--gradients", folder] for way in WAYS]
        failed = max(subprocess.run(run, check=False).returncode for run in runs)
        if not failed and not given.score:
            print(f"gradients: {apart(Path(folder)):.1e} apart, relative", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
