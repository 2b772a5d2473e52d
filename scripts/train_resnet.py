"""Trains a small residual network on labelled images from random weights, on one core.

    python scripts/train_resnet.py --data cifar10-train-20k.npz -o out/resnet20               # 16, 32, 64 channels
    python scripts/train_resnet.py --data cifar10-train-20k.npz -o out/narrow --widths 8,16,32 --kernel 5 --epochs 8

Every tenth image is held out; the others are mirrored and moved by up to four pixels. SGD with momentum, the rate a
cosine behind a warm-up. Batch norms are given their statistics by an exact mean at the end. A run is a function of seed
and step; it keeps its state every minute, and one that was stopped goes on to the same losses.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from regauge.hosts.regauge.configuration_resnet import deep
from regauge.hosts.regauge.modeling_resnet import ResNetForImageClassification, recalibrate
from regauge.learn.pictures import moved

SCALE = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HELD_OUT, EDGE, WARM, DECAY = 10, 4, 0.1, 5e-4
"""One image in so many is held out; pixels that images are moved by; share of steps that warm up; weight decay."""
STATE = "state.pt"


def images_of(path: Path) -> tuple[Tensor, Tensor]:
    """Pixels (N, 3, H, W) as bytes, and classes.

    Raises:
        SystemExit: the file holds none.
    """
    try:
        with np.load(path) as held:
            x, y = held["x"], held["y"]
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(
            f"{path} holds no labelled images: arrays 'x' (N, H, W, 3) of uint8 and 'y' (N) are needed"
        ) from error
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3 or x.shape[1] != x.shape[2] or len(x) != len(y):
        raise SystemExit(
            f"{path}: 'x' has shape {x.shape} and dtype {x.dtype}, and 'y' {y.shape}; (N, H, H, 3) of uint8"
        )
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y).long()


def scaled(pixels: Tensor) -> Tensor:
    """As the processor beside the model makes them."""
    mean, std = (torch.tensor(SCALE[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
    return (pixels.float() / 255 - mean) / std


def accuracy(model: ResNetForImageClassification, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        right = [
            (model(pixel_values=scaled(a)).logits.argmax(1) == b).sum()
            for a, b in zip(x.split(500), y.split(500), strict=True)
        ]
    return 100 * float(sum(right)) / len(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, help="images that are asked last, beside those held out")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=3, help="of a stage: 3 for ResNet-20")
    parser.add_argument("--widths", default="16,32,64")
    parser.add_argument("--kernel", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    said = parser.parse_args()
    x, y = images_of(said.data)
    aside = torch.arange(len(x)) % HELD_OUT == HELD_OUT - 1
    x, y, held_x, held_y = x[~aside], y[~aside], x[aside], y[aside]
    torch.manual_seed(said.seed)
    widths = [int(width) for width in said.widths.split(",")]
    config = deep(said.blocks, widths, said.kernel, image_size=x.shape[-1], num_labels=int(y.max()) + 1)
    model = ResNetForImageClassification(config).train()
    own = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in own if p.dim() > 1], "weight_decay": DECAY},
              {"params": [p for p in own if p.dim() == 1], "weight_decay": 0.0}]  # fmt: skip
    optimiser = torch.optim.SGD(groups, lr=said.rate, momentum=0.9, nesterov=True)
    each = len(x) // said.batch
    steps, step, losses = said.epochs * each, 0, list[float]()
    said.out.mkdir(parents=True, exist_ok=True)
    state = said.out / STATE
    if state.exists():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        optimiser.load_state_dict(kept["optimiser"])
        step, losses = kept["step"], kept["losses"]
    began, saved = time.process_time(), time.monotonic()
    while step < steps:
        drawn = torch.Generator().manual_seed(said.seed * 1_000_003 + step)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(said.seed * 1009 + step // each))
        rows = order[step % each * said.batch :][: said.batch]
        warm = min(1.0, (step + 1) / (WARM * steps))
        for group in optimiser.param_groups:
            group["lr"] = said.rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = functional.cross_entropy(model(pixel_values=moved(scaled(x[rows]), EDGE, drawn)).logits, y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        step += 1
        losses.append(float(loss.detach()))
        if step % 50 == 0 or step == steps:
            mean = sum(losses[-50:]) / len(losses[-50:])
            print(f"{step}/{steps}  loss {mean:.4f}  {time.process_time() - began:.0f} s of CPU", flush=True)
        if time.monotonic() - saved > 60:
            whole = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step, "losses": losses}
            torch.save(whole, state.with_suffix(".new"))
            state.with_suffix(".new").replace(state)
            saved = time.monotonic()
    model.eval()
    recalibrate(model, (scaled(x[n :: len(x) // 2000][:250]) for n in range(8)))
    model.save_pretrained(said.out)
    (said.out / "preprocessor_config.json").write_text(json.dumps(SCALE) + "\n", encoding="utf-8")
    told = {"held_out": accuracy(model, held_x, held_y), "seed": said.seed, "steps": steps, "loss": losses[-1]}
    if said.test is not None:
        told["test"] = accuracy(model, *images_of(said.test))
    (said.out / "trained.json").write_text(json.dumps(told) + "\n", encoding="utf-8")
    state.unlink(missing_ok=True)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
