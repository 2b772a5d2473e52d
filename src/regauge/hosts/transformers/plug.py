"""The native step under `model.forward`: a few new tokens a sequence go through it, all else through transformers.

`generate` keeps sampling, stopping, streaming, beams and assisted decoding. Where the step cannot serve a model or a
call, transformers computes, and a warning says so once. What is checked, and when: modules, hooks, tensors and every
attribute that the program was built from at the beginning of every text, whenever many tokens come, and with the first
tokens of a cache that the step has not seen; the shapes of a call at every call.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy
from regauge.errors import FallbackWarning
from regauge.hosts.transformers.adopting import CACHES, adopt
from regauge.hosts.transformers.attending import watching
from regauge.hosts.transformers.cache import GrowingLayer
from regauge.hosts.transformers.caching import begun
from regauge.hosts.transformers.inputs import Inputs
from regauge.hosts.transformers.overflow import look
from regauge.hosts.transformers.owned import method, own
from regauge.hosts.transformers.packed import PackedCache
from regauge.hosts.transformers.program import Reads, build
from regauge.hosts.transformers.tables import table_for
from regauge.hosts.transformers.tight import closed
from regauge.kernels.cpu.library import available
from regauge.kernels.cpu.matrix import DTYPES
from regauge.kernels.cpu.step import MOST
from regauge.runtime.step.running import Running, first_tokens
from regauge.runtime.step.signature import hooked, kinds_of, signature
from regauge.runtime.step.sites import Unservable

SERVED = frozenset(("input_ids", "attention_mask", "position_ids", "past_key_values", "logits_to_keep"))
HARMLESS = {"use_cache": (True, None), "return_dict": (True, None)}
HARMLESS |= dict.fromkeys(("output_attentions", "output_hidden_states", "output_router_logits"), (False, None))
"""Arguments that change nothing for a few tokens while they have these values."""
UNREAD = frozenset(("tokenizer", "assistant_tokenizer", "assistant_model"))
"""What `generate` takes for itself (stop strings, assisted decoding) and also hands to `forward`, which reads none."""
NEW = 16
"""New tokens of a sequence that come through the step in one call."""
HARMLESS_HOOKS = ("transformers.utils.output_capturing", closed.__module__)
"""By hooks of the first transformers collects attentions and states; they stay where they were once wanted. Those of
the second change strides alone."""


def plug(model: Any, anatomy: Anatomy) -> None:
    """Lets a loaded model decode natively. Changes `model.forward` alone; does nothing where it can never serve."""
    table = table_for(model.config).decoding
    windowed = getattr(model, "regauge_window", None) is not None
    if table is None or windowed or not model.can_generate() or not available():
        return
    model.regauge_step = NativeStep(model, anatomy)
    own(model, "forward", _forward)
    if _cacheless(model):
        warnings.warn(
            "use_cache is false in the configs of this model: generate() reads the whole text again for every token, "
            "and never through the native step; set model.generation_config.use_cache = True for that.",
            FallbackWarning,
            stacklevel=3,
        )


def _cacheless(model: Any) -> bool:
    """Whether `generate` keeps no cache unless it is asked to: as it decides, the generation config first."""
    asked = getattr(model.generation_config, "use_cache", None)
    return (getattr(model.config, "use_cache", None) if asked is None else asked) is False


@dataclass(frozen=True, eq=False)
class Built:
    """A model as a program, and what the program is given at each step."""

    running: Running
    inputs: Inputs


def _forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    """A model's `forward` with the native step before it."""
    eager = method(model, "forward")
    if torch.compiler.is_compiling():
        return eager(*args, **kwargs)
    kwargs = begun(model, kwargs)
    native: NativeStep = model.regauge_step
    native.of = weakref.ref(model)  # a copied model's copy serves the copy
    found = native.serve(args, kwargs)
    if found is None:
        found = eager(*args, **kwargs)
        native.output = type(found)
        look(model, found)
    return found


class NativeStep:
    """One model's native step.

    Attributes:
        of: the model, which holds its step and so must not be held by it.
        steps: tokens that went through it.
        output: the class of what the model's own forward returns.
    """

    def __init__(self, model: Any, anatomy: Anatomy) -> None:
        self.of: weakref.ref[Any] | None = weakref.ref(model)
        self.anatomy = anatomy
        self.steps = 0
        self.output: Any = None
        self._why = ""
        self._kinds = kinds_of(model)
        self._said: set[str] = set()
        self._forget()

    @property
    def model(self) -> Any:
        """The model that is being run."""
        return None if self.of is None else self.of()

    def _forget(self) -> None:
        self._built: Built | None = None
        self._signature: object = None
        self._reads = Reads()  # every attribute that went into it
        self._begun: weakref.WeakSet[Any] = weakref.WeakSet()  # caches whose texts the program was checked for
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes with it: not the program, whose addresses are this model's."""
        left = ("of", "_built", "_signature", "_reads", "_begun", "_lock")
        return {name: value for name, value in vars(self).items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"of": None})
        self._forget()

    def serve(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What `forward` returns for a few new tokens a sequence, or None: let transformers compute."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        if len(args) > 1 or not isinstance(ids, Tensor) or ids.ndim != 2:
            return None
        if not 1 <= ids.shape[1] <= NEW or cache is None or cache.get_seq_length() == 0:
            if cache is not None and self._begin(cache):
                adopt(cache, self.anatomy.blocks)  # so that the first pass already writes where the step reads
            return None
        for name, value in kwargs.items():
            if name in SERVED or name in UNREAD or value is None:
                continue
            if not any(value is ok for ok in HARMLESS.get(name, ())):
                return self._eager(f"the call has {name}={_short(value)}")
        if self.model.training:
            return None
        if (self._built is None or not self._has_begun(cache)) and not self._begin(cache):
            return self._eager(self._why)
        layers = adopt(cache, self.anatomy.blocks)
        if layers is None:
            return self._eager(f"the cache is a {type(cache).__name__} that the step does not write")
        if type(cache) is PackedCache and watching(cache, ids.shape[1]):
            return None  # what a policy must see of attention, the step does not show
        kept = kwargs.get("logits_to_keep", 0)
        if not isinstance(kept, int) or kept < 0:
            return self._eager(f"the call has logits_to_keep={_short(kept)}")
        logits = self._step(ids, layers, kwargs.get("attention_mask"), kwargs.get("position_ids"), kept)
        return None if logits is None else self._returned(logits, cache)

    def _step(self, ids: Tensor, layers: list[GrowingLayer], mask: Any, position_ids: Any, kept: int) -> Any:
        built, lengths, (batch, new) = self._built, [layer.length for layer in layers], ids.shape
        past = lengths[0]
        if built is None:  # another thread found that the model changed
            return self._eager(self._why)
        if batch * new > MOST:
            return self._eager(f"more than {MOST} sequences came at once") if new == 1 else None
        starts = first_tokens(mask, batch, past + new)
        if starts is None:
            return self._eager("the attention mask is not one of padding on the left")
        if any(starts) and any([length != past for length in lengths]):  # noqa: C419  # a generator takes twice as long
            return self._eager("the layers of the cache hold unequal numbers of tokens, and there is padding")
        running, inputs = built.running, built.inputs
        positions = inputs.positions(position_ids, mask, batch, past, new)
        if positions is None:
            return self._eager("the position_ids are not one position a token")
        logits_NV = running.step(layers, ids, positions, starts, inputs, kept == 1)
        if logits_NV is None:
            return self._eager(running.refused)
        self.steps += new
        logits_BQV = logits_NV.view(batch, -1, running.program.vocabulary)
        return logits_BQV if kept in (0, 1) else logits_BQV[:, -kept:]

    def _returned(self, logits: Tensor, cache: Any) -> Any:
        if not hasattr(self.output, "logits"):
            from transformers.modeling_outputs import CausalLMOutputWithPast

            self.output = CausalLMOutputWithPast
        found = self.output.__new__(self.output)  # its __init__ takes as long as a small model's step
        found["logits"], found["past_key_values"] = logits, cache  # which sets the attributes too
        return found

    def _has_begun(self, cache: Any) -> bool:
        return type(cache) in CACHES and cache in self._begun

    def _begin(self, cache: Any) -> bool:
        """`_ready`, for the text of a cache."""
        ready = self._ready()
        if ready and type(cache) in CACHES:
            self._begun.add(cache)
        return ready

    def _ready(self) -> bool:
        """Whether the program is the model as it now is; builds it anew where something changed."""
        if self.model.training:
            return False
        now = _signature_of(self.model)
        with self._lock:
            built = self._built
            if now == self._signature and self._reads.unchanged() and (built is None or built.inputs.unchanged()):
                if built is not None:
                    built.running.refresh()
                return built is not None
            self._signature, self._reads, self._built = now, Reads(), None
            try:
                self._check()
                inputs = Inputs(self.model, self._reads)
                program, copies = build(self.model, self.anatomy, inputs.widths(), self._reads)
                self._built = Built(Running(program, copies), inputs)
            except Unservable as why:
                self._why = str(why)  # said when the step is missed: a text that is only read loses nothing
            return self._built is not None

    def _check(self) -> None:
        """Everything that is called around the modules, and would not be by the step."""
        config, kinds = self.model.config, kinds_of(self.model)
        if why := getattr(self.model, "regauge_forms", ""):
            raise Unservable(why)
        if self.model.dtype not in DTYPES:
            raise Unservable(f"the model computes in {str(self.model.dtype).removeprefix('torch.')}, and the step not")
        if hooked(self.model, HARMLESS_HOOKS):
            raise Unservable("modules have hooks, which the step would not call")
        if kinds != self._kinds:
            changed = sorted(path for path in kinds.keys() | self._kinds if kinds.get(path) != self._kinds.get(path))
            raise Unservable(f"{changed[0]} is not the module that was loaded")
        if config.output_attentions or config.output_hidden_states or not config.return_dict:
            raise Unservable("the config asks for attentions, hidden states or tuples")

    def _eager(self, why: str) -> None:
        """Says once that transformers computes, and why."""
        if why not in self._said:
            self._said.add(why)
            warnings.warn(
                f"transformers' own modules decode, not the native step: {why}.", FallbackWarning, stacklevel=5
            )


def _signature_of(model: Any) -> tuple[object, ...]:
    config = model.config
    asked = config.output_attentions, config.output_hidden_states, config.return_dict
    return (*signature(model, HARMLESS_HOOKS), asked)


def _short(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, Tensor) or len(repr(value)) > 30 else repr(value)
