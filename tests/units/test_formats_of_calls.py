"""Grains over time and ranges of a call's own values: by hand, and where each beats what it stands against."""

from __future__ import annotations

import pytest
import torch

from regauge.formats.base import Format, Grain
from regauge.formats.grains import Time, Token
from regauge.formats.grids import Int
from regauge.formats.rangers import Dynamic
from regauge.formats.scales import Float32


def test_groups_over_time_by_hand() -> None:
    """Four tokens, two channels, a step for every two tokens of a channel: groups run down the columns."""
    x_TD = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]])
    grain = Time(2)
    wanted = torch.tensor([[1.0, 2.0], [10.0, 20.0], [3.0, 4.0], [30.0, 40.0]])
    assert grain.split(x_TD).equal(wanted)
    assert grain.join(wanted, x_TD).equal(x_TD)
    assert grain.groups((4, 2)) == (4, 2)
    steps = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    assert grain.spread(steps, (4, 2)).equal(torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0], [3.0, 4.0]]))
    assert grain.refuses((5, 2)) == "groups of 2 tokens do not divide 5 tokens"
    with pytest.raises(ValueError, match="do not divide 5 tokens"):
        grain.split(torch.ones(5, 2))
    with pytest.raises(ValueError, match="at least one token, not 0"):
        Time(0)


def test_steps_over_time_suit_channels_that_are_large_throughout() -> None:
    """Keys of a cache have such channels: a step a token is spoilt by them, a step a channel over time is not."""
    x_TD = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    x_TD[:, 3] *= 50

    def error(grain: Grain) -> float:
        fmt = Format(Int(4), grain, Dynamic(), Float32())
        return float((fmt.decode(fmt.encode(x_TD)) - x_TD)[:, [0, 1, 2]].square().mean())

    assert error(Time(32)) < 0.05 * error(Token())


def test_a_dynamic_range_by_hand() -> None:
    x_GK = torch.tensor([[-1.0, 3.0]])
    even, uneven = (Dynamic()(x_GK, Int(2, symmetric), Float32()) for symmetric in (True, False))
    assert even.scale_G1.item() == 2.0  # 2 · 3 over a grid from -2 to 1
    assert even.zero_G1 is None
    assert (uneven.scale_G1 * 3).item() == pytest.approx(4.0)  # 3 − (−1) over a grid from 0 to 3
    assert uneven.zero_G1 is not None
    assert uneven.zero_G1.item() == 1.0
