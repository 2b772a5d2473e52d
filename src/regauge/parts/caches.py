"""The lines of the axes that only caches have: what is evened out, what is let go and when, what is shared."""

from __future__ import annotations

from collections.abc import Mapping

from regauge.parts.part import Part
from regauge.parts.points import CACHE

_HERE = (CACHE,)
CACHE_ROWS: Mapping[str, Mapping[str, Part]] = {
    "balance": {
        "variance": Part(
            "regauge.cache.scheme:Variance",
            "tokens and channels of a block divided by their spread, in turn, until both are even",
            "2606.03458",
            short="rounds",
            places=_HERE,
            cost="four bytes a token and head, and a product for each score",
        ),
    },
    "score": {
        "by-lot": Part("regauge.cache.scores:Random", "by lot: what any other score must beat", places=_HERE),
        "recency": Part(
            "regauge.cache.scores:Recency", "the newest, and the first few", "2309.17453", short="sinks", places=_HERE
        ),
        "key-norm": Part(
            "regauge.cache.scores:KeyNorm",
            "keys of small norm, which attention falls on",
            "2406.11430",
            short="sinks",
            places=_HERE,
            cost="one norm a token",
        ),
        "window-attention": Part(
            "regauge.cache.scores:WindowAttention",
            "the attention of the newest queries, smoothed over neighbours",
            "2404.14469",
            short="queries",
            places=_HERE,
            cost="the scores of so many queries once more",
        ),
        "accumulated-attention": Part(
            "regauge.cache.scores:AccumulatedAttention",
            "the attention that a token has had from every query so far",
            "2306.14048",
            short="sinks",
            places=_HERE,
            cost="attention once more for every query, outside of a fused kernel",
        ),
        "expected-attention": Part(
            "regauge.cache.scores:ExpectedAttention",
            "what queries still to come are expected to read, by the newest ones' mean and covariance",
            "2510.00636",
            short="future",
            places=_HERE,
            cost="a covariance a head, and two products a token",
        ),
        "head-kinds": Part(
            "regauge.cache.scores:HeadKinds",
            "by attention in contextual heads; by sinks, attention and age in structural ones",
            "2504.09261",
            short="queries",
            places=_HERE,
            cost="the scores of so many queries once more",
        ),
    },
    "budget": {
        "uniform": Part("regauge.cache.budgets:Uniform", "the same share in every head", short="keep", places=_HERE),
        "pyramid": Part(
            "regauge.cache.budgets:Pyramid",
            "much in the first block and evenly less upwards",
            "2406.02069",
            short="keep",
            places=_HERE,
        ),
        "across-heads": Part(
            "regauge.cache.budgets:AcrossHeads",
            "the heads of a block share one budget, and the best of all of them stay",
            "2407.11550",
            short="keep",
            places=_HERE,
        ),
        "by-kind": Part(
            "regauge.cache.budgets:ByKind",
            "less for contextual heads and so more for structural ones",
            "2504.09261",
            short="keep",
            places=_HERE,
            cost="the scores of some queries once more",
        ),
        "sensitivity": Part(
            "regauge.cache.budgets:Sensitivity",
            "in proportion to `weights`, a number a block or a head, which the recipe gives",
            short="keep",
            places=_HERE,
        ),
    },
    "disposal": {
        "drop": Part("regauge.cache.disposals:Drop", "gone, and its memory with it", places=_HERE),
        "merge": Part(
            "regauge.cache.disposals:MergeKept",
            "added to the kept token whose key is nearest in angle, where that is near enough",
            "2406.13035",
            short="alike",
            places=_HERE,
            cost="a product of every token let go with every token kept",
        ),
    },
    "merge": {
        "across-layers": Part(
            "regauge.cache.merges:AcrossLayers",
            "two adjacent blocks of the upper half keep one direction for each token, and each its own norm",
            "2405.14366",
            short="start",
            places=_HERE,
            cost="eight bytes a token, head and block for the norms",
        ),
    },
    "trigger": {
        "prefill": Part(
            "regauge.cache.scheme:Trigger",
            "once, when the whole prompt has been read",
            fixed={"kind": "prefill", "tokens": 0},
            places=_HERE,
        ),
        "every": Part(
            "regauge.cache.scheme:Trigger",
            "then, and again after every `tokens`",
            fixed={"kind": "every"},
            short="tokens",
            places=_HERE,
        ),
        "at": Part(
            "regauge.cache.scheme:Trigger",
            "whenever the fullest head holds `tokens`",
            fixed={"kind": "at"},
            short="tokens",
            places=_HERE,
        ),
    },
}
