"""Models of images side by side, as `compare` has texts: classes of images, or the tokens that VAR makes of them.

A classifier's figures are nats an image (−log q of its class), the share that is right, and KL of its classes to the
original's; those of a model that draws scale by scale are nats a token of an image, all scales at once behind the true
ones before, given its class, and KL a token. Intervals are over images, drawn together for all models. Speeds are
images a second, one at a time and several together, of classifying or of drawing, all models in turn.

Legend: B images of a batch, L tokens of an image, V classes or codes, N rows that are scored.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regauge.kernels.cpu.machine import bandwidth
from regauge.measure.compare import LOGITS, Comparison, Method, Row
from regauge.measure.cost import RUNTIME, Costs, Model, Speed, Thunk, gain, interleave, memory
from regauge.measure.machine import machine
from regauge.measure.quality import Kind, Scores, divergence, paired, summarise
from regauge.measure.subject import CLASSES, SCALES, Batch, Facts, Outputs, Subject

KINDS: dict[str, Kind] = {CLASSES: "classes", SCALES: "scales"}
"""What a model gives → the kind of its figures (`Quality.kind`)."""
EACH = {"tokens": "a token", "classes": "an image", "scales": "a token"}
"""Kind of figures → what nats are of."""
BATCH, MANY, DRAWN = 250, 64, 8
"""Images that are read at once; that are classified together, and drawn together, where that is timed."""
ONE = 8
"""Images classified one after the other in one timing."""
MOST = 1 << 24
"""Logits of the original that are kept."""
DTYPE = "float32"
"""In which speeds are: convolutions and pictures are not run in bf16."""


@dataclass(frozen=True, eq=False)
class Seen:
    """Images as every model reads them.

    Attributes:
        kind: of `KINDS`.
        arguments: of each batch; targets: its classes (B), or its tokens (B, L).
    """

    kind: Kind
    arguments: tuple[Batch, ...]
    targets: tuple[Tensor, ...]
    description: str
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        return sum(len(target) for target in self.targets)

    @property
    def predicted(self) -> int:
        """Classes or tokens that are scored."""
        return sum(target.numel() for target in self.targets)

    @property
    def documents(self) -> int:
        """Images, as the documents of a text."""
        return self.images

    def hash(self) -> str:
        """sha256 over images or tokens, and classes."""
        digest = hashlib.sha256()
        for arguments in self.arguments:
            for name in sorted(arguments):
                digest.update(name.encode() + arguments[name].contiguous().numpy().tobytes())
        return digest.hexdigest()


def classified(x_NCHW: Tensor, y_N: Tensor, description: str, notes: tuple[str, ...] = (), size: int = BATCH) -> Seen:
    """Images for a classifier."""
    given = tuple({"pixel_values": x_BCHW} for x_BCHW in torch.split(x_NCHW, size))
    return Seen(KINDS[CLASSES], given, torch.split(y_N, size), description, notes)


def coded(ids_NT: Tensor, vocabulary: int, description: str, notes: tuple[str, ...] = ()) -> Seen:
    """Images for a model that draws, each as its class and then its tokens."""
    size = max(1, min(BATCH, LOGITS // (vocabulary * ids_NT.shape[1])))
    parts = torch.split(ids_NT, size)
    given = tuple({"labels": ids_BT[:, 0], "tokens": ids_BT[:, 1:]} for ids_BT in parts)
    return Seen(KINDS[SCALES], given, tuple(ids_BT[:, 1:] for ids_BT in parts), description, notes)


def scored(seen: Seen, original: Iterable[Tensor], compressed: Sequence[Iterable[Tensor]]) -> list[Scores]:
    """Scores of several models against one original, whose logits come in the order of the batches."""
    base = list[tuple[Tensor, Tensor]]()
    columns: list[list[tuple[Tensor, ...]]] = [[] for _ in compressed]
    readers = [iter(one) for one in compressed]
    for target, first in zip(seen.targets, original, strict=True):
        next_N = target.reshape(-1).long()
        log_p_NV = _log(first)
        base.append(_right(log_p_NV, next_N))
        for column, reader in zip(columns, readers, strict=True):
            log_q_NV = _log(next(reader))
            column.append((*_right(log_q_NV, next_N), *divergence(log_p_NV, log_q_NV)))
    each = seen.predicted // max(seen.images, 1)
    owner_N = np.repeat(np.arange(seen.images, dtype=np.int64), each)
    nll_original_N, right_original_N = (torch.cat(parts).double().numpy() for parts in zip(*base, strict=True))
    found, alone = [], each == 1
    for column in columns:
        nll_N, right_N, kl_N, agree_N = (torch.cat(parts).double().numpy() for parts in zip(*column, strict=True))
        found.append(
            Scores(
                nll_N=nll_N,
                nll_original_N=nll_original_N,
                kl_N=kl_N,
                agree_N=agree_N,
                document_N=owner_N,
                bytes_D=np.zeros(seen.images),
                kind=seen.kind,
                right_N=right_N if alone else None,
                right_original_N=right_original_N if alone else None,
            )
        )
    return found


def _again(given: Outputs, numbers: int) -> Outputs:
    """What a model gives, kept where it is few numbers, so that it runs once."""
    if numbers > MOST:
        return given
    kept = list(given())
    return lambda: iter(kept)


def _log(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.flatten(0, -2).float(), -1)


def _right(log_q_NV: Tensor, next_N: Tensor) -> tuple[Tensor, Tensor]:
    """(−log q of what is right, whether it is the likeliest) of each row."""
    nll_N = -log_q_NV.gather(-1, next_N[:, None]).squeeze(-1)
    return nll_N, (log_q_NV.argmax(-1) == next_N).float()


def read(model: Model, seen: Seen) -> Iterator[Tensor]:
    """Logits of a loaded model on each batch."""
    with torch.no_grad():
        for arguments in seen.arguments:
            yield model(**arguments).logits


def speeds(models: dict[str, Any], facts: Facts, rounds: int) -> dict[str, dict[str, Speed]]:
    """Images a second of loaded models in turn: `decode`, one at a time, and `prefill`, several together."""
    one, many = (_rate(facts, count) for count in (1, MANY if facts.gives == CLASSES else DRAWN))
    return {
        "decode": interleave({name: one(model) for name, model in models.items()}, rounds),
        "prefill": interleave({name: many(model) for name, model in models.items()}, rounds),
    }


def _rate(facts: Facts, count: int) -> Any:
    image = facts.image
    assert image is not None, "of a model of images"
    drawn = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(
        (count, image.channels, image.side, image.side), generator=drawn, dtype=torch.float32, device="cpu"
    )
    labels = [index % max(1, facts.labels) for index in range(count)]
    times = ONE if count == 1 and facts.gives == CLASSES else 1

    def of(model: Any) -> Thunk:
        def run() -> float:
            with torch.inference_mode():
                start = time.perf_counter()
                for _ in range(times):
                    model(pixel_values=x_BCHW) if facts.gives == CLASSES else model.sample(labels, seed=0)
                return times * count / (time.perf_counter() - start)

        return run

    return of


def cache_bytes(model: Any, facts: Facts) -> float | None:
    """Bytes of keys and values of an image while it is drawn, at the most; None of a classifier."""
    return float(model.sample([0], seed=0).most_cache_bytes) if facts.gives == SCALES else None


def probe_of(facts: Facts) -> dict[str, list[int]]:
    """What a model is run on once where its memory is read: an argument and its shape, or `labels` to draw."""
    image = facts.image
    assert image is not None, "of a model of images"
    if facts.gives == SCALES:
        return {"labels": [1]}
    return {"pixel_values": [1, image.channels, image.side, image.side]}


def side_by_side(subjects: Sequence[Subject], facts: Facts, seen: Seen, method: Method) -> Comparison:
    """Measures models of images side by side; the first is the original."""
    began = time.monotonic()
    method.say("measure", "quality")
    first, *others = subjects
    with torch.no_grad():
        base = _again(
            first.outputs(seen.arguments), seen.predicted * facts.labels if facts.gives == CLASSES else MOST + 1
        )
        found = [scored(seen, base(), [base()])[0]]
        found += [scored(seen, base(), [one.outputs(seen.arguments)()])[0] for one in others]
    method.say("measure", "speed")
    models = {subject.name: subject.ways(getattr(torch, method.dtype))[RUNTIME] for subject in subjects}
    timed = speeds(models, facts, method.rounds)
    caches = {name: cache_bytes(model, facts) for name, model in models.items()}
    del models
    method.say("measure", "memory")
    costs = {
        subject.name: Costs(
            decode=timed["decode"][subject.name],
            prefill=timed["prefill"][subject.name],
            memory=memory(subject.path, method.dtype, probe_of(facts)),
            cache_bytes=caches[subject.name],
            bytes=subject.stored,
        )
        for subject in subjects
    }
    whole = costs[first.name]
    rows = tuple(
        Row(
            name=one.name,
            quality=summarise(scores, method.seed),
            costs=costs[one.name],
            decode=None if one is first else gain(costs[one.name].decode, whole.decode, None),
            prefill=None if one is first else gain(costs[one.name].prefill, whole.prefill, None),
        )
        for one, scores in zip(subjects, found, strict=True)
    )
    scores_of = dict(zip((one.name for one in subjects), found, strict=True))
    pairs = {
        f"{a.name} against {b.name}": paired(scores_of[a.name], scores_of[b.name], method.seed)
        for a, b in itertools.combinations(others, 2)
    }
    return Comparison(
        kind=seen.kind,
        rows=rows,
        original=None,
        text=seen.description,
        tokens=seen.predicted,
        pairs=pairs,
        bandwidth=bandwidth(folder=Path(tempfile.gettempdir())),
        machine=machine().model_dump(mode="json"),
        seconds=round(time.monotonic() - began, 2),
        notes=(*seen.notes, *(note for subject in subjects for note in subject.notes)),
    )
