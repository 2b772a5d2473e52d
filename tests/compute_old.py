"""Logits of every artifact of format version 1 under a folder, in a process of its own: `compute_old.py FOLDER OUT`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import regauge as rg
from regauge.errors import FallbackWarning


def logits(folder: Path) -> dict[str, Tensor]:
    """`prefill`: two sequences in one call. `decode`: the first of them, a token a call."""
    ids = torch.randint(53, (2, 11), generator=torch.Generator().manual_seed(1))
    model = rg.load(folder)
    with torch.inference_mode():
        found = {"prefill": model(input_ids=ids, use_cache=False).logits.contiguous()}
        cache, steps = None, []
        for position in range(ids.shape[1]):
            out = model(input_ids=ids[:1, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    return found | {"decode": torch.cat(steps, 1).contiguous()}


def main(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FallbackWarning)
    found = {}
    for artifact in sorted(path for path in folder.iterdir() if path.is_dir()):
        found |= {f"{artifact.name}.{name}": tensor for name, tensor in logits(artifact).items()}
    save_file(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
