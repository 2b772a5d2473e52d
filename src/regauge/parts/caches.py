"""The lines of the axes of caches that no other place has: what is evened out, what is let go, and when."""

from __future__ import annotations

from collections.abc import Mapping

from regauge.parts.part import Part
from regauge.parts.points import CACHE

CACHE_ROWS: Mapping[str, Mapping[str, Part]] = {
    "balance": {
        "variance": Part(
            "regauge.cache.scheme:Variance",
            "tokens and channels of a block divided by their spread, in turn, until both are even",
            "2606.03458",
            short="rounds",
            places=(CACHE,),
            cost="four bytes a token and head, and a product for each score",
        ),
    },
    "score": {},
}
