"""Budgets of cached tokens: whole blocks, sums kept, and each better than an even one on data built to show it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from regauge.cache.base import Budget, Layer, probabilities
from regauge.cache.budgets import AcrossHeads, ByKind, Pyramid, Sensitivity, Tokens, Uniform, apportion
from regauge.cache.choosing import choose
from regauge.cache.scores import HeadKinds, Recency, WindowAttention
from regauge.errors import BudgetError
from tests.caches import D, draw, lost, seen
from tests.discriminate.test_cache_scores import mixture

BLOCK = 8
ONE = Layer(0, 1, BLOCK)


def lengths(budget: Budget, tokens: int = 104, window: int = 24, heads: int = 2, layer: Layer = ONE) -> list[int]:
    held = seen(draw(1, heads, tokens, D), window=window)
    return budget(Recency()(held)[:, :, : held.older], held, layer)[0].tolist()


def test_an_even_budget_by_hand() -> None:
    """104 tokens, 24 in the window, blocks of 8: half of the text is 52, less 24 is 28, three blocks."""
    assert lengths(Uniform(0.5)) == [24, 24]
    assert lengths(Uniform(1.0)) == [80, 80]
    assert lengths(Uniform(0.01)) == [8, 8]  # a block for the sinks
    assert lengths(Uniform(60)) == lengths(Tokens(60)) == [32, 32]
    assert lengths(Tokens(4096)) == [80, 80]
    assert lengths(Tokens(64), tokens=24) == [0, 0]  # nothing is older than the window


@pytest.mark.parametrize("total", [0, 1, 7, 12, 20])
def test_blocks_are_apportioned_to_the_last(total: int) -> None:
    found = apportion((3.0, 1.0, 0.5, 0.0), total, 0, (6, 6, 6, 6))
    assert sum(found) == total
    assert all(0 <= share <= 6 for share in found)
    assert list(found) == sorted(found, reverse=True)


def test_blocks_by_hand() -> None:
    assert apportion((2.0, 1.0, 1.0), 8, 0, (9, 9, 9)) == (4, 2, 2)
    assert apportion((2.0, 1.0, 1.0), 8, 3, (9, 9, 9)) == (3, 3, 3)  # what each has for certain goes before
    assert apportion((100.0, 1.0), 8, 1, (4, 9)) == (4, 4)
    assert apportion((1.0, 1.0), 8, 0, (3, 3)) == (3, 3)  # there are no more


def test_a_pyramid_is_wide_below_and_keeps_the_sum() -> None:
    """Mean 10 blocks over 5 layers: 2 - 1/20 falling evenly to 1/20, times 10."""
    each = [lengths(Pyramid(0.5), 208, 24, layer=Layer(number, 5, BLOCK))[0] // BLOCK for number in range(5)]
    assert each == [19, 15, 10, 5, 1]
    assert sum(each) == 5 * (lengths(Uniform(0.5), 208, 24)[0] // BLOCK)


def test_by_sensitivity_in_proportion_over_layers_and_heads() -> None:
    weights = "3/1 1"
    found = [lengths(Sensitivity(0.5, weights=weights), layer=Layer(number, 2, BLOCK)) for number in (0, 1)]
    assert found == [[48, 16], [16, 16]]  # 12 blocks as 3 : 1 : 1 : 1
    with pytest.raises(BudgetError, match=r"wants a weight for each of 1 blocks, .* 2 heads, and '3/1 1' has 2"):
        lengths(Sensitivity(0.5, weights=weights))


def uneven() -> tuple[object, Tensor]:
    """One head reads two tokens, one reads everything a little."""
    keys = 0.1 * draw(1, 2, 152, D)
    aim = torch.nn.functional.normalize(draw(1, 1, 1, 1, D, seed=1), dim=-1)
    keys[:, 0, [5, 60]] += 6 * aim[0, 0, 0]
    queries = 4 * aim + 0.1 * draw(1, 2, 1, 40, D, seed=2)
    return seen(keys, queries=queries[:, :, :, :16], window=24), queries[:, :, :, 16:]


def test_across_heads_beats_an_even_budget_at_the_same_bytes() -> None:
    held, later = uneven()
    score = WindowAttention(queries=16, pool=1)
    even, shared = (choose(score, budget, held, ONE) for budget in (Uniform(0.5), AcrossHeads(0.5)))
    assert shared.lengths_BH.sum() == even.lengths_BH.sum()
    assert shared.lengths_BH[0, 0] < even.lengths_BH[0, 0] < shared.lengths_BH[0, 1]
    assert lost(held, shared.kept_BHO, later) < 0.8 * lost(held, even.kept_BHO, later)
    mass = score(held)[:, :, : held.older]
    assert (mass * shared.kept_BHO).sum() > (mass * even.kept_BHO).sum()


def test_across_heads_is_even_where_heads_are_alike_or_the_floor_says_so() -> None:
    held, _ = uneven()
    alike = replace(
        held,
        keys_BHTD=held.keys_BHTD[:, :1].expand(-1, 2, -1, -1),
        queries_BHGQD=held.queries_BHGQD[:, :1].expand(-1, 2, -1, -1, -1),
    )
    score = WindowAttention(queries=16, pool=1)
    even = choose(score, Uniform(0.5), held, ONE).lengths_BH
    assert torch.equal(choose(score, AcrossHeads(0.5), alike, ONE).lengths_BH, even)
    assert torch.equal(choose(score, AcrossHeads(0.5, floor=1.0), held, ONE).lengths_BH, even)
    floor = choose(score, AcrossHeads(0.5, floor=0.5), held, ONE).lengths_BH
    assert int(floor.min()) >= BLOCK * int(0.5 * int(even[0, 0]) / BLOCK)


def test_by_kind_beats_an_even_budget_on_a_mixture() -> None:
    """Two heads read two or three tokens, two read along a diagonal that the newest 64 tokens hold."""
    held = mixture()
    later = held.queries_BHGQD
    even, kinds = (
        choose(HeadKinds(share=0.5), budget, held, ONE) for budget in (Uniform(48), ByKind(48, 0.25, share=0.5))
    )
    assert kinds.lengths_BH.sum() == even.lengths_BH.sum()
    assert kinds.lengths_BH.tolist() == [[8, 56, 8, 56]]
    assert lost(held, kinds.kept_BHO, later) < 0.7 * lost(held, even.kept_BHO, later)


def test_padding_is_no_text() -> None:
    """Of 104 tokens 60 are padding: half of the other 44 is 22, less than the window of 24, so one block."""
    held = seen(draw(2, 1, 104, D), queries=draw(2, 1, 1, 16, D, seed=1), window=24, padding=(60, 0))
    for budget in (Uniform(0.5), AcrossHeads(0.5), Pyramid(0.5), ByKind(0.5)):
        found = choose(WindowAttention(queries=16), budget, held, ONE)
        assert found.lengths_BH[0].tolist() == [8], budget
        assert int(found.kept_BHO[0, 0, :60].sum()) == 0
    assert choose(WindowAttention(queries=16), Uniform(0.5), held, ONE).lengths_BH[1].tolist() == [24]


def test_padding_fills_up_the_first_block_where_there_is_too_little() -> None:
    held = seen(draw(1, 1, 48, D), window=24, padding=(21,))  # three tokens are older than the window
    found = choose(Recency(), Uniform(1.0), held, ONE)
    assert found.lengths_BH.tolist() == [[8]]
    assert found.firsts_BH.tolist() == [[5]]
    assert found.kept_BHO[0, 0].nonzero().flatten().tolist() == [16, 17, 18, 19, 20, 21, 22, 23]


def test_sinks_are_the_first_tokens_of_each_sequence() -> None:
    held = seen(draw(2, 1, 104, D), queries=draw(2, 1, 1, 16, D, seed=1), window=24, padding=(10, 0))
    kept = choose(WindowAttention(queries=16, sinks=3), Uniform(0.4), held, ONE).kept_BHO[:, 0]
    assert kept[0, 10:13].all()
    assert kept[1, :3].all()


def test_what_cannot_be_is_refused() -> None:
    for make, why in [
        (lambda: Uniform(0), "keep is the share of the text that stays.*you wrote 0"),
        (lambda: Uniform(1.5), "or a whole number of tokens; you wrote 1.5"),
        (lambda: Tokens(0.5), "a budget in tokens is a whole number above 1; you wrote 0.5"),
        (lambda: Pyramid(beta=0.5), "beta is 1 or more"),
        (lambda: AcrossHeads(floor=2), "floor is a share, 0 to 1"),
        (lambda: ByKind(contextual=0), "contextual is a share of an even budget"),
        (lambda: Sensitivity(weights="-1 2"), "weights are 0 or more, and finite; you wrote '-1 2'"),
        (lambda: Sensitivity(weights="nan"), "weights are 0 or more"),
        (lambda: Sensitivity(weights="3, 1"), "one a block, such as '3 1 1 2'; you wrote '3, 1'"),
    ]:
        with pytest.raises(ValueError, match=why):
            make()
    with pytest.raises(ValueError, match="80 older tokens are not whole blocks of 32"):
        choose(Recency(), Uniform(), seen(draw(1, 1, 104, D), window=24), Layer(0, 1, 32))


def test_probabilities_are_those_of_attention() -> None:
    held = seen(draw(1, 2, 9, D), queries=draw(1, 2, 2, 1, D, seed=1))
    whole = torch.nn.functional.scaled_dot_product_attention(
        held.queries_BHGQD[:, :, :, 0], held.keys_BHTD, torch.eye(9).expand(1, 2, 9, 9)
    )
    assert torch.allclose(probabilities(held)[:, :, :, 0], whole, atol=1e-6)
