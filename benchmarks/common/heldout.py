"""Text that a model never saw, and how far from it another comes: what benchmarks of quality share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regauge.hosts import host_of
from regauge.measure.compare import BATCH
from regauge.measure.quality import Scores, compare
from regauge.text.corpora import corpus
from regauge.text.split import pieces
from regauge.text.tokens import frame
from regauge.text.windows import cut


class HeldOut:
    """A model beside what is made of it, on windows of one text.

    Attributes:
        windows: of `length` tokens; `halved`: their second halves are scored, behind the cache.
    """

    def __init__(self, model: Path, text: Path, length: int, tokens: int, halved: bool = False) -> None:
        self.host = host_of(model)
        tokenizer = self.host.tokenizer(self.host.folder(str(model)))
        read = corpus(text)
        whole = cut(pieces(read), tokenizer, length, description=read.description, before=frame(tokenizer)[0])
        self.windows, self._most = replace(whole.take(tokens, 0), halved=halved), 1 if halved else BATCH
        self._inputs = [{"input_ids": batch.ids_BT} for batch in self.windows.batches(self._most)]
        self._original = self.host.outputs(model, self._inputs)
        told = f"{self.windows.predicted:,} held-out tokens of {self.windows.documents} documents"
        print(f"{model.name}, {told}; nats a token")

    def scores(self, artifact: Path) -> Scores:
        """Of what was made of the model, a token."""
        return compare(self.windows, self._original(), self.host.outputs(artifact, self._inputs)(), self._most)


def windows(tokenizer: Any, folder: Path, count: int, length: int) -> list[Tensor]:
    """(1, length) tokens each, of as many files as there are."""
    files = sorted(folder.glob("*.txt"))
    found = []
    for number in range(count):
        path = files[number % len(files)]
        text = path.read_text(encoding="utf-8")[20_000 * (1 + number // len(files)) :][: 8 * length]
        found.append(torch.tensor([tokenizer(text)["input_ids"][:length]], dtype=torch.int64, device="cpu"))
    return found


@torch.no_grad()
def log_probabilities(model: Any, texts: list[Tensor]) -> list[Tensor]:
    """(1, T, V) of each text, float32."""
    return [model(ids, use_cache=False).logits.float().log_softmax(-1) for ids in texts]


def divergence(want: list[Tensor], found: list[Tensor]) -> tuple[float, float]:
    """(mean, standard error over windows) of KL a token."""
    each = torch.tensor(
        [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(want, found, strict=True)],
        dtype=torch.float64,
        device="cpu",
    )
    return float(each.mean()), float(each.std() / len(each) ** 0.5)
