"""What VAR keeps of earlier scales by a rule: bytes by hand, answers of what is kept, kinds of heads measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import regauge as rg
from regauge.cache.base import Layer
from regauge.cache.budgets import Sensitivity, Uniform
from regauge.cache.disposals import Drop, MergeKept
from regauge.cache.kinds import lowest
from regauge.cache.scheme import Policy, Trigger
from regauge.cache.scores import AccumulatedAttention, HeadKinds, Random, Recency
from regauge.errors import BudgetError, RecipeError, SettingError
from regauge.hosts.regauge.heads import Watched, by_kinds, by_layers, watch
from regauge.hosts.regauge.pasts import Chosen, Past, Whole
from regauge.plan import parse
from tests.caches import draw, output, seen
from tests.discriminate.test_cache_scores import mixture
from toy_var import saved, toy

HALF = {"score": "window-attention:16", "budget": "uniform:0.5"}
ONE = Layer(0, 1, 1)


def scales(heads: int = 2) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Queries, keys and values of maps of 1, 4 and 9 tokens."""
    return [tuple(draw(2, heads, n, 8, seed=10 * n + k) for k in range(3)) for n in (1, 4, 9)]  # type: ignore[misc]


def test_what_no_later_scale_reads_is_kept_by_nobody() -> None:
    past = Past(((0, 1), (0, 1), (0,)))
    held = []
    for scale, (q, k, v) in enumerate(scales()):
        past.begin(scale)
        for layer in past.layers[scale]:
            read = past.append(layer, q, k, v)
            assert read.keys_BHTD.shape[2] == (1, 5, 14)[scale]
        held.append(past.bytes)
    token = 2 * 2 * 2 * 8 * 4  # keys and values of two heads of two sequences
    assert held == [2 * token, 5 * token, 0]  # layer 1 is read no more after the second scale
    assert past.most == 6 * token  # while layer 0 has five and layer 1 still has one


def test_a_rule_lets_tokens_go_and_their_memory(tmp_path: Path) -> None:
    """Half of 1 token is 1 at the least, half of 5 is 2: in each of 5 layers, with a place (4 bytes) for every token of
    a head, and a count (8) for every head."""
    folder = saved(tmp_path / "model")
    drawn = rg.load(folder, cache=HALF).sample([0, 1], seed=1)
    numbers, heads = 4 * 5 * 3, 4 * 5 * 3 * 8  # heads of all layers of two guided images
    assert drawn.cache_bytes == (numbers * (2 * 8 * 4 + 4) + heads, 2 * numbers * (2 * 8 * 4 + 4) + heads, 0)
    whole = rg.load(folder).sample([0, 1], seed=1)
    assert whole.cache_bytes[1] == 5 * numbers * 2 * 8 * 4
    assert not torch.equal(whole.tokens, drawn.tokens)
    every = rg.load(folder, cache=HALF | {"budget": "uniform:1"}).sample([0, 1], seed=1)
    assert torch.equal(every.tokens, whole.tokens)


def test_an_artifact_keeps_by_its_recipe(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    receipt = rg.apply(parse({"name": "half", "cache": {"*": HALF}}), folder, tmp_path / "out")
    assert [store.name for store in receipt.caches] == [f"blocks.{number}.cache" for number in range(5)]
    asked = rg.load(folder, cache=HALF)
    assert torch.equal(rg.load(tmp_path / "out").sample([0], 1).tokens, asked.sample([0], 1).tokens)
    whole = rg.load(tmp_path / "out", cache="none")
    assert torch.equal(whole.sample([0], 1).tokens, rg.load(folder).sample([0], 1).tokens)


@pytest.mark.parametrize("score", [Recency(sinks=1), AccumulatedAttention(), HeadKinds(sinks=0, kinds="cs")])
def test_attention_reads_what_is_kept_of_uneven_heads(score: Any) -> None:
    """One head keeps three times as many as the other; the answers are those of all tokens with the others hidden."""
    kept = Chosen(Policy(score, Sensitivity(0.5, weights="1/3"), Drop()), 0, ONE, 0.5)
    before = scales()
    for q, k, v in before[:2]:
        kept.add(q, k, v, last=False)
    assert kept.bytes == (2 * 1 + 2 * 3) * (2 * 8 * 4 + 4 + 4 * score.accumulates) + 4 * 8
    q, k, v = before[2]
    read = kept.add(q, k, v, last=True)
    assert kept.bytes == 0
    assert read.held_BHT is not None
    assert read.held_BHT.sum(-1).tolist() == [[10, 12], [10, 12]]
    whole = Whole()
    for queries, keys, values in before[:2]:
        whole.add(queries, keys, values, last=False)
    full = whole.add(q, k, v, last=True)
    same = full.keys_BHTD.unsqueeze(2) == read.keys_BHTD.unsqueeze(3)
    shown = (same.all(-1) & read.held_BHT.unsqueeze(-1)).any(2)
    found = output(q.unsqueeze(2), read.keys_BHTD, read.values_BHTD, read.held_BHT, 0.5)
    torch.testing.assert_close(found, output(q.unsqueeze(2), full.keys_BHTD, full.values_BHTD, shown, 0.5))


def test_what_is_let_go_may_be_merged() -> None:
    policies = [Policy(Recency(sinks=0), Uniform(0.5), one) for one in (Drop(), MergeKept(-1.0))]
    stores = [Chosen(policy, 0, ONE, 0.5) for policy in policies]
    reads = []
    for store in stores:
        for number, (q, k, v) in enumerate(scales()):
            read = store.add(q, k, v, last=number == 2)
        reads.append(read)
    assert reads[0].keys_BHTD.shape == reads[1].keys_BHTD.shape
    assert not torch.equal(reads[0].keys_BHTD[:, :, :2], reads[1].keys_BHTD[:, :, :2])
    assert torch.equal(reads[0].keys_BHTD[:, :, 2:], reads[1].keys_BHTD[:, :, 2:])


def test_a_window_and_a_trigger_hold_tokens_back() -> None:
    for window, tokens, count in ((0, 1, 1), (3, 1, 4), (0, 6, 5)):
        store = Chosen(Policy(Random(), Uniform(0.2), Drop(), Trigger("every", tokens)), window, ONE, 0.5)
        for q, k, v in scales()[:2]:
            store.add(q, k, v, last=False)
        assert int(store._counts_BH.max()) == count  # type: ignore[union-attr]  # something is held


def test_codes_are_near_to_what_they_stand_for(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", patch_nums=(1, 2, 6), image_size=12)
    whole, eight = (
        rg.load(folder, cache=cache).sample([0, 1], seed=1, cache=None)
        for cache in ("none", {"keys": "int8/token", "values": "int8/token"})
    )
    assert float((whole.tokens == eight.tokens).float().mean()) > 0.9
    assert eight.cache_bytes[2] == 0


def test_what_scales_cannot_keep_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    for rule, message in (
        ({"merge": "across-layers", "window": 32}, "layers are not merged there"),
        (HALF | {"keys": "int8/token", "values": "int8/token"}, "let go or put in codes, not both"),
        (HALF | {"score": "expected-attention"}, "not turned by position"),
    ):
        with pytest.raises(SettingError, match=message):
            rg.load(folder, cache=rule)
    with pytest.raises(RecipeError, match="s for structural; you wrote 'cx'"):
        rg.load(folder, cache=HALF | {"score": {"part": "head-kinds", "kinds": "cx"}})
    with pytest.raises(BudgetError, match="kinds names 2 heads, 'cs', and a block here has 3"):
        rg.load(folder, cache=HALF | {"score": {"part": "head-kinds", "kinds": "cs"}}).sample([0])


def test_heads_are_told_apart_by_what_was_watched() -> None:
    """Of a planted mixture: heads 0 and 2 read stripes, 1 and 3 a diagonal; all of them what came before."""
    held, found = mixture(), Watched()
    found(held)
    assert lowest(found.variance_SH[0], 0.5).tolist() == [True, False, True, False]
    assert found.before_S[0] == pytest.approx(1 - 32 / 96, abs=0.34)
    found(seen(draw(1, 2, 4, 8), queries=draw(1, 2, 1, 4, 8)))  # a first scale, with nothing before it
    assert len(found.variance_SH) == 1


def test_rules_that_are_measured_give_each_head_and_layer_its_share(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", num_attention_heads=4)
    model = toy(num_attention_heads=4)
    rule: Any = by_kinds(model, [0, 1], keep=0.5, contextual=0.5)
    kinds = [rule["cache"][f"blocks.{number}.cache"]["score"]["kinds"] for number in range(5)]
    assert "".join(kinds).count("c") == 10
    weights = rule["cache"]["blocks.0.cache"]["budget"]["weights"].split()
    assert weights == ["/".join("0.5" if kind == "c" else "1.5" for kind in row) for row in kinds]
    watched = [sum(one.before_S) / len(one.before_S) for one in watch(model, [0, 1])]
    layers: Any = by_layers(model, [0, 1])
    told = [float(one) for one in layers["cache"]["*"]["budget"]["weights"].split()]
    assert told == pytest.approx(watched, rel=0.01)
    for made in (rule, layers):
        drawn = rg.load(folder, cache=made).sample([0, 1], seed=1)
        assert drawn.cache_bytes[1] < 0.55 * model.sample([0, 1], seed=1).cache_bytes[1]
