"""The fixed set of completions: how many continuations of a header parse as Python.

The rule, in full:

Prompts end before their newline: in the training text a newline and the
indentation after it are one token, so a prompt that ends in a newline alone
says "not indented", and the model starts something new (14 of 40 parsed
that way).

1. Each prompt in ``bundled_prompts.json`` is continued by the most likely token,
   at most ``NEW_TOKENS`` times; the end token ends it early.
2. A continuation that did not end by itself is cut after its last whole logical
   line, as ``tokenize`` sees them, and then after its last line that is not a
   block header or a decorator, because the body of that block was cut off. If
   ``tokenize`` finds an error other than the end of the text, nothing is cut.
3. It counts if at least one whole logical line of code was generated and kept,
   and ``ast.parse`` takes prompt and continuation together.

A block that needs a second part (``try`` without ``except``) and was cut before
it counts against the model, as does a string that is never closed where it
leaves no line.
"""

from __future__ import annotations

import ast
import io
import json
import tokenize
import warnings
from pathlib import Path

import torch
from bundled_model import END

PROMPTS = Path(__file__).with_name("bundled_prompts.json")
NEW_TOKENS = 96


def logical_lines(text: str) -> list[tuple[int, bool]] | None:
    """End (in physical lines) of every whole logical line, and whether it opens a block.

    None if the text is wrong before its end.
    """
    found: list[tuple[int, bool]] = []
    last, first = "", ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NEWLINE:
                if token.string:
                    found.append((token.start[0], last == ":" or first == "@"))
                last = first = ""
            elif token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
                last, first = token.string, first or token.string
    except tokenize.TokenError as error:
        if "EOF" not in str(error) and "unterminated triple" not in str(error):
            return None
    except IndentationError:
        return None
    return found


def cut(prompt: str, generated: str, ended: bool) -> str:
    """The part of ``generated`` that rule 2 keeps."""
    lines = logical_lines(prompt + generated)
    if ended or lines is None:
        return generated
    whole = 0
    for end, opens in lines:
        if not opens:
            whole = end
    kept = "".join((prompt + generated).splitlines(keepends=True)[:whole])
    return kept[len(prompt) :]


def counts(prompt: str, kept: str) -> bool:
    """Rule 3."""
    before, after = logical_lines(prompt + "\n") or [], logical_lines(prompt + kept) or []
    if len(after) <= len(before):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            ast.parse(prompt + kept)
    except (SyntaxError, ValueError):
        return False
    return True


@torch.no_grad()
def complete(model, tokenizer, prompt: str, temperature: float = 0.0, seed: int = 0) -> tuple[str, bool]:
    """Continue a prompt; the text, and whether the model ended it. Temperature 0 is the likeliest token."""
    end = tokenizer.convert_tokens_to_ids(END)
    ids = [end, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    generator = torch.Generator().manual_seed(seed)
    made: list[int] = []
    past, fed = None, torch.tensor([ids])
    for _ in range(NEW_TOKENS):
        out = model(input_ids=fed, past_key_values=past, use_cache=True)
        past, logits = out.past_key_values, out.logits[0, -1].float()
        if temperature:
            chosen = int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))
        else:
            chosen = int(logits.argmax())
        if chosen == end:
            return tokenizer.decode(made), True
        made.append(chosen)
        fed = torch.tensor([[chosen]])
    return tokenizer.decode(made), False


def run(model, tokenizer, temperature: float = 0.0) -> list[dict]:
    """One row per prompt: prompt, kept text, and whether it counts."""
    rows = []
    for seed, prompt in enumerate(json.loads(PROMPTS.read_text())):
        generated, ended = complete(model, tokenizer, prompt, temperature, seed)
        kept = cut(prompt, generated, ended)
        rows.append({"prompt": prompt, "generated": generated, "kept": kept, "parses": counts(prompt, kept)})
    return rows
