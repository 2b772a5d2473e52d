"""A router with transport holds its budget where prompts come one by one; without, most go to the best member."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regauge.learn import routing
from regauge.learn.loop import train
from regauge.learn.routing import STEPS, Basis, Lot, Routing, shares_for, transported
from regauge.learn.settings import Settings

COSTS = (1.0, 0.5)
HOW = Settings(STEPS // 4, schedule="cosine", patience=0, every=10)


def lot(count: int, seed: int) -> tuple[Tensor, Lot]:
    """Prompts of which most are hard for the cheap member, and which tell their kind among noise."""
    generator = torch.Generator().manual_seed(seed)
    hard = (torch.rand(count, generator=generator) < 0.8).long()
    told = torch.randn(count, 24, generator=generator)
    told[:, 3] += 4.0 * (2 * hard - 1)
    best = 3 + torch.randn(count, generator=generator)
    return hard, Lot(told, torch.stack([best, best + 0.05 + 0.95 * hard], 1))


def chosen(first: Lot, second: Lot, seed: int = 0) -> Tensor:
    made = Routing(first, second, shares_for(COSTS, 0.75), Basis.of(first.told_BD), seed)
    weight_KD, bias_K = made.finish(train(made, HOW, seed).best)
    return (second.told_BD @ weight_KD.T + bias_K).argmax(1)


def alone(score_BK: Tensor, share_K: Tensor, rounds: int = 0) -> tuple[Tensor, Tensor]:
    """No transport: each prompt by itself."""
    return score_BK.softmax(1), torch.zeros_like(share_K)


def test_prompts_that_the_small_member_answers_as_well_go_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    (_, first), (hard, second) = lot(160, 0), lot(160, 1)
    found = chosen(first, second)
    assert (found[hard == 0] == 1).float().mean() > 0.9
    assert float(torch.tensor(COSTS)[found].mean()) == pytest.approx(0.75, abs=0.06)
    by_lot = second.lost_BK.mean(0) @ (torch.bincount(found, minlength=2) / len(found))
    assert second.lost_BK.gather(1, found[:, None]).mean() < by_lot - 0.05
    monkeypatch.setattr(routing, "transported", alone)
    free = chosen(first, second)  # nothing charges for the member that is never worse
    assert float(torch.tensor(COSTS)[free].mean()) > 0.85


def test_where_prompts_tell_nothing_the_budget_still_holds() -> None:
    (_, first), (_, second) = lot(200, 2), lot(200, 3)
    blind = [
        Lot(torch.randn(200, 24, generator=torch.Generator().manual_seed(s)), x.lost_BK)
        for s, x in ((4, first), (5, second))
    ]
    assert float((chosen(*blind) == 0).float().mean()) == pytest.approx(0.5, abs=0.15)


def test_transport_gives_each_prompt_whole_and_each_member_its_share() -> None:
    score = 3 * torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    share = torch.tensor([0.5, 0.3, 0.2])
    plan, price = transported(score, share, 400)
    torch.testing.assert_close(plan.sum(1), torch.ones(50))
    torch.testing.assert_close(plan.mean(0), share, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.softmax(score - price, 1), plan)


def test_shares_are_the_most_even_of_their_mean() -> None:
    assert shares_for((1.0, 0.5, 0.0), 0.5).tolist() == pytest.approx([1 / 3] * 3)
    found = shares_for((1.0, 0.5, 0.25), 0.4)
    assert float((found * torch.tensor([1.0, 0.5, 0.25])).sum()) == pytest.approx(0.4)
    assert found[2] > found[1] > found[0]
    for budget in (0.25, 0.1, 1.0):
        with pytest.raises(ValueError, match="say another route"):
            shares_for((1.0, 0.25), budget)


def test_a_gate_gives_neurons_to_the_tokens_that_need_them() -> None:
    """The second half of a layer's neurons speak where the first channel is positive, and nowhere else."""
    generator = torch.Generator().manual_seed(8)
    up_FD, down_DF = (torch.randn(16, 16, generator=generator) for _ in range(2))
    up_FD[8:] = 0.0
    up_FD[8:, 0] = torch.rand(8, generator=generator) + 0.5

    def tokens(count: int) -> Lot:
        x_TD = torch.randn(count, 16, generator=generator)
        h_TF = (x_TD @ up_FD.T).relu()
        gap_TD = h_TF[:, 8:] @ down_DF[:, 8:].T
        return Lot(x_TD, torch.stack([torch.zeros(count), gap_TD.square().sum(1)], 1))

    first, second = tokens(400), tokens(400)
    found = chosen(first, second)
    assert float(torch.tensor(COSTS)[found].mean()) == pytest.approx(0.75, abs=0.05)
    assert ((found == 0) == (second.told_BD[:, 0] > 0)).float().mean() > 0.9
    lost = second.lost_BK.gather(1, found[:, None]).mean()
    assert lost < 0.1 * (second.lost_BK.mean(0) @ torch.tensor([0.5, 0.5]))  # the same shares by lot
