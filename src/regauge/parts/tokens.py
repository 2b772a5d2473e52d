"""The lines of the axes of tokens: what is passed by between two blocks, at which scale, and what stands for it."""

from __future__ import annotations

from collections.abc import Mapping

from regauge.parts.part import Part
from regauge.parts.points import TOKENS

_HERE = (TOKENS,)
TOKEN_ROWS: Mapping[str, Mapping[str, Part]] = {
    "score": {
        "detail": Part(
            "regauge.tokens.maps:Detail",
            "how far a token of a map is from the map's mean",
            "2503.23367",
            places=_HERE,
            cost="a mean and a square of each token",
        ),
        "lattice": Part(
            "regauge.tokens.maps:Lattice", "evenly over the map: what any other score must beat", places=_HERE
        ),
    },
    "schedule": {
        "late": Part(
            "regauge.tokens.maps:Late",
            "a share of the tokens on the last scales, all on the others",
            "2503.23367",
            short="keep",
            places=_HERE,
        ),
    },
    "disposal": {
        "earlier-scale": Part(
            "regauge.tokens.maps:EarlierScale",
            "what the block added at the scale before, at the same place",
            "2503.23367",
            places=_HERE,
            cost="what each block adds at that scale is kept until the image is drawn",
        ),
        "nothing": Part("regauge.tokens.maps:Nothing", "the block adds nothing to them", places=_HERE),
    },
}
