"""Decoding with drafts: `model.generate(..., drafts="lookup")`, or the name of a member of the model's family.

Asked for in the call, drafts are made or the call is refused. In a generation config, which `fit` writes, they are a
preference: a call that they cannot serve (beams, several sequences, another member) decodes as without it.
`generate` prepares everything as it always does and then hands the loop over to ours: logits processors, samplers,
stopping criteria, streamers and the cache are transformers' own, and each token goes through them alone. What differs
is that one step of the model reads several tokens. How many is decided as texts go, by `runtime/drafts/pace.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regauge.errors import SettingError
from regauge.hosts.transformers.cachedtext import CachedText
from regauge.hosts.transformers.caching import lets_go
from regauge.hosts.transformers.marking import running
from regauge.hosts.transformers.owned import before, method, own
from regauge.hosts.transformers.selfdrafts import MemberDrafts
from regauge.hosts.transformers.switching import Members
from regauge.runtime.drafts.lookup import Lookup
from regauge.runtime.drafts.loop import drafted
from regauge.runtime.drafts.pace import Costs, Pace
from regauge.runtime.drafts.source import Source

REQUEST = "drafts"
"""The attribute of a generation config that names what drafts for one request."""
LOOKUP, NONE = "lookup", "none"
"""The text itself; nothing: the loop is ours and reads a token at a time."""
READ = frozenset(("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"))
"""What `generate` hands to `forward` beside ids, and we carry on by ourselves."""
OTHERS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate")
"""Arguments of `generate` that choose another loop."""
ELSEWHERE = (*OTHERS, "penalty_alpha", "dola_layers", "num_beam_groups", "constraints", "force_words_ids")
"""Those, and what is decoded by code from a hub."""


def draftable(model: Any) -> None:
    """Lets a loaded model draft where a request asks for it, or where its generation settings prefer that.

    Raises:
        SettingError: they name nothing that can draft for it.
    """
    if not model.can_generate():
        return
    model.regauge_drafts = Costs()
    asked = getattr(model.generation_config, REQUEST, None)
    _named(model, asked)
    setattr(model.generation_config, REQUEST, asked)
    own(model, "generate", Drafting(before(model, "generate")))


@dataclass(frozen=True)
class Drafting:
    """`generate`, with drafts where they are asked for.

    Attributes:
        before: what would be `generate`; None: the class's.
    """

    before: Callable[..., Any] | None

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config
        ordered = kwargs.get(REQUEST)
        asked = getattr(config, REQUEST, None) or getattr(model.generation_config, REQUEST, None)
        if ordered is not None:
            given = _given(OTHERS, kwargs, config)
            if given:
                raise SettingError(f"{REQUEST}={ordered!r} and {given[0]} both say how to decode: give one of them")
            kwargs["custom_generate"] = Decoding(ordered, kwargs.get("streamer"))
        elif asked is not None and not _given(ELSEWHERE, kwargs, config):
            _named(model, asked)
            kwargs["custom_generate"] = Decoding(asked, kwargs.get("streamer"), preferred=True)
        if self.before is None:
            return method(model, "generate")(*args, **kwargs)
        return self.before(model, *args, **kwargs)


def _given(names: Sequence[str], kwargs: Mapping[str, Any], config: Any) -> list[str]:
    return [name for name in names if kwargs.get(name) is not None or getattr(config, name, None) is not None]


def _named(model: Any, asked: object) -> None:
    """
    Raises:
        SettingError: it is no name of what can draft for the model.
    """
    if asked in (None, LOOKUP, NONE):
        return
    members = vars(model).get("regauge")
    if not isinstance(asked, str) or not isinstance(members, Members):
        raise SettingError(
            f"{REQUEST}={str(asked)[:60]!r} drafts nothing: give {LOOKUP!r} or {NONE!r}, or a member where the model "
            "is a family"
        )
    members.settled(asked)


@dataclass(frozen=True)
class Decoding:
    """The loop, as `generate` calls it.

    Attributes:
        asked: what drafts.
        streamer: tokens are put there as they come.
        preferred: where drafts cannot serve, transformers' own loop does.
    """

    asked: object
    streamer: Any
    preferred: bool = False

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Any:
        if why := _why_not(self.asked, model, input_ids, generation_config, kwargs):
            if not self.preferred:
                raise SettingError(why)
            return self._plain(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        prompt = input_ids.shape[1]
        out = model._prefill(input_ids, generation_config, kwargs)
        target = CachedText(model, out.past_key_values, kwargs.get("attention_mask"))
        chooser = Chooser(input_ids, logits_processor, generation_config)
        source = source_of(self.asked, model, target, input_ids[0].tolist())
        found = drafted(
            target, source, Pace(costs_of(model)), out.logits[0, -1], chooser, generation_config.max_length - prompt
        )
        for token in found:
            if self.streamer is not None:
                self.streamer.put(torch.tensor([token], dtype=torch.int64, device="cpu"))
            if bool(stopping_criteria(chooser.ids, chooser.scores)[0]):
                break
        found.close()  # type: ignore[attr-defined]  # a generator, which takes back what nobody asks for any more
        if self.streamer is not None:
            self.streamer.end()
        return chooser.output(target.cache)

    def _plain(self, model: Any, ids: Tensor, processors: Any, criteria: Any, config: Any, **kwargs: Any) -> Any:
        """transformers' own loop, as `generate` would have called it."""
        from transformers.generation.utils import GENERATION_MODES_MAPPING

        stock = getattr(type(model), GENERATION_MODES_MAPPING[config.get_generation_mode()])
        more = {} if self.streamer is None else {"streamer": self.streamer}
        given = {"logits_processor": processors, "stopping_criteria": criteria, "generation_config": config}
        return stock(model, ids, **given, **more, **kwargs)


def _why_not(asked: object, model: Any, ids: Tensor, config: Any, kwargs: Mapping[str, Any]) -> str:
    """Why drafts cannot serve a request, in a sentence; "" where they can."""
    said = f"{REQUEST}={asked!r}"
    mode = str(getattr(config.get_generation_mode(), "value", ""))
    if mode not in ("greedy_search", "sample"):
        return f"{said} goes with greedy decoding and with sampling, not with {mode.replace('_', ' ')}"
    if ids.shape[0] != 1:
        return f"{said} is for one sequence, not for {ids.shape[0]} at once"
    if not kwargs.get("use_cache"):
        return f"{said} needs a cache: leave use_cache=False out"
    if config.output_attentions or config.output_hidden_states:
        return f"{said} tells tokens, scores and logits, and neither attentions nor hidden states"
    if more := sorted(name for name in kwargs.keys() - READ if kwargs[name] is not None):
        return f"{said} reads token ids alone, and the call has {more[0]}"
    if lets_go(model):
        return f"{said} takes tokens back, and this model's cache lets tokens go: leave one of them out"
    if asked not in (LOOKUP, NONE) and not isinstance(vars(model).get("regauge"), Members):
        return (
            f"{REQUEST}={str(asked)[:60]!r} drafts nothing: give {LOOKUP!r} or {NONE!r}, or a member where the model "
            "is a family, whose whole runs"
        )
    return ""


def preferred(model: Any) -> str | None:
    """What drafts for the thin loop, which has no arguments for it: what the generation settings prefer, where it can
    serve the member that runs here and now."""
    asked = getattr(model.generation_config, REQUEST, None)
    if asked is None or lets_go(model) or (asked not in (LOOKUP, NONE) and running(model) is not model):
        return None
    return str(asked)


def costs_of(model: Any) -> Costs:
    """What steps of a model took so far."""
    found: Costs | None = getattr(model, "regauge_drafts", None)
    if found is None:
        found = model.regauge_drafts = Costs()
    return found


def source_of(asked: object, model: Any, target: CachedText, ids: Sequence[int]) -> Source:
    """What drafts, of a text that begins with these ids.

    Raises:
        SettingError: there is no such thing.
    """
    if asked == LOOKUP:
        return Lookup(ids)
    if asked == NONE:
        return Nothing()
    _named(model, asked)
    return MemberDrafts(str(asked), model, target, ids)


class Nothing(Lookup):
    """No guesses."""

    def extend(self, ids: Any) -> None:
        """More of the text, which is not kept."""


class Chooser:
    """The next token of a text, as `generate` chooses it; called once a token, in order.

    Attributes:
        ids: (1, T), the text so far.
        scores: of each new token, where they are asked for.
    """

    def __init__(self, ids: Tensor, processors: Any, config: Any) -> None:
        self.ids, self._processors, self._config = ids, processors, config
        told = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if told and config.output_scores else None
        self._logits: tuple[Tensor, ...] | None = () if told and config.output_logits else None

    def __call__(self, logits_V: Tensor) -> int:
        logits_1V = logits_V.to(copy=True, dtype=torch.float32)[None]
        scores_1V = self._processors(self.ids, logits_1V)
        if self.scores is not None:
            self.scores += (scores_1V,)
        if self._logits is not None:
            self._logits += (logits_1V,)
        if self._config.do_sample:
            token_11 = torch.multinomial(scores_1V.softmax(-1), 1)
        else:
            token_11 = scores_1V.argmax(-1, keepdim=True)
        self.ids = torch.cat((self.ids, token_11), 1)
        return int(token_11)

    def output(self, cache: Any) -> Any:
        """What `generate` returns."""
        if not self._config.return_dict_in_generate:
            return self.ids
        from transformers.generation import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(
            sequences=self.ids, scores=self.scores, logits=self._logits, past_key_values=cache
        )


def streamed(
    model: Any, ids: Tensor, cache: Any, asked: str, choose: Callable[[Tensor], int], most: int
) -> Iterator[int]:
    """Tokens of the thin loop, with drafts."""
    with torch.inference_mode():
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        target = CachedText(model, cache)
        source = source_of(asked, model, target, ids[0].tolist())
    return drafted(target, source, Pace(costs_of(model)), out.logits[0, -1].float(), choose, most)
