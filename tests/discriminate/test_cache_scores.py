"""Each score of cached tokens strictly beats its nulls on data built to show it, and equals them where theory says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from regauge.cache.base import Layer, Rotary, Seen, probabilities
from regauge.cache.budgets import Uniform
from regauge.cache.choosing import choose
from regauge.cache.kinds import contextual_BH, variance_BH
from regauge.cache.scores import (
    AccumulatedAttention,
    ExpectedAttention,
    HeadKinds,
    KeyNorm,
    Random,
    Recency,
    WindowAttention,
    mean_rotation,
    turned,
)
from tests.caches import B, D, G, H, T, draw, lost, seen

ONE = Layer(0, 1, 8)
RADIANS = (1.0, 0.1, 0.01)


def spiked(at: tuple[int, ...] = (5, 6, 40, 41, 42, 70)) -> tuple[Seen, Tensor]:
    """Every query, of the window and later, reads the same few tokens, which lie anywhere; the later ones follow."""
    aim = draw(B, H, 1, D, seed=1)
    keys = draw(B, H, T, D)
    keys[:, :, list(at)] += 4 * aim / aim.norm(dim=-1, keepdim=True)
    queries = 2 * aim.unsqueeze(2) + draw(B, H, G, 24, D, seed=2)
    return seen(keys, queries=queries[:, :, :, :16], window=16), queries[:, :, :, 16:]


def error(held: Seen, later: Tensor, score: object, keep: float = 0.35) -> float:
    return lost(held, choose(score, Uniform(keep), held, ONE).kept_BHO, later)  # type: ignore[arg-type]


def test_window_attention_beats_chance_and_the_newest() -> None:
    held, later = spiked()
    best, lot, newest = (error(held, later, s) for s in (WindowAttention(queries=16), Random(), Recency()))
    assert best < 0.5 * min(lot, newest), (best, lot, newest)


def test_accumulated_attention_beats_chance_and_the_newest() -> None:
    held, later = spiked()
    held = replace(held, mass_BHT=probabilities(held).sum((2, 3)))
    best, lot, newest = (error(held, later, s) for s in (AccumulatedAttention(), Random(), Recency()))
    assert best < 0.5 * min(lot, newest), (best, lot, newest)


def test_key_norm_finds_small_keys_that_draw_attention() -> None:
    """Planted as 2406.11430 sees it: what is read has the small keys, since the others point away from the queries."""
    aim = torch.nn.functional.normalize(draw(B, H, 1, D, seed=3), dim=-1)
    keys = draw(B, H, T, D) - 3 * aim
    keys[:, :, [4, 30, 31, 55]] += 3 * aim
    held, later = seen(keys, window=16), (4 * aim).unsqueeze(2)
    best, lot = (error(held, later, s, 0.25) for s in (KeyNorm(sinks=0), Random()))
    assert best < 0.5 * lot, (best, lot)
    assert KeyNorm()(seen(torch.tensor([[[[3.0, 4.0], [0.0, 1.0]]]]))).tolist() == [[[-5.0, -1.0]]]


def test_smoothing_keeps_a_stretch_where_single_tokens_would_win() -> None:
    """Attention 0.5 on one token alone, 0.2 and 0.2 on two neighbours, by hand through a pool of three."""
    keys = torch.zeros(1, 1, 5, 1)
    keys[0, 0, :, 0] = torch.tensor([0.5, 0.05, 0.05, 0.2, 0.2]).log()
    held = replace(seen(keys, queries=torch.ones(1, 1, 1, 1, 1)), scale=1.0)
    alone, smooth = (WindowAttention(queries=1, pool=pool)(held)[0, 0] for pool in (1, 3))
    assert torch.allclose(alone, torch.tensor([0.5, 0.05, 0.05, 0.2, 0.2]))
    assert torch.allclose(smooth, torch.tensor([0.275, 0.2, 0.1, 0.15, 0.2]))


def test_a_query_reads_no_later_token_and_no_padding() -> None:
    held = seen(draw(2, 1, 6, D), queries=draw(2, 1, 1, 3, D, seed=1), padding=(0, 2))
    p = probabilities(held)[:, 0, 0]
    assert (p[0] > 0).int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert (p[1] > 0).int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert torch.allclose(p.sum(-1), torch.ones(2, 3))


def test_a_softcap_bounds_the_products() -> None:
    held = replace(seen(100 * draw(1, 1, 6, D), queries=100 * draw(1, 1, 1, 1, D, seed=1)), softcap=0.5)
    p = probabilities(held).flatten()
    assert float(p.max() / p.min()) <= 2.72  # e^(2 · 0.5)


def test_recency_is_sinks_and_the_newest() -> None:
    held = seen(draw(1, 1, 40, D), window=8)
    kept = choose(Recency(sinks=4), Uniform(24), held, ONE).kept_BHO[0, 0].nonzero().flatten().tolist()
    assert kept == [0, 1, 2, 3, *range(20, 32)]


def test_expected_attention_is_what_queries_to_come_read() -> None:
    """Oracle: queries drawn before rotation, turned to every one of the positions to come, in float64."""
    rotary = Rotary(RADIANS)
    mean, spread = draw(1, 1, 1, 1, D, seed=1), draw(D, D, seed=2)
    raw = mean / 4 + draw(1, 1, 1, 90, D, seed=3) @ spread
    keys = 0.3 * draw(1, 1, 100, D, seed=4)
    held = replace(seen(keys, queries=turned(raw, torch.arange(10, 100), rotary), window=16), rotary=rotary)
    found = ExpectedAttention(future=16, queries=90)(held)[0, 0] / held.values_BHTD.norm(dim=-1)[0, 0]
    fresh = (mean / 4 + draw(1, 1, 1, 2000, D, seed=5) @ spread)[0, 0, 0].double()
    far = []
    for position in range(100, 116):
        turn = turned(fresh, torch.full((len(fresh),), position), rotary)
        far.append((turn @ keys[0, 0].double().T * held.scale).exp().mean(0))
    true = torch.stack(far).mean(0)
    assert torch.corrcoef(torch.stack((found.double(), true / true.sum())))[0, 1] > 0.75  # without the spread 0.18


def test_expected_attention_undoes_the_rotation() -> None:
    """A head that reads one place of its slow channels: by queries as they are turned now it would look elsewhere."""
    rotary = Rotary((0.02,))
    raw = torch.zeros(1, 1, 1, 64, 2)
    raw[..., 0] = 6  # every query is the same before its rotation
    keys = turned(torch.tensor([2.0, 0.0]).expand(1, 1, 128, 2), torch.arange(128), rotary)  # and every key
    queries = turned(raw, torch.arange(64, 128), rotary)
    held = replace(seen(keys, values=torch.ones_like(keys), queries=queries), rotary=rotary)
    with_turn = ExpectedAttention(future=32, queries=64)(held)[0, 0]
    without = ExpectedAttention(future=32, queries=64)(replace(held, rotary=Rotary()))[0, 0]
    assert int(with_turn.argmax()) == 127  # the next 32 positions are nearest to the newest key
    assert int(without.argmax()) < 120  # somewhere behind the middle of the queries so far


@pytest.mark.parametrize("halves", [True, False])
def test_the_mean_rotation_is_the_mean_of_rotations(halves: bool) -> None:
    rotary, x = Rotary(RADIANS, halves), draw(1, D)
    by_hand = torch.stack([turned(x, torch.tensor([p]), rotary)[0] for p in range(10, 30)]).mean(0)
    assert torch.allclose(mean_rotation(rotary, 10, 20, x) @ x[0], by_hand, atol=1e-6)
    assert torch.equal(turned(x, torch.tensor([5]), rotary)[..., 6:], x[..., 6:])  # behind the last pair


def test_rotation_turns_pairs_as_transformers_does() -> None:
    angle = torch.arange(7.0)[:, None] * torch.tensor([1.0, 0.3])
    table = torch.cat((angle, angle), -1)
    x = draw(1, 1, 7, 4)
    half = torch.cat((-x[..., 2:], x[..., :2]), -1)  # its `rotate_half`
    assert torch.allclose(
        turned(x, torch.arange(7), Rotary((1.0, 0.3))), x * table.cos() + half * table.sin(), atol=1e-6
    )


def mixture() -> Seen:
    """Heads of two kinds: every query reads the same stripes, or each reads what stands eight before it."""
    tokens, queries, size = 96, 32, 96
    keys = torch.eye(size).expand(1, 4, tokens, size).clone()
    asked = torch.zeros(1, 4, 1, queries, size)
    for row in range(queries):
        asked[0, 0, 0, row, [3, 17, 60]] = 60
        asked[0, 2, 0, row, [9, 11]] = 60
        for head in (1, 3):
            asked[0, head, 0, row, 64 + row - 8 * head] = 60
    return seen(keys, queries=asked + 0.1 * draw(*asked.shape), window=16)


def test_kinds_of_heads_are_told_apart() -> None:
    p = probabilities(mixture())
    assert contextual_BH(p, 0.5).tolist() == [[True, False, True, False]]
    assert contextual_BH(p, 0.75)[0].sum() == 3
    assert not contextual_BH(p, 0.0).any()
    assert variance_BH(p)[0, 0] < 0.05
    assert float(variance_BH(p)[0, 1]) == pytest.approx(1 - 1 / 32, abs=0.01)


def test_each_kind_keeps_by_its_own_rule() -> None:
    held = mixture()
    kept = choose(HeadKinds(sinks=2, share=0.5), Uniform(48), held, ONE).kept_BHO[0]
    assert {3, 17, 60} <= set(kept[0].nonzero().flatten().tolist())
    structural = set(kept[1].nonzero().flatten().tolist())
    assert {0, 1, 79, 78, 77, 76, 75, 74} <= structural
    assert not {79, 78, 77, 76} <= set(kept[0].nonzero().flatten().tolist())


def test_random_is_the_same_again_and_another_by_seed() -> None:
    held = seen(draw(1, 2, 40, D))
    assert torch.equal(Random()(held), Random()(held))
    assert not torch.equal(Random()(held), Random(seed=1)(held))
    assert not torch.equal(Random()(held)[:, 0], Random()(held)[:, 1])


def test_what_is_missing_is_said() -> None:
    held = seen(draw(1, 1, 40, D))
    with pytest.raises(ValueError, match="no queries were kept, and the score reads them"):
        WindowAttention()(held)
    with pytest.raises(ValueError, match="accumulated attention was not collected"):
        AccumulatedAttention()(held)
    with pytest.raises(ValueError, match="the rotation of this model's queries is not known"):
        ExpectedAttention()(replace(held, rotary=None))
    for make, why in [
        (lambda: Recency(sinks=-1), "sinks is 0 or more; you wrote -1"),
        (lambda: WindowAttention(pool=4), "pool is an odd number of tokens, 1 for none; you wrote 4"),
        (lambda: WindowAttention(queries=0), "queries is 1 or more; you wrote 0"),
        (lambda: ExpectedAttention(future=0), "future is 1 or more; you wrote 0"),
    ]:
        with pytest.raises(ValueError, match=why):
            make()
