"""`regauge chat`: talk to an artifact, and to the original beside it, with tokens a second after each answer."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regauge.cli.show import remark
from regauge.errors import ModelError, SettingError, printable
from regauge.hosts import host_of
from regauge.hosts.base import Host

LEAVE = ("/exit", "/quit")
AFRESH = "/new"
HELP = f"Write a line and press Enter; {AFRESH} starts afresh, {LEAVE[0]} or Ctrl-D leaves."


@dataclass(frozen=True)
class Manner:
    """How answers are made.

    Attributes:
        temperature: 0 takes the likeliest token.
        tokens: the most of an answer.
        device: `cpu` or `cuda`.
        cache: what is kept of the past, as `load` takes it; None: as the artifact says.
    """

    temperature: float = 0.0
    tokens: int = 256
    seed: int = 0
    device: str = "cpu"
    cache: str | None = None


@dataclass(eq=False)
class Speaker:
    """One model in a conversation.

    Attributes:
        said: turns so far, as a chat template takes them, or the text so far where there is no template.
    """

    name: str
    host: Host
    model: Any
    tokenizer: Any
    manner: Manner
    turns: list[dict[str, str]] = field(default_factory=list)
    text: str = ""

    @property
    def templated(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def answer(self, line: str) -> Iterator[str]:
        """Pieces of the answer, as they are made; then it is part of the conversation."""
        if self.templated:
            self.turns.append({"role": "user", "content": line})
            told = self.tokenizer.apply_chat_template(self.turns, add_generation_prompt=True, tokenize=False)
            ids = self.tokenizer(told, add_special_tokens=False).input_ids
        else:
            self.text += line
            ids = self.tokenizer(self.text).input_ids
        most = _room(self.model, len(ids))
        if most < 1:
            raise SettingError(
                f"the conversation fills the model's context of {len(ids)} tokens; {AFRESH} starts afresh"
            )
        count = min(self.manner.tokens, most)
        made: list[str] = []
        for piece in self.host.speak(self.model, self.tokenizer, ids, count, _chooser(self.manner)):
            made.append(piece)
            yield piece
        if self.templated:
            self.turns.append({"role": "assistant", "content": "".join(made)})
        else:
            self.text += "".join(made)

    def afresh(self) -> None:
        self.turns, self.text = [], ""


def _room(model: Any, used: int) -> int:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return (int(longest) if longest else 1 << 30) - used


def _chooser(manner: Manner) -> Callable[[Tensor], int] | None:
    if manner.temperature == 0:
        return None
    generator = torch.Generator().manual_seed(manner.seed)

    def choose(logits_V: Tensor) -> int:
        p_V = torch.softmax(logits_V.float().cpu() / manner.temperature, 0)
        return int(torch.multinomial(p_V, 1, generator=generator))

    return choose


def chat(paths: Sequence[str | Path], manner: Manner, prompts: Sequence[str] = ()) -> None:
    """Answers each line; with several models one after another, each under its name.

    Args:
        prompts: what to say; none: lines of standard input, with a prompt where that is a terminal.

    Raises:
        ModelError, SettingError: a model that cannot be loaded, or makes no text.
    """
    speakers = [_speaker(path, manner) for path in paths]
    if not speakers[0].templated:
        remark(f"{paths[0]} has no chat template: it goes on with the text as it is written.")
    for line in prompts or _lines():
        if line.strip() in LEAVE:
            return
        if line.strip() == AFRESH:
            for speaker in speakers:
                speaker.afresh()
            continue
        for speaker in speakers:
            _say(speaker, line, len(speakers) > 1)


def _speaker(path: str | Path, manner: Manner) -> Speaker:
    host = host_of(path)
    model = host.load(path, device=manner.device, cache=manner.cache)
    if not model.can_generate():
        raise ModelError(f"{path} makes no text ({type(model).__name__}); chat wants a causal language model.")
    return Speaker(Path(str(path)).name or str(path), host, model, host.tokenizer(host.folder(str(path))), manner)


def _say(speaker: Speaker, line: str, named: bool) -> None:
    if named:
        print(f"{speaker.name}:")
    count, began, first = 0, time.perf_counter(), 0.0
    for piece in speaker.answer(line):
        count += 1
        first = first or time.perf_counter()
        print(printable(piece, "\n\t"), end="", flush=True)
    print()
    spent = time.perf_counter() - (first or began)
    rate = f"{(count - 1) / spent:.0f} tokens a second" if count > 1 and spent > 0 else "one token"
    remark(f"  {count} tokens, {rate}, the first after {(first or began) - began:.2f} s")


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        return
    remark(HELP)
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
