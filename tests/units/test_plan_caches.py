"""Rules of caches: what they come to in each block, what is refused, and what they take."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pico import pico, save
from regauge.anatomy.model import Anatomy, Attention
from regauge.cache.budgets import AcrossHeads, Tokens
from regauge.cache.disposals import Drop, MergeKept
from regauge.cache.merges import AcrossLayers
from regauge.cache.scheme import Policy, Scheme, Trigger, Variance
from regauge.cache.scores import Recency, WindowAttention
from regauge.errors import RecipeError
from regauge.hosts.transformers.source import Source
from regauge.parts import CACHE, point
from regauge.plan import digest, dump, load, parse, resolve
from regauge.plan.caches import Asked, asked, cache_plan, of_caches, with_cache
from regauge.plan.combining import combined
from regauge.plan.keeping import bytes_at, growth, share, told
from regauge.report.explanation import explain
from regauge.runtime.capabilities import keeps

SIZES = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}


def anatomy_of(name: str, folder: Path, **settings: object) -> Anatomy:
    return Source.open(save(pico(name, **settings), folder / name)).anatomy


@pytest.fixture(scope="module")
def anatomy(tmp_path_factory: pytest.TempPathFactory) -> Anatomy:
    return anatomy_of("llama", tmp_path_factory.mktemp("caches"), **SIZES)


def scheme(cache: Asked, anatomy: Anatomy, block: int = 0) -> Scheme:
    plan = asked(cache)
    assert plan is not None
    found = cache_plan(plan, anatomy).blocks[block]
    assert found is not None
    return found.scheme


def test_kivi_by_hand(anatomy: Anatomy) -> None:
    found = scheme("kivi-2", anatomy)
    assert found.keys is not None
    assert found.values is not None
    assert (found.keys.grid.name, found.keys.grain.name) == ("int2-asym", "time:32")
    assert (found.values.grid.name, found.values.grain.name) == ("int2-asym", "group:16")  # not 32
    assert (found.window, found.tokens, found.hadamard, found.balance) == (128, 32, False, 0)
    assert [found.sealed(seen) for seen in (0, 127, 128, 159, 160, 191, 192)] == [0, 0, 0, 0, 32, 32, 64]
    # a block of one head: codes 32·16·2 bits of each; keys 16 steps and lows, values 32 of each, of 2 bytes
    block = 2 * 128 + 16 * 4 + 32 * 4
    assert found.bytes(160, 2, (16, 16)) == 2 * (block + 128 * 32 * 2)
    assert found.bytes(159, 2, (16, 16)) == 2 * 159 * 32 * 2
    assert found.rate(2, (16, 16)) == 2 * block / 32


def test_two_bits_in_groups_of_64_take_a_sixth_at_16k() -> None:
    rule = load("kivi-2-g64").of(CACHE)[0].point
    assert rule is not None
    sizes = Attention(4, 2, 64, 64)
    from regauge.plan.stores import block_cache

    found = block_cache(rule, sizes).scheme
    assert found.bytes(16384, 2, (64, 64)) / (16384 * 2 * 128 * 2) < 0.17
    assert share(rule, 64) == pytest.approx((2 + 32 / 64) / 16)


def test_ends_are_kept_otherwise(tmp_path: Path) -> None:
    deep = anatomy_of("llama", tmp_path, num_hidden_layers=6, **SIZES)
    bits = [scheme("k4v2-ends8", deep, block).keys for block in range(6)]
    assert [fmt.grid.bits for fmt in bits if fmt is not None] == [8, 8, 4, 4, 8, 8]


def test_a_rule_that_the_ends_leave_nothing_is_said(anatomy: Anatomy) -> None:
    notes = resolve(load("k4v2-ends8"), anatomy).notes
    assert "rule '*' has no effect: the ends are all of its 2 blocks" in notes


def test_a_part_of_each_axis(anatomy: Anatomy) -> None:
    found = scheme("kvarn", anatomy)
    assert (found.hadamard, found.balance, found.tokens, found.window) == (True, 4, 128, 0)
    rule = {"keys": "int4-asym/time:64", "values": "int4/time:32", "balance": "variance:2"}
    assert (scheme(rule, anatomy).balance, scheme(rule, anatomy).tokens) == (2, 64)
    with pytest.raises(RecipeError, match="balancing takes one round at least, not 0"):
        scheme({**rule, "balance": "variance:0"}, anatomy)
    assert Variance().rounds == 4
    with pytest.raises(ValueError, match="a trigger counts tokens"):
        Trigger("every", 0)


REFUSED: list[tuple[Asked, str]] = [
    (
        {"keys": "int4/group:7"},
        "keys: groups of 7 do not divide a width of 16, which a head has here",
    ),
    ({"values": "int4/group:32"}, "values: groups of 32 do not divide a width of 16"),
    (
        {"keys": "int4/token", "window": -1},
        "0 or more of them, and -1 is no such",
    ),
    ({"keys": "int4/token", "window": 1.5}, "a window counts the last tokens, 0 or more of them, and 1.5 is no such"),
    ({"window": 64}, "nothing is done to the others: give keys and values formats"),
    ({"keys": "int4/time:24"}, "blocks have a multiple of 16 tokens, 512 at most, and groups in time make 24"),
    ({"keys": "int4/time:2048"}, "and groups in time make 2048"),
    ({"transform": "hadamard"}, "transform 'hadamard' is for keys and values that are rounded"),
    ({"keys": "int4/time:32", "balance": "variance"}, "both need groups in time, such as int4-asym/time:128"),
    (
        {"keys": "int4/token", "window": "many"},
        "0 or more of them, and many is no such",
    ),
    ({"keys": "fp4/token"}, "grid 'fp4' is for weights and inputs, not for cache"),
    ({"keys": {"part": "int4/token", "scale": "f32"}}, "scale 'f32' is for weights and inputs, not for cache"),
    ("rtn-w4g128", "'rtn-w4g128' says nothing of a cache"),
    ("kivi-5", "there is no preset 'kivi-5' (did you mean 'kivi-4'?)"),
    (
        {"weights": {"*": {"grid": "int4", "grain": "channel"}}, "cache": {"*": {"keys": "int8/token"}}},
        "rules for w",
    ),
    ({"cache": {"last:0": {"keys": "int8/token"}}}, "selector 'last:0' matches nothing"),
    ({"budget": 512}, "a budget says how many tokens stay and not which: add a score"),
    ({"score": "recency"}, "score 'recency' lets tokens go, and nothing says how many stay: add a budget"),
    ({"trigger": "every:32"}, "trigger 'every' lets tokens go"),
    (
        {"score": "recency", "budget": 0.5},
        "a budget counts tokens, and 0.5 is no such number; a share is written uniform",
    ),
    ({"score": "recency", "budget": 64, "window": 32}, "a budget of 64 tokens a head cannot hold its window of 32"),
    ({"score": "recency", "budget": 512, "trigger": "at:512"}, "write at:544 or more"),
    ({"score": "recency", "budget": "uniform:1.5"}, "keep is the share of the text that stays"),
    ({"score": "activation", "budget": 512}, "score 'activation' is for shape, not for cache"),
    ("snapkv+minicache", "a budget keeps other tokens in each block, and a merge needs the same in two of them"),
    ({"merge": "across-layers:2"}, "start is a share, 0 to 1; you wrote 2"),
    ({"disposal": "offload"}, "there is no disposal 'offload'"),
    ("kivi-2+kivi-4", "would have keys 'int2-asym/time:32' and 'int4-asym/time:32'; they do not go together"),
    ("snapkv + rtn-w9", "there is no preset 'rtn-w9'"),
    ({"kyes": "int8/token"}, "unknown key 'kyes'"),
]


@pytest.mark.parametrize(("cache", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_no_cache_can_be_is_a_sentence(cache: Asked, message: str, anatomy: Anatomy) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        scheme(cache, anatomy)
    assert "\n" not in str(caught.value)


def test_a_head_that_no_hadamard_divides(tmp_path: Path) -> None:
    odd = anatomy_of("llama", tmp_path)
    with pytest.raises(RecipeError, match="a head of 10 channels holds no Hadamard of 8 or more"):
        scheme("rotated-kv4", odd)


def test_blocks_behind_a_window_stay_whole(tmp_path: Path) -> None:
    mixed = anatomy_of("gemma2", tmp_path)
    assert mixed.plumbing.sliding == (0,)
    plan = asked("kivi-4")
    assert plan is not None
    found = cache_plan(plan, mixed)
    assert found.blocks[0] is None
    assert found.blocks[1] is not None
    assert "blocks.0.cache kept in full precision: a window of the past" in " ".join(found.notes)
    grown = growth(resolve(plan, mixed).at(CACHE), mixed)
    assert grown.before == 2 * 3 * 20  # the second block alone grows


def test_what_a_cache_takes(anatomy: Anatomy) -> None:
    plan = asked({"keys": "int8/token", "values": "int4-asym/token"})
    assert plan is not None
    grown = growth(resolve(plan, anatomy).at(CACHE), anatomy)
    assert grown.before == 2 * 2 * 2 * 32
    assert grown.after == 2 * 2 * (16 + 2 + 8 + 4)
    found = cache_plan(plan, anatomy)
    assert bytes_at(found, anatomy, 64) == 64 * grown.after
    assert bytes_at(found, anatomy, 10) == 10 * grown.before


def test_what_is_let_go(anatomy: Anatomy) -> None:
    plan = asked("snapkv")
    assert plan is not None
    block = cache_plan(plan, anatomy).blocks[1]
    assert block is not None
    assert block.scheme == Scheme(window=32)
    assert block.policy == Policy(WindowAttention(), Tokens(1024), Drop(), Trigger("prefill", 0))
    plan = asked({"score": "recency:8", "budget": "across-heads:0.25", "trigger": "every:64", "disposal": "merge:0.9"})
    assert plan is not None
    block = cache_plan(plan, anatomy).blocks[0]
    assert block is not None
    assert block.policy == Policy(Recency(8), AcrossHeads(0.25), MergeKept(0.9), Trigger("every", 64))


def test_recipes_go_together(anatomy: Anatomy) -> None:
    both = load("snapkv + kivi-4")
    assert both.name == "snapkv + kivi-4"
    assert load("snapkv+kivi-4") == both
    assert parse(dump(both)) == both
    found = cache_plan(both, anatomy).blocks[0]
    assert found is not None
    assert found.scheme == scheme("kivi-4", anatomy)  # of whose two windows the wider is taken
    assert found.policy is not None
    shared = asked("kivi-2+minicache")
    assert shared is not None
    merged = cache_plan(shared, anatomy).blocks[1]
    assert merged is not None
    assert merged.merge == AcrossLayers()
    whole = load("gptq-w4g128 + kivi-4")
    assert set(whole.places) == {"weights", "cache"}
    assert whole.calibration == load("gptq-w4g128").calibration
    told_twice = "one leaves cache of 'first:2' as they are, and another does not"
    with pytest.raises(RecipeError, match=told_twice):
        combined([load("knorm"), parse("cache: {first:2: {keys: int8/token}}")])
    assert digest(combined([load("knorm"), load("kv8")])) != digest(load("knorm"))
    assert "snapkv + kivi-4" in explain("snapkv+kivi-4")


def test_who_is_asked_may_be_trusted_or_not(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\ncache:\n  '*': {keys: int8/token}\n")
    plan = asked(tmp_path / "mine.yaml")
    assert plan is not None
    assert plan.name == "mine"
    with pytest.raises(RecipeError, match="there is no preset of a cache called"):
        asked(str(tmp_path / "mine.yaml"), trusted=False)
    assert asked({"keys": "my.pkg:Grid/token"}) is not None
    with pytest.raises(RecipeError, match="is code of another package"):
        asked({"keys": "my.pkg:Grid/token"}, trusted=False)
    assert asked("kv8", trusted=False) == load("kv8")
    assert asked("none", trusted=False) is None


@pytest.mark.parametrize("cache", ["", " "])
def test_what_names_no_cache_is_refused(cache: str) -> None:
    for trusted in (True, False):
        with pytest.raises(RecipeError, match="names no cache: give a preset's name such as 'kivi-4', a recipe file"):
            asked(cache, trusted)


def test_a_plan_with_another_cache() -> None:
    plan = with_cache(load("rtn-w4g128"), "kivi-4")
    assert list(plan.places) == ["weights", "cache"]
    assert plan.name == "rtn-w4g128, cache kivi-4"
    assert digest(with_cache(plan, "none")) == digest(load("rtn-w4g128"))
    assert with_cache(plan, None) is plan
    # of before caches acted
    assert digest(parse('cache: {"*": {keys: int2-asym/time:32, values: int2-asym/group:32, window: 128}}')) == (
        "d9ea272be5bb12152bc8d0e92a6d0e49b871c632cf3cecaa10443b40804a16b8"
    )


@pytest.mark.parametrize("name", of_caches())
def test_every_preset_of_a_cache_explains_itself(name: str) -> None:
    said = " ".join(explain(name).split())
    rule = load(name).of(CACHE)[0].point
    assert rule is not None
    assert told(rule) in said
    for device, how in keeps(rule).items():
        assert f"on {device}: {how}" in said
    assert "keeps weights and activations stay as they are" in said
    assert "no part acts" not in said


def test_how_a_cache_is_read_is_told() -> None:
    assert keeps(point(CACHE, keys="int4-asym/time:32"))["cpu"].startswith("native (the step of one token")
    assert keeps(point(CACHE, keys="int4-asym/time:32"))["cuda"].startswith("simulated (blocks are decoded")
    assert keeps(point(CACHE, score="recency", budget="uniform:0.5"))["cuda"].startswith("native")
    assert keeps(point(CACHE, merge="across-layers"))["cpu"].startswith("not yet")


def test_points_spell_what_they_are() -> None:
    one = point(CACHE, keys="int4-asym/time:32", transform="hadamard")
    assert told(one).endswith("of bf16 a token")
