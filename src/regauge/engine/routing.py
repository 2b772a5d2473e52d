"""The router of a family that was just trained: what its members lose is looked at once, and a small map fitted to it.

The first quarter of each window is the prompt, and what a member loses is counted on the rest. Cost: each window that
is looked at, once through each member, and a second for the map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from regauge.anatomy.model import Anatomy
from regauge.artifact.disk import put
from regauge.artifact.receipt import RoutedReceipt
from regauge.artifact.router import FILE, Router, router_bytes, told_by
from regauge.elastic.family import Family
from regauge.elastic.subnet import Subnet
from regauge.engine.raising import Batch, Raising, space_of
from regauge.errors import RecipeError
from regauge.hosts.teaching import Trainee
from regauge.learn.base import Parameters
from regauge.learn.loop import train
from regauge.learn.routing import STEPS, Basis, Lot, Routing, shares_for
from regauge.learn.settings import Settings
from regauge.learn.training import Training

PROMPT = 4
"""A prompt is this part of a window."""
LOOKED = 131072
"""Tokens of the text trained on that are looked at, at most."""


@dataclass(frozen=True)
class Choosers:
    """Members that a router chooses from, and which share of the whole's products each has."""

    subnets: tuple[Subnet, ...]
    costs: tuple[float, ...]

    @staticmethod
    def of(named: Mapping[Subnet, float]) -> Choosers:
        """The whole, and the members that have names: the largest first."""
        sizes = {Subnet(): 1.0, **named}
        some = tuple(sorted(sizes, key=lambda one: -sizes[one]))
        return Choosers(some, tuple(sizes[one] for one in some))


def refuse_route(training: Training, family: Family, anatomy: Anatomy) -> None:
    """
    Raises:
        RecipeError: a router is asked for, and these members cannot have it.
    """
    if not training.route:
        return
    if not anatomy.causal or training.rank:
        what = "an encoder" if not anatomy.causal else "members that differ in bits"
        raise RecipeError(
            f"a router sends prompts to members that cost less, and there are none of {what}: leave route out"
        )
    some = Choosers.of(space_of(family, anatomy).named)
    if len(some.subnets) < 2:
        raise RecipeError("a router chooses between members that have names: say family: {members: {small: 'depth=4'}}")
    try:
        shares_for(some.costs, training.route)
    except ValueError as error:
        raise RecipeError(f"route: {error}") from error


def routed(problem: Raising, learnt: Parameters, budget: float, base: Path) -> RoutedReceipt:
    """Fits the router of a family, and writes it beside it; what the receipt says of it.

    Args:
        learnt: the family's numbers as they will be stored.
        budget: the mean share of the whole's products that prompts may cost.
    """
    some = Choosers.of(problem.space.named)
    share_K = shares_for(some.costs, budget)
    problem.trainee.put(learnt)
    first = _looked(problem.trainee, some, _few(problem.text))
    second = _looked(problem.trainee, some, problem.aside)
    routing = Routing(first, second, share_K, Basis.of(first.told_BD), problem.seed)
    state = train(routing, Settings(STEPS, schedule="cosine", patience=0, every=10), problem.seed)
    weight_KD, bias_K = routing.finish(state.best)
    rows = {
        str(one): torch.cat([row, bias[None]]) for one, row, bias in zip(some.subnets, weight_KD, bias_K, strict=True)
    }
    put(base / FILE, router_bytes(rows))
    return _told(Router(some.subnets, weight_KD, bias_K), some, second, budget)


def _few(text: Sequence[Batch]) -> list[Batch]:
    """As many batches as are looked at, spread evenly."""
    count = max(1, LOOKED // max(text[0].ids_BT.numel(), 1))
    return [text[at * len(text) // count] for at in range(count)] if len(text) > count else list(text)


def _looked(trainee: Trainee, some: Choosers, text: Sequence[Batch]) -> Lot:
    """Every prompt of some text, and what each member loses on what follows."""
    told, lost = list[Tensor](), list[Tensor]()
    with torch.no_grad():
        for batch in text:
            ids_BT = batch.ids_BT
            prompt = max(1, ids_BT.shape[1] // PROMPT)
            told.append(told_by(trainee.embedded(ids_BT[:, :prompt])))
            each = [_lost(trainee.read(one, ids_BT).logits_BTV, ids_BT, prompt) for one in some.subnets]
            lost.append(torch.stack(each, 1))
    return Lot(torch.cat(told).cpu(), torch.cat(lost).cpu())


def _lost(logits_BTV: Tensor | None, ids_BT: Tensor, prompt: int) -> Tensor:
    """(B,): nats a token behind the prompt."""
    assert logits_BTV is not None, "a prompt is one of a language model"
    ahead_BVT = logits_BTV[:, prompt - 1 : -1].float().transpose(1, 2)
    return cross_entropy(ahead_BVT, ids_BT[:, prompt:], reduction="none").mean(1)


def _told(router: Router, some: Choosers, held_out: Lot, budget: float) -> RoutedReceipt:
    """What the router does with prompts that it never saw, one by one."""
    chosen_B = (held_out.told_BD @ router.weight_KD.T + router.bias_K).argmax(1)
    share_K = torch.bincount(chosen_B, minlength=len(some.subnets)).float() / len(chosen_B)
    means_K = held_out.lost_BK.mean(0)
    return RoutedReceipt(
        budget=budget,
        compute=float((share_K * torch.tensor(some.costs, dtype=torch.float32, device="cpu")).sum()),
        prompts=len(chosen_B),
        shares={str(one): float(share) for one, share in zip(some.subnets, share_K, strict=True)},
        alone={str(one): float(mean) for one, mean in zip(some.subnets, means_K, strict=True)},
        routed=float(held_out.lost_BK.gather(1, chosen_B[:, None]).mean()),
        by_lot=float((share_K * means_K).sum()),
    )
