"""Text cut into windows, each with the document it came from: what every quality figure is measured on.

A window never spans two documents. Legend: B windows in a batch, T tokens of the longest of them, D documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.errors import TextError
from regauge.text.tokens import Tokenizer


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows with their documents.

    Attributes:
        ids: one 1-D int64 tensor a window, two tokens or more.
        document: index of each window's document, 0 … D − 1, not falling.
        bytes: UTF-8 bytes that the predicted tokens of each window stand for (see `covered_bytes`).
        description: where the text comes from, in words.
        halved: whether the first half of each window is read and not scored: what continues it reads the cache.
    """

    ids: tuple[Tensor, ...]
    document: tuple[int, ...]
    bytes: tuple[int, ...]
    description: str = ""
    halved: bool = False

    @property
    def documents(self) -> int:
        return len(set(self.document))

    @property
    def predicted(self) -> int:
        """Tokens that have a predecessor in their window: those that are scored."""
        return sum(len(ids) - 1 - begin(len(ids), self.halved) for ids in self.ids)

    def hash(self) -> str:
        """sha256 over the ids, window by window."""
        digest = hashlib.sha256()
        for ids, document in zip(self.ids, self.document, strict=True):
            digest.update(f"{document}:{len(ids)}:".encode())
            digest.update(ids.numpy().tobytes())
        return digest.hexdigest()

    def batches(self, tokens: int = 4096) -> Iterator[Batch]:
        """Windows in order, several to a batch of at most `tokens` padded tokens (one window at least).

        Short windows are padded on the right: under a causal mask the padding is seen by nothing that is scored.
        """
        start = 0
        while start < len(self.ids):
            stop, longest = start, 0
            while stop < len(self.ids):
                longest_next = max(longest, len(self.ids[stop]))
                if stop > start and longest_next * (stop + 1 - start) > tokens:
                    break
                longest, stop = longest_next, stop + 1
            ids_BT = torch.zeros(stop - start, longest, dtype=torch.int64, device="cpu")
            for row, ids in enumerate(self.ids[start:stop]):
                ids_BT[row, : len(ids)] = ids
            lengths = tuple(len(ids) for ids in self.ids[start:stop])
            yield Batch(ids_BT, lengths, self.document[start:stop], self.halved)
            start = stop

    def take(self, tokens: int, seed: int = 0) -> Windows:
        """A sample of whole windows, at least `tokens` predicted tokens where there are as many, spread evenly."""
        if tokens >= self.predicted:
            return self
        order = torch.randperm(
            len(self.ids), generator=torch.Generator().manual_seed(seed), dtype=torch.int64, device="cpu"
        ).tolist()
        kept: list[int] = []
        total = 0
        for index in order:
            if total >= tokens:
                break
            kept.append(index)
            total += len(self.ids[index]) - 1
        kept.sort()
        names = {old: new for new, old in enumerate(sorted({self.document[index] for index in kept}))}
        return Windows(
            tuple(self.ids[index] for index in kept),
            tuple(names[self.document[index]] for index in kept),
            tuple(self.bytes[index] for index in kept),
            self.description,
        )

    def halves(self) -> tuple[Windows, Windows]:
        """Two texts: every other document, or every other window of the only one."""
        owners = range(len(self.ids)) if self.documents < 2 else self.document
        return self._some(owners, 0), self._some(owners, 1)

    def _some(self, owners: Sequence[int], odd: int) -> Windows:
        kept = [index for index, owner in enumerate(owners) if owner % 2 == odd]
        fields = (self.ids, self.document, self.bytes)
        ids, document, size = (tuple(field[index] for index in kept) for field in fields)
        return Windows(ids, document, size, self.description, self.halved)  # type: ignore[arg-type]  # as they were


@dataclass(frozen=True, eq=False)
class Batch:
    """Padded ids with the true length and the document of each row."""

    ids_BT: Tensor
    lengths: tuple[int, ...]
    document: tuple[int, ...]
    halved: bool = False


def begin(length: int, halved: bool) -> int:
    """The first place of a window whose next token is scored."""
    return length // 2 - 1 if halved and length > 3 else 0


def covered_bytes(ids: Sequence[int], tokenizer: Tokenizer) -> int:
    """UTF-8 bytes that the predicted tokens stand for.

    The first token of a window is given, not predicted, so its bytes do not count: the rule is the length of the
    decoded window less the length of its decoded first token. (Decoding the rest alone would lose a leading space
    under some tokenizers.)
    """
    whole = len(tokenizer.decode(list(ids)).encode())
    first = len(tokenizer.decode(list(ids[:1])).encode())
    return max(whole - first, 0)


def cut(
    documents: Sequence[str],
    tokenizer: Tokenizer,
    length: int,
    shortest: int = 16,
    description: str = "",
    before: Sequence[int] = (),
) -> Windows:
    """Documents → windows of at most `length` tokens. Tails shorter than `shortest` tokens are left out.

    Args:
        before: special tokens that open every window (BOS). They are given, not predicted.
    """
    if length < len(before) + 2:
        raise TextError(f"a window needs {len(before) + 2} tokens or more; you asked for {length}.")
    ids: list[Tensor] = []
    owner: list[int] = []
    size: list[int] = []
    found = 0
    for text in documents:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        room = length - len(before)
        pieces = [[*before, *tokens[start : start + room]] for start in range(0, len(tokens), room)]
        pieces = [piece for piece in pieces if len(piece) >= min(shortest, length)]
        for piece in pieces:
            ids.append(torch.tensor(piece, dtype=torch.int64, device="cpu"))
            owner.append(found)
            size.append(covered_bytes(piece, tokenizer))
        found += bool(pieces)
    if not ids:
        raise TextError(
            f"the text gives no window of {min(shortest, length)} tokens or more; we saw {len(documents)} documents. "
            "Give a longer text."
        )
    return Windows(tuple(ids), tuple(owner), tuple(size), description)


def stretches(text: str, size: int) -> list[str]:
    """One long text as documents of about `size` characters, cut at blank lines, else at line ends.

    A bootstrap over documents says nothing when there is one document. A novel is then cut into stretches, and the
    record says so.
    """
    found: list[str] = []
    start = 0
    while start < len(text):
        stop = start + size
        if stop < len(text):
            for mark in ("\n\n", "\n", " "):
                at = text.rfind(mark, start + size // 2, stop)
                if at > start:
                    stop = at + len(mark)
                    break
        found.append(text[start:stop])
        start = stop
    return [piece for piece in found if piece.strip()]
