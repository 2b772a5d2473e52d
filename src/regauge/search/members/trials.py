"""Members measured: true KL to the original on a text, and speed as they run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from regauge.elastic.subnet import Subnet
from regauge.measure.cost import DECODE, PROMPT, Speed, decode_rate, interleave, prefill_rate
from regauge.measure.images import read
from regauge.measure.quality import Quality, Scores, divergence, summarise
from regauge.measure.reading import Read, logits_of, scores_of
from regauge.measure.subject import Outputs, logits
from regauge.text.windows import Batch, Windows

TOKENS = 2048
"""Of a batch."""
HELD = 2**27
"""Log-probabilities of the original that are kept, at the most."""


class Trials:
    """The original's log-probabilities of a text, which members are held to.

    Attributes:
        batches: as far as they are kept.
    """

    def __init__(self, text: Read, original: Outputs, vocabulary: int) -> None:
        self.text = text
        self.batches: list[Batch] = []
        self.known = list[Tensor]()
        if isinstance(text, Windows):
            batches = list(text.batches(self.batch(vocabulary)))
            while batches and sum(batch.ids_BT.numel() for batch in batches) * vocabulary > HELD and len(batches) > 1:
                batches.pop()
            self.batches = batches
            for batch, found_BTV in zip(batches, original(), strict=False):
                self.known.append(torch.log_softmax(self._scored(batch, found_BTV), -1))
        else:
            self.known = [torch.log_softmax(found.flatten(0, -2).float(), -1) for found in original()]

    @staticmethod
    def batch(vocabulary: int) -> int:
        """Tokens of a batch: fewer where the vocabulary is large."""
        return min(TOKENS, max(256, HELD // vocabulary))

    def kl(self, member: Any) -> float:
        """Nats a token of a loaded member, or an image where it gives each one class."""
        total, tokens = 0.0, 0
        with torch.inference_mode():
            for log_p_NV, log_q_NV in zip(self.known, self._read(member), strict=True):
                kl_N, _ = divergence(log_p_NV, log_q_NV)
                total, tokens = total + float(kl_N.double().sum()), tokens + kl_N.numel()
        return total / max(tokens, 1)

    def _read(self, member: Any) -> Iterator[Tensor]:
        """Log-probabilities of a member, batch by batch."""
        if not isinstance(self.text, Windows):
            for found in read(member, self.text):
                yield torch.log_softmax(found.flatten(0, -2).float(), -1)
            return
        for batch, found_BTV in zip(self.batches, logits(member, [b.ids_BT for b in self.batches]), strict=True):
            yield torch.log_softmax(self._scored(batch, found_BTV), -1)

    @staticmethod
    def _scored(batch: Batch, found_BTV: Tensor) -> Tensor:
        """(N, V) of the tokens that have a next one; padding is left out."""
        return torch.cat([found_BTV[row, : length - 1].float() for row, length in enumerate(batch.lengths)])


def quality(text: Read, original: Outputs, members: Sequence[Any], seed: int) -> list[Quality]:
    """Figures with intervals, of members that are loaded, side by side."""
    with torch.inference_mode():
        scores: list[Scores] = scores_of(text, original(), [logits_of(one, text, TOKENS) for one in members], TOKENS)
    return [summarise(found, seed) for found in scores]


def speeds(members: dict[str, Any], prompt_BT: Tensor, resource: str, rounds: int) -> dict[str, Speed]:
    """Tokens a second of several members, in turn."""
    if resource == "decode":
        runs = {name: decode_rate(one, prompt_BT[:, :PROMPT], DECODE) for name, one in members.items()}
    else:
        runs = {name: prefill_rate(one, prompt_BT) for name, one in members.items()}
    return interleave(runs, rounds)


def member(model: Any, subnet: Subnet) -> Any:
    """A member of a loaded family as a model of its own, over the same memory."""
    found = model.regauge.tree(model.regauge.settled(subnet), model)
    return model if found is None else found
