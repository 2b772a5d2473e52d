"""What each option of each shape costs on this machine: timed on the packed modules that will run, cached by machine.

Every distinct (shape, option) is timed once, at one token (decode) and at a prefill, on several copies in turn,
so that weights come from where the model's would: memory for large models, the cache for small ones. Medians. What a
token costs besides the sites is the whole model's time less their sum, and no choice changes it.
Units: ms a token. Legend: O outputs, I inputs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regauge import parts
from regauge.errors import BudgetError
from regauge.hosts.transformers.packed.arena import Arena
from regauge.hosts.transformers.packed.modules import PackedMatrix
from regauge.kernels.cpu.library import ABI, level
from regauge.measure.cost import decode_rate, interleave, prefill_rate
from regauge.measure.machine import cost, machine, read_costs, write_costs
from regauge.parts import Spec
from regauge.search.budgets import Budget
from regauge.search.build import DECODE, PREFILL, PROMPT, in_bf16
from regauge.search.model import Subject
from regauge.search.options import Option, SiteGroup

SPREAD = 64 * 2**20  # bytes of weights that a timing walks through, larger than most last-level caches
REPEATS = 9
Costs = dict[str, dict[str, dict[str, float]]]
"""`decode` or `prefill` → group → option → ms a token."""


@dataclass(frozen=True)
class Timing:
    """What the machine said: costs of every option, and the source's own ms a token in bf16."""

    costs: Costs
    source: Mapping[str, float]

    def fixed(self, resource: str) -> float:
        """ms a token that no choice changes: the source's time less its sites', never below 0."""
        return max(0.0, self.source[resource] - sum(options["full"] for options in self.costs[resource].values()))

    def least(self, resource: str) -> float:
        """ms a token with every site at its fastest."""
        return self.fixed(resource) + sum(min(options.values()) for options in self.costs[resource].values())


def timed(asked: Sequence[Budget]) -> list[str]:
    """The speeds that are asked for."""
    return [budget.resource for budget in asked if budget.resource != "memory"]


def within_reach(subject: Subject, groups: Sequence[SiteGroup], asked: Sequence[Budget], turns: int) -> Timing | None:
    """The machine profiled, where a speed is asked for.

    Raises:
        BudgetError: not even every site at its fastest would do; says how near it would come.
    """
    if not timed(asked):
        return None
    costs, before = profile(subject, groups, turns)
    timing = Timing(costs, before)
    for budget in asked:
        if budget.resource != "memory":
            best = before[budget.resource] / timing.least(budget.resource)
            if best < budget.amount:
                raise BudgetError(
                    f"{budget.text!r} cannot be had here: with every weight at its fastest this machine would reach "
                    f"{best:.2f}x ({timing.fixed(budget.resource):.3g} of the source's {before[budget.resource]:.3g} "
                    "ms a token are spent outside the weights); ask for less."
                )
    return timing


def profile(subject: Subject, groups: Sequence[SiteGroup], turns: int) -> tuple[Costs, dict[str, float]]:
    """Costs of every option, and the source's own ms a token in bf16, both for decode and prefill."""
    here = machine()
    known = read_costs(here)
    before = dict(known)
    tokens = {"decode": 1, "prefill": PREFILL}
    whole = min(subject.source.bytes_bf16(), SPREAD)
    found: Costs = {
        resource: {
            group.name: {
                option.name: sum(
                    1000 * cost(_key(site.shape, option, count, whole), known, _timer(site.shape, option, count, whole))
                    for site in group.sites
                    if site.tap is not None or subject.anatomy.tied
                )
                for option in group.options
            }
            for group in groups
        }
        for resource, count in tokens.items()
    }
    if known != before:
        write_costs(here, known)
    return found, source_ms(subject, turns)


def source_ms(subject: Subject, turns: int) -> dict[str, float]:
    """ms a token of the source in bf16."""
    model = in_bf16(subject.source)
    generator = torch.Generator().manual_seed(0)
    most = min(PREFILL, int(getattr(subject.source.config, "max_position_embeddings", PREFILL)) // 2)
    prompt = torch.randint(0, subject.anatomy.site("embed").shape[0], (1, most), generator=generator)
    runs = {"decode": decode_rate(model, prompt[:, :PROMPT], DECODE), "prefill": prefill_rate(model, prompt)}
    return {name: 1000 / speed.median for name, speed in interleave(runs, turns).items()}


def _key(shape: tuple[int, int], option: Option, tokens: int, whole: int) -> str:
    return f"bf16:{level()}.{ABI}:{shape[0]}x{shape[1]}:{option.name}:{tokens}:{whole >> 20}MiB"


def _timer(shape: tuple[int, int], option: Option, tokens: int, whole: int) -> Callable[[], float]:
    return lambda: seconds(shape, option, tokens, whole)


def seconds(shape: tuple[int, int], option: Option, tokens: int, whole: int) -> float:
    """Seconds a token of one product, median over copies taken in turn."""
    generator = torch.Generator().manual_seed(0)
    w_OI = torch.randn(shape, generator=generator)
    x_TI = torch.randn(tokens, shape[1], generator=generator).to(torch.bfloat16)
    size = 2 * w_OI.numel()
    copies = max(1, min(16, whole // size))
    arena = Arena()
    products = [_product(w_OI, option, arena) for _ in range(copies)]
    with torch.inference_mode():
        for product in products:
            product(x_TI)
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            for product in products:
                product(x_TI)
            times.append((time.perf_counter() - start) / copies / tokens)
    return statistics.median(times)


def _product(w_OI: Tensor, option: Option, arena: Arena) -> Callable[[Tensor], Tensor]:
    if option.choice is None:
        weight = w_OI.to(torch.bfloat16)
        return lambda x_TI: torch.nn.functional.linear(x_TI, weight)
    fmt = parts.format_of(replace(option.choice, ranger=Spec("minmax")))
    return PackedMatrix(fmt.encode(w_OI), fmt, torch.bfloat16, allocate=arena.allocate)
