"""Merges across layers and into kept tokens: lossless where they should be, better than their nulls where built so."""

from __future__ import annotations

import pytest
import torch

from regauge.cache.disposals import Drop, MergeKept
from regauge.cache.merges import AcrossLayers, in_blocks
from regauge.cache.triggers import check_tokens, due
from regauge.errors import BudgetError
from tests.caches import B, D, H, T, draw


def angles(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Between tokens over all heads, in float64."""
    a, b = (x.double().transpose(1, 2).flatten(2) for x in (a, b))
    return ((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).clamp(-1, 1).acos()


def near(seed: int = 1, by: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    u = draw(B, H, T, D)
    return u, 3 * (u + by * draw(B, H, T, D, seed=seed) * draw(B, 1, T, 1, seed=7).abs())


def test_layers_alike_merge_without_loss() -> None:
    u = draw(B, H, T, D)
    found = AcrossLayers()(u, 2.5 * u)
    assert not found.retained_BT.any()
    shallow, deep = found.restored()
    assert torch.allclose(shallow, u, atol=1e-6)
    assert torch.allclose(deep, 2.5 * u, atol=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.6, 1.0])
def test_the_shared_direction_is_unit_and_lies_at_its_share_of_the_angle(t: float) -> None:
    u, v = near()
    found = AcrossLayers(t=t)(u, v)
    whole = found.directions_BHTD
    assert torch.allclose(whole.square().sum((1, 3)), torch.ones(B, T), atol=1e-5)
    omega = angles(u, v)
    assert torch.allclose(angles(u, whole), t * omega, atol=1e-3)
    assert torch.allclose(angles(v, whole), (1 - t) * omega, atol=1e-3)


def test_lengths_are_each_layers_own() -> None:
    u, v = near()
    for restored, own in zip(AcrossLayers()(u, v).restored(), (u, v), strict=True):
        assert torch.allclose(restored.square().sum((1, 3)), own.square().sum((1, 3)), rtol=1e-4)


def test_no_retained_pair_is_nearer_than_a_merged_one_and_the_range_says_how_many() -> None:
    u, v = near()
    for keep in (0.0, 0.05, 0.5, 1.0):
        retained, omega = AcrossLayers(keep=keep)(u, v).retained_BT, angles(u, v)
        for apart, row in zip(retained, omega, strict=True):
            threshold = row.max() - keep * (row.max() - row.min())
            assert (row > threshold).sum().sub(apart.sum()).abs() <= 1  # rounding at the threshold itself
            if apart.any() and not apart.all():
                assert row[apart].min() >= row[~apart].max() - 1e-6
    few, many = (AcrossLayers(keep=keep)(u, v).retained_BT.sum() for keep in (0.05, 0.5))
    assert 0 < few < many < B * T


def test_points_apart_are_retained_and_nothing_is_not_a_number() -> None:
    u = draw(1, H, 4, D)
    v = u.clone()
    v[:, :, 2] *= -1
    v[:, :, 3] = 0
    found = AcrossLayers(keep=0.0)(u, v)
    assert found.retained_BT.tolist() == [[False, False, True, False]]
    assert found.directions_BHTD.isfinite().all()
    assert torch.equal(found.restored()[1][:, :, 3], torch.zeros(1, H, D))


def test_padding_does_not_stretch_the_range() -> None:
    u, v = near()
    v[:, :, :5] = -u[:, :, :5]  # padding is anything
    real = torch.ones(B, T, dtype=torch.bool)
    real[:, :5] = False
    found = AcrossLayers()(u, v, real)
    assert not found.retained_BT[:, :5].any()
    assert torch.equal(found.retained_BT[:, 5:], AcrossLayers()(u[:, :, 5:], v[:, :, 5:]).retained_BT)


def test_merging_beats_the_shallow_layers_own_and_the_mean() -> None:
    """In what both layers' tokens lose together, at the middle of the arc; lengths kept beat lengths shared."""
    u, v = near(by=1.0)

    def error(pair: tuple[torch.Tensor, torch.Tensor]) -> float:
        return sum(float((x - y).square().sum() / y.square().sum()) for x, y in zip(pair, (u, v), strict=True))

    best = error(AcrossLayers(t=0.5)(u, v).restored())
    assert best < 0.8 * error(AcrossLayers(t=0.0)(u, v).restored())
    assert best < 0.5 * error((u, u))  # the deeper layer's cache dropped, the shallower read instead
    assert best < 0.5 * error(((u + v) / 2, (u + v) / 2))


def test_pairs_begin_at_the_middle() -> None:
    assert AcrossLayers().pairs(8) == [(4, 5), (6, 7)]
    assert AcrossLayers().pairs(5) == [(2, 3)]
    assert AcrossLayers(start=0.0).pairs(4) == [(0, 1), (2, 3)]
    assert AcrossLayers(start=1.0).pairs(4) == []
    with pytest.raises(ValueError, match=r"t is a share, 0 to 1; you wrote 1.5"):
        AcrossLayers(t=1.5)


def test_retained_tokens_fill_blocks_with_the_next_most_distant() -> None:
    omega = torch.tensor([[9.0, 0.1, 0.5, 0.4, 0.3, 0.2, 0.0, 0.6]])
    padding = torch.tensor([[True, False, False, False, False, False, False, False]])
    retained = torch.tensor([[False, False, False, False, False, False, False, True]])
    assert in_blocks(omega, retained, 4, padding).nonzero()[:, 1].tolist() == [2, 3, 4, 7]
    assert not in_blocks(omega, torch.zeros_like(retained), 4, padding).any()


def test_a_token_goes_into_the_kept_one_nearest_by_hand() -> None:
    """Kept at angle 0, weight e; one at the same angle weighs e too, so values and lengths are halved between them."""
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [-1.0, 0.0]])
    values = torch.tensor([[2.0], [5.0], [4.0], [100.0]])
    kept = torch.tensor([True, True, False, False])
    merged_keys, merged_values = MergeKept()(keys, values, kept)
    assert torch.allclose(merged_keys, torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    assert torch.allclose(merged_values, torch.tensor([[3.0], [5.0]]))  # the opposite one went nowhere


def test_merging_is_dropping_where_nothing_is_alike_or_nothing_goes() -> None:
    keys, values, kept = torch.eye(6), draw(6, 3), torch.tensor([True, False] * 3)
    for one, two in zip(MergeKept()(keys, values, kept), Drop()(keys, values, kept), strict=True):
        assert torch.allclose(one, two)
    assert torch.equal(MergeKept()(keys, values, torch.ones(6, dtype=torch.bool))[1], values)
    assert torch.allclose(MergeKept(alike=1.0)(draw(6, 3), values, kept)[1], values[kept])


def test_merging_beats_dropping_where_tokens_come_in_kinds() -> None:
    """Twelve tokens of each of four kinds; what stays of a kind stands for the mean of its values."""
    kinds = torch.arange(48) % 4
    keys = 4 * draw(4, D)[kinds] + 0.1 * draw(48, D, seed=1)
    values = draw(4, D, seed=2)[kinds] + draw(48, D, seed=3)
    kept = torch.arange(48) < 8
    queries = draw(20, D, seed=4)

    def read(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (queries @ k.T).softmax(-1) @ v

    whole = read(keys, values)
    merged, dropped = (
        float((read(*way(keys, values, kept)) - whole).norm() / whole.norm()) for way in (MergeKept(), Drop())
    )
    assert merged < 0.6 * dropped, (merged, dropped)


def test_how_much_alike_is_a_cosine() -> None:
    with pytest.raises(ValueError, match=r"alike is a cosine, -1 to 1; you wrote 2"):
        MergeKept(alike=2)


class When:
    """A trigger as a recipe says it."""

    def __init__(self, kind: str, tokens: int = 0) -> None:
        self.kind, self.tokens = kind, tokens


def test_triggers_by_hand() -> None:
    once, every, at = When("prefill"), When("every", 64), When("at", 512)
    assert due(once, seen=700, chosen_at=0, held=700)
    assert not due(once, seen=9000, chosen_at=700, held=9000)
    assert due(every, seen=700, chosen_at=0, held=700)
    assert not due(every, seen=763, chosen_at=700, held=200)
    assert due(every, seen=764, chosen_at=700, held=200)
    assert not due(at, seen=511, chosen_at=0, held=511)
    assert due(at, seen=3000, chosen_at=2000, held=512)


def test_a_budget_that_cannot_hold_what_it_must_is_refused() -> None:
    check_tokens(kept=192, window=128, sinks=4, block=32)
    with pytest.raises(BudgetError, match=r"191 tokens a head cannot hold its window of 128, a block of 32.*write 192"):
        check_tokens(kept=191, window=128, sinks=4, block=32)
    with pytest.raises(BudgetError, match=r"and 64 for 33 sinks: write 224 or more"):
        check_tokens(kept=192, window=128, sinks=33, block=32)
    check_tokens(kept=256, window=128, sinks=4, block=32, at=288)
    with pytest.raises(BudgetError, match=r"when a head holds 256, and the budget keeps 256.*write at:288 or more"):
        check_tokens(kept=256, window=128, sinks=4, block=32, at=256)
