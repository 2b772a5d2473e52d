"""XᵀX of bfloat16 by the tile unit, against float64; and the collector on both paths."""

from __future__ import annotations

import pytest
import torch

from regauge.engine import statistics
from regauge.engine.statistics import Collector, output_error
from regauge.kernels.cpu.gram import gram, has_gram, mirrored

tiles = pytest.mark.skipif(not has_gram(), reason="this CPU has no tile unit for bfloat16")


def rows(tokens: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Of very different sizes, and not around 0."""
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(tokens, channels, generator=generator) * torch.logspace(-2, 2, channels) + 0.5
    return x_TI.bfloat16()


def exact(x_TI: torch.Tensor) -> torch.Tensor:
    return x_TI.double().T @ x_TI.double()


@tiles
@pytest.mark.parametrize("shape", [(1, 1), (31, 15), (33, 17), (1024, 32), (1025, 129), (2500, 200)])
def test_sums_of_any_shape_are_those_of_float64(shape: tuple[int, int]) -> None:
    x_TI = rows(*shape)
    sum_II = torch.zeros(shape[1], shape[1])
    gram(x_TI, sum_II)
    wanted_II = exact(x_TI)
    bound_II = wanted_II.diagonal().sqrt().outer(wanted_II.diagonal().sqrt())  # what Cauchy and Schwarz allow
    assert float(((mirrored(sum_II) - wanted_II).abs() / bound_II).max()) < 1e-6


@tiles
def test_a_second_call_adds_and_rows_with_a_stride_are_read_right() -> None:
    x_TI = rows(70, 48)
    sum_II = torch.zeros(40, 40)
    gram(x_TI[:, 4:44], sum_II)
    gram(x_TI[:, 4:44], sum_II)
    wanted_II = 2 * exact(x_TI[:, 4:44])
    assert torch.allclose(mirrored(sum_II).double(), wanted_II, rtol=1e-5, atol=1e-6 * float(wanted_II.abs().max()))


@tiles
@pytest.mark.parametrize(
    ("x_TI", "sum_II", "told"),
    [
        (torch.zeros(4, 8), torch.zeros(8, 8), "rows of bfloat16"),
        (torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(8, 8, dtype=torch.float64), "sums of float32"),
        (torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(16, 8)[::2], "contiguous"),
        (torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(4, 4), r"are \(8, 8\), not \(4, 4\)"),
    ],
)
def test_what_it_cannot_sum_is_refused(x_TI: torch.Tensor, sum_II: torch.Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        gram(x_TI, sum_II)


def test_mirrored_is_the_upper_triangle_twice() -> None:
    upper_II = torch.tensor([[1.0, 2.0, 3.0], [7.0, 4.0, 5.0], [8.0, 9.0, 6.0]])
    assert mirrored(upper_II).tolist() == [[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_collector_sums_strips_to_the_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "STRIP", 64)
    x_TI = rows(300, 150).to(dtype)
    collector = Collector(frozenset({"hessian", "absmax"}), 150)
    for part in torch.split(x_TI, 77):
        collector(part)
    found = collector.finish()
    wanted_II = exact(x_TI) / 300
    assert float((found["hessian"].double() - wanted_II).norm() / wanted_II.norm()) < 1e-6
    assert torch.equal(found["hessian"], found["hessian"].T)
    assert torch.equal(found["absmax"], x_TI.float().abs().amax(0))


@tiles
def test_the_receipts_error_in_bfloat16_is_within_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    x_TI, w_OI = rows(2000, 96).float(), torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
    stats = {"hessian": (x_TI.T @ x_TI / 2000)}
    rounded_OI = (w_OI * 8).round() / 8
    plain = output_error(w_OI, rounded_OI, stats)
    monkeypatch.setattr(statistics, "WIDE", 64)
    assert output_error(w_OI, rounded_OI, stats) == pytest.approx(plain, rel=2e-3)
