"""How right are a residual network, what was made of it, and its members?

    python benchmarks/resnet.py resnet20 resnet20-w4 --data cifar10-test.npz
    python benchmarks/resnet.py OUT --data cifar10-test.npz --subnet half --images cifar10-train-20k.npz

Accuracy on labelled images, with its standard error. Of a family each member that is named is run inside
the whole: with the statistics of its batch norms that it comes with; with those of the whole, its first channels; and
taken anew on `--images`, where they are given.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from train_resnet import images_of, scaled  # noqa: E402

import regauge as rg  # noqa: E402

BATCH, CALIBRATED = 250, 2000


def right(model: Any, x: Tensor, y: Tensor) -> float:
    """Per cent."""
    with torch.no_grad():
        found = [model(pixel_values=scaled(some)).logits.argmax(1) for some in x.split(BATCH)]
    return 100 * float((torch.cat(found) == y).float().mean())


def spread(x: Tensor, count: int) -> Tensor:
    """So many rows, evenly: files are often sorted by class."""
    return torch.arange(min(count, len(x))) * len(x) // min(count, len(x))


def told(name: str, value: float, count: int) -> None:
    error = (value * (100 - value) / count) ** 0.5
    print(json.dumps({"model": name, "accuracy": round(value, 2), "error": round(error, 2)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--subnet", action="append", default=[])
    parser.add_argument("--images", type=Path)
    said = parser.parse_args()
    x, y = images_of(said.data)
    rows = spread(x, said.count)
    x, y = x[rows], y[rows]
    for path in said.models:
        model = rg.load(path, dtype=torch.float32)
        told(path.name, right(model, x, y), len(x))
        for subnet in said.subnet:
            members = model.regauge
            legal = str(members.settled(subnet))
            kept = members.learnt.statistics.pop(legal, None)
            members.forget()
            told(f"{path.name} {subnet}, statistics of the whole", right(members.member(subnet), x, y), len(x))
            if kept is not None:
                members.learnt.statistics[legal] = kept
                members.forget()
                told(f"{path.name} {subnet}, its own", right(members.member(subnet), x, y), len(x))
            if said.images is not None:
                pixels, _ = images_of(said.images)
                pixels = pixels[spread(pixels, CALIBRATED)]
                order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
                members.recalibrate(subnet, model, [scaled(some) for some in pixels[order].split(BATCH)])
                told(f"{path.name} {subnet}, taken anew", right(members.member(subnet), x, y), len(x))


if __name__ == "__main__":
    main()
