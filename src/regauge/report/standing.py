"""Methods of the list that no preset names, because every loaded model has them: said in a few sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Standing:
    """A method that needs no recipe.

    Attributes:
        title, cite: whose it is.
        what: where it is had.
        text: how much it is, and what measured it.
    """

    title: str
    cite: tuple[str, ...]
    what: str
    text: str


_WHAT = "speed of its class is had through torch's SDPA on a GPU, and through our step on a CPU; no recipe asks for it"
_TEXT = """\
A loaded model attends by torch's scaled_dot_product_attention, which takes FlashAttention-2's kernels on a GPU and a
tiled one of its own on a CPU; nothing is as large as queries times keys in either. On a CPU our decode step reads the
cache in tiles with an online softmax, packed or not, and splits it along time among threads.

Measured on two cores, one layer of 9 heads and 3 KV heads of 64, bfloat16, 4096 tokens (benchmarks/attention_speed.py):
a token 1.32 ms step by step, 0.13 through SDPA, 0.08 through our step; a prompt 2380 ms step by step, 127 through SDPA.
No GPU was measured."""
HAD: Mapping[str, Standing] = {
    "flash-attention": Standing("FlashAttention-2, exact attention in tiles", ("arXiv:2307.08691",), _WHAT, _TEXT),
    "fast-attention": Standing(
        "FastAttention, FlashAttention-2 for devices of few resources", ("arXiv:2410.16663",), _WHAT, _TEXT
    ),
}
