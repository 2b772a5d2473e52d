"""Which drafts are chosen: acceptance is real, costs are injected where time is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import regauge as rg
from regauge.artifact.folder import read_receipt
from regauge.artifact.preferring import SETTINGS
from regauge.cli import main
from regauge.elastic.family import Family
from regauge.engine.drafting import Drafting, Way, passages, run, weighed
from regauge.errors import SettingError
from regauge.hosts import host_of
from regauge.hosts.transformers.drafting import draftable
from regauge.hosts.transformers.switching import switchable
from regauge.kernels.cpu.library import available
from regauge.measure.bootstrap import Interval
from regauge.measure.several import Together
from regauge.runtime.drafts.replay import Passage, Times, replayed
from regauge.search import drafting
from regauge.search.budgets import parse
from regauge.text.windows import Windows
from tests import tiny
from tests.families import made
from tests.pico import pico, save

native = pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")
FLAT, STEEP = (1.0,) * 8, tuple(float(tokens) for tokens in range(1, 9))
MEMBER = "depth=2"


def windows(count: int = 14, length: int = 24) -> Windows:
    ids = torch.randint(3, 50, (count, length), generator=torch.Generator().manual_seed(5))
    return Windows(tuple(ids), tuple(range(count)), (length,) * count, "search: a text")


def family(folder: Path, idle: bool) -> Any:
    """A family of four blocks; `idle`: the last two do nothing, so that a member without them is always right."""
    source = pico("llama", num_hidden_layers=4)
    for layer in source.model.layers[2:] if idle else ():
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model = rg.load(save(source, folder / "model"))
    switchable(model, Family(depth=(3, 2), layers="exits"), model.regauge_anatomy)
    draftable(model)
    model.generation_config.eos_token_id = None
    return model


def choice(model: Any, steps: tuple[float, ...], guess: float, names: tuple[str, ...] = (MEMBER,)) -> Drafting:
    rounds = [Together(steps, {MEMBER: guess})]
    return weighed(model, {MEMBER: model.regauge.member(MEMBER)}, windows().halves(), rounds, 64, names)


def test_a_passage_is_replayed_by_the_loop_that_decodes() -> None:
    """Ten tokens behind two. All guesses right: a step for each token that was not guessed. All wrong, where a step
    costs as many times one as it reads: the fourth tries two, and so takes three and two guesses. A text that repeats
    itself costs its steps alone.
    """
    ids = (3, 8, *range(10, 20))
    right = [*ids[1:], 0]
    always = replayed(Passage(ids, 2), Times(FLAT, 0.25), right)
    assert (always.tokens, always.plain) == (9, 9.0)
    assert always.accepted == always.drafted == always.tokens - always.steps
    assert always.taken == pytest.approx(always.steps + 0.25 * always.drafted)
    never = replayed(Passage(ids, 2), Times(STEEP, 1.0), [9] * 12)
    assert (never.accepted, never.drafted, never.taken) == (0, 2, 8.0 + 3.0 + 2.0)
    looked = replayed(Passage((5, 6, 7, 8) * 6, 8), Times(FLAT))
    assert (looked.tokens, looked.accepted) == (15, looked.drafted)
    assert looked.taken == looked.steps < 4


def test_a_draft_is_right_only_behind_right_ones() -> None:
    ids = (1, 2, 3, 4, 5, 6, 7, 8)
    likely = [2, 3, 9, 5, 6, 7, 8, 0]  # wrong of the fourth token alone
    found = replayed(Passage(ids, 1), Times(FLAT, 0.0), likely)
    assert found.accepted == found.tokens - found.steps
    assert found.steps > 1


@native
def test_a_draft_that_surely_pays_is_chosen_and_a_dear_one_is_not(tmp_path: Path) -> None:
    """The same guesses, all of them right: what they cost decides; where they cost little, whether they are right."""
    model = family(tmp_path / "idle", True)
    cheap = choice(model, FLAT, 0.1)
    assert cheap.drafts == MEMBER
    assert cheap.way is not None
    assert cheap.way.accepted == 1.0
    assert cheap.way.gain.low > 2
    dear = choice(model, STEEP, 0.9)
    assert dear.drafts == "none"
    assert dear.ways[0].gain.value < 1.03
    assert "drafts are used where 1.03x is sure" in dear.why
    other = choice(family(tmp_path / "busy", False), FLAT, 0.3)
    assert other.ways[0].accepted < 0.6
    assert other.drafts == "none"
    assert choice(model, FLAT, 0.3).drafts == MEMBER


@native
def test_the_best_of_several_is_taken(tmp_path: Path) -> None:
    """Of greedy text that repeats itself look-up is as right as a member that is always right, and costs nothing."""
    model = family(tmp_path, True)
    both = choice(model, FLAT, 0.4, ("lookup", MEMBER))
    gains = {way.drafts: way.gain.value for way in both.ways}
    assert both.drafts == max(gains, key=gains.__getitem__)
    assert choice(model, FLAT, 0.01, ("lookup", MEMBER)).drafts == MEMBER


@native
def test_what_is_sampled_is_told_as_it_is_sampled(tmp_path: Path) -> None:
    """Hot text repeats nothing, so that look-up which pays greedily does not."""
    model = family(tmp_path, False)
    cold = choice(model, FLAT, 9.0, ("lookup",))
    assert (cold.how, cold.drafts) == ("greedily", "lookup")
    model.generation_config.do_sample, model.generation_config.temperature = True, 8.0
    hot = choice(model, STEEP, 9.0, ("lookup",))
    assert (hot.how, hot.drafts) == ("sampled at temperature 8", "none")
    assert hot.ways[0].accepted < 0.2


def test_a_text_too_short_to_tell_gives_none(tmp_path: Path) -> None:
    model = rg.load(save(pico("llama"), tmp_path / "model"))
    model.generation_config.eos_token_id = None
    found = weighed(model, {}, windows(8).halves(), [Together(FLAT, {})], None)
    assert found.drafts == "none"
    assert found.ways == ()
    assert "4 and 4 continuations of the text are too few" in found.why
    assert passages(model, windows(0), None) == []


@native
def test_what_promises_and_does_not_keep_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last word is had by `generate`; its clock here says that drafts take longer."""
    model = family(tmp_path, False)
    found = choice(model, FLAT, 9.0, ("lookup",))
    ticks = iter(map(float, range(10_000)))

    def slow(model: Any, ids: Any, tokens: int, drafts: str | None) -> Any:
        for _ in range(3 if drafts else 1):
            next(ticks)
        return ids

    monkeypatch.setattr("regauge.measure.several._written", slow)
    kept = run(model, found, windows(), None, clock=lambda: next(ticks))
    assert kept.drafts == "none"
    assert "through generate it is no faster: 0.50x" in kept.why
    assert kept.gain == 1.0
    assert run(model, kept, windows(), None) is kept


def chosen(drafts: str = "lookup") -> Drafting:
    gain = Interval(value=1.2, low=1.1, high=1.3)
    way = Way(drafts=drafts, accepted=0.38, tokens=1.6, gain=gain)
    measured = Interval(value=1.12, low=1.05, high=1.2)
    return Drafting(drafts=drafts, text="held.txt", how="greedily", texts=8, steps=FLAT, ways=(way,), measured=measured)


@native
def test_an_artifact_decodes_with_what_was_written(tmp_path: Path) -> None:
    """In its settings, for `generate` and `stream`, receipt and card; and not in a member that is taken out."""
    out = made(tmp_path, "llama", "int4")
    source = host_of(tmp_path / "model").open(tmp_path / "model")
    had = (out / SETTINGS).exists()
    plain = rg.load(out)
    drafting.write(source, out, chosen(MEMBER), 1.45)
    model = rg.load(out)
    assert model.generation_config.drafts == MEMBER
    assert model.generation_config.eos_token_id == plain.generation_config.eos_token_id
    assert had or SETTINGS in json.loads((out / "regauge" / "manifest.json").read_text())["files"]
    ids = torch.tensor([[5, 9, 11, 7, 5, 9, 11, 7]])
    more = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    assert model.generate(ids, **more).equal(plain.generate(ids, **more))
    assert model.regauge_drafts.steps > 0 == plain.regauge_drafts.steps
    told = "1.62x: 1.45x from the weights, 1.12x from depth=2 (accepted 38 % of guesses on held.txt)"
    assert str(read_receipt(out).drafts) == told
    assert f"decode {told}" in (out / "README.md").read_text()
    rg.extract(out, "depth=3", tmp_path / "small")
    assert getattr(rg.load(tmp_path / "small").generation_config, "drafts", None) is None
    assert read_receipt(tmp_path / "small").drafts is None
    (tmp_path / "small" / SETTINGS).write_text(json.dumps({"drafts": MEMBER}))
    with pytest.raises(SettingError, match="drafts='depth=2' drafts nothing: give 'lookup' or 'none'"):
        rg.load(tmp_path / "small")


def test_what_may_draft_is_asked_for_or_follows_from_a_budget() -> None:
    decode, memory = parse(["decode=1.5x"]), parse(["memory=0.5x"])
    assert drafting.asked(None, decode, False) == ("any",)
    assert drafting.asked(None, memory, True) == ()
    assert drafting.asked("none", decode, True) == ()
    assert drafting.asked("lookup", memory, True) == ("lookup",)
    with pytest.raises(SettingError, match=r"--drafts lookup is decided by .* give --eval or --calibration"):
        drafting.asked("lookup", decode, False)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--drafts", "depth=1"], "without --members the artifact has no members to draft"),
        (["--drafts", "oracle"], "--drafts oracle: without --members"),
        (["--drafts", "depth=9", "--members", "--budget", "memory=0.6x"], "depth=9"),
    ],
)
def test_drafts_that_nobody_makes_are_refused_before_any_work(
    more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = tiny.folder(tmp_path / "model", num_hidden_layers=3), tiny.text(tmp_path, 3000)
    out = tmp_path / "out"
    assert main(["fit", str(model), "-o", str(out), "--calibration", str(text), "--quiet", *more]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()
