"""Collectors against naive float64 sums, sharing, rare experts, and the receipt's error by hand."""

from __future__ import annotations

import math

import pytest
import torch

from regauge.anatomy.model import Site, Slot
from regauge.engine.statistics import ROWS, SAMPLE, Collector, collection, output_error


def site(name: str, tap: str | None, i: int = 3, expert: int | None = None) -> Site:
    return Site(name, name.rpartition(".")[2], (2, i), Slot(name), block=0, tap=tap, expert=expert)


def collect(needs: frozenset[str], *batches: torch.Tensor) -> dict[str, torch.Tensor]:
    collector = Collector(needs, batches[0].shape[1])
    for batch in batches:
        collector(batch)
    return collector.finish()


EVERYTHING = frozenset({"hessian", "second_moment", "absmax", "minimum", "maximum", "count"})


def test_by_hand() -> None:
    found = collect(EVERYTHING, torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    expected = {
        "hessian": [[10 / 3, -2 / 3], [-2 / 3, 5 / 3]],
        "second_moment": [10 / 3, 5 / 3],
        "absmax": [3.0, 2.0],
        "minimum": [0.0, -2.0],
        "maximum": [3.0, 1.0],
        "count": 3,
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), torch.tensor(value, dtype=torch.float64), atol=1e-7), name


def test_only_what_is_needed_is_there() -> None:
    assert collect(frozenset({"absmax"}), torch.ones(2, 3)).keys() == {"absmax", "count"}


def test_a_long_text_loses_nothing_to_its_large_sum() -> None:
    """A million rows of one large and one small channel, against float64; a float32 running sum is 1e-4 off."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(ROWS + 13, 2, generator=generator) * torch.tensor([100.0, 1.0]) + 3 for _ in range(240)]
    found = collect(frozenset({"hessian", "second_moment"}), *batches)
    whole = torch.cat(batches).double()
    exact = whole.T @ whole / len(whole)
    assert float(((found["hessian"] - exact) / exact).abs().max()) < 1e-6
    assert float(((found["second_moment"] - exact.diagonal()) / exact.diagonal()).abs().max()) < 1e-6


def test_order_and_size_of_batches_do_not_matter_beyond_rounding() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    whole, parts = collect(EVERYTHING, x), collect(EVERYTHING, x[:7], x[7:7], x[7:])
    assert all(torch.allclose(whole[name].double(), parts[name].double(), rtol=1e-6) for name in EVERYTHING)


def test_the_sample_is_even_bounded_and_independent_of_batches() -> None:
    x = torch.arange(10 * SAMPLE, dtype=torch.float32)[:, None]
    needs = frozenset({"sample"})
    one = collect(needs, *x.split(997))["sample"]
    other = collect(needs, *x.split(3001))["sample"]
    assert torch.equal(one, other)
    assert SAMPLE <= len(one) <= 2 * SAMPLE
    assert (one.diff(dim=0) == one[1] - one[0]).all()


def test_sites_of_one_input_share_a_collector() -> None:
    sites = [site("q", "in"), site("k", "in"), site("o", "mixed"), site("embed", None)]
    made = collection(sites, {"q": frozenset({"absmax"}), "k": frozenset({"hessian"}), "o": frozenset({"count"})})
    assert list(made.watch) == ["q", "o"]
    made.watch["q"](torch.ones(4, 3))
    stats, rare = made.finish(sites)
    assert stats["q"] is stats["k"]
    assert stats["k"].keys() == {"absmax", "hessian", "count"}
    assert int(stats["q"]["count"]) == 4
    assert int(stats["o"]["count"]) == 0
    assert stats.keys() == {"q", "k", "o"}
    assert rare == {}


def experts() -> list[Site]:
    return [site(f"moe.{e}.up", f"moe.{e}.in", 4, e) for e in range(3)]


def test_a_rare_expert_leans_on_the_others_and_says_so() -> None:
    """Expert 0 saw four tokens, expert 1 one of the four it has channels for, expert 2 none."""
    needs = frozenset({"hessian", "absmax", "minimum", "second_moment"})
    made = collection(experts(), dict.fromkeys(("moe.0.up", "moe.1.up", "moe.2.up"), needs))
    made.watch["moe.0.up"](torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(4, 1))
    made.watch["moe.1.up"](torch.tensor([[0.0, 2.0, 0.0, 0.0]]))
    stats, rare = made.finish(experts())
    assert stats["moe.0.up"]["hessian"].diagonal().tolist() == [1.0, 0.0, 0.0, 0.0]
    assert stats["moe.2.up"]["hessian"].diagonal().tolist() == [0.8, 0.8, 0.0, 0.0]  # of all five tokens
    assert stats["moe.1.up"]["hessian"].diagonal().tolist() == pytest.approx([0.6, 1.6, 0.0, 0.0])  # ¼ own + ¾ of all
    assert stats["moe.1.up"]["second_moment"].tolist() == pytest.approx([0.6, 1.6, 0.0, 0.0])
    assert stats["moe.1.up"]["absmax"].tolist() == [1.0, 2.0, 0.0, 0.0]
    assert stats["moe.1.up"]["minimum"].tolist() == [0.0] * 4
    assert [int(stats[f"moe.{e}.up"]["count"]) for e in range(3)] == [4, 1, 0]
    assert rare.keys() == {"moe.1.up", "moe.2.up"}
    assert "saw 0 tokens, fewer than its 4 input channels" in rare["moe.2.up"]
    assert "blended with those of all experts (5 tokens)" in rare["moe.1.up"]
    assert all(bool(torch.isfinite(t.double()).all()) for found in stats.values() for t in found.values())


def test_where_no_expert_saw_a_token_inputs_count_as_white_noise() -> None:
    made = collection(experts(), dict.fromkeys(("moe.0.up", "moe.1.up"), frozenset({"hessian", "second_moment"})))
    stats, rare = made.finish(experts())
    assert torch.equal(stats["moe.0.up"]["hessian"], torch.eye(4, dtype=torch.float64))
    assert stats["moe.1.up"]["second_moment"].tolist() == [1.0] * 4
    assert "white noise" in rare["moe.0.up"]


def test_errors_by_hand() -> None:
    """W = [3 4], Ŵ = [3 0]: without text 4/5; on x = (1, 0) nothing is lost, on x = (0, 1) everything."""
    w, w_hat = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]])
    assert output_error(w, w_hat, None) == pytest.approx(0.8)
    assert output_error(w, w_hat, {"hessian": torch.diag(torch.tensor([1.0, 0.0]))}) == 0.0
    assert output_error(w, w_hat, {"sample": torch.tensor([[0.0, 1.0]])}) == 1.0
    assert output_error(w, w_hat, {"sample": torch.tensor([[1.0, 1.0]])}) == pytest.approx(4 / 7)
    assert output_error(w * 0, w * 0, None) == 0.0


def test_both_ways_to_the_error_agree() -> None:
    generator = torch.Generator().manual_seed(3)
    x, w, noise = (torch.randn(shape, generator=generator) for shape in ((40, 5), (7, 5), (7, 5)))
    naive = float((x.double() @ noise.double().T).norm() / (x.double() @ w.double().T).norm())
    ways = ({"hessian": x.T.double() @ x.double() / 40}, {"sample": x})
    assert all(math.isclose(output_error(w, w - noise, way), naive, rel_tol=1e-5) for way in ways)
