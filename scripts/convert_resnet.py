"""Makes a directory that regauge reads of a checkpoint of a CIFAR-10 residual network with parameter-free shortcuts.

    python scripts/convert_resnet.py resnet20-12fca82f.th -o resnet20

The layout is that of many copies of the paper's networks (1512.03385, section 4.2): `layer1.0.conv1`, `bn1`, `linear`.
The file is a pickle; only tensors are read from it. How many blocks a stage has is read off their names.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from torch import Tensor

from regauge.hosts.regauge.configuration_resnet import deep
from regauge.hosts.regauge.modeling_resnet import ResNetForImageClassification

SCALE = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
"""What such networks were trained with."""
OUTER = {"conv1.": "stem.", "bn1.": "stem_norm.", "linear.": "classifier.", "fc.": "classifier."}


def renamed(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The tensors under our names, and how many blocks a stage has."""
    plain = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    numbers = [int(found[1]) for key in plain if (found := re.match(r"layer\d+\.(\d+)\.", key))]
    if not numbers:
        raise SystemExit("the file holds no tensors of blocks (layer1.0. …): it is no such checkpoint")
    blocks, made = max(numbers) + 1, dict[str, Tensor]()
    for key, tensor in plain.items():
        if key.endswith("num_batches_tracked"):
            continue
        key = key.replace("running_mean", "mean").replace("running_var", "var")
        if found := re.match(r"layer(\d+)\.(\d+)\.(.*)", key):
            key = f"blocks.{(int(found[1]) - 1) * blocks + int(found[2])}.{found[3]}"
        else:
            key = next((new + key.removeprefix(old) for old, new in OUTER.items() if key.startswith(old)), key)
        made[key] = tensor
    return made, blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    said = parser.parse_args()
    held = torch.load(said.checkpoint, weights_only=True, map_location="cpu")
    tensors, blocks = renamed(held.get("state_dict", held))
    widths = [tensors[f"blocks.{stage * blocks}.conv2.weight"].shape[0] for stage in range(3)]
    config = deep(blocks, widths, num_labels=len(tensors["classifier.bias"]))
    model = ResNetForImageClassification(config)
    model.load_state_dict(tensors)
    model.save_pretrained(said.out)
    (said.out / "preprocessor_config.json").write_text(json.dumps(SCALE) + "\n", encoding="utf-8")
    print(f"{said.out}: {config.num_hidden_layers} blocks, widths {widths}, {config.num_labels} classes")


if __name__ == "__main__":
    main()
