"""Picos and their checkpoints, run by transformers and by the runner, for the tests that compare the two."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor

from regauge.anatomy.model import Weights
from regauge.hosts.transformers.runner import Runner
from regauge.hosts.transformers.source import Source
from tests.pico import batches, pico, save


@cache
def opened(name: str) -> tuple[Any, Source]:
    """A pico model in float64 and its checkpoint."""
    model = pico(name, dtype=torch.float64)
    return model, Source.open(save(model, Path(mkdtemp()) / name))


def stock(model: Any, inputs: Any) -> Tensor:
    """What transformers' own forward gives: logits, or the last hidden states."""
    found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return found["logits"] if "logits" in found else found["last_hidden_state"]


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def run(name: str, change: dict[str, Tensor] | None = None, **taps: Any) -> Tensor:
    """The output for one batch of a pico; `change` replaces canonical tensors, `taps` go where the site is."""
    model, source = opened(name)
    runner = Runner(source, dtype=torch.float64)

    def weights(block: int | None) -> Weights:
        return {key: (change or {}).get(key, tensor) for key, tensor in source.block(block).items()}

    def of(block: int | None, embedding: bool = False) -> dict[str, Any]:
        names = {
            s.name for s in source.anatomy.in_block(block) if (s.kind == "patch") == embedding or block is not None
        }
        return {kind: {site: f for site, f in some.items() if site in names} for kind, some in taps.items()}

    with torch.no_grad():
        first = of(None, embedding=True)
        states = runner.begin(batches(model)[:1], weights(None), first.get("watch"), first.get("inputs"))
        for block in range(source.anatomy.blocks):
            states = runner.block(block, weights(block), states, **of(block))
        return next(runner.tail(weights(None), states, **of(None)))
