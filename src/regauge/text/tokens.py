"""What text asks of a tokenizer: ids of a text, the text of ids, and the special tokens around one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from torch import Tensor

from regauge.errors import TextError


@runtime_checkable
class Tokenizer(Protocol):
    """What is asked of a tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


def frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and after a text."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def within(ids: Iterable[Tensor], rows: int, tokenizer: Tokenizer) -> None:
    """Refuses ids that the model's table of embeddings has no row for.

    Args:
        ids: int64, of any shapes.
        rows: of the table; 0: not known, and nothing is looked at.

    Raises:
        TextError: names the largest id, what it stands for, and the size of the table.
    """
    largest = max((int(some.max()) for some in ids if some.numel()), default=-1) if rows else -1
    if largest >= rows > 0:
        raise TextError(
            f"the text holds token {largest} ({tokenizer.decode([largest])!r}), which the tokenizer has and the model "
            f"has not: its table of embeddings has {rows} rows, so its ids end at {rows - 1}; give the tokenizer that "
            "the model was trained with, or resize the model's embeddings first."
        )
