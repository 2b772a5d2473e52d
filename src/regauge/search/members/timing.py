"""How fast members run: products timed on this machine by shape, and the truth, members run beside the source.

What a token takes beside its products (attention, norms) is the time of the whole family less that of its products,
and is shared evenly by the blocks: a block that is left out takes its share along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regauge.anatomy.model import Site
from regauge.artifact.codec.base import Layout
from regauge.elastic.subnet import Subnet
from regauge.engine.block import spelled
from regauge.hosts import host_of
from regauge.hosts.base import Source
from regauge.measure.cost import PREFILL, prompt_of
from regauge.measure.machine import cost, machine, read_costs, write_costs
from regauge.search.members.space import Members, Table, Weigh
from regauge.search.members.trials import member, speeds
from regauge.search.options import FULL, Option
from regauge.search.profile import SPREAD, key_of, seconds

TURNS = 5
RESOURCES = ("decode", "prefill")


@dataclass(frozen=True, eq=False)
class Pace:
    """How fast the source runs, by the runtime of artifacts.

    Attributes:
        base: resource → ms a token.
        native: whether the native step serves it.
        whole: bytes of weights that timings walk through.
    """

    model: Any
    base: Mapping[str, float]
    native: bool
    prompt_BT: Tensor
    whole: int


def pace_of(source: Source) -> Pace:
    """The source in bf16, timed."""
    host = host_of(source.path)
    with host.unsaid():
        ways = host.ways_of_source(source)
        prompt_BT = prompt_of(source.anatomy.site("embed").shape[0], host.context(source))
        base = {
            resource: 1000 / speeds({"source": ways.runtime}, prompt_BT, resource, TURNS)["source"].median
            for resource in RESOURCES
        }
    return Pace(ways.runtime, base, ways.native, prompt_BT, min(source.bytes_bf16(), SPREAD))


@dataclass(frozen=True, eq=False)
class Timed:
    """A family as it runs.

    Attributes:
        model: loaded in bf16.
        tables: resource → ms a token of members, predicted.
    """

    pace: Pace
    model: Any
    tables: Mapping[str, Table]

    def ratios(self, subnet: Subnet, rounds: int) -> dict[str, float]:
        """Resource → how many times as fast as the source a member is, run beside it in turn."""
        found = {}
        for resource in RESOURCES:
            runs = {"source": self.pace.model, "member": member(self.model, subnet)}
            rates = speeds(runs, self.pace.prompt_BT, resource, rounds)
            found[resource] = rates["member"].median / rates["source"].median
        return found


def timed(pace: Pace, folder: Path, members: Members, layout: Layout) -> Timed:
    """Products of every shape that a member may have, and the family as a whole."""
    model = host_of(folder).load(folder, dtype=torch.bfloat16)
    here = machine()
    before = read_costs(here)
    known, tables = dict(before), {}
    for resource in RESOURCES:
        plain = Table.made(members, _weigh(pace, layout, resource, known))
        whole = (0,) * len(members.choices)
        took = 1000 / speeds({"whole": model}, pace.prompt_BT, resource, TURNS)["whole"].median
        rest = max(0.0, took - plain(whole)) / max(members.anatomy.blocks, 1)
        tables[resource] = Table(members, {key: value + rest for key, value in plain.of.items()}, plain.outside)
    fresh = {key: value for key, value in known.items() if before.get(key) != value}
    if fresh:
        write_costs(here, fresh)
    return Timed(pace, model, tables)


def _weigh(pace: Pace, layout: Layout, resource: str, known: dict[str, float]) -> Weigh:
    """Milliseconds a token of a site; of an expert, of the tokens that reach it."""
    tokens, native = (1, pace.native) if resource == "decode" else (PREFILL, False)

    def ms(site: Site, share: float) -> float:
        if site.tap is None:
            return 0.0
        point = layout.quantised.get("embed" if site.name == "head" and layout.anatomy.tied else site.name)
        name = FULL if point is None else " ".join(map(str, spelled(point).values()))
        given = (site.shape, Option(name, point), max(1, round(share * tokens)), native, pace.whole)
        return 1000 * share * cost(key_of(*given), known, lambda: seconds(*given))

    return ms
