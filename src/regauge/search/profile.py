"""What each option of each shape costs on this machine: timed on the code that will run, cached by machine.

Every distinct (shape, option) is timed once, at one token (decode) and at a prefill, on several copies in turn,
so that weights come from where the model's would: memory for large models, the cache for small ones. Medians. What was
timed before is believed for a week, where one of it measured again says the same. Decoding
is timed as the native step multiplies, where the step serves the model, and by packed modules elsewhere; a prefill
by packed modules. What a token costs besides the sites is the time of the whole model in bf16, run as the artifact
will be, less their sum; no choice changes it.
Units: ms a token. Legend: O outputs, I inputs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge import parts
from regauge.errors import BudgetError
from regauge.hosts import host_of
from regauge.hosts.base import Source
from regauge.kernels.cpu.library import ABI, level
from regauge.kernels.cpu.pieces import Norm, Site
from regauge.kernels.cpu.step import Program
from regauge.measure.cost import ORIGINAL, PREFILL, RUNTIME, prompt_of, speeds
from regauge.measure.machine import believed, cost, machine, read_costs, write_costs
from regauge.parts import Spec
from regauge.runtime.matrices.arena import Arena
from regauge.runtime.matrices.modules import FullMatrix, PackedMatrix
from regauge.runtime.step.sites import Unservable, site_of
from regauge.search.budgets import Budget
from regauge.search.options import FULL, Option, SiteGroup
from regauge.search.subject import Subject

SPREAD = 64 * 2**20  # bytes of weights that a timing walks through, larger than most last-level caches
REPEATS = 9
LEAST = 1e-8  # seconds: no product is free
Costs = dict[str, dict[str, dict[str, float]]]
"""`decode` or `prefill` → group → option → ms a token."""
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Timing:
    """What the machine said.

    Attributes:
        costs: of every option.
        source: ms a token of the source in bf16, by its library's own modules.
        base: the same weights run as an artifact is, by the native step where it serves the model: what a speed budget
            is a multiple of.
    """

    costs: Costs
    source: Mapping[str, float]
    base: Mapping[str, float]

    def fixed(self, resource: str) -> float:
        """ms a token that no choice changes: the base's time less its sites', never below 0."""
        return max(0.0, self.base[resource] - sum(options["full"] for options in self.costs[resource].values()))

    def least(self, resource: str) -> float:
        """ms a token with every site at its fastest."""
        return self.fixed(resource) + sum(min(options.values()) for options in self.costs[resource].values())


def timed(asked: Sequence[Budget]) -> list[str]:
    """The speeds that are asked for."""
    return [budget.resource for budget in asked if budget.resource != "memory"]


def within_reach(
    subject: Subject, groups: Sequence[SiteGroup], asked: Sequence[Budget], turns: int, drafts: float = 1.0
) -> Timing | None:
    """The machine profiled, where a speed is asked for.

    Args:
        drafts: how many times as fast decoding may be by drafts, beside the weights.

    Raises:
        BudgetError: not even every site at its fastest would do; says how near it would come.
    """
    if not timed(asked):
        return None
    timing = profile(subject, groups, turns)
    before = timing.base
    for budget in asked:
        if budget.resource != "memory":
            best, more = before[budget.resource] / timing.least(budget.resource), ""
            if budget.resource == "decode" and drafts > 1:
                more = f"; drafts are not counted on for more than {drafts:g}x beside them"
            if best * (drafts if more else 1.0) < budget.amount:
                raise BudgetError(
                    f"{budget.text!r} cannot be had here: with every weight at its fastest this machine would reach "
                    f"{best:.2f}x ({timing.fixed(budget.resource):.3g} of the source's {before[budget.resource]:.3g} "
                    f"ms a token by the same runtime are spent outside the weights{more}); ask for less."
                )
    return timing


def profile(subject: Subject, groups: Sequence[SiteGroup], turns: int) -> Timing:
    """Costs of every option, and the source's own ms a token in bf16, both for decode and prefill."""
    source, base, native = source_ms(subject.source, turns)
    here = machine()
    whole = min(subject.source.bytes_bf16(), SPREAD)
    ways = {"decode": (1, native), "prefill": (PREFILL, False)}
    before = read_costs(here)
    known = dict(before)
    for shape in sorted({site.shape for group in groups for site in group.sites if site.tap is not None})[-1:]:
        probe = (shape, Option(FULL, None), *ways["decode"], whole)
        known = dict(believed(known, key_of(*probe), _timer(*probe)))
    found: Costs = {
        resource: {
            group.name: {
                option.name: sum(
                    1000 * cost(key_of(site.shape, option, *way, whole), known, _timer(site.shape, option, *way, whole))
                    for site in group.sites
                    if site.tap is not None or subject.anatomy.tied
                )
                for option in group.options
            }
            for group in groups
        }
        for resource, way in ways.items()
    }
    fresh = {key: value for key, value in known.items() if before.get(key) != value}
    if fresh:
        write_costs(here, fresh)
    return Timing(found, source, base)


def source_ms(source: Source, turns: int) -> tuple[dict[str, float], dict[str, float], bool]:
    """ms a token of the source in bf16, by its library's own modules and as an artifact runs, interleaved; and whether
    the native step served."""
    host = host_of(source.path)
    ways = host.ways_of_source(source)
    models = {RUNTIME: ways.runtime} if ways.own is None else {RUNTIME: ways.runtime, ORIGINAL: ways.own}
    with host.unsaid():
        found = speeds(models, prompt_of(source.anatomy.site("embed").shape[0], host.context(source)), turns)
    base = {name: 1000 / pair[RUNTIME].median for name, pair in found.items()}
    own = {name: 1000 / pair.get(ORIGINAL, pair[RUNTIME]).median for name, pair in found.items()}
    return own, base, ways.native


def key_of(shape: tuple[int, int], option: Option, tokens: int, native: bool, whole: int) -> str:
    how = "step" if native else "modules"
    return f"bf16:{how}:{level()}.{ABI}:{shape[0]}x{shape[1]}:{option.name}:{tokens}:{whole >> 20}MiB"


def _timer(shape: tuple[int, int], option: Option, tokens: int, native: bool, whole: int) -> Callable[[], float]:
    return lambda: seconds(shape, option, tokens, native, whole)


def seconds(shape: tuple[int, int], option: Option, tokens: int, native: bool, whole: int) -> float:
    """Seconds a token of one product, median over copies taken in turn. `native`: as the step multiplies."""
    generator = torch.Generator().manual_seed(0)
    w_OI = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    x_TI = torch.randn(tokens, shape[1], generator=generator, dtype=torch.float32, device="cpu")
    copies = max(1, min(16, whole // (2 * w_OI.numel())))
    arena = Arena()
    products = [_product(w_OI, option, arena, native) for _ in range(copies)]
    with torch.inference_mode():
        found = _median(products, x_TI if native else x_TI.bfloat16())
        if native:  # a step calls once for all its sites
            found = max(
                LEAST,
                found
                - _median(
                    [_native(Site(torch.zeros(1, 1, dtype=torch.float32, device="cpu")))],
                    torch.zeros(1, 1, dtype=torch.float32, device="cpu"),
                ),
            )
    return found / tokens


def _median(products: Sequence[Product], x_TI: Tensor) -> float:
    """Seconds of one product."""
    for product in products:
        product(x_TI)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for product in products:
            product(x_TI)
        times.append((time.perf_counter() - start) / len(products))
    return statistics.median(times)


def _product(w_OI: Tensor, option: Option, arena: Arena, native: bool) -> Product:
    if option.choice is None:
        weight = w_OI.to(torch.bfloat16)
        if native:
            return _native(site_of(option.name, FullMatrix(weight, torch.bfloat16)))
        return lambda x_TI: torch.nn.functional.linear(x_TI, weight)
    fmt = parts.format_of(option.choice.but(ranger=Spec("minmax")))
    packed = PackedMatrix(fmt.encode(w_OI), fmt, torch.bfloat16, allocate=arena.allocate)
    if native:
        try:
            return _native(site_of(option.name, packed))
        except Unservable:  # one such site, and the whole model decodes by modules
            return lambda x_TI: packed(x_TI.bfloat16())
    return packed


def _native(site: Site) -> Product:
    """A program of the step with nothing in it but this matrix."""
    width = site.matrix.shape[1]
    program = Program((), Norm("none", width, 0.0), site, width, 0, 0.0)
    return lambda x_BH: program(x_BH, (0,), (0,), (), ())
