"""Masks, maps, groups and windows, by hand and against brute force. No model here."""

from __future__ import annotations

import itertools

import pytest
import torch

from regauge.attention import forms
from regauge.attention.base import Local, Seen
from regauge.attention.maps import causal, distances, overlap, probabilities
from regauge.attention.shares import Alike, Lot, Of
from regauge.attention.windows import ByDistance, ByLot
from regauge.errors import RecipeError


def rows(form: forms.Form, length: int, batch: int = 1) -> list[str]:
    seen = forms.dense(form, batch, 1, length, length)
    return ["".join("x" if see else "." for see in row) for sequence in seen[:, 0].tolist() for row in sequence]


def test_a_window_keeps_the_querys_own_token_and_those_before_it_and_the_first_of_the_text() -> None:
    assert rows(forms.window(2), 5) == ["x....", "xx...", ".xx..", "..xx.", "...xx"]
    assert rows(forms.window(2, sinks=1), 5) == ["x....", "xx...", "xxx..", "x.xx.", "x..xx"]


def test_the_anchor_is_seen_by_every_document_and_no_other_token_of_another_is() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
    assert rows(forms.anchored(documents), 6, batch=2) == [
        "x.....", "xx....", "x.x...", "x.xx..", "x.xxx.", "x....x",
        "x.....", "xx....", "xxx...", "xxxx..", "xxxxx.", "xxxxxx",
    ]  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
def test_neighbourhoods_are_those_of_brute_force(causal: bool) -> None:
    for length, tokens, dilation in itertools.product(range(1, 13), range(1, 13), range(1, 5)):
        if tokens * dilation > length:
            with pytest.raises(ValueError, match="does not fit a text of"):
                forms.neighbourhood(length, tokens, dilation)
            continue
        seen = forms.dense(forms.neighbourhood(length, tokens, dilation, causal), 1, 1, length, length)[0, 0]
        for query in range(length):
            own = [key for key in range(length) if key % dilation == query % dilation]
            at = own.index(query)
            start = at - tokens + 1 if causal else min(max(at - tokens // 2, 0), len(own) - tokens)
            expected = own[max(start, 0) : start + tokens]
            assert seen[query].nonzero().flatten().tolist() == expected, (length, tokens, dilation, query)


def test_a_window_of_each_head_is_the_window_of_each_head_alone() -> None:
    tokens, sinks = torch.tensor([3, 1 << 40]), torch.tensor([1, 0])
    both = forms.dense(forms.by_head(tokens, sinks), 1, 2, 4, 9)
    assert torch.equal(both[0, 0], forms.dense(forms.window(3, 1), 1, 1, 4, 9)[0, 0])
    assert torch.equal(both[0, 1], causal(4, 9))


def test_equal_maps_overlap_wholly_and_maps_on_other_keys_not_at_all() -> None:
    p = torch.tensor([[[[0.5, 0.5, 0.0, 0.0]]]])
    assert overlap(p, p) == 1
    assert overlap(p, p.flip(-1)) == 0
    assert overlap(p, torch.tensor([[[[0.5, 0.0, 0.5, 0.0]]]])) == 0.5


def test_distance_is_how_far_back_the_mean_query_head_of_a_kv_head_looks() -> None:
    p = torch.zeros(1, 4, 2, 5)
    for head, key in enumerate((4, 3, 0, 0)):
        p[0, head, :, key] = 1
    assert distances(p, 2).tolist() == [((-1 + 0) / 2 + (0 + 1) / 2) / 2, 3.5]
    assert distances(p, 2, sinks=1).tolist() == [0.0, 0.0]


def test_probabilities_are_those_of_torchs_attention() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 3, 8, generator=draw, dtype=torch.float64) for heads in (4, 2))
    eye = torch.eye(3, dtype=torch.float64).expand(2, 4, 3, 3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), eye, is_causal=True, scale=0.3
    )
    found = probabilities(query, key, None, 0.3)
    assert torch.allclose(found, expected, atol=1e-6)
    capped = probabilities(query, key, causal(3, 3), 0.3, softcap=0.1)
    products = (query @ key.repeat_interleave(2, 1).mT * 0.3 / 0.1).tanh() * 0.1
    assert torch.allclose(capped, products.masked_fill(~causal(3, 3), -torch.inf).softmax(-1), atol=1e-6)


def test_groups_are_the_most_alike_of_all_that_there_are() -> None:
    draw = torch.Generator().manual_seed(3)
    total, taking = 8, 3
    alike = {(b, a): float(torch.rand((), generator=draw)) for b in range(total) for a in range(b)}
    found = Alike(taking / total)(range(total), total, Seen(alike))
    best = 0.0
    for chosen in itertools.combinations(range(2, total - 1), taking):
        leaders = {b: max(a for a in range(1, b) if a not in chosen) for b in chosen}
        best = max(best, sum(alike[pair] for pair in leaders.items()))
    assert len(found) == taking
    assert sum(alike[pair] for pair in found.items()) == pytest.approx(best)


def test_neither_the_first_nor_the_last_block_is_in_a_group_and_leaders_have_maps_of_their_own() -> None:
    for seed in range(20):
        found = Lot(0.4, seed)(range(10), 10, Seen())
        assert len(found) == 4
        assert not {0, 9} & {*found, *found.values()}
        assert not found.keys() & set(found.values())
    assert Lot(0.4, 1)(range(10), 10, Seen()) != Lot(0.4, 2)(range(10), 10, Seen())
    assert Of(2)([3, 5], 10, Seen()) == {3: 2, 5: 2}


def test_what_cannot_be_grouped_is_said() -> None:
    with pytest.raises(RecipeError, match="of 2 blocks, 0 can be in a group, and it takes two"):
        Alike(0.23)(range(2), 2, Seen())
    with pytest.raises(RecipeError, match=r"0\.9 of 10 blocks cannot take another's attention map"):
        Lot(0.9)(range(10), 10, Seen())
    with pytest.raises(RecipeError, match="takes the map of an earlier block, and 4 is none"):
        Of(4)([3], 10, Seen())
    with pytest.raises(ValueError, match=r"above 0 and below 1, or a number of them, not 1\.5"):
        Alike(1.5)
    with pytest.raises(ValueError, match=r"heads are numbers such as 0\+2\+5"):
        Local("a")
    with pytest.raises(ValueError, match="not all different heads of 3"):
        Local("0+3").numbers(3)


def test_the_heads_that_look_back_least_see_a_window_wherever_they_are() -> None:
    far = {0: torch.tensor([9.0, 1.0]), 1: torch.tensor([8.0, 7.0]), 2: torch.tensor([2.0, 3.0])}
    found = ByDistance(0.5, 16, 2)(range(3), Seen(distances_K=far))
    assert found == {0: Local("1", 16, 2), 2: Local("0+1", 16, 2)}
    drawn = ByLot(0.5, 16, 2)(range(3), Seen(kv_heads={0: 2, 1: 2, 2: 2}))
    assert sum(len(local.numbers(2)) for local in drawn.values()) == 3
