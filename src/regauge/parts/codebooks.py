"""Grids whose values are looked up, alone or a run of neighbours at a time: lines of the table of parts."""

from __future__ import annotations

from collections.abc import Mapping

from regauge.parts.part import Part
from regauge.parts.points import WEIGHTS


def _trellises() -> dict[str, Part]:
    table = {}
    for bits, name in ((2, "Two"), (3, "Three"), (4, "Four")):
        table[f"trellis{bits}"] = Part(
            f"regauge.formats.trellis:{name}",
            f"128 values for {bits} bits: a window over the bits of neighbours chooses, and Viterbi finds the path",
            "2406.11235",
            short="window",
            wants={"ranger": ("deviation",), "rounder": ("nearest", "gptq", "gptq-ordered", "retargeted")},
            offers={WEIGHTS: ("channel",)},
            beside={"ranger": "deviation:3", "scale": "f16"},
            cost="two passes over the weights with 128 candidates each; with feedback about two more",
        )
    return table


def _words() -> dict[str, Part]:
    table = {}
    for name, make, what in (
        ("iq2-xxs", "IQ2XXS", "eight of 8, 25, 43 by 256 rows of a list, signs even in number (GGUF)"),
        ("iq2-xs", "IQ2XS", "eight of 8, 25, 43 by 512 rows of a list, signs even in number (GGUF)"),
        ("iq2-s", "IQ2S", "eight of 8, 25, 43 by 1024 rows of a list, and a sign each (GGUF)"),
        ("iq3-xxs", "IQ3XXS", "four of 4, 12, … 62 by 256 rows of a list, signs even in number (GGUF)"),
        ("iq3-s", "IQ3S", "four of 1, 3, … 15 by 512 rows of a list, and a sign each (GGUF)"),
    ):
        table[name] = Part(
            f"regauge.formats.codewords:{make}",
            what,
            "https://github.com/ggml-org/llama.cpp/pull/4773",
            wants={
                "ranger": ("absmax", "least-squares"),
                "rounder": ("nearest", "importance", "gptq", "gptq-ordered", "retargeted"),
            },
            cost="a product of the weights with every row of the list, to round them once",
        )
    return table


CODE_BOOK_ROWS: Mapping[str, Part] = {
    "iq4": Part(
        "regauge.formats.grids:IQ4",
        "16 whole numbers from -127 to 113, dense near 0 (GGUF)",
        "https://github.com/ggml-org/llama.cpp/pull/5590",
    ),
    **_words(),
    **_trellises(),
}
