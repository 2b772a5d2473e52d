"""What a model would take in memory under the presets people choose, with its cache at several lengths of context.

Counted from formats and shapes; nothing is read but the config and headers. What a preset costs in quality `measure`
and `fit` say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from regauge import parts
from regauge.anatomy.model import Anatomy
from regauge.cache.scheme import CachePlan
from regauge.errors import RegaugeError
from regauge.parts import WEIGHTS, Point
from regauge.plan import load
from regauge.plan.caches import cache_plan
from regauge.plan.keeping import bytes_at
from regauge.plan.outer import with_outer
from regauge.plan.resolution import resolve
from regauge.runtime.capabilities import ask

PRESETS = ("rtn-w8", "gptq-w6g128", "gptq-w5g128", "gptq-w4g128", "gptq-w3g64", "gptq-w2g64")
CONTEXTS = (4096, 32768, 131072)
WHOLE, EMBED = "bf16, as it is", "int8"
CACHES = ("kv8", "kivi-4", "kivi-2")
"""Presets of caches that are told of a model; formats alone, for what lets tokens go keeps another text."""


@dataclass(frozen=True)
class Size:
    """One preset on one model.

    Attributes:
        name: the preset, as `apply` takes it, with the option for the embedding where that is meant.
        bits: a weight, over the whole model.
        bytes: of all tensors.
        with_cache: tokens of context → bytes with its cache; empty where the model has none.
        native: whether every matrix is multiplied by a kernel that reads the packed codes, on a CPU.
        cache: the preset that the cache is kept by; "" for bf16.
    """

    name: str
    bits: float
    bytes: int
    with_cache: dict[int, int]
    native: bool
    cache: str = ""


def sizes(anatomy: Anatomy, parameters: int, cache: int | None, itemsize: int = 2) -> tuple[Size, ...]:
    """The model as it is, then each preset that fits it, the smallest with the embedding rounded too, and two of them
    with smaller caches.

    Args:
        parameters: of the model, tied ones once.
        cache: bytes a token in bf16; None where there is no cache.
    """
    found = [_size(WHOLE, {}, anatomy, parameters, cache, itemsize)]
    tries = [(name, None) for name in PRESETS] + [(PRESETS[3], EMBED), (PRESETS[-1], EMBED)]
    for name, embed in tries:
        try:
            plan = with_outer(load(name), embed, None if embed is None or anatomy.tied else embed)
            choices = resolve(plan, anatomy).at(WEIGHTS)
        except RegaugeError:
            continue  # its formats do not fit these shapes
        head = "" if anatomy.tied else f" --head {embed}"
        called = name if embed is None else f"{name} --embed {embed}{head}"
        found.append(_size(called, choices, anatomy, parameters, cache, itemsize))
    grown = caches(anatomy) if cache else {}
    beside = [one for one in found if one.name in (WHOLE, PRESETS[3])]
    return (*found, *(_keeping(one, name, plan, anatomy) for one in beside for name, plan in grown.items()))


def caches(anatomy: Anatomy) -> dict[str, CachePlan]:
    """The presets of caches that the model can be kept by."""
    found: dict[str, CachePlan] = {}
    for name in CACHES:
        try:
            found[name] = cache_plan(load(name), anatomy)
        except RegaugeError:
            continue  # its heads are of another size
    return {name: plan for name, plan in found.items() if not plan.plain}


def _keeping(size: Size, name: str, plan: CachePlan, anatomy: Anatomy) -> Size:
    grown = {context: size.bytes + bytes_at(plan, anatomy, context) for context in CONTEXTS}
    return replace(size, name=f"{size.name} --cache {name}", with_cache=grown, cache=name)


def fitting(found: Sequence[Size], memory: int, context: int) -> tuple[Size, ...]:
    """Those that fit in so many bytes with the cache at a context, most bits first."""
    return tuple(one for one in found if one.with_cache.get(context, one.bytes) <= memory)


def _size(
    name: str, held: Mapping[str, Point], anatomy: Anatomy, parameters: int, cache: int | None, itemsize: int
) -> Size:
    rounded, left, native = 0, parameters, True
    for site in anatomy.sites:
        point = held.get(site.name)
        if point is None:
            continue
        fmt = parts.format_of(point)
        left -= site.shape[0] * site.shape[1]
        rounded += fmt.bytes(site.shape)
        if site.tap is not None:
            native = native and ask(fmt, site.shape).native
    total = rounded + left * itemsize
    grown = {} if cache is None else {context: total + cache * context for context in CONTEXTS}
    return Size(name, 8 * total / parameters, total, grown, native)
