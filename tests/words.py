"""A tokenizer and a text for pico models: fourteen words of Python and three special tokens."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = ["def", "return", "self", "import", "for", "in", "if", "else", "not", "None", "True", "class", "with", "as"]


def save_tokenizer(folder: Path) -> Path:
    """Writes a word-level tokenizer with fewer words than a pico has tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]  # as the library documents it
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


def text(words: int, seed: int = 0) -> str:
    """So many words, drawn at random."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))
