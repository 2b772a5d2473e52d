"""The search of code words in C++ against torch's, at every level of this CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regauge.formats.codewords import IQ2S, IQ2XS, IQ2XXS, IQ3S, IQ3XXS, CodeWords
from regauge.kernels.cpu import lists
from regauge.kernels.cpu.interface import has

pytestmark = [
    pytest.mark.usefixtures("level"),
    pytest.mark.skipif(not has("rg_lists_near"), reason="the C++ kernels are not built"),
]
GRIDS = [IQ2XXS(), IQ2XS(), IQ2S(), IQ3XXS(), IQ3S()]


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def by_torch(grid: CodeWords, z: Tensor, weight: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(lists, "near", lambda *_: None)
        return grid.near(z, weight)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
@pytest.mark.parametrize("how", ["plain", "a column", "each"])
def test_the_words_found_cost_what_torchs_cost(grid: CodeWords, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words may differ where two rows cost the same; 67 words leave a tile of sixteen unfilled."""
    z = draws(1, 67, 8) * 0.4 * grid.high
    weight = {"plain": None, "a column": draws(2, 8).square(), "each": draws(3, 67, 8).square()}[how]
    ours, theirs = grid.near(z, weight), by_torch(grid, z, weight, monkeypatch)
    counted = torch.ones(8, dtype=torch.float64) if weight is None else weight.double()
    costs = [((z - found).double().square() * counted).sum(1) for found in (ours, theirs)]
    torch.testing.assert_close(*costs, rtol=1e-5, atol=1e-6)
    assert (ours != theirs).any(1).float().mean() < 0.05
    rows = {tuple(row) for row in grid.rows.tolist()}
    assert {tuple(row) for row in ours.abs().view(-1, grid.rows.shape[1]).tolist()} <= rows


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_what_is_no_number_counts_as_nothing(grid: CodeWords, monkeypatch: pytest.MonkeyPatch) -> None:
    z = draws(4, 3, 8)
    z[0, 2], z[1, 5], z[2, 7] = torch.nan, torch.inf, -torch.inf
    assert torch.equal(grid.near(z), by_torch(grid, z, None, monkeypatch))
    assert grid.near(z[:0]).shape == (0, 8)


def test_torch_is_not_asked_where_the_kernels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Tensor:
        raise AssertionError("torch was asked")

    monkeypatch.setattr(CodeWords, "_nearest", never)
    assert IQ2S().near(draws(5, 2, 16)).shape == (2, 16)


def test_a_row_of_magnitudes_that_are_not_there_is_refused() -> None:
    three = torch.tensor([8.0, 25.0, 43.0], dtype=torch.float32)
    rows = torch.tensor([0x5555, 0x0003], dtype=torch.int16)  # the second names a fourth magnitude
    with pytest.raises(ValueError, match="no such list"):
        lists.near(draws(6, 2, 8), None, lists.Words(rows, three, 8, True))
