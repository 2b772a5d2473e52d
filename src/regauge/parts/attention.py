"""The lines of the axes of attention: which blocks share probabilities, and what heads see."""

from __future__ import annotations

from collections.abc import Mapping

from regauge.parts.part import Part
from regauge.parts.points import ATTENTION

ATTENTION_ROWS: Mapping[str, Mapping[str, Part]] = {
    "share": {
        "alike": Part(
            "regauge.attention.shares:Alike",
            "groups of blocks whose attention maps are most alike on text; the first of each computes the map",
            "2409.14595",
            short="amount",
            places=(ATTENTION,),
            text=True,
            cost="one pass over 1,024 tokens of calibration text",
        ),
        "lot": Part(
            "regauge.attention.shares:Lot",
            "groups drawn by lot: what any other way must beat",
            short="amount",
            places=(ATTENTION,),
        ),
        "of": Part(
            "regauge.attention.shares:Of",
            "the map of one earlier block that is named",
            short="block",
            places=(ATTENTION,),
        ),
    },
    "window": {
        "by-distance": Part(
            "regauge.attention.windows:ByDistance",
            "the heads that look back the least on text see a window and the first tokens, the others everything",
            "2505.15548",
            short="short",
            places=(ATTENTION,),
            text=True,
            cost="one pass over 1,024 tokens of calibration text; a mask for each head when the model runs",
        ),
        "by-lot": Part(
            "regauge.attention.windows:ByLot",
            "heads drawn by lot see a window: what any other way must beat",
            short="short",
            places=(ATTENTION,),
        ),
        "local": Part(
            "regauge.attention.base:Local",
            "the heads that are named see a window and the first tokens",
            short="tokens",
            places=(ATTENTION,),
            cost="a mask for each head when the model runs",
        ),
    },
}
