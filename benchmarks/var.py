"""How good are the images that a small VAR draws, at full depth and with a subnet on the late scales?

    python scripts/train_var.py mnist16 --data mnist.npz -o out/var/mnist16
    python benchmarks/var.py out/var/mnist16 --data mnist.npz
    python benchmarks/var.py out/var/mnist --data mnist.npz --rivals

A classifier is trained on real images and asked what was drawn; the Fréchet distance is that of its features to those
of real training images (Gaussians fitted to both). Beside drawn images stand: real test images; test images through
the tokenizer; and, as a control, test images whose tokens were shuffled among them, place by place, so that each place
has the right tokens and no image holds together. Means over seeds, ± standard deviation of them.
Time is of one thread's CPU, medians; bytes are of keys and values at their most. `--rivals` sets rules of a cache and
of tokens beside VARiant, drawing in turn from the same noise: agreement is the share of tokens that are those of the
model as it is, at full depth.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from train_var import CONFIGS, EARLY, LATE, images_of  # noqa: E402

from regauge.hosts import host_of  # noqa: E402
from regauge.hosts.regauge.heads import by_kinds, by_layers  # noqa: E402
from regauge.hosts.regauge.sampling import Taste  # noqa: E402
from regauge.hosts.regauge.stages import Stages, late  # noqa: E402
from regauge.hosts.transformers.load import load  # noqa: E402
from regauge.plan import parse  # noqa: E402
from regauge.plan.passing import passing  # noqa: E402
from regauge.plan.resolution import resolve  # noqa: E402

BATCH = 100
NAMES = ("full", "variant", "variant-1", "fixed", "fixed-1")
HEADS = ("images", "accuracy, %", "Fréchet distance", "CPU ms an image", "cache bytes an image")


class Judge(nn.Module):
    """A small classifier, whose last hidden layer gives features (N, 64)."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 16, 5, stride=2, padding=2)
        self.second = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.third = nn.Linear(32 * ((side + 3) // 4) ** 2, 64)
        self.last = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        made = functional.relu(self.second(functional.relu(self.first(images))))
        found: Tensor = functional.relu(self.third(made.flatten(1)))
        return found

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.last(self.features(images))
        return found


def judge_of(images: Tensor, labels: Tensor, steps: int, seed: int) -> Judge:
    """A classifier trained on real images (N, C, h, w) from −1 to 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = Judge(images.shape[1], images.shape[-1])
    optimiser = torch.optim.AdamW(found.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        some = torch.randint(len(images), (64,), generator=generator)
        optimiser.zero_grad()
        functional.cross_entropy(found(images[some]), labels[some]).backward()
        optimiser.step()
    return found.eval().requires_grad_(False)


def frechet(one: Tensor, other: Tensor) -> float:
    """The Fréchet distance of the Gaussians fitted to two sets of features (n, F): 1706.08500."""
    (mean1, cov1), (mean2, cov2) = ((f.double().mean(0), f.double().T.cov()) for f in (one, other))
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    both = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * both)


@dataclass(frozen=True)
class Row:
    """One line: accuracy in percent and Fréchet distance a seed; milliseconds of CPU an image, and bytes an image."""

    name: str
    accuracy: Sequence[float]
    distance: Sequence[float]
    milliseconds: float | None = None
    bytes: int | None = None
    agreement: float | None = None

    def cells(self) -> list[str]:
        return [
            self.name,
            _told(self.accuracy, 1),
            _told(self.distance, 2),
            "" if self.milliseconds is None else f"{self.milliseconds:.2f}",
            "" if self.bytes is None else f"{self.bytes:,}",
            *([] if self.agreement is None else [f"{100 * self.agreement:.1f}"]),
        ]


def _told(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


@dataclass(frozen=True)
class Bench:
    """What every row is measured with."""

    judge: Judge
    real: Tensor  # features of training images
    count: int
    seeds: int
    taste: Taste

    def of_images(self, name: str, make: Callable[[int], tuple[Tensor, Tensor]]) -> Row:
        """`make` gives images and their classes of a seed."""
        accuracy, distance = [], []
        for seed in range(self.seeds):
            images, labels = make(seed)
            found = torch.cat([self.judge.features(some) for some in images.split(500)])
            accuracy.append(100 * float((self.judge.last(found).argmax(1) == labels).float().mean()))
            distance.append(frechet(self.real, found))
        return Row(name, accuracy, distance)

    def of_model(self, name: str, model: Any, subnet: Stages) -> Row:
        """Images that a model draws, as many of each class."""
        most, seconds = 0, []

        def make(seed: int) -> tuple[Tensor, Tensor]:
            nonlocal most
            labels = torch.arange(self.count) % model.config.num_classes
            made = []
            for number, some in enumerate(labels.split(BATCH)):
                began = time.process_time()
                drawn = model.sample(some, (seed << 16) + number, self.taste, subnet)
                seconds.append((time.process_time() - began) / len(some))
                most = drawn.most_cache_bytes // len(some)
                made.append(drawn.images * 2 - 1)
            return torch.cat(made), labels

        row = self.of_images(name, make)
        return Row(name, row.accuracy, row.distance, 1000 * statistics.median(seconds), most)

    def of_rivals(self, rivals: Sequence[Rival]) -> list[Row]:
        """Images of several ways to draw, in turn, from the same noise; the first is what others agree with."""
        found = [Drawn() for _ in rivals]
        labels = torch.arange(self.count) % rivals[0].model.config.num_classes
        for seed in range(self.seeds):
            features: list[list[Tensor]] = [[] for _ in rivals]
            for number, some in enumerate(labels.split(BATCH)):
                made = []
                for rival, kept, each in zip(rivals, features, found, strict=True):
                    began = time.process_time()
                    made.append(rival.model.sample(some, (seed << 16) + number, self.taste, rival.subnet))
                    each.seconds.append((time.process_time() - began) / len(some))
                    each.most = made[-1].most_cache_bytes // len(some)
                    each.alike.append(float((made[-1].tokens == made[0].tokens).float().mean()))
                    kept.append(self.judge.features(made[-1].images * 2 - 1))
            for kept, each in zip(features, found, strict=True):
                each.add(self, torch.cat(kept), labels)
        return [each.row(rival.name) for rival, each in zip(rivals, found, strict=True)]


@dataclass(frozen=True)
class Rival:
    """One way to draw."""

    name: str
    model: Any
    subnet: Stages = None


@dataclass
class Drawn:
    """What one way to draw gave so far."""

    accuracy: list[float] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    alike: list[float] = field(default_factory=list)
    most: int = 0

    def add(self, bench: Bench, features: Tensor, labels: Tensor) -> None:
        """A seed's images."""
        self.accuracy.append(100 * float((bench.judge.last(features).argmax(1) == labels).float().mean()))
        self.distance.append(frechet(bench.real, features))

    def row(self, name: str) -> Row:
        milliseconds = 1000 * statistics.median(self.seconds)
        return Row(name, self.accuracy, self.distance, milliseconds, self.most, statistics.mean(self.alike))


def rivals_of(trained: Path, keep: float, half: Stages) -> list[Rival]:
    """VARiant, rules of a cache and rules of tokens, on what scripts/train_var.py wrote."""
    folder = trained / "full"
    model: Any = load(folder)
    labels = [label % model.config.num_classes for label in range(50)]  # as many as HACK samples
    anatomy = host_of(folder).open(folder).anatomy
    read = {"part": "window-attention", "queries": 16, "pool": 1}
    even = {"budget": f"uniform:{keep:g}", "disposal": "drop"}
    caches = {
        "by lot": {"score": "by-lot", **even},
        "by attention": {"score": read, **even},
        "heads by kind (HACK)": by_kinds(model, labels, keep),
        "layers by their past (ScaleKV's kind)": by_layers(model, labels, keep),
    }
    found = [Rival("full depth", model), Rival("half depth late, no step on it", model, half)]
    found += [
        Rival(f"{name}, half depth late", load(trained / name), half)
        for name in ("variant", "fixed")
        if (trained / name).is_dir()
    ]
    found += [Rival(f"cache of {keep:g}: {name}", load(folder, cache=rule)) for name, rule in caches.items()]
    behind = f"blocks.{{{','.join(str(block) for block in range(1, anatomy.blocks - 1))}}}.residual"
    for share in (0.5, 0.25):
        for name, score in (("detail (FastVAR's kind)", "detail"), ("lattice", "lattice")):
            rule = {"score": score, "schedule": f"late:{share:g}", "disposal": "earlier-scale"}
            fewer: Any = load(folder)
            points = resolve(parse({"name": name, "tokens": {behind: rule}}), anatomy).at("tokens")
            fewer.pass_by(passing(points, anatomy))
            found.append(Rival(f"{share:g} of the last scale's tokens: {name}", fewer))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("trained", type=Path, help="what scripts/train_var.py wrote")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, help="real test images, where --data holds none")
    parser.add_argument("--count", type=int, default=1000, help="images a seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", default=",".join(NAMES), help="of what was trained, which draw")
    parser.add_argument("--rivals", action="store_true", help="rules of a cache and of tokens beside VARiant")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the tokens that rules of a cache keep")
    parser.add_argument("--judge-steps", type=int, default=1500)
    said = parser.parse_args()
    torch.set_num_threads(1)
    models = {name: load(said.trained / name) for name in NAMES if (said.trained / name).is_dir()}
    config = models["full"].config
    assert any(one["image_size"] == config.image_size for one in CONFIGS.values())
    train, labels = images_of(said.data, config.image_size)
    test, test_labels = images_of(said.test or said.data, config.image_size, "test")
    judge = judge_of(train, labels, said.judge_steps, 0)
    known, _ = _some(train, labels, 10000, 0)
    real = torch.cat([judge.features(some) for some in known.split(500)])
    bench = Bench(judge, real, said.count, said.seeds, Taste(1.5, 0, 0.96))
    rows = [bench.of_images("real test images", lambda seed: _some(test, test_labels, said.count, seed))]
    codec = models["full"].vae

    def rebuilt(seed: int, shuffled: bool) -> tuple[Tensor, Tensor]:
        images, classes = _some(test, test_labels, said.count, seed)
        ids = [torch.cat(parts) for parts in zip(*(codec.encode(some) for some in images.split(250)), strict=True)]
        if shuffled:
            generator = torch.Generator().manual_seed(seed)
            order = [torch.rand(part.shape, generator=generator).argsort(0) for part in ids]
            ids = [part.gather(0, places) for part, places in zip(ids, order, strict=True)]
        parts = zip(*(part.split(250) for part in ids), strict=True)
        return torch.cat([codec.decode(part) for part in parts]), classes

    with torch.no_grad():
        half = late(len(config.areas), EARLY, LATE)
        if said.rivals:
            show([*HEADS, "agreement, %"], bench.of_rivals(rivals_of(said.trained, said.keep, half)))
            return
        rows.append(bench.of_images("through the tokenizer", lambda seed: rebuilt(seed, False)))
        rows.append(bench.of_images("control: tokens shuffled", lambda seed: rebuilt(seed, True)))
        for name, model in ((name, model) for name, model in models.items() if name in said.models.split(",")):
            rows.append(bench.of_model(f"{name}, full depth", model, None))
            rows.append(bench.of_model(f"{name}, half depth late", model, half))
    show(list(HEADS), rows)


def show(heads: list[str], rows: Sequence[Row]) -> None:
    for line in (heads, ["---"] * len(heads), *(row.cells() for row in rows)):
        print("| " + " | ".join(line) + " |")


def _some(images: Tensor, labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    picked = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    return images[picked], labels[picked]


if __name__ == "__main__":
    main()
