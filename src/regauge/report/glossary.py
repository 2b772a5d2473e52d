"""The words that the page uses, as docs/glossary.md has them; a test holds both alike."""

from __future__ import annotations

WORDS: tuple[tuple[str, str], ...] = (
    ("bf16", 'bfloat16, 2 bytes a number; sizes "as bf16" count every number of the source so.'),
    ("Cache", "keys and values of the tokens so far; its bytes grow with the length of the context."),
    (
        "Calibration text",
        "what methods read to see which inputs a layer gets. The search and the final figures read other text.",
    ),
    (
        "Certificate",
        "the measured error of a move that must keep the function, in float64 and as stored.",
    ),
    ("Decode, prefill", "making text a token at a time; reading the prompt."),
    ("Frontier", "the best that the search found at each size; `pick` builds another of its points."),
    (
        "KL",
        "how far the compressed model's next-token distribution is from the original's, in nats a token; 0 is the "
        "same.",
    ),
    ("Perplexity, bits a byte", "how well a model predicts a text; lower is better."),
    ("Same next token", "of how many tokens both models find the same one likeliest."),
    ("Site", "a weight matrix, by a name that is the same in every family: `blocks.3.attn.q`."),
    ("Wire", "the format of the files: `compressed-tensors`, which others read, or `regauge`."),
)
