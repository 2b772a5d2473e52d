"""What a loaded model keeps of the past: by its artifact, by `load(..., cache=...)`, or as one request asks.

`model.regauge_cache` is the plan. `generate` builds its cache by it, and by `generation_config.regauge_cache` where a
request names another (`model.generate(..., regauge_cache="kivi-4")`); so does a forward with `use_cache=True` and no
cache given. A plan says nothing of blocks that it leaves whole, and a model without a plan has transformers' own cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from transformers import DynamicCache

from regauge.anatomy.model import Anatomy
from regauge.cache.scheme import CachePlan
from regauge.errors import FallbackWarning, SettingError
from regauge.hosts.transformers.attending import NAME, attend, expect
from regauge.hosts.transformers.coding import may_read
from regauge.hosts.transformers.marking import running
from regauge.hosts.transformers.owned import method, own
from regauge.hosts.transformers.packed import PackedCache, cache_of
from regauge.plan.caches import NONE, Asked, asked, cache_plan

REQUEST = "regauge_cache"
"""The attribute of a generation config that names what one request keeps."""
PLAIN = (None, "dynamic")
"""Implementations of a cache, by transformers' names, in whose place a plan's stands."""
BATCHING = ("init_continuous_batching", "continuous_batching_context_manager", "generate_batch")


def keep(model: Any, anatomy: Anatomy, plan: CachePlan | None, on_gpu: bool = False) -> None:
    """Lets a loaded model keep what a plan says, and lets requests ask for another.

    Args:
        on_gpu: it runs on a GPU, where attention reads codes by a kernel of its own.
    """
    model.regauge_on_gpu = on_gpu
    if anatomy.plumbing.scales:
        if plan is not None:
            model.keep_by(plan)
        return
    if not model.can_generate():
        if plan is not None and not plan.plain:
            raise SettingError(f"a {type(model).__name__} makes no text and keeps no past: leave cache= out")
        return
    model.regauge_cache, model.regauge_anatomy = plan, anatomy
    setattr(model.generation_config, REQUEST, None)
    own(model, "_prepare_cache_for_generation", _prepare)
    if plan is None:
        return
    for name in BATCHING:
        if callable(getattr(type(model), name, None)):
            own(model, name, _refuse_batching)
    if getattr(model, "regauge_step", None) is None:  # whose forward asks `begun` too
        own(model, "forward", _forward)
    if plan.plain:
        warnings.warn(
            f"{plan.name} changes no block's cache of this model: {'; '.join(plan.notes) or 'none has a store'}.",
            FallbackWarning,
            stacklevel=3,
        )


def planned(cache: Asked | None, anatomy: Anatomy, otherwise: CachePlan | None = None) -> CachePlan | None:
    """The plan that a user asks for; None: that of the artifact.

    Raises:
        RecipeError: it is none, or does not fit the model.
    """
    if cache is None:
        return otherwise
    plan = asked(cache)
    return None if plan is None else cache_plan(plan, anatomy)


def keeps(model: Any) -> str:
    """The name of the plan by which a loaded model keeps its past; "" where everything is kept as it comes."""
    plan: CachePlan | None = getattr(model, "regauge_cache", None)
    return "" if plan is None or plan.plain else plan.name


def lets_go(model: Any) -> bool:
    """Whether the plan by which a loaded model keeps its past lets tokens go."""
    plan: CachePlan | None = getattr(model, "regauge_cache", None)
    return plan is not None and any(block is not None and block.policy is not None for block in plan.blocks)


def fresh(model: Any, request: object = None) -> Any:
    """A new cache of a model, of the member that runs where it is a family, by its plan or by what a request asks for;
    transformers' own where neither says anything.

    Args:
        request: a preset's name, several with `+`, `none`, or a rule as a mapping. It names no files and no code.

    Raises:
        SettingError: it is nothing of these.
        RecipeError: it does not fit the model.
    """
    model = running(model)
    plan = asked_by(model, request)
    if plan is None or plan.plain:
        return DynamicCache(config=model.config.get_text_config(decoder=True))
    if model.config.is_encoder_decoder:
        raise SettingError(f"the caches of a {type(model).__name__} are two for each block; leave {plan.name} out")
    if any(block is not None and (block.policy or block.merge) for block in plan.blocks):
        attend(model)
    if not getattr(model, "regauge_on_gpu", False):
        return cache_of(plan, model)
    with suppress(SettingError):  # a family with an attention of its own decodes what is held
        attend(model)
    cache = cache_of(plan, model)
    if model.config._attn_implementation == NAME:
        may_read(cache, plan)
    return cache


def begun(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward, with a cache by the model's plan where it asks for one and gives none."""
    plan = getattr(model, "regauge_cache", None)
    if plan is None or plan.plain or kwargs.get("use_cache") is not True or kwargs.get("past_key_values") is not None:
        return kwargs
    return kwargs | {"past_key_values": fresh(model)}


def asked_by(model: Any, request: object) -> CachePlan | None:
    """The plan that a request asks for, by name or as a rule; None: the model's own.

    Raises:
        SettingError: it is nothing of these, or the model was not loaded with `rg.load`.
        RecipeError: it does not fit the model.
    """
    plan: CachePlan | None = getattr(model, "regauge_cache", None)
    if request is None:
        return plan
    if isinstance(request, CachePlan):
        return request
    if not isinstance(request, str | Mapping):
        raise SettingError(
            f"{REQUEST}={str(request)[:40]!r} is no cache: give a preset's name, '{NONE}', or a rule as a mapping"
        )
    wanted, anatomy = asked(request, trusted=False), getattr(model, "regauge_anatomy", None)
    if anatomy is None:
        raise SettingError(f"a {type(model).__name__} that rg.load did not load keeps no {str(request)[:40]!r}")
    return None if wanted is None else cache_plan(wanted, anatomy)


def _forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    """A model's own `forward`, where no native step stands before it."""
    return method(model, "forward")(*args, **begun(model, kwargs))


def _prepare(model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **rest: Any) -> Any:
    """`_prepare_cache_for_generation` of transformers, with a plan's cache in place of a dynamic one."""
    stock = method(model, "_prepare_cache_for_generation")
    request = getattr(generation_config, REQUEST, None)
    given = model_kwargs.get("past_key_values")
    if given is not None and request is not None:
        raise SettingError(f"{REQUEST}={str(request)[:40]!r} and past_key_values= are two caches: give one of them")
    plan = asked_by(model, request)
    length = _length(generation_config, model_kwargs)
    if type(given) is PackedCache and length:
        expect(given, length)
    if given is not None or generation_config.use_cache is False or plan is None or plan.plain:
        return stock(generation_config, model_kwargs, *args, **rest)
    if generation_config.cache_implementation not in PLAIN:
        if request is not None:
            raise SettingError(
                f"{REQUEST}={str(request)[:40]!r} and cache_implementation={generation_config.cache_implementation!r} "
                "are two caches: give one of them"
            )
        warnings.warn(
            f"cache_implementation={generation_config.cache_implementation!r} is asked for, so the cache is "
            f"transformers' own and not {plan.name}.",
            FallbackWarning,
            stacklevel=4,
        )
        return stock(generation_config, model_kwargs, *args, **rest)
    cache = fresh(model, plan)
    model_kwargs["past_key_values"] = cache
    if length:
        expect(cache, length)
    if generation_config.is_assistant:
        cache.activate_past_recording()
    return None


def _length(generation_config: Any, model_kwargs: dict[str, Any]) -> int:
    """Tokens that the text has when the prompt has been read; 0: that is not said. `generate` takes a mask of ones
    away, and leaves its length."""
    mask = model_kwargs.get("attention_mask")
    found = getattr(generation_config, "_mask_length", 0) if mask is None or mask.ndim != 2 else mask.shape[1]
    return max(0, int(found))


def _refuse_batching(model: Any, *args: Any, **rest: Any) -> Any:
    """
    Raises:
        SettingError: always.
    """
    raise SettingError(
        "continuous batching pages its own cache in full precision and reads none of ours; use generate(), which takes "
        "several prompts at once"
    )
