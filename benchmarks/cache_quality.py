"""What each row of caches costs in quality: KL to the model that keeps everything, on real text, at equal bytes.

    python benchmarks/cache_quality.py                               # the bundled model on this project's sources
    python benchmarks/cache_quality.py --model DIR --text NOVELS --keep 0.25

A prompt is read, tokens are let go, and the text that follows is scored against the whole cache: KL a token, mean and
standard error over windows, once where tokens are chosen behind the whole prompt, whose end stands for a question
(`seen`), and once before that end, which is read afterwards (`unseen`). Then half of the model's context is written
greedily by the whole cache and read again by each row: tokens until its own choice differs, and the KL of the last
quarter over that of the first. `bytes` is the cache's, measured, over the whole one's. Below the rows stand the
differences that rows are held to (`AGAINST`), over the same windows.

`--plant scale` first gives two channels of each key that turn together 32 times their size, and queries the inverse:
an exact move of a model with llama's names. `--plant bias` adds 64 to keys' channels that do not turn (GPT-NeoX): the
same for all of a query's scores, so exact too.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from regauge.cache import budgets, disposals, merges, scores
from regauge.cache.scheme import AFTER_PREFILL, BlockCache, CachePlan, Policy, Scheme
from regauge.hosts import host_of
from regauge.hosts.transformers.attending import attend, expect
from regauge.hosts.transformers.packed import cache_of
from regauge.hosts.transformers.table import anatomy_of
from regauge.plan.caches import asked, cache_plan
from regauge.text.corpora import corpus
from regauge.text.split import pieces
from regauge.text.tokens import frame
from regauge.text.windows import cut

ROOT = Path(__file__).resolve().parent.parent
PIECE = 32
"""Tokens read at once behind the prompt, so that blocks are sealed as in decoding."""
BY_TOKEN = "int{}-asym/group:32 else group:16 else token"
RULES: dict[str, str | dict[str, object]] = {
    "kivi-4": "kivi-4",
    "kivi-4, keys by token": {"keys": BY_TOKEN.format(4), "values": BY_TOKEN.format(4)},
    "kivi-4, turned": {"keys": "int4-asym/time:32", "values": BY_TOKEN.format(4), "transform": "hadamard"},
    "rotated-kv4": "rotated-kv4",
    "kivi-2": "kivi-2",
    "kivi-2, axes swapped": {"keys": BY_TOKEN.format(2), "values": "int2-asym/time:32"},
    "kivi-2, turned": {"keys": "int2-asym/time:32", "values": BY_TOKEN.format(2), "transform": "hadamard"},
    "kvarn": "kvarn",
    "kvarn, not evened": {"keys": "int4-asym/time:128", "values": "int2-asym/time:128", "transform": "hadamard"},
    "kivi, 4 and 2 bits": {"keys": "int4-asym/time:32", "values": BY_TOKEN.format(2)},
}
"""Formats, by a preset's name or a rule. All have the window that the command line names."""
AGAINST = (
    ("kivi-2", "kivi-2, axes swapped"),
    ("hack", "hack's score"),
    ("not smoothed, by kind", "snapkv, not smoothed"),
    ("minicache", "every second dropped"),
    ("rotated-kv4", "kivi-4"),
    ("kivi-4, turned", "kivi-4"),
    ("kivi-2, turned", "kivi-2"),
    ("kvarn", "kivi, 4 and 2 bits"),
    ("kvarn", "kvarn, not evened"),
    ("kivi-4", "kivi-4, keys by token"),
)
"""Rows, each with what it is to be better than."""


def policies(keep: float, sinks: int = 4) -> dict[str, Policy]:
    """Name → policy, each of which keeps as much."""
    snap = scores.WindowAttention(sinks=sinks)
    plain = scores.WindowAttention(sinks=sinks, pool=1)
    even, drop = budgets.Uniform(keep), disposals.Drop()
    rows: dict[str, tuple[Any, Any, Any]] = {
        "random": (scores.Random(sinks=sinks), even, drop),
        "streaming": (scores.Recency(sinks=sinks), even, drop),
        "key-norm": (scores.KeyNorm(sinks=sinks), even, drop),
        "h2o": (scores.AccumulatedAttention(sinks=sinks), even, drop),
        "expected-attention": (scores.ExpectedAttention(sinks=sinks), even, drop),
        "snapkv": (snap, even, drop),
        "snapkv, not smoothed": (plain, even, drop),
        "snapkv, merged": (snap, even, disposals.MergeKept()),
        "adakv-snapkv": (snap, budgets.AcrossHeads(keep), drop),
        "pyramidkv": (snap, budgets.Pyramid(keep), drop),
        "hack's score": (scores.HeadKinds(sinks=sinks), even, drop),
        "hack": (scores.HeadKinds(sinks=sinks), budgets.ByKind(keep), drop),
        "not smoothed, by kind": (plain, budgets.ByKind(keep), drop),
    }
    return {name: Policy(*row, trigger=AFTER_PREFILL) for name, row in rows.items()}


def plans(model: Any, anatomy: Any, keep: float, window: int) -> dict[str, CachePlan]:
    """Name → what every block keeps."""
    blocks = anatomy.blocks
    whole = BlockCache(Scheme(window=window))
    found = {name: (BlockCache(Scheme(window=window), policy),) * blocks for name, policy in policies(keep).items()}
    deeper = {deep for _, deep in merges.AcrossLayers().pairs(blocks)}
    least = Policy(scores.Recency(), budgets.Uniform(1e-9), disposals.Drop(), AFTER_PREFILL)
    found["minicache"] = (BlockCache(Scheme(window=window), merge=merges.AcrossLayers()),) * blocks
    gone = BlockCache(Scheme(window=window), least)
    found["every second dropped"] = tuple(gone if number in deeper else whole for number in range(blocks))
    for name, rule in RULES.items():
        one = cache_plan(_plan(rule), anatomy).blocks
        found[name] = tuple(replace(block, scheme=replace(block.scheme, window=window)) for block in one if block)
    policy = policies(keep)["snapkv"]
    found["snapkv + kivi-4"] = tuple(replace(block, policy=policy) for block in found["kivi-4"])
    return {name: CachePlan(name, kept) for name, kept in found.items()}


def _plan(rule: Any) -> Any:
    plan = asked(rule)
    assert plan is not None
    return plan


def read(model: Any, cache: Any, ids_BT: Tensor, piece: int) -> Tensor:
    """Logits of a text that follows what a cache holds, read in pieces."""
    return torch.cat([model(part, past_key_values=cache).logits for part in ids_BT.split(piece, 1)], 1)


def divergence(whole_BTV: Tensor, other_BTV: Tensor) -> Tensor:
    """KL a token (B, T), in nats."""
    p, q = (logits.float().log_softmax(-1) for logits in (whole_BTV, other_BTV))
    return (p.exp() * (p - q)).sum(-1)


def measure(model: Any, plan: CachePlan, ids_BT: Tensor, whole_BTV: Tensor, cuts: tuple[int, int]) -> Tensor:
    """KL (B, T) of what follows the prompt, whose cache is chosen from after so many tokens."""
    chosen, prompt = cuts
    cache = cache_of(plan, model)
    expect(cache, chosen)
    model(ids_BT[:, :chosen], past_key_values=cache, logits_to_keep=1)
    logits = read(model, cache, ids_BT[:, chosen:], PIECE)[:, prompt - chosen :]
    return divergence(whole_BTV[:, prompt:], logits)


def size(model: Any, plan: CachePlan, ids_BT: Tensor) -> int:
    """Bytes of a cache behind a prompt."""
    cache = cache_of(plan, model)
    expect(cache, ids_BT.shape[1])
    model(ids_BT, past_key_values=cache, logits_to_keep=1)
    return sum(layer.bytes for layer in cache.layers)


def written(model: Any, prompt_BT: Tensor, new: int) -> Tensor:
    """Prompts with what the whole cache writes behind them, greedily."""
    return torch.as_tensor(
        model.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=new, min_new_tokens=new,
                       do_sample=False, pad_token_id=0)
    )  # fmt: skip


def long_run(model: Any, plan: CachePlan, ids_BT: Tensor, whole_BTV: Tensor, prompt: int) -> tuple[float, float]:
    """Tokens until a row's own greedy choice differs (the mean; all where it never does), and the growth of KL."""
    cache = cache_of(plan, model)
    expect(cache, prompt)
    model(ids_BT[:, :prompt], past_key_values=cache, logits_to_keep=1)
    logits, whole = read(model, cache, ids_BT[:, prompt:], PIECE)[:, :-1], whole_BTV[:, prompt:-1]
    until = (logits.argmax(-1) == whole.argmax(-1)).long().cumprod(1).sum(1).float().mean()
    kl_BT = divergence(whole, logits)
    quarter = kl_BT.shape[1] // 4
    return float(until), float(kl_BT[:, -quarter:].mean() / kl_BT[:, :quarter].mean().clamp_min(1e-9))


@torch.no_grad()
def main() -> int:
    words = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    words.add_argument("--model", type=Path, default=ROOT / "bundled" / "code-llama-5m")
    words.add_argument("--text", type=Path, default=ROOT / "tests")
    words.add_argument("--keep", type=float, default=0.25)
    words.add_argument("--window", type=int, default=32)
    words.add_argument("--windows", type=int, default=6)
    words.add_argument("--rows", nargs="+")
    words.add_argument("--length", type=int, help="tokens of a window; the model's own positions without it")
    words.add_argument("--plant", choices=("scale", "bias"))
    given = words.parse_args()
    host = host_of(given.model)
    tokenizer = host.tokenizer(host.folder(str(given.model)))
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    length = given.length or model.config.max_position_embeddings
    if given.plant:
        plant(model, given.plant)
    text = corpus(given.text)
    cut_up = cut(pieces(text), tokenizer, length, description=text.description, before=frame(tokenizer)[0])
    some = (batch.ids_BT for batch in cut_up.batches(1) if batch.ids_BT.shape[1] >= length)
    ids_BT = torch.cat([one[:, :length] for one in islice(some, given.windows)])
    attend(model)
    prompt, question = length - length // 8, 32
    whole_BTV = model(ids_BT).logits
    half = length // 2
    long_BT = written(model, ids_BT[:, :half], length - half)
    long_BTV = model(long_BT).logits
    anatomy = anatomy_of(model.config, model)
    rows = plans(model, anatomy, given.keep, given.window)
    found: dict[str, list[Tensor]] = {}
    full = 2 * anatomy.blocks * ids_BT[:, :prompt].numel() * _channels(model) * 4  # float32
    print(f"{given.model.name}, {len(ids_BT)} windows of {length} tokens, {given.keep:g} of a prompt of {prompt} kept")
    print(f"{'row':22} {'bytes':>6} {'KL seen':>16} {'KL unseen':>16} {'differs at':>10} {'drift':>6}")
    for name, plan in rows.items():
        if given.rows and name not in given.rows:
            continue
        kl = [
            measure(model, plan, ids_BT, whole_BTV, (chosen, prompt)).mean(1) for chosen in (prompt, prompt - question)
        ]
        found[name] = kl
        told = [f"{float(k.mean()):.4f} ± {float(k.std() / len(k) ** 0.5):.4f}" for k in kl]
        until, drift = long_run(model, plan, long_BT, long_BTV, half)
        share = size(model, plan, ids_BT[:, :prompt]) / full
        print(f"{name:22} {share:6.2f} {told[0]:>16} {told[1]:>16} {until:10.1f} {drift:6.2f}", flush=True)
    for name, null in AGAINST:
        if name in found and null in found:
            gaps = [ours - theirs for ours, theirs in zip(found[name], found[null], strict=True)]
            told = [f"{float(gap.mean()):+.4f} ± {float(gap.std() / len(gap) ** 0.5):.4f}" for gap in gaps]
            print(f"{name} less {null}: {told[0]} seen, {told[1]} unseen")
    return 0


def plant(model: Any, kind: str) -> None:
    """Keys with outliers in some channels, and the same logits."""
    for name, module in model.named_modules():
        if kind == "scale" and name.endswith("self_attn"):
            size, pairs = module.head_dim, module.head_dim // 2
            for projection, factor in ((module.k_proj, 32.0), (module.q_proj, 1 / 32)):
                rows_HDI = projection.weight.data.view(-1, size, projection.in_features)
                rows_HDI[:, [pairs - 1, size - 1]] *= factor
        if kind == "bias" and name.endswith("attention"):
            size, turned = module.head_size, module.rotary_ndims
            module.query_key_value.bias.data.view(-1, 3, size)[:, 1, turned : turned + 2] += 64.0


def _channels(model: Any) -> int:
    """Numbers of a key in a block."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(heads) * int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


if __name__ == "__main__":
    sys.exit(main())
