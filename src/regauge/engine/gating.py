"""Gates of a family that was just trained: a small map a block, that chooses how many neurons a token runs through.

What a share of a layer's neurons misses of what the whole layer gives is looked at once for some tokens, and each gate
is fitted to that as a router is, every block under the same budget (after arXiv 2312.10193). Cost: some thousand tokens
through every layer at each share, and some seconds a block for the maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy
from regauge.artifact.disk import put
from regauge.artifact.gates import FILE, gates_bytes, widths
from regauge.artifact.receipt import GatedReceipt
from regauge.elastic.family import Family
from regauge.elastic.subnet import Subnet
from regauge.engine.raising import Batch, Raising
from regauge.errors import RecipeError
from regauge.hosts.teaching import Trainee
from regauge.learn.base import Parameters
from regauge.learn.distillers import labels
from regauge.learn.loop import train
from regauge.learn.routing import Basis, Lot, Routing, shares_for
from regauge.learn.settings import Settings
from regauge.learn.training import Training

TOKENS, SECOND = 4096, 2048
"""That gates are fitted to, and by which the best is kept."""
NUMBERS = 64
"""That a token is told by, at most."""
HOW = Settings(100, schedule="cosine", patience=0, every=10)


def refuse_gates(training: Training, family: Family, anatomy: Anatomy) -> None:
    """
    Raises:
        RecipeError: gates are asked for, and this family cannot have them.
    """
    if not training.gates:
        return
    if not anatomy.causal or training.rank or len(widths(family)) < 2:
        raise RecipeError(
            "gates choose neurons of a feed-forward layer for each token of a language model, and weights are trained "
            "before them: say family: {ffn: [0.75, 0.5, 0.25]}, and neither rank nor an encoder"
        )
    try:
        shares_for(widths(family), training.gates)
    except ValueError as error:
        raise RecipeError(f"gates: {error}") from error


def gated(problem: Raising, learnt: Parameters, budget: float, base: Path) -> GatedReceipt:
    """Fits the gates of a family, and writes them beside it; what the receipt says of them.

    Args:
        learnt: the family's numbers as they will be stored.
        budget: the mean share of neurons that a token may run through.
    """
    trainee, shares = problem.trainee, widths(problem.trainee.family)
    share_K = shares_for(shares, budget)
    trainee.put(learnt)
    first, second = _looked(trainee, problem.text, TOKENS), _looked(trainee, problem.aside, SECOND)
    gates, by_lot = dict[int, Tensor](), dict[int, Tensor]()
    for block, (seen, kept) in enumerate(zip(first, second, strict=True)):
        routing = Routing(seen, kept, share_K, Basis.of(seen.told_BD, NUMBERS), problem.seed + block)
        best = train(routing, HOW, problem.seed).best
        for found, parameters in ((gates, best), (by_lot, routing.init())):
            weight_KD, bias_K = routing.finish(parameters)
            found[block] = torch.cat([weight_KD, bias_K[:, None]], 1)
    put(base / FILE, gates_bytes(gates))
    lost, ran_BK = _run(trainee, gates, problem.aside)
    null, _ = _run(trainee, by_lot, problem.aside)
    mean_K = ran_BK.sum(0) / ran_BK.sum()
    alone = {
        str(one): _alone(trainee, one, problem.aside)
        for one in (Subnet() if share == 1 else Subnet(ffn=share) for share in shares)
    }
    cost_K = torch.tensor(shares, dtype=torch.float64, device="cpu")
    return GatedReceipt(
        budget=budget,
        compute=float((mean_K * cost_K).sum()),
        shares={str(share): float(part) for share, part in zip(shares, mean_K, strict=True)},
        alone=alone,
        gated=lost,
        by_lot=null,
    )


def _looked(trainee: Trainee, text: Sequence[Batch], tokens: int) -> list[Lot]:
    """For each block some tokens: what its layer reads, and what each share misses."""
    parts: list[list[tuple[Tensor, Tensor]]] = []
    seen = 0
    for batch in text:
        if seen >= tokens:
            break
        parts.append(trainee.narrowed(batch.ids_BT, widths(trainee.family)))
        seen += batch.ids_BT.numel()
    return [
        Lot(torch.cat([x.float() for x, _ in some]).cpu(), torch.cat([y for _, y in some]).cpu())
        for some in zip(*parts, strict=True)
    ]


def _run(trainee: Trainee, gates: Mapping[int, Tensor], text: Sequence[Batch]) -> tuple[float, Tensor]:
    """Nats a token through gates, and how many tokens ran through each share, a block (B, K)."""
    lost, count, ran = 0.0, 0, list[Tensor]()
    for batch in text:
        read, seen_BK = trainee.gated(gates, batch.ids_BT)
        lost += len(batch.ids_BT) * float(labels(read, batch.ids_BT))
        count += len(batch.ids_BT)
        ran.append(seen_BK.cpu())
    return lost / count, torch.stack(ran).sum(0)


def _alone(trainee: Trainee, subnet: Subnet, text: Sequence[Batch]) -> float:
    """Nats a token of one share for all."""
    with torch.no_grad():
        some = [(len(one.ids_BT), float(labels(trainee.read(subnet, one.ids_BT), one.ids_BT))) for one in text]
    return sum(count * one for count, one in some) / sum(count for count, _ in some)
