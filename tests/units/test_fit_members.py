"""`fit --members` from end to end on a pico: a member for each budget, within it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import regauge as rg
from regauge.anatomy.model import Site
from regauge.artifact.codec.base import Layout
from regauge.artifact.cutting import opened
from regauge.artifact.folder import read_receipt
from regauge.artifact.ownership import strangers
from regauge.cli import main
from regauge.errors import BudgetError, SettingError
from regauge.hosts import host_of
from regauge.measure.cost import Speed
from regauge.search.evolution import Effort
from regauge.search.members import build as building
from regauge.search.members import timing
from regauge.search.members import wanted as asking
from regauge.search.members.build import offered
from regauge.search.members.fit import fit_members
from regauge.search.members.record import FILE, Chosen
from regauge.search.members.space import Members, Table, stored
from regauge.search.members.wanted import Wanted
from tests import tiny

SMALL = Effort(evaluations=6, first=4, rounds=1, population=8, generations=2)
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{tiny.TEXT}{WORDS[i % 10]} {i}.\n\n" for i in range(60)))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("fit") / "model", "llama-tied", num_hidden_layers=4)


@pytest.fixture(scope="module")
def made(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Chosen]:
    out = tmp_path_factory.mktemp("out") / "out"
    budgets = ["memory=0.8x", "memory=0.45x"]
    wanted = Wanted(budgets, text, methods="none,rtn-w8", tokens=1024, length=64, first=SMALL, further=SMALL)
    return out, fit_members(source, out, wanted)


@pytest.mark.slow
def test_each_budget_has_a_member_that_keeps_it(source: Path, made: tuple[Path, Chosen]) -> None:
    out, chosen = made
    assert [one.name for one in chosen.members] == ["full", "m0.80x", "m0.45x"]
    for one, most in zip(chosen.members[1:], (0.8, 0.45), strict=True):
        assert one.ratio <= most
        assert one.bytes <= most * host_of(source).open(source).bytes_bf16()
    assert chosen.measured > 4
    assert set(chosen.tried) <= {"full precision", "rtn-w8"}
    assert Chosen.model_validate_json((out / FILE).read_text()) == chosen
    assert [note for note in read_receipt(out).notes if note.startswith("member m0.45x: ")]
    assert not out.with_name("out.search").exists()


@pytest.mark.slow
def test_members_are_named_in_the_family(made: tuple[Path, Chosen]) -> None:
    out, chosen = made
    model = rg.load(out, dtype="float32")
    ids = torch.arange(3, 20, dtype=torch.int64, device="cpu")[None]
    found = []
    for one in chosen.members:
        with rg.use(model, one.name) as active, torch.no_grad():
            assert str(active) == (one.subnet or "full")
            found.append(model(input_ids=ids).logits)
    assert not torch.equal(found[0], found[-1])


@pytest.mark.slow
def test_a_table_counts_what_a_member_stores(made: tuple[Path, Chosen]) -> None:
    out, _ = made
    model = rg.load(out, dtype="float32")
    members = Members.of(model.regauge.family, model.regauge.anatomy)
    weigh = stored(opened(out).layout)
    table = Table.made(members, weigh)
    for genes in list(members.alike())[::7]:
        cut = model.regauge.cut(members.subnet(genes))
        names = {site.name: cut.origin(site.name) for site in cut.anatomy.sites}
        wanted = sum(weigh(_named(site, names[site.name]), 1.0) for site in cut.anatomy.sites)
        assert table(genes) == pytest.approx(wanted)


def _named(site: Site, name: str) -> Site:
    return replace(site, name=name)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose tokens go to four of five experts."""
    return tiny.folder(tmp_path_factory.mktemp("mixture") / "model", "mixtral", num_experts_per_tok=4)


def test_fewer_experts_take_fewer_products_and_as_many_bytes(mixture: Path) -> None:
    """By hand: a block's experts cost two of five, or three, or all four, of what five would; nothing else falls."""
    anatomy = host_of(mixture).open(mixture).anatomy
    family = offered(anatomy)
    assert family.experts == (3, 2)
    members = Members.of(replace(family, ffn=(), heads=(), ranked=(0, 1)), anatomy)
    assert members.choices == (2, 2, 1, 1, 1, 1, 1, 3)
    assert [str(members.subnet((0,) * 7 + (pick,))) for pick in range(3)] == ["full", "experts=3", "experts=2"]
    weights = Table.made(members, lambda site, share: site.shape[0] * site.shape[1])
    products = Table.made(members, lambda site, share: share * site.shape[0] * site.shape[1])
    experts = sum(site.shape[0] * site.shape[1] for site in anatomy.sites if site.expert is not None)
    whole = weights((0,) * 8)
    for pick, used in enumerate((4, 3, 2)):
        assert weights((0,) * 7 + (pick,)) == whole
        assert products((0,) * 7 + (pick,)) == pytest.approx(whole - experts + used / 5 * experts)


def test_an_expert_is_timed_at_the_tokens_that_reach_it(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    anatomy = host_of(mixture).open(mixture).anatomy
    layout = Layout(anatomy, anatomy, {}, torch.bfloat16)
    (expert, *_) = (site for site in layout.anatomy.sites if site.expert is not None)
    asked = []
    monkeypatch.setattr(timing, "seconds", lambda shape, option, tokens, *_: asked.append(tokens) or 1e-3)
    pace = timing.Pace(None, {}, False, torch.zeros(1, 1, dtype=torch.int64, device="cpu"), 1)
    for resource, tokens in (("decode", 1), ("prefill", 102)):
        assert timing._weigh(pace, layout, resource, {})(expert, 0.4) == pytest.approx(0.4)
        assert asked.pop() == tokens


@pytest.mark.slow
def test_a_faster_member_sends_tokens_to_fewer_experts(
    mixture: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a product costs what it has weights; for memory, which experts do not spare, all four stay."""
    monkeypatch.setattr(building, "offered", lambda anatomy: replace(offered(anatomy), depth=(), ffn=(), heads=()))
    monkeypatch.setattr(timing, "seconds", lambda shape, *_: shape[0] * shape[1] * 1e-6)
    monkeypatch.setattr(timing, "read_costs", lambda _: {})
    monkeypatch.setattr(timing, "write_costs", lambda *_: None)
    monkeypatch.setattr(timing, "speeds", lambda runs, *_: {name: _rate(one) for name, one in runs.items()})
    wanted = Wanted(["decode=1.02x"], text, methods="none", tokens=512, length=64, first=SMALL, further=SMALL)
    chosen = fit_members(mixture, tmp_path / "out", wanted)
    assert [one.subnet for one in chosen.members] == ["", "experts=3"]
    assert chosen.members[1].bytes == chosen.members[0].bytes
    assert chosen.members[1].speeds["decode"] >= 1.02


def test_what_cannot_be_kept_is_a_sentence(source: Path, text: Path, tmp_path: Path) -> None:
    wanted = Wanted(["memory=0.01x"], text, methods="none", tokens=1024, length=64, first=SMALL, further=SMALL)
    with pytest.raises(BudgetError, match=r"memory=0.01x: the smallest member takes \d+\.\d\d times that"):
        fit_members(source, tmp_path / "out", wanted)
    for budgets, why in (
        ([], "give one or several"),
        (["memory=0.5x", "memory=0.50x"], "two budgets are the same"),
        (["memory@4k=2GB"], "members are chosen for their own memory"),
    ):
        with pytest.raises(BudgetError, match=why):
            fit_members(source, tmp_path / "out", Wanted(budgets, text))
    assert list(tmp_path.iterdir()) == []


def test_both_worlds_refuse_what_does_not_go_together(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="--floor, --recover and --members"):
        rg.fit(source, tmp_path / "out", "memory=0.5x", members=True, floor="kl=0.1", recover="5m")
    assert main(["fit", str(source), "-o", str(tmp_path / "out"), "--members", "--floor", "kl=0.1"]) == 2


def test_the_command_tells_its_members(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(asking, "METHODS", ("rtn-w8",))
    monkeypatch.setattr(Wanted, "first", SMALL)
    monkeypatch.setattr(asking, "Effort", lambda: SMALL)
    monkeypatch.setattr("regauge.search.drafting.TURNS", 1)
    monkeypatch.setattr("regauge.engine.drafting.NEW", 12)
    out = tmp_path / "out"
    line = ["fit", str(source), "-o", str(out), "--members", "--budget", "memory=0.6x", "--calibration", str(text)]
    assert main([*line, "--tokens", "1024", "--length", "64", "--drafts", "any", "-q"]) == 0
    said = capsys.readouterr().out
    assert "m0.60x" in said
    assert "members measured on the search text" in said
    assert "drafts for the whole: " in said
    ways = Chosen.model_validate_json((out / FILE).read_text()).drafts
    assert ways is not None
    assert {"lookup", "depth=3"} <= {way.drafts for way in ways.ways}
    assert strangers(out) == []  # so that --force replaces it
    assert "member m0.60x: " in (out / "regauge" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_speed_is_predicted_by_shape_and_then_measured(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products cost what they have weights, and as they run a member is as fast as predicted less a tenth."""
    monkeypatch.setattr(timing, "seconds", lambda shape, *_: shape[0] * shape[1] * 1e-6)
    monkeypatch.setattr(timing, "read_costs", lambda _: {})
    monkeypatch.setattr(timing, "write_costs", lambda *_: None)
    monkeypatch.setattr(timing, "speeds", lambda runs, *_: {name: _rate(one) for name, one in runs.items()})
    wanted = Wanted(["decode=1.5x"], text, methods="none", tokens=1024, length=64, first=SMALL, further=SMALL)
    chosen = fit_members(source, tmp_path / "out", wanted)
    assert [one.name for one in chosen.members] == ["full", "d1.50x"]
    assert chosen.members[0].speeds["decode"] == pytest.approx(0.9)  # by the toy's rate: weights, and a tenth more
    assert chosen.members[1].speeds["decode"] >= 1.5
    assert not any("missed" in note for note in chosen.notes)


def _rate(model: Any) -> Speed:
    """What a model would run at were every weight of a block a microsecond; what is no source takes a tenth more."""
    weights = sum(p.numel() for layer in model.model.layers for p in layer.parameters() if p.ndim == 2)
    for layer in model.model.layers:  # of stacks what one token's experts have
        stacks = [p.numel() / p.shape[0] for p in layer.parameters() if p.ndim == 3]
        weights += sum(stacks) * layer.mlp.gate.top_k if stacks else 0
    weights += model.get_input_embeddings().weight.numel()
    rate = 1e6 / weights * (0.9 if hasattr(model, "regauge_anatomy") or hasattr(model, "regauge") else 1.0)
    return Speed(median=rate, low=rate, high=rate, rounds=1)
