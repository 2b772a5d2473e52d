"""The three texts of a search, which never share a stretch: calibration, search, evaluation.

Calibration text is what rounders see, search text is where variants are compared, evaluation text is read once, by the
final figures. One text of the user's is cut into stretches and split; where there is none, the model samples one from
itself, and says so. Nothing here knows a model: what is asked of one comes as a `Reader`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from regauge.errors import TextError
from regauge.text.calibration import Calibration, draw
from regauge.text.corpora import Corpus, Where, corpus
from regauge.text.tokens import Tokenizer, frame, within
from regauge.text.windows import Windows, cut, stretches

READ = 24 * 2**20  # bytes of a text that are looked at
SHARES = (0.6, 0.15, 0.25)  # calibration, search, evaluation, where one text has to serve for all
LONG = 80  # characters of a line that two texts do not share by chance


@dataclass(frozen=True)
class Sizes:
    """Tokens wanted of each text."""

    calibration: int = 32768
    search: int = 4096
    evaluation: int = 16384


@dataclass(frozen=True, eq=False)
class Reader:
    """What the texts are cut for.

    Attributes:
        tokenizer: the model's.
        length: tokens of a window.
        rows: of the model's table of embeddings; 0: not known.
        sample: so many windows → texts that the model writes itself, and how they begin; asked where no text is given.
    """

    tokenizer: Tokenizer
    length: int
    sample: Callable[[int], tuple[list[str], str]]
    rows: int = 0

    def cut(self, texts: Sequence[str], tokens: int, said: str) -> Windows:
        """Windows of at least so many predicted tokens, where the texts have as many, opened as the model wants."""
        before = frame(self.tokenizer)[0]
        found = cut(_enough(texts, tokens), self.tokenizer, self.length, description=said, before=before).take(tokens)
        within(found.ids, self.rows, self.tokenizer)
        return found

    def draw(self, texts: Sequence[str], tokens: int, said: str, seed: int) -> Calibration:
        """What calibrates: the windows that `apply` draws from the same texts, as many as there are up to `tokens`."""
        found = draw(replace(corpus(list(texts)), description=said), self.tokenizer, tokens, self.length, seed)
        within([found.inputs], self.rows, self.tokenizer)
        return found


class Text(BaseModel):
    """A text that the run read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str  # calibration | search | evaluation
    description: str
    tokens: int
    documents: int
    sha256: str


@dataclass(frozen=True, eq=False)
class Texts:
    """What the search reads. `calibration` is text, for `apply`; the others are windows with documents.

    Attributes:
        tokens: calibration tokens to be read.
        windows_NT: those tokens, in windows of one length.
    """

    calibration: tuple[str, ...]
    tokens: int
    length: int
    windows_NT: Tensor
    search: Windows
    evaluation: Windows
    prompts: tuple[str, ...]  # of the evaluation text, for samples side by side
    records: tuple[Text, ...]
    notes: tuple[str, ...]

    @property
    def given(self) -> dict[str, Any]:
        """What `apply` reads."""
        return {"calibration": list(self.calibration), "tokens": self.tokens, "length": self.length}

    def batches(self, tokens: int, size: int) -> list[Tensor]:
        """So many tokens to calibrate on, the first, for they come in any order; in batches of at most `size`."""
        rows = self.windows_NT[: max(1, tokens // self.length)]
        return list(torch.split(rows, max(1, size // rows.shape[1])))


def prepare(reader: Reader, calibration: Where | None, evaluation: Where | None, sizes: Sizes, seed: int = 0) -> Texts:
    """Opens, checks, splits and cuts the texts.

    Raises:
        TextError: a text is missing, empty, binary or too short.
    """
    length = reader.length
    notes: list[str] = []
    seen, held_out, same = _apart(calibration, evaluation)
    if same:
        notes.append("--calibration and --eval are one text: it was cut into stretches and split between them")
    if seen is None and held_out is None:
        drawn, said = _sampled(reader, sizes)
        first, second, third = split(drawn, SHARES, seed)
        named = (said,) * 3
        notes.append(f"no text was given: {said}. Figures on it say how near the models are, not how good they are")
    elif seen is not None and held_out is not None:
        told = _overlap(seen, held_out)
        notes += told.notes
        given, third = _once(pieces(seen, told.shared), notes), _shuffled(pieces(held_out), seed)
        share = min(0.3, max(0.05, sizes.search * 12 / max(sum(map(len, given)), 1)))
        first, second = split(given, (1 - share, share), seed)
        named = (seen.description, seen.description, held_out.description)
    else:
        one = seen if seen is not None else held_out
        assert one is not None, "the case of no text was taken above"
        first, second, third = split(_once(pieces(one), notes), SHARES, seed)
        named = (one.description,) * 3
        if not same:
            notes.append("one text was given: it was cut into stretches and split; none serves twice")
    search = reader.cut(second, sizes.search, f"search: {named[1]}")
    held = reader.cut(third, sizes.evaluation, f"evaluation: {named[2]}")
    texts = _enough(first, sizes.calibration)
    read = reader.draw(texts, sizes.calibration, named[0], seed)
    tokens = min(sizes.calibration, read.tokens)
    if tokens < 2 * length:
        raise TextError(f"{named[0]} leaves {tokens} tokens to calibrate on; give a longer text ({2 * length} or more)")
    sha256 = str(read.details["text_sha256"])
    record = Text(role="calibration", description=named[0], tokens=tokens, documents=len(texts), sha256=sha256)
    return Texts(
        calibration=tuple(texts),
        tokens=tokens,
        length=length,
        windows_NT=read.inputs,
        search=search,
        evaluation=held,
        prompts=tuple(_prompt(text) for text in third[:6]),
        records=(record, _record("search", search), _record("evaluation", held)),
        notes=tuple(notes),
    )


def _apart(calibration: Where | None, evaluation: Where | None) -> tuple[Corpus | None, Corpus | None, bool]:
    first, second = (None if one is None else corpus(one) for one in (calibration, evaluation))
    if first is not None and second is not None and first.sha256 == second.sha256:
        return first, None, True
    return first, second, False


@dataclass(frozen=True)
class Overlap:
    """What two texts have in common: documents by hash, and what is to be said."""

    shared: frozenset[str]
    notes: tuple[str, ...]


def _overlap(seen: Corpus, held_out: Corpus) -> Overlap:
    """Documents and long lines that stand in both texts.

    Raises:
        TextError: every document to calibrate on is one to evaluate on.
    """
    first, second = _read(seen), _read(held_out)
    own = {_sha(text) for text in second}
    shared = frozenset(_sha(text) for text in first) & own
    apart = [text for text in first if _sha(text) not in shared]
    if not apart:
        raise TextError(
            "every document of --calibration is in --eval too; give other text to one of them, or one text to one of "
            "them alone, which is then split."
        )
    notes = []
    if shared:
        notes.append(
            f"{len(first) - len(apart)} of {len(first)} documents of --calibration are in --eval too, and were not "
            "calibrated on"
        )
    lines = {line for text in second for line in _long(text)}
    twice = lines & {line for text in apart for line in _long(text)}
    if twice:
        notes.append(
            f"{len(twice):,} of {len(lines):,} lines of {LONG} or more characters of --eval stand in documents of "
            "--calibration too: figures on them are not of text that the search never saw"
        )
    return Overlap(shared, tuple(notes))


def _once(texts: Sequence[str], notes: list[str]) -> list[str]:
    """Each text once, so that none lies on both sides of a split; says how many were the same."""
    found = list(dict.fromkeys(texts))
    if len(found) < len(texts):
        notes.append(f"{len(texts) - len(found)} of {len(texts)} stretches of the text repeat others and are read once")
    return found


def _sha(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()


def _long(text: str) -> set[str]:
    return {line for line in map(str.strip, text.split("\n")) if len(line) >= LONG}


def _read(text: Corpus) -> list[str]:
    each = max(1, READ // len(text.documents))
    return [document.read(0, each) for document in text.documents]


def pieces(text: Corpus, without: Collection[str] = ()) -> list[str]:
    """Documents; long ones in stretches, so that a bootstrap over documents has some to draw from.

    Args:
        without: sha256 of documents to leave out.
    """
    texts = [found for found in _read(text) if _sha(found) not in without]
    total = sum(map(len, texts))
    size = max(400, min(4000, total // 60))
    return [
        piece for one in texts for piece in (stretches(one, size) if len(one) > 2 * size else [one]) if piece.strip()
    ]


def _sampled(reader: Reader, sizes: Sizes) -> tuple[list[str], str]:
    length = reader.length
    found, told = reader.sample(-(-(sizes.calibration // 2 + sizes.search + sizes.evaluation // 2) // length))
    texts = [text for text in found if text.strip()]
    return texts, f"{len(texts)} texts of up to {length} tokens that the model sampled from itself, from {told}"


def _shuffled(texts: Sequence[str], seed: int) -> list[str]:
    drawn = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=drawn, dtype=torch.int64, device="cpu").tolist()
    return [texts[index] for index in order]


def split(texts: Sequence[str], shares: Sequence[float], seed: int) -> list[list[str]]:
    """Shuffled pieces in parts of about these shares of their characters, each piece in one part."""
    if len(texts) < 2 * len(shares):
        raise TextError(
            f"the text has {len(texts)} stretches, too few to keep calibration, search and evaluation apart; "
            "give a longer text."
        )
    mixed, total = _shuffled(texts, seed), sum(map(len, texts))
    parts: list[list[str]] = [[] for _ in shares]
    edge, index, seen = shares[0], 0, 0
    for place, piece in enumerate(mixed):
        left = len(mixed) - place
        if parts[index] and index + 1 < len(shares) and (seen >= edge * total or left <= 2 * (len(shares) - 1 - index)):
            index += 1
            edge += shares[index]
        parts[index].append(piece)
        seen += len(piece)
    return parts


def _enough(texts: Sequence[str], tokens: int) -> list[str]:
    """Texts until they surely hold so many tokens (12 bytes a token is generous)."""
    found, size = list[str](), 0
    for text in texts:
        if size >= 12 * tokens:
            break
        found.append(text)
        size += len(text.encode())
    return found


def _record(role: str, windows: Windows) -> Text:
    return Text(
        role=role,
        description=windows.description.partition(": ")[2],
        tokens=windows.predicted,
        documents=windows.documents,
        sha256=windows.hash(),
    )


def _prompt(text: str) -> str:
    """The first words of a stretch, ended at a space where there is one."""
    return text.strip()[:120].rsplit(" ", 1)[0]
