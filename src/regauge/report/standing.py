"""Methods of the list that no preset names, because every loaded model or a command of its own has them: said in a few
sentences."""

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
        check: tests that fail without its idea, as of a preset.
    """

    title: str
    cite: tuple[str, ...]
    what: str
    text: str
    check: tuple[str, ...] = ()


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
    "pre-rmsnorm": Standing(
        "Pre-RMSNorm, a LayerNorm that its writers have centred",
        ("arXiv:2305.14858",),
        "the rewrite layernorm-to-rms",
        "Exact, with a certificate; what rotates a model with LayerNorm puts it first.",
        ("tests/discriminate/test_rewrites.py::test_centring_and_folding",),
    ),
    "pie": Standing(
        "PIE, an edit in the middle of a cached text",
        ("arXiv:2407.03157",),
        "rg.cache.edit, of every model that rg.load loads and has rotary positions",
        "Keys behind the edit turn to their new places, and what is new is read: an approximation to reading\n"
        "the new text; docs/edit.md says how near, and `python benchmarks/edit.py` measures it.",
        (
            "tests/units/test_editing.py::test_kept_keys_are_what_the_model_makes_of_the_same_states_at_their_new_positions",
        ),
    ),
    "prefix-grouper": Standing(
        "Prefix Grouper, one pass over a prefix for all of its continuations",
        ("arXiv:2506.05433",),
        "rg.shared_prefix",
        "Outputs and gradients are those of the plain batch. docs/edit.md; `python benchmarks/shared_prefix.py`.",
        ("tests/units/test_shared_prefix.py::test_outputs_and_gradients_are_those_of_the_plain_batch",),
    ),
    "anchor-attention": Standing(
        "AnchorAttention, packed documents that share the first token alone",
        ("arXiv:2411.13476",),
        "a mask for who trains on packed texts, regauge.attention.forms.anchored",
        "It changes what is trained, so no artifact has it. `regauge inspect --positions` tells whether a model\n"
        "suffers from positions in bfloat16, which is what it is against.",
        (
            "tests/units/test_attention_forms.py::"
            "test_the_anchor_is_seen_by_every_document_and_no_other_token_of_another_is",
        ),
    ),
    "onebench": Standing(
        "ONEBench, a ranking from runs of which some are missing",
        ("arXiv:2412.06745",),
        "regauge compare, over the runs that a folder holds",
        "Plackett-Luce is fitted to who won on each window; each model and text has one vote. docs/compare.md.",
        ("tests/units/test_worth.py::test_worths_of_two_by_hand",),
    ),
    "tpi-llm": Standing(
        "TPI-LLM, a window of blocks in memory and the others read ahead",
        ("arXiv:2410.00531",),
        "rg.load(OUT, memory=...)",
        "On one machine: blocks that fit stay, the others pass through two slots. docs/offload.md; `python\n"
        "benchmarks/offload.py` runs it beside another library.",
        ("tests/units/test_window.py::test_lru_reads_everything_and_the_plan_less_than_one_block_more_than_the_best",),
    ),
    "self-speculation": Standing(
        "Self-speculation, a member of the family guesses and the whole checks",
        ("arXiv:2211.17192",),
        "generate(drafts=MEMBER)",
        "The text is that of greedy decoding, token for token, and with sampling of its distribution; how many are\n"
        "guessed follows from what is right and what it costs here: `fit --drafts` and `regauge subnets --eval` tell.",
        ("tests/units/test_drafts.py::test_drafts_make_the_tokens_of_greedy_decoding",),
    ),
}
