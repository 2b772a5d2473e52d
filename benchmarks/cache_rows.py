"""What each preset of a cache costs in quality on the bundled model, beside its null: `rows.py` keeps it.

Of each window the first half is read at once, the rest in pieces of 16 tokens behind what the cache has kept of those
before, as `regauge measure --cache` does. A format's null has the same bits in steps a token, nothing turned or evened;
of tokens that are let go it is as many, chosen by lot; of layers that share, the deeper one's old tokens dropped.
Presets that keep so many tokens of long texts are given half of what is read at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regauge.cache import budgets, disposals, scores
from regauge.cache.scheme import AFTER_PREFILL, BlockCache, CachePlan, Policy, Scheme, Trigger
from regauge.hosts.transformers.attending import attend, expect
from regauge.hosts.transformers.load import load as load_model
from regauge.hosts.transformers.packed import cache_of
from regauge.measure.bootstrap import FEW
from regauge.measure.quality import Scores, compare, paired, summarise
from regauge.measure.subject import PIECE
from regauge.plan import load
from regauge.plan.caches import asked, cache_plan
from regauge.plan.keeping import rate
from regauge.text.windows import Windows

LENGTH, COUNT = 512, 8
"""Tokens of a window, and windows."""
MANY = LENGTH // 4
"""Tokens that stay where a preset keeps a number of them: half of what is read at once."""
READ = f"{COUNT} windows of {LENGTH:,} tokens, the second half in pieces of {PIECE} behind the cache"


def fitted(plan: CachePlan) -> tuple[CachePlan, str]:
    """The plan at windows of `LENGTH`, and what was changed for that."""
    told = ""

    def one(block: BlockCache | None) -> BlockCache | None:
        nonlocal told
        if block is None or block.policy is None or block.policy.budget.keep <= 1:
            return block
        policy = block.policy
        told = f"{MANY} of {LENGTH // 2} tokens stay, not {policy.budget.keep:g}"
        scheme = block.scheme
        if scheme.window > MANY // 2:  # what stays has to hold the window, sinks and a block that fills
            scheme = replace(scheme, window=MANY // 4)
            told += f", behind a window of {scheme.window}, not {block.scheme.window}"
        trigger = Trigger("at", MANY + scheme.tokens) if policy.trigger.kind == "at" else policy.trigger
        budget = replace(policy.budget, keep=MANY)
        return replace(block, scheme=scheme, policy=replace(policy, budget=budget, trigger=trigger))

    return replace(plan, blocks=tuple(one(block) for block in plan.blocks)), told


def null(plan: CachePlan, anatomy: Any) -> tuple[CachePlan, str] | None:
    """What a plan is to beat at the same bytes, and its name; None where it is that itself."""
    kept = [block for block in plan.blocks if block is not None]
    if any(block.merge is not None for block in kept):
        deeper = {deep for block in kept for _, deep in block.merge.pairs(anatomy.blocks)}
        least = Policy(scores.Recency(), budgets.Uniform(1e-9), disposals.Drop(), AFTER_PREFILL)
        blocks = (BlockCache(Scheme(), least if number in deeper else None) for number in range(anatomy.blocks))
        return CachePlan("null", tuple(blocks)), "every second layer dropped"
    if any(block.policy is not None for block in kept):
        return CachePlan("null", tuple(block and _by_lot(block) for block in plan.blocks)), "by lot"
    found = CachePlan("null", tuple(block and _by_token(block, anatomy) for block in plan.blocks))
    return None if found.blocks == plan.blocks else (found, "steps a token")


def _by_lot(block: BlockCache) -> BlockCache:
    policy = block.policy
    if policy is None:
        return block
    score = scores.Random(sinks=policy.score.sinks)
    return replace(block, policy=replace(policy, score=score, budget=budgets.Uniform(policy.budget.keep)))


def _by_token(block: BlockCache, anatomy: Any) -> BlockCache:
    words = {}
    for role, fmt in zip(("keys", "values"), block.scheme.formats, strict=True):
        assert fmt is not None, "both are rounded"
        words[role] = "int8/token" if fmt.grid.bits == 8 and fmt.grid.symmetric else f"int{fmt.grid.bits}-asym/token"
    rule = asked(words | {"window": block.scheme.window} if block.scheme.window else words)
    assert rule is not None
    found = cache_plan(rule, anatomy).blocks[0]
    assert found is not None
    return found


def measure(chosen: list[str], model_at: Path, windows: Windows, keep: Callable[[dict[str, Any]], None]) -> None:
    """Hands over the row of every preset as it is measured."""
    model = load_model(model_at, dtype=torch.float32, cache="none")
    anatomy = model.regauge_anatomy
    attend(model)
    texts = replace(windows, halved=True)
    batches = [batch.ids_BT for batch in texts.batches(COUNT * LENGTH)]
    with torch.inference_mode():
        original = [model(ids_BT, use_cache=False).logits for ids_BT in batches]
    known: dict[CachePlan, tuple[Scores, float]] = {}

    def found(plan: CachePlan) -> tuple[Scores, float]:
        key = replace(plan, name="", notes=())
        if key not in known:
            share: list[float] = []
            read = compare(texts, iter(original), _read(model, plan, batches, share), COUNT * LENGTH)
            known[key] = read, 8 * rate(plan, anatomy) / anatomy.cached * share[0]
        return known[key]

    for name in chosen:
        plan, told = fitted(cache_plan(load(name), anatomy))
        ours, bits = found(plan)
        row: dict[str, Any] = {"bits": round(bits, 3), "kl": _three(summarise(ours).kl)}
        other = null(plan, anatomy)
        if other is not None:
            base, row["null_bits"] = found(other[0])[0], round(found(other[0])[1], 3)
            row |= {"null": other[1], "null_kl": _three(summarise(base).kl)}
            words = {"first": "better", "second": "worse", "neither": "no different"}
            few = len(ours.bytes_D) < FEW
            row["verdict"] = "too few texts to tell" if few else words[paired(ours, base).verdict]
        if told:
            row["as"] = told
        keep({name: row})


def _read(model: Any, plan: CachePlan, batches: list[Tensor], share: list[float]) -> Iterator[Tensor]:
    """Logits of each batch; `share` is told which part of the tokens is held at the end of the first."""
    for ids_BT in batches:
        cache, half = cache_of(plan, model), ids_BT.shape[1] // 2
        expect(cache, half)
        with torch.inference_mode():
            pieces = (ids_BT[:, :half], *ids_BT[:, half:].split(PIECE, 1))
            found = torch.cat([model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces], 1)
        share.append(sum(_held(layer) for layer in cache.layers) / len(cache.layers) / ids_BT.shape[1])
        yield found


def _held(layer: Any) -> float:
    """Tokens of the mean head; what two layers share counts once, without its length in each."""
    shelf = getattr(layer, "shelf", None)
    common = getattr(shelf, "common", None)
    shelves = [shelf] * (shelf is not None) + ([common.shelf] if common is not None and common.owner else [])
    older = sum(float(one.counts_BH.float().mean()) * one.tokens for one in shelves)
    return float(getattr(layer, "rows", layer.get_seq_length())) + older


def _three(figure: Any) -> list[float]:
    return [float(f"{value:.4g}") for value in (figure.value, figure.low, figure.high)]
