"""Families of a residual network that are trained, beside their members trained alone, at equal passes over images.

    python benchmarks/resnet_families.py resnet20 --data cifar10-train-20k.npz --test cifar10-test.npz
    python benchmarks/resnet_families.py resnet20 --data … --test … --rows "alone 1/4" "named, labels too" --passes 800
    python benchmarks/resnet_families.py resnet20 --data … --test … --kernels --rows untrained "named, labels too"

A pass is one member, forward and backward, on one batch. A family has `--passes` of them, divided as its sampler says;
each member alone has an equal share, a quarter: the whole, three quarters, a half and a quarter of the products of its
blocks; with `--kernels` members whose last block of each stage, whose last two, or whose every block has kernels of
1 x 1 (of which the last alone is trained by itself). All begin with the same trained model, its channels sorted in the
same way, and all are taught by that model as it was (KL), half as much by the classes. Every network has statistics of
its own for its batch norms, taken anew behind the training. What is told is measured on test images, evenly chosen: the
share that is right, and the loss in nats; the gap to the same member alone is paired over images, with its standard
error.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from resnet import BATCH, CALIBRATED, spread  # noqa: E402
from train_resnet import images_of, scaled  # noqa: E402

import regauge as rg  # noqa: E402
from regauge.elastic.family import Family, family_of  # noqa: E402
from regauge.engine import apply  # noqa: E402
from regauge.engine.raising import space_of  # noqa: E402
from regauge.engine.training import train  # noqa: E402
from regauge.hosts.transformers.source import Source  # noqa: E402
from regauge.learn.space import Turn  # noqa: E402
from regauge.learn.training import training_of  # noqa: E402
from regauge.plan import parse  # noqa: E402

SIZES = {"whole": "full", "3/4": "ffn=0.75", "1/2": "depth=0.67,ffn=0.75", "1/4": "depth=0.34,ffn=0.75"}
KERNELS = {
    "whole": "full",
    "7/10": "kernel=3/3/1/3/3/1/3/3/1",
    "4/10": "kernel=3/1/1/3/1/1/3/1/1",
    "1/9": "kernel=1",
}
"""Share of the products of the blocks → member; kernels of ResNet-20, nine blocks in three stages."""
SHARED: dict[str, object] = {"distiller": "kl", "teacher": "original", "labels": 0.5, "moved": 4}
ROWS: dict[str, dict[str, object]] = {
    "named, labels too": {"sampler": "named"},
    "progressive, labels too": {"sampler": "progressive:2"},
    "sandwich, labels too": {"sampler": "sandwich:1"},
    "each block by lot, labels too": {"sampler": "sandwich:1", "layers": "each"},
}
ALONE = tuple(f"alone {name}" for name in ("whole", "3/4", "1/2", "1/4", "1/9"))
UNTRAINED = "untrained"
QUARTER = 4
Figures = dict[str, dict[str, list[float]]]
"""Member → `right` and `lost`, a number an image each."""


@dataclass(frozen=True)
class Given:
    """What every row shares."""

    model: Path
    data: Path
    test: Path
    count: int
    batch: int
    rate: float
    seed: int
    members: Mapping[str, str]


def family_for(texts: Sequence[str]) -> Family:
    """The family of some members, each dimension with the choices that they say."""
    raw: dict[str, object] = {"layers": "stages"}
    for name, kind in (("depth", float), ("ffn", float), ("kernel", int)):
        said = [part.partition("=")[2] for text in texts for part in text.split(",") if part.startswith(name)]
        if said:
            raw[name] = sorted({kind(one) for text in said for one in text.split("/")}, reverse=True)
    named = {f"m{number}": text for number, text in enumerate(texts) if text != "full"}
    return (
        family_of(raw if len(raw) > 1 else raw | {"ffn": [1.0]}) if not named else family_of(raw | {"members": named})
    )


def row(name: str, passes: int, given: Given, out: Path) -> Figures:
    """Trains what a row says, and asks its members."""
    texts = [given.members[name.removeprefix("alone ")]] if name in ALONE else list(given.members.values())
    family = family_for(texts)
    how = {**SHARED, **({"sampler": "smallest"} if name in ALONE else ROWS.get(name, {}))}
    how |= {"batch": given.batch, "rate": given.rate}
    steps = passes // QUARTER
    if name in ROWS:
        draws, space = training_of(how).draws, space_of(family, Source.open(given.model).anatomy)
        steps = round(passes / (sum(len(draws(space, Turn(turn, 200))) for turn in range(200)) / 200))
    plan = parse(f"name: {name.replace(', ', '-').replace(' ', '-').replace('/', '-')}\nfamily: {{depth: [1]}}\n")
    plan = replace(plan, family=family, calibration={"tokens": 2048})
    if name == UNTRAINED:
        apply(plan, given.model, out, calibration=given.data, seed=given.seed)
    else:
        train(replace(plan, train={**how, "steps": steps}), given.model, out, given.data)
    return {text: asked(out, text, given, name == UNTRAINED) for text in texts}


def asked(out: Path, subnet: str, given: Given, anew: bool) -> dict[str, list[float]]:
    """What a member makes of test images.

    Args:
        anew: whether its statistics are taken first, on training images.
    """
    model = rg.load(out, dtype=torch.float32)
    if anew and subnet != "full":
        x, _ = images_of(given.data)
        x = x[spread(x, CALIBRATED)]
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        model.regauge.recalibrate(subnet, model, [scaled(some) for some in x[order].split(BATCH)])
    member = model.regauge.member(subnet)
    x, y = images_of(given.test)
    rows = spread(x, given.count)
    logits = []
    with torch.no_grad():
        logits = [member(pixel_values=scaled(some)).logits for some in x[rows].split(BATCH)]
    found = torch.cat(logits)
    lost: Tensor = torch.nn.functional.cross_entropy(found, y[rows], reduction="none")
    return {"right": (found.argmax(1) == y[rows]).float().tolist(), "lost": [round(one, 5) for one in lost.tolist()]}


def table(kept: Mapping[str, Figures], members: Mapping[str, str]) -> str:
    """Rows as text; behind each the gap to the same member alone, in points that are right and in nats."""
    lines = [f"| row | {' | '.join(members)} |", "|---" * (len(members) + 1) + "|"]
    null = {text: kept[f"alone {name}"][text] for name, text in members.items() if f"alone {name}" in kept}
    if null:
        lines.append(f"| each alone | {' | '.join(cell(null.get(text)) for text in members.values())} |")
    for name, found in kept.items():
        if name not in ALONE:
            other = {} if name == UNTRAINED else null
            lines.append(f"| {name} | {' | '.join(cell(found[t], other.get(t)) for t in members.values())} |")
    return "\n".join(lines)


def cell(own: Mapping[str, Sequence[float]] | None, null: Mapping[str, Sequence[float]] | None = None) -> str:
    if own is None:
        return ""
    text = f"{100 * _mean(own['right']):.1f} %, {_mean(own['lost']):.3f}"
    if null is None:
        return text
    right, lost = (_gap(own[word], null[word]) for word in ("right", "lost"))
    return f"{text} ({100 * right[0]:+.1f} ± {100 * right[1]:.1f}, {lost[0]:+.3f} ± {lost[1]:.3f})"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _gap(own: Sequence[float], null: Sequence[float]) -> tuple[float, float]:
    """The mean gap of two rows over the same images, and its standard error."""
    gap = torch.tensor(own, dtype=torch.float64) - torch.tensor(null, dtype=torch.float64)
    return gap.mean().item(), gap.std().item() / math.sqrt(len(gap))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = (UNTRAINED, *ALONE, *ROWS)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="images to learn from, an .npz of 'x' and 'y'")
    parser.add_argument("--test", type=Path, required=True, help="images that are asked")
    parser.add_argument("--rows", nargs="+", choices=rows)
    parser.add_argument("--kernels", action="store_true", help="members of smaller kernels")
    parser.add_argument("--passes", type=int, default=1600, help="of each family")
    parser.add_argument("--batch", type=int, default=64, help="images of a pass")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--count", type=int, default=4000, help="test images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", type=Path, default=ROOT / "out" / "resnet-families.json", help="figures, gone on with"
    )
    said = parser.parse_args()
    members = KERNELS if said.kernels else SIZES
    given = Given(said.model, said.data, said.test, said.count, said.batch, said.rate, said.seed, members)
    asked_for = {name: getattr(said, name) for name in ("passes", "batch", "rate", "count", "seed")}
    asked_for |= {"kernels": True} if said.kernels else {}
    usual = (UNTRAINED, *(f"alone {name}" for name in members if f"alone {name}" in ALONE), *ROWS)
    said.keep.parent.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in said.rows or usual:
            held = json.loads(said.keep.read_text()) if said.keep.exists() else {}
            kept = held["rows"] if held.get("asked") == asked_for else {}
            if name not in kept:
                kept[name] = row(name, said.passes, given, Path(folder) / name.replace("/", "-"))
                said.keep.write_text(json.dumps({"asked": asked_for, "rows": kept}))
            print(table(kept, members), flush=True)


if __name__ == "__main__":
    main()
