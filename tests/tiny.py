"""A byte-level tokenizer of 258 ids (bytes, <s>, </s>) and pico models that go with it: what calibration text needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.pico import pico, save

VOCABULARY = 258
TEXT = "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs, said she. "


def tokenizer(bos: bool = True, template: str | None = None, frame: bool = False) -> Any:
    """One token a byte; `bos` puts <s> before every text, `frame` also </s> behind it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {letter: index for index, letter in enumerate(letters)} | {"<s>": 256, "</s>": 257}
    made = Tokenizer(models.BPE(ids, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>" if frame else "<s> $A", special_tokens=[("<s>", 256), ("</s>", 257)]
        )
    found = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    if template is not None:
        found.chat_template = template
    return found


def folder(where: Path, name: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A pico checkpoint with the tokenizer in it."""
    tokenizer().save_pretrained(where)
    return save(pico(name, seed, vocab_size=VOCABULARY, **changes), where)


def text(where: Path, tokens: int = 3000) -> Path:
    """A text file of so many tokens (bytes)."""
    path = where / "text.txt"
    path.write_text((TEXT * (tokens // len(TEXT) + 1))[:tokens])
    return path
