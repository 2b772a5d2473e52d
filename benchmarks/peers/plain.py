"""What a peer made of a model, as a plain checkpoint: values decoded to float32, so that one evaluator reads all.

Bytes are counted one way: codes, steps, zero points and tables as the peer stores them; what it left alone at 16 bits.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from windows import Job

BLOCK = re.compile(r"\.(?:layers|h)\.\d+\.")
KIND = re.compile(r"w(\d)g(\d+)")


def matrices(folder: Path) -> dict[str, Tensor]:
    """The tensors of the linear layers in the blocks, by name, as they are stored."""
    return {name: tensor for name, tensor in stored(folder).items() if tensor.ndim == 2 and BLOCK.search(name)}


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def kind(job: Job) -> tuple[int, int]:
    """(bits, group) of `w3g64`."""
    match = KIND.fullmatch(job.kind)
    if match is None:
        raise SystemExit(f"{job.kind!r} is no kind; write w3g64")
    return int(match[1]), int(match[2])


def write(job: Job, decoded: dict[str, Tensor], bits: dict[str, float], **more: object) -> None:
    """The checkpoint with `decoded` in place of its tensors, and the line of JSON.

    Args:
        bits: stored bits a weight of each tensor that is not kept at 16.
    """
    source = stored(job.model)
    if missing := [name for name in decoded if name not in source or source[name].shape != decoded[name].shape]:
        raise SystemExit(f"{missing[0]} is no tensor of {job.model} of that shape")
    found = {name: decoded.get(name, tensor).float().contiguous() for name, tensor in source.items()}
    save_file(found, job.out / "model.safetensors", {"format": "pt"})
    config = json.loads((job.model / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    (job.out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}), encoding="utf-8")
    for path in job.model.glob("tokenizer*"):
        shutil.copy(path, job.out / path.name)
    inside = {name: source[name].numel() for name in matrices(job.model)}
    spent = {name: bits.get(name, 16.0) * tensor.numel() / 8 for name, tensor in source.items()}
    in_blocks = 8 * sum(spent[name] for name in inside) / sum(inside.values())
    job.tell("torch", bits=in_blocks, bytes=sum(spent.values()), **more)


def grouped(bits: int, group: int, step: int, zero: int) -> float:
    """Bits a weight with a step and a zero point of so many bits for each group."""
    return bits + (step + zero) / group


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The linear layers in the blocks of a model of transformers, by the name of their weight."""
    named = {f"{name}.weight": module for name, module in model.named_modules() if hasattr(module, "weight")}
    return {name: module for name, module in named.items() if module.weight.ndim == 2 and BLOCK.search(name)}
