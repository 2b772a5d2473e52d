"""Trains a small VAR from random weights, with its tokenizer, on one core.

    python scripts/train_var.py mnist16 --data mnist.npz -o out/var/mnist16    # digits of 14 pixels: two minutes
    python scripts/train_var.py mnist --data mnist.npz -o out/var/mnist
    python scripts/train_var.py cifar10 --data cifar10-train-20k.npz -o out/var/cifar10

Four stages, each in a file of its own from which a stopped run goes on: the tokenizer; the transformer (`full/`, a
checkpoint); from it VARiant's phases (`variant/`), and as long with the share of subnets fixed (`fixed/`); `--draws 2`
trains both once more with other draws (`variant-1/`, `fixed-1/`). The losses lie beside them, `losses.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from regauge.hosts.regauge.configuration_var import VarConfig
from regauge.hosts.regauge.modeling_var import VarForImageGeneration
from regauge.hosts.regauge.stages import late
from regauge.hosts.regauge.training import (
    Course,
    Phases,
    TokenizerLoss,
    TransformerLoss,
    freeze_key_bias,
    initialise,
    tokens_of,
    train,
)

COMMON = {"num_classes": 10, "codec_depth": 1, "codec_groups": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "mnist16": {
        "hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 256,
        "patch_nums": (1, 2, 4), "vocab_size": 128, "latent_channels": 8, "image_size": 16, "num_channels": 1,
        "codec_width": 8, "codec_multipliers": (1, 3, 6),
    },
    "mnist": {
        "hidden_size": 96, "num_hidden_layers": 8, "num_attention_heads": 3, "intermediate_size": 384,
        "patch_nums": (1, 2, 4, 7), "vocab_size": 128, "latent_channels": 8, "image_size": 28, "num_channels": 1,
        "codec_width": 8, "codec_multipliers": (1, 3, 6),
    },
    "cifar10": {
        "hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 512,
        "patch_nums": (1, 2, 4, 8), "vocab_size": 512, "latent_channels": 16, "image_size": 32, "num_channels": 3,
        "codec_width": 16, "codec_multipliers": (1, 2, 4),
    },
}  # fmt: skip
EARLY = 2
"""Scales that always run at full depth."""
LATE = "depth=4"
"""What runs on the others: half of the layers."""
FIXED = Phases(1.0, 1.0, 0.5)
"""The rival of VARiant's phases: full model and subnet in turn by chance, to the end."""


@dataclass(frozen=True)
class Lengths:
    """Steps of each stage, and images a step; `few`: those of the tokenizer; `draws`: how often subnets are trained."""

    tokenizer: int
    transformer: int
    variant: int
    few: int
    batch: int
    seed: int
    draws: int = 1


class Progress:
    """Prints the mean loss of every some steps, and how many images a second went through."""

    def __init__(self, name: str, steps: int, batch: int) -> None:
        self.name, self.steps, self.batch = name, steps, batch
        self.recent: list[float] = []
        self.began = time.monotonic()

    def __call__(self, step: int, loss: float) -> None:
        self.recent.append(loss)
        if (step + 1) % 50 == 0 or step == self.steps - 1:
            rate = len(self.recent) * self.batch / (time.monotonic() - self.began)
            mean = sum(self.recent) / len(self.recent)
            print(f"{self.name} {step + 1}/{self.steps}  loss {mean:.4f}  {rate:.0f} images/s", flush=True)
            self.recent, self.began = [], time.monotonic()


def images_of(path: Path, side: int, part: str = "train") -> tuple[Tensor, Tensor]:
    """Images (N, C, side, side) from −1 to 1, and their classes; larger ones are halved, and black is put around them.

    Args:
        part: of an archive that holds several.
    """
    with np.load(path) as held:
        parts = f"x_{part}" in held
        x, y = (held[f"x_{part}"], held[f"y_{part}"]) if parts else (held["x"], held["y"])
    images, labels = _pixels(x), torch.from_numpy(y).long()
    while images.shape[-1] > side:
        images = functional.avg_pool2d(images, 2)
    edge = (side - images.shape[-1]) // 2
    return functional.pad(images, (edge,) * 4, value=-1.0), labels


def _pixels(x: Any) -> Tensor:
    pixels = torch.from_numpy(x).float() / 127.5 - 1
    return (pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)).contiguous()


def mirrored(images: Tensor, name: str) -> Tensor:
    """Twice the images where a mirror image is as good; digits are not."""
    return images if name != "cifar10" else torch.cat([images, images.flip(3)])


def main() -> None:
    said = arguments()
    torch.set_num_threads(said.threads)
    torch.manual_seed(said.seed)
    said.out.mkdir(parents=True, exist_ok=True)
    images, labels = images_of(said.data, CONFIGS[said.name]["image_size"])
    images, labels = mirrored(images, said.name), labels.repeat(2 if said.name == "cifar10" else 1)
    model = VarForImageGeneration(VarConfig(**COMMON, **CONFIGS[said.name])).to(said.device)
    images = images.to(said.device)
    steps = (said.tokenizer_steps, said.steps, said.variant_steps)
    lengths = Lengths(*steps, said.tokenizer_batch, said.batch, said.seed, said.draws)
    losses = dict(stages(model, images, labels, lengths, said.out))
    (said.out / "losses.json").write_text(json.dumps(losses) + "\n", encoding="utf-8")


def stages(
    model: VarForImageGeneration, images: Tensor, labels: Tensor, lengths: Lengths, out: Path
) -> Iterator[tuple[str, list[float]]]:
    """Every stage with its losses."""
    codec, size = model.vae, lengths.batch
    codec.to(memory_format=torch.channels_last)
    few = lengths.few
    course = Course(lengths.tokenizer, few, 3e-3, seed=lengths.seed)
    told = Progress("tokenizer", course.steps, few)
    yield "tokenizer", train(codec, TokenizerLoss(codec, images, few), course, out / "tokenizer.state", told).losses
    codec.eval().requires_grad_(False)
    tokens = kept(out / "tokens.pt", lambda: tokens_of(codec, images.split(256)))
    initialise(model.cpu(), lengths.seed)  # draws where its source of randomness lies
    model.to(images.device)
    freeze_key_bias(model)
    course = Course(lengths.transformer, size, 4e-3, seed=lengths.seed + 1)
    told = Progress("transformer", course.steps, size)
    loss = TransformerLoss(model, tokens, labels, size)
    yield "transformer", train(model, loss, course, out / "transformer.state", told).losses
    model.save_pretrained(out / "full")
    whole = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    subnet = late(len(model.config.areas), EARLY, LATE)
    for draw, (name, phases) in itertools.product(range(lengths.draws), (("variant", Phases()), ("fixed", FIXED))):
        name += f"-{draw}" if draw else ""
        model.load_state_dict(whole)
        course = Course(lengths.variant, size, 1e-3, warm=50, seed=lengths.seed + 2 + draw)
        told = Progress(name, course.steps, size)
        loss = TransformerLoss(model, tokens, labels, size, subnet, phases, course.steps)
        yield name, train(model, loss, course, out / f"{name}.state", told).losses
        model.save_pretrained(out / name)


def kept(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """A tensor that is made once."""
    if not path.exists():
        torch.save(make(), path)
    found: Tensor = torch.load(path, weights_only=True)
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=CONFIGS)
    parser.add_argument("--data", type=Path, required=True, help="an .npz of images and classes")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--tokenizer-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--variant-steps", type=int, default=400)
    parser.add_argument("--tokenizer-batch", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--draws", type=int, default=1, help="how often subnets are trained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="where it is trained: cpu or cuda")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
