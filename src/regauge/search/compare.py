"""`measure A [B ...]`: quality, speed and memory side by side. The first model is what the others are held to.

Quality on the text given, or on text that the first model samples from itself; speeds interleaved, all models in one
round; memory each in a fresh process. Encoders, which predict no next token, are compared by the cosine of their mean
embeddings.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from regauge.engine.watchdog import Clock, Watcher, nobody, quiet_torch
from regauge.errors import ModelError
from regauge.hosts.transformers.hub import model_folder
from regauge.hosts.transformers.load import load
from regauge.hosts.transformers.probe import context
from regauge.hosts.transformers.sampling import sample
from regauge.hosts.transformers.source import Source, read_tokenizer
from regauge.measure.cost import Costs, Speed, interleave, memory, prefill_rate, verdict, weight_bytes
from regauge.measure.cost import cache_bytes_a_token as cache_growth
from regauge.measure.cost import decode_rate as decoding
from regauge.measure.encoders import cosine, embed
from regauge.measure.machine import bandwidth, machine
from regauge.measure.quality import Paired, Quality, compare_many, paired, summarise
from regauge.search.build import DECODE, PREFILL, PROMPT, logits
from regauge.text.corpora import Where, corpus
from regauge.text.split import pieces, window_length
from regauge.text.tokens import frame
from regauge.text.windows import Windows, cut

TOKENS = 32768  # most tokens of text that are read
SAMPLED = 8192


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Record):
    """One model. The first row's quality is its own: KL 0, agreement 1."""

    name: str
    quality: Quality | None = None
    cosine: float | None = None  # encoders: mean cosine to the first model's embeddings
    costs: Costs
    decode: str | None = None  # against the first: `1.52x`, `no faster`
    prefill: str | None = None


class Comparison(_Record):
    """All models, in the order given."""

    rows: tuple[Row, ...]
    text: str
    tokens: int
    pairs: dict[str, Paired]  # `B against C`: mean KL of B less that of C, on the same documents
    bandwidth: float  # bytes a second, at this minute
    machine: dict[str, object]
    seconds: float
    notes: tuple[str, ...] = ()


def measure(
    models: Sequence[str | Path],
    eval: Where | None = None,
    seed: int = 0,
    dtype: str = "bfloat16",
    rounds: int = 7,
    progress: Watcher | None = None,
) -> Comparison:
    """Measures models side by side.

    Args:
        models: directories or hub ids of sources and artifacts; the first is the original.
        eval: text; None: sampled from the first model, which must then be a source.
        dtype: of activations while speed and memory are measured; quality is measured in float32.

    Raises:
        ModelError: no model, or one that cannot be loaded.
        TextError: the text cannot be used.
    """
    if not models:
        raise ModelError("there is nothing to measure: name a model, and others to hold against it.")
    began, clock = time.monotonic(), Clock(progress or nobody)
    names = _names(models)
    with quiet_torch():
        clock.say("open")
        tokenizer = read_tokenizer(model_folder(str(models[0]), None))
        loaded = [load(path, dtype=torch.float32) for path in models]
        generative = bool(getattr(loaded[0], "can_generate", lambda: False)())
        text = _windows(models[0], loaded[0], tokenizer, eval, seed)
        qualities, cosines, pairs = _quality(loaded, names, text, seed, generative, clock)
        del loaded
        costs, speeds = _costs(models, names, dtype, rounds, generative, clock)
    rows = tuple(
        Row(
            name=name,
            quality=qualities.get(name),
            cosine=cosines.get(name),
            costs=costs[name],
            decode=_against(speeds.get("decode"), name, names[0]),
            prefill=_against(speeds.get("prefill"), name, names[0]),
        )
        for name in names
    )
    return Comparison(
        rows=rows,
        text=text.description,
        tokens=text.predicted,
        pairs=pairs,
        bandwidth=bandwidth(),
        machine=machine().model_dump(mode="json"),
        seconds=round(time.monotonic() - began, 2),
        notes=() if eval is not None else ("no text was given: the first model sampled it from itself",),
    )


def _names(models: Sequence[str | Path]) -> list[str]:
    """Last parts of the paths, numbered where they are not unique."""
    found: list[str] = []
    for path in models:
        name = Path(str(path).rstrip("/")).name or str(path)
        found.append(name if name not in found else f"{name} ({len(found) + 1})")
    return found


def _windows(path: str | Path, model: nn.Module, tokenizer: Any, text: Where | None, seed: int) -> Windows:
    if text is not None:
        read = corpus(text)
        most = int(getattr(getattr(model, "config", None), "max_position_embeddings", 256) or 256)
        before = frame(tokenizer)[0]
        found = cut(pieces(read), tokenizer, min(256, most), description=read.description, before=before)
        return found.take(TOKENS, seed)
    source = Source.open(path)
    length = window_length(source.parameters(), context(source))
    ids_NT, told = sample(source, tokenizer, SAMPLED // length, length, seed)
    rows = tuple(ids_NT.unbind())
    sizes = tuple(max(1, len(tokenizer.decode(row.tolist()).encode())) for row in rows)
    return Windows(rows, tuple(range(len(rows))), sizes, f"sampled from the first model, from {told}")


def _quality(
    loaded: Sequence[nn.Module], names: Sequence[str], text: Windows, seed: int, generative: bool, clock: Clock
) -> tuple[dict[str, Quality], dict[str, float], dict[str, Paired]]:
    clock.say("measure", "quality")
    inputs = [batch.ids_BT for batch in text.batches(2048)]
    if not generative:
        first, *others = [embed(model, inputs) for model in loaded]
        return {}, {name: cosine(first, other) for name, other in zip(names[1:], others, strict=True)}, {}
    base, *rest = [logits(model, inputs) for model in loaded]
    again = logits(loaded[0], inputs)
    scores = compare_many(text, base, [again, *rest], 2048)
    qualities = {name: summarise(one, seed) for name, one in zip(names, scores, strict=True)}
    pairs = {
        f"{names[i]} against {names[j]}": paired(scores[i], scores[j], seed)
        for i in range(1, len(names))
        for j in range(i + 1, len(names))
    }
    return qualities, {}, pairs


def _costs(
    models: Sequence[str | Path], names: Sequence[str], dtype: str, rounds: int, generative: bool, clock: Clock
) -> tuple[dict[str, Costs], dict[str, dict[str, Speed]]]:
    clock.say("measure", "speed")
    speeds: dict[str, dict[str, Speed]] = {}
    cache: dict[str, float] = {}
    if generative:
        loaded = {name: load(path, dtype=getattr(torch, dtype)) for name, path in zip(names, models, strict=True)}
        config = loaded[names[0]].config
        most = min(PREFILL, int(getattr(config, "max_position_embeddings", PREFILL) or PREFILL) // 2)
        prompt = torch.randint(0, config.vocab_size, (1, most), generator=torch.Generator().manual_seed(0))
        speeds["decode"] = interleave({n: decoding(m, prompt[:, :PROMPT], DECODE) for n, m in loaded.items()}, rounds)
        speeds["prefill"] = interleave({n: prefill_rate(m, prompt) for n, m in loaded.items()}, rounds)
        cache = {n: cache_growth(m, prompt[:, :32]) for n, m in loaded.items()}
        del loaded
    clock.say("measure", "memory")
    return {
        name: Costs(
            decode=speeds["decode"][name] if generative else None,
            prefill=speeds["prefill"][name] if generative else None,
            memory=memory(path, dtype),
            cache_bytes=cache.get(name),
            bytes=weight_bytes(path) if Path(path).is_dir() else None,
        )
        for name, path in zip(names, models, strict=True)
    }, speeds


def _against(speeds: dict[str, Speed] | None, name: str, first: str) -> str | None:
    return None if speeds is None or name == first else verdict(speeds[name], speeds[first])
