"""`regauge inspect --positions`: how far bf16 products drift when a text is moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regauge.attention.rotary import Turning, drift
from regauge.errors import ModelError
from regauge.report.positions import SHIFTS, positions
from tests.pico import pico, save


def test_in_exact_arithmetic_a_move_changes_nothing_and_in_bfloat16_it_does() -> None:
    draw = torch.Generator().manual_seed(0)
    turning = Turning(1e4 ** -(torch.arange(8, dtype=torch.float32) / 8))
    query, key = (torch.randn(1, heads, 12, 16, generator=draw, dtype=torch.float32) for heads in (4, 2))
    at = torch.arange(12)
    exact = [
        turning(query, at + shift, torch.float64)[:, ::2] @ turning(key, at + shift, torch.float64).mT
        for shift in (0, 4096)
    ]
    assert torch.allclose(*exact, atol=1e-6)
    found = drift(query, key, turning, 4096, 0.25)
    assert found.wide < 1e-3 < found.mean < 0.05 < found.spread
    assert drift(query, key, turning, 0, 0.25).mean == 0


@pytest.mark.parametrize("halves", [True, False])
def test_pairs_turn_by_hand(halves: bool) -> None:
    turning = Turning(torch.tensor([torch.pi / 2, 0.0]), halves)
    found = turning(torch.tensor([[[[1.0, 2.0, 3.0, 4.0, 5.0]]]]), torch.tensor([1]), torch.float32).flatten()
    expected = [-3.0, 2.0, 1.0, 4.0, 5.0] if halves else [-2.0, 1.0, 3.0, 4.0, 5.0]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_every_block_of_a_model_is_measured(tmp_path: Path) -> None:
    found = positions(str(save(pico("llama"), tmp_path / "model")))
    assert [one.block for one in found] == [0, 1]
    assert all([drift.shift for drift in one.drifts] == list(SHIFTS) for one in found)
    assert all(0 < drift.mean < drift.spread for one in found for drift in one.drifts)


def test_a_model_that_turns_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="turns no queries and keys by their position"):
        positions(str(save(pico("gpt2"), tmp_path / "model")))
