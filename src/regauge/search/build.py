"""From an allocation to an artifact, and from the artifact to figures: what a budget is held against.

The artifact is made by the engine from an explicit recipe, loaded as a user would load it, and run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regauge.artifact.receipt import Receipt
from regauge.engine import apply
from regauge.engine.watchdog import Watcher, nobody
from regauge.hosts.transformers.load import load
from regauge.hosts.transformers.sampling import whole_model
from regauge.hosts.transformers.source import Source
from regauge.measure.cost import (
    Costs,
    Speed,
    cache_bytes_a_token,
    decode_rate,
    interleave,
    memory,
    prefill_rate,
    weight_bytes,
)
from regauge.measure.quality import Scores, compare
from regauge.plan import Plan
from regauge.search.model import Subject
from regauge.text.split import Texts
from regauge.text.windows import Windows

DECODE, PREFILL, PROMPT = 24, 256, 16  # tokens timed, tokens of a prefill, tokens before decoding


@dataclass(frozen=True, eq=False)
class Built:
    """An artifact on disk, with what was read from it."""

    folder: Path
    receipt: Receipt
    search: Scores  # on the search text

    @property
    def bytes(self) -> int:
        return self.receipt.bytes_after

    @property
    def kl(self) -> float:
        return float(self.search.kl_N.mean())


def build(
    plan: Plan, subject: Subject, texts: Texts, folder: Path, seed: int, command: str, watch: Watcher = nobody
) -> Built:
    """Makes the artifact in `folder` (an earlier one there is replaced), loads it and scores it on the search text."""
    receipt = apply(
        plan,
        subject.source.path,
        folder,
        calibration=list(texts.calibration),
        tokens=texts.tokens,
        length=texts.length,
        seed=seed,
        force=True,
        progress=watch,
        command=command,
    )
    return Built(folder, receipt, score(load(folder, dtype=torch.float32), subject, texts.search))


@torch.no_grad()
def score(model: nn.Module, subject: Subject, windows: Windows, tokens: int = 2048) -> Scores:
    """A loaded model against the subject, whose own forward is streamed beside it."""
    inputs = [batch.ids_BT for batch in windows.batches(tokens)]
    return compare(windows, subject.runner.logits(inputs, subject.read), logits(model, inputs), tokens)


def logits(model: Any, inputs: list[Tensor]) -> Iterator[Tensor]:  # any causal model of the host
    """(B, T, V) of each batch."""
    for ids_BT in inputs:
        yield model(input_ids=ids_BT, use_cache=False).logits


def in_bf16(source: Source) -> nn.Module:
    """The source as a speed budget counts it: transformers' own model in bf16."""
    model: nn.Module = whole_model(source).to(torch.bfloat16)
    return model


def speeds(source: Source, folder: Path, turns: int) -> dict[str, dict[str, Speed]]:
    """`decode` and `prefill` of `original` (bf16) and `compressed`, their rounds interleaved."""
    models = {"original": in_bf16(source), "compressed": load(folder, dtype=torch.bfloat16)}
    vocabulary = source.anatomy.site("embed").shape[0]
    generator = torch.Generator().manual_seed(0)
    most = min(PREFILL, int(getattr(source.config, "max_position_embeddings", PREFILL)) // 2)
    prompt = torch.randint(0, vocabulary, (1, most), generator=generator)
    short = prompt[:, : min(PROMPT, most)]
    return {
        "decode": interleave({name: decode_rate(model, short, DECODE) for name, model in models.items()}, turns),
        "prefill": interleave({name: prefill_rate(model, prompt) for name, model in models.items()}, turns),
    }


def costs(source: Source, folder: Path, turns: int, resident: bool) -> dict[str, Costs]:
    """Everything measured about the cost of both models."""
    found = speeds(source, folder, turns)
    prompt = torch.ones(1, 32, dtype=torch.int64)
    cache = {
        "original": cache_bytes_a_token(in_bf16(source), prompt),
        "compressed": cache_bytes_a_token(load(folder, dtype=torch.bfloat16), prompt),
    }
    paths = {"original": source.path, "compressed": folder}
    return {
        name: Costs(
            decode=found["decode"][name],
            prefill=found["prefill"][name],
            memory=memory(path, "bfloat16") if resident else None,
            cache_bytes=cache[name],
            bytes=weight_bytes(path),
        )
        for name, path in paths.items()
    }
