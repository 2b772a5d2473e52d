"""Stores as choices of a search: attention that reads codes, bytes at a context, one program over weights and cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regauge.anatomy.model import Attention
from regauge.cache.scheme import Scheme
from regauge.errors import BudgetError
from regauge.hosts import host_of
from regauge.hosts.heads import Heads
from regauge.measure.subject import logits_kept
from regauge.parts import CACHE
from regauge.plan.caches import cache_plan
from regauge.report import run as pages
from regauge.report import words
from regauge.search import menus, record
from regauge.search.budgets import parse
from regauge.search.fit import fit, pick
from regauge.search.loop import finish
from regauge.search.loop.desk import Ask
from regauge.search.loop.start import LONG, with_caches
from regauge.search.losses.shelf import Shelf
from regauge.search.losses.stores import between, losses_of
from regauge.search.losses.trials import true_kl
from regauge.search.options import FULL, Option, SiteGroup, plan_of
from regauge.search.stores import (
    WINDOW,
    held,
    read_bytes,
    reading,
    scheme_of,
    store_bytes,
    store_groups,
    whole_bytes,
    why_not_read,
)
from regauge.search.subject import Subject
from regauge.text.windows import Windows
from tests.pico import pico, save
from tests.tiny import folder
from tests.units.test_search_fit import small

SIZES = Attention(4, 2, 32, 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    where = tmp_path_factory.mktemp("stores") / "model"
    return folder(where, "llama-tied", **sizes, intermediate_size=70, max_position_embeddings=512)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = torch.randint(0, 10, (9000,), generator=torch.Generator().manual_seed(0)).tolist()
    names = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    path.write_text("".join(names[w] + (".\n\n" if i % 150 == 149 else " ") for i, w in enumerate(words)))
    return path


def heads(tokens: int, seed: int = 0) -> Heads:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, n, tokens, 32, generator=generator) for n in (4, 2, 2))
    found = Heads(q, k, v, None, 32**-0.5, lambda: held(found, Scheme()))
    return found


@pytest.fixture(scope="module")
def groups(model: Path) -> tuple[SiteGroup, ...]:
    """The choices of a model whose second block keeps a window alone."""
    anatomy = host_of(model).open(model).anatomy
    return store_groups(replace(anatomy, plumbing=replace(anatomy.plumbing, sliding=(1,))), (16384,))


@pytest.fixture
def group(groups: tuple[SiteGroup, ...]) -> SiteGroup:
    return groups[0]


def test_blocks_whose_store_grows_have_a_choice_where_a_context_counts(
    model: Path, groups: tuple[SiteGroup, ...]
) -> None:
    assert [group.name for group in groups] == ["blocks.0.cache"]
    group = groups[0]
    assert {(o.name.partition("-")[0]) for o in group.options} >= {"k8v8", "k4v2", "k2v4", "k3v3"}
    assert group.options[-1] == Option(FULL, None)
    assert group.kind == "cache"
    assert group.block == 0
    assert store_groups(host_of(model).open(model).anatomy, ()) == ()


def test_bytes_by_hand(group: SiteGroup) -> None:
    """2 heads of 32 channels: whole 2·2·32·2 bytes a token; at 4 bits 16384 − 128 tokens in blocks of 32."""
    assert store_bytes(group, group.option(FULL), 100) == 100 * 256
    blocks = (16384 - 128) // 32
    one = 32 * 32 * 4 // 8 + 32 * 4  # codes, and 32 steps and lows of two bytes: a channel each, or a token each
    assert store_bytes(group, group.option("k4v4-g32"), 16384) == 2 * (2 * one * blocks) + 128 * 256


def test_stores_hold_what_the_formula_says_within_a_twentieth(group: SiteGroup) -> None:
    for name in ("k4v4-g32", "k2v2-g128"):
        option = group.option(name)
        held_bytes = read_bytes(scheme_of(option.choice, SIZES), SIZES, 8192)
        assert 1.0 <= held_bytes / store_bytes(group, option, 8192) < 1.07, name


def test_attention_reads_what_decoding_would(group: SiteGroup) -> None:
    """Every token by hand: sealed tokens before it from a store's own codes, the rest as they came."""
    from regauge.runtime.store.packed import Packed

    found = heads(192)
    for name in ("k3v2-turned",):
        scheme = scheme_of(group.option(name).choice, SIZES)
        store, out = Packed(scheme), []
        for at in range(192):
            keys, values = store.append(*(x[:, :, at : at + 1] for x in (found.keys_BKSD, found.values_BKSE)))
            k, v = (x.repeat_interleave(2, 1) for x in (keys, values))
            p = ((found.queries_BHTD[:, :, at : at + 1] @ k.transpose(-1, -2)) * found.scale).softmax(-1)
            out.append((p @ v)[:, :, 0])
        torch.testing.assert_close(held(found, scheme), torch.stack(out, 1), atol=2e-5, rtol=1e-4)
        assert not torch.allclose(held(found, scheme), found.plain(), atol=1e-3)


def test_three_bits_lie_between() -> None:
    assert between(2, 1.0, 100.0) == pytest.approx(100)
    assert between(3, 1.0, 100.0) == pytest.approx(10)
    assert between(4, 1.0, 100.0) == pytest.approx(1)
    assert between(8, 289.0, 1e9) == pytest.approx(1)


def test_options_are_ranked_by_their_bits(group: SiteGroup) -> None:
    found = heads(192)
    losses = losses_of(group, found, torch.ones(2, 192, 4, 32))
    assert losses[FULL] == 0
    assert losses["k8v8-g32"] < losses["k4v4-g32"] < losses["k3v3-g32"] < losses["k2v2-g32"]
    assert losses["k2v8-g32"] < losses["k2v2-g32"]
    assert losses["k8v2-g32"] < losses["k2v2-g32"]


def test_trials_of_a_cache_are_what_a_loaded_model_gives(model: Path, tmp_path: Path) -> None:
    """True KL of a variant equals that of the model which reads its text in pieces behind such a cache."""
    source = host_of(model).open(model)
    subject = Subject.of(source)
    groups = menus.groups_of(source.anatomy, menus.Menu(contexts=(4096,)))
    stores = [group for group in groups if group.store is not None]
    ids = torch.randint(0, 50, (2, 256), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    windows = Windows(tuple(ids), (0, 1), (256, 256))
    picks = {stores[0].name: stores[0].option("k2v2-g32"), stores[1].name: stores[1].option("k3v2-turned")}
    names = {group.name: FULL for group in groups} | {name: option.name for name, option in picks.items()}

    plan = plan_of({one.name: one.option(names[one.name]) for one in groups}, groups, "some", "", 512, 256)
    kept = cache_plan(plan, source.anatomy)
    assert [block is not None for block in kept.blocks] == [True, True]
    assert plan.of(CACHE)
    (kl,) = true_kl(subject, Shelf(tmp_path, groups), windows, [picks])
    loaded = subject.host.whole(source)
    with torch.no_grad():
        (after,) = logits_kept(loaded, [ids], lambda: subject.host.cache(loaded, kept))
        before = loaded(input_ids=ids, use_cache=False).logits
    p, q = (torch.log_softmax(x[:, :-1].float(), -1) for x in (before, after))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert kl > 1e-7
    assert kl == pytest.approx(expected, rel=0.02)


def test_families_without_the_door_keep_their_cache(model: Path, tmp_path: Path) -> None:
    source = host_of(model).open(model)
    assert why_not_read(source, host_of(model).runner(source), 0) == ""
    capped = save(pico("gemma2"), tmp_path / "gemma2")
    other = host_of(capped).open(capped)
    assert "softcap" in why_not_read(other, host_of(capped).runner(other), 1)
    ask = Ask("m", parse(["memory@1k=1MB"]))
    assert with_caches(ask, other).menu.contexts == ()
    assert "stays as it is" in with_caches(ask, other).notes[0]


def test_only_budgets_with_a_context_choose_a_cache(model: Path) -> None:
    source = host_of(model).open(model)
    ask = Ask("m", parse(["memory=1MB"]))
    assert with_caches(ask, source) is ask
    both = with_caches(Ask("m", parse(["memory@1k=1MB", "memory@4k=2MB"])), source)
    assert both.menu.contexts == (4096, 1024)
    assert both.length == min(LONG, 512)
    assert both.given["contexts"] == [4096, 1024]
    for menu in (menus.parse("vllm", None), menus.parse(None, "rtn-w8")):
        kept = Ask("m", parse(["memory@1k=1MB"]), menu=menu)
        assert with_caches(kept, source) is kept


def test_attention_is_left_as_it_was(model: Path) -> None:
    source = host_of(model).open(model)
    runner = host_of(model).runner(source)
    states = runner.begin([torch.arange(64)[None] % 50], source.block(None))
    before = runner.block(0, source.block(0), states).hidden[0]
    with pytest.raises(ZeroDivisionError), reading(runner, Scheme(window=WINDOW)):
        raise ZeroDivisionError
    with runner.attending(lambda one: one.plain() * 2):
        assert not torch.equal(runner.block(0, source.block(0), states).hidden[0], before)
    assert torch.equal(runner.block(0, source.block(0), states).hidden[0], before)


def test_the_page_and_the_last_words_say_bits_block_by_block() -> None:
    caches = tuple(
        record.CachePick(
            name=f"blocks.{block}.cache", block=block, option="k4v2-g32", keys=4, values=2 + block, tokens=16384,
            bytes=1000, kl_predicted=0.01,
        )
        for block in range(2)
    )  # fmt: skip
    run = record.Run.model_construct(caches=caches, costs={})
    said = {one.about.strip(): one.said for one in words._stores(run)}
    assert said["keys"].startswith("4 4 bits")
    assert said["values"].startswith("2 3 bits")
    assert said[""] == "2.00 kB at 16,384 tokens"
    (table,) = pages._caches(run)
    assert [row[2:4] for row in table.rows] == [("4", "2"), ("4", "3")]
    assert pages._caches(record.Run.model_construct(caches=())) == ()


@pytest.mark.slow
def test_fit_spends_one_budget_over_weights_and_cache(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    monkeypatch.setattr(finish, "costs", lambda *_: {})
    monkeypatch.setattr(finish, "_samples", lambda *_: ())
    source = host_of(model).open(model)
    stores = store_groups(source.anatomy, (16384,))
    whole = whole_bytes(stores, 16384)
    limit = round(0.3 * (whole + source.bytes_bf16()))
    out = tmp_path / "out"
    run = fit(model, out, budgets=[f"memory@16k={limit / 1000}KB", "memory=1.0x"], calibration=text)
    assert all(verdict.met for verdict in run.verdicts)
    assert run.point.cache_bytes == sum(one.bytes for one in run.caches) < whole
    assert run.point.cache_bytes + (run.point.bytes_measured or 0) <= limit + 1
    assert any(one.keys < 16 for one in run.caches)
    assert "filled, take" in run.verdicts[0].how
    assert any("16,384 tokens" in note for note in run.notes)
    assert run.long is not None
    assert 0 < run.long.tokens <= 2048
    assert any(note.startswith("long generation: ") for note in run.notes)
    assert record.read(out).long == run.long
    assert record.read(out).caches == run.caches
    receipt = pick(out, 0, tmp_path / "picked", force=True)
    assert receipt.caches
    with pytest.raises(BudgetError, match="the cache alone takes"):
        fit(model, tmp_path / "small", budgets=["memory@16k=0.001x"], calibration=text)
