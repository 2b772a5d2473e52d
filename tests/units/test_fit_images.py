"""`fit` on models of images: budgets of memory, members, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import regauge as rg
from regauge.artifact.folder import read_receipt
from regauge.cli import chosen, tell
from regauge.errors import BudgetError, ModelError, SettingError, TextError
from regauge.hosts.transformers.host import HOST
from regauge.measure.subject import Facts
from regauge.report.build import write
from regauge.search import pictures
from regauge.search.evolution import Effort as Few
from regauge.search.fit import fit, pick
from regauge.search.losses.fisher import Visit
from regauge.search.members.fit import fit_members
from regauge.search.members.wanted import Wanted
from regauge.search.pictures import pictures as gathered
from regauge.search.sense import sensitivity
from regauge.text.split import Sizes
from tests import tiny, toy_resnet, toy_var
from tests.units.test_measure_images import grey

WIDE = {"layer_neurons": (24,) * 4, "layer_widths": (24,) * 4, "stem_width": 24, "hidden_size": 24}
FEW = Few(evaluations=3, first=2, rounds=1)


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "LEAST", 8)
    monkeypatch.setattr(pictures, "memory", lambda *_: None)


def drawing(where: Path, count: int = 60) -> Path:
    """An .npz of one part, not sorted into those to train on and to test on."""
    with np.load(grey(where / "both.npz", count)) as held:
        np.savez(where / "x.npz", x=held["x_test"], y=held["y_test"])
    return where / "x.npz"


def facts_of(source: Path) -> Facts:
    return HOST.facts(source)


def test_the_parts_of_one_file_share_no_image(tmp_path: Path) -> None:
    """Each image is of one grey, so that it is known by it; calibration is what `apply` reads of the same file."""
    source = toy_resnet.saved(tmp_path / "m")
    x = np.broadcast_to(np.arange(100, dtype=np.uint8)[:, None, None, None], (100, 8, 8, 3))
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(100) % 3)
    found = gathered(HOST.open(source), facts_of(source), tmp_path / "x.npz", None, Sizes(20, 10, 99))

    def seen(some: Any) -> set[int]:
        pixels = torch.cat([one["pixel_values"] for one in some.arguments])[:, 0, 0, 0]
        return {round(float(value)) for value in (pixels * 0.5 + 0.5) * 255}

    parts = [seen(some) for some in (found.read, found.search, found.evaluation)]
    assert [len(part) for part in parts] == [20, 10, 70]
    assert set.union(*parts) == set(range(100))
    assert parts[0] == set(range(0, 100, 5))
    assert found.given == {"calibration": tmp_path / "x.npz", "tokens": 20}
    assert [record.role for record in found.records] == ["calibration", "search", "evaluation"]
    assert "one file of images was given: it was split; none serves twice" in found.notes


def test_a_file_beside_it_is_read_for_the_figures_alone(tmp_path: Path) -> None:
    source = toy_resnet.saved(tmp_path / "m")
    first = toy_resnet.images(tmp_path / "x.npz", 60)
    other = toy_resnet.images(tmp_path / "t.npz", 33, seed=8)
    found = gathered(HOST.open(source), facts_of(source), first, other, Sizes(24, 12, 99))
    assert (found.read.images, found.search.images, found.evaluation.images) == (24, 12, 33)
    with pytest.raises(TextError, match=r"has 12 images, too few to keep calibration, search and evaluation apart"):
        gathered(HOST.open(source), facts_of(source), toy_resnet.images(tmp_path / "s.npz", 12), None, Sizes(9, 9, 9))


@pytest.mark.slow
def test_a_classifier_within_a_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, source, data = toy_resnet.toy(**WIDE), tmp_path / "m", toy_resnet.images(tmp_path / "x.npz", 90)
    with torch.no_grad():
        model.classifier.weight.mul_(0.1)  # so that no class is certain
    model.save_pretrained(source)
    out = tmp_path / "out"
    run = fit(source, out, ["memory=0.4x"], calibration=data)
    assert run.kind == "classes"
    assert run.verdicts[0].met
    assert run.quality is not None
    assert run.quality.right is not None
    assert run.check is not None
    assert run.check.rank > 0.6
    assert run.costs["compressed"].decode is not None
    page = write(out).read_text(encoding="utf-8")
    tell.run(run, out, read_receipt(out))
    said = capsys.readouterr().out
    for text in ("images/s, one at a time", "same class", "nats an image", "right"):
        assert text in said
        assert text in page
    assert "perplexity" not in said
    assert "bits a byte" not in said
    assert pick(out, 0, tmp_path / "least").bytes_after < read_receipt(out).bytes_after
    dry = fit(source, tmp_path / "dry", ["memory=0.4x"], calibration=data, dry_run=True)
    assert "images" in dry.notes[1]


@pytest.mark.slow
def test_var_within_a_budget(tmp_path: Path) -> None:
    sizes = {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 64}
    source = toy_var.saved(tmp_path / "m", **sizes)
    run = fit(source, tmp_path / "out", ["memory=0.7x"], calibration=drawing(tmp_path))
    assert run.kind == "scales"
    assert run.verdicts[0].met
    assert {site.name for site in run.sites} >= {"blocks.0.attn.q", "head"}
    assert not any(site.name.startswith("embed") for site in run.sites)


def test_what_places_do_to_one_class_is_summed_before_it_is_squared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images of two places each: +1 and −1 cancel, +1 and +1 make 2."""
    from types import SimpleNamespace

    rows = {"s": SimpleNamespace(pulls=lambda x, g: {"o": torch.tensor([1.0, -1.0, 1.0, 1.0])})}
    group = SimpleNamespace(sites=[SimpleNamespace(name="s", tap="t")])
    given: Any = {"t": [torch.zeros(4, 1)]}, {"s": [torch.zeros(4, 1)]}
    for inputs, loss in ((0, 0.5), (2, 1.0)):
        visit = object.__new__(Visit)
        object.__setattr__(visit, "inputs", inputs)
        assert Visit._scores.__wrapped__(visit, group, rows, *given) == {"o": loss}  # type: ignore[attr-defined]


@pytest.mark.parametrize("budget", ["decode=1.5x", "prefill=1.2x", "memory@32k=2GB"])
def test_budgets_of_text_are_refused_with_what_can_be_asked(budget: str, tmp_path: Path) -> None:
    source, data = toy_resnet.saved(tmp_path / "m"), toy_resnet.images(tmp_path / "x.npz")
    with pytest.raises(BudgetError, match=r"m is a model of images.*what can be asked is memory=0\.25x"):
        fit(source, tmp_path / "out", [budget], calibration=data)
    with pytest.raises(BudgetError, match=r"m is a model of images|for their own memory"):
        fit_members(source, tmp_path / "out", Wanted((budget,), calibration=data))
    assert not (tmp_path / "out").exists()


def test_what_else_is_refused_before_any_work(tmp_path: Path) -> None:
    source, data = toy_resnet.saved(tmp_path / "m"), toy_resnet.images(tmp_path / "x.npz")
    out, text = tmp_path / "out", tiny.text(tmp_path)
    with pytest.raises(SettingError, match="--time and --length are for searches of models of text"):
        fit(source, out, [], calibration=data, time_limit=60, length=64)
    for given in (None, text):
        with pytest.raises(TextError, match=r"m is a model of images.*give --calibration an \.npz"):
            fit(source, out, [], calibration=given)
    with pytest.raises(TextError, match=r"m is a model of images.*give --eval an \.npz"):
        fit(source, out, [], calibration=data, eval=text)
    with pytest.raises(TextError, match=r"x\.npz holds arrays, such as images, and .* reads text"):
        fit(tiny.folder(tmp_path / "llama", "llama"), out, [], calibration=data)
    with pytest.raises(ModelError, match="m is a model of images"):
        sensitivity(source)
    assert not out.exists()


def test_members_of_a_classifier_have_statistics_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, data = toy_resnet.saved(tmp_path / "m"), toy_resnet.images(tmp_path / "x.npz", 60)
    budgets = ("memory=1.8x", "memory=1.2x")
    wanted = Wanted(budgets, calibration=data, methods=("none",), first=FEW, further=FEW)
    found = fit_members(source, tmp_path / "out", wanted)
    assert [one.name for one in found.members] == ["full", "m1.80x", "m1.20x"]
    assert all(one.ratio <= float(one.name[1:-1]) for one in found.members[1:])
    assert all(one.quality.kind == "classes" for one in found.members)
    model = rg.load(tmp_path / "out", dtype=torch.float32)
    assert set(model.regauge.learnt.statistics) == {one.subnet for one in found.members[1:]}
    chosen.members(found, tmp_path / "out")
    assert "±" in capsys.readouterr().out
    assert "right" in str(found)


@pytest.mark.slow
def test_members_of_a_model_that_draws(tmp_path: Path) -> None:
    wanted = Wanted(("memory=1.7x",), calibration=drawing(tmp_path), methods=("none",), first=FEW, further=FEW)
    found = fit_members(toy_var.saved(tmp_path / "m"), tmp_path / "out", wanted)
    assert found.members[1].ratio <= 1.7
    assert found.members[1].quality.nats is not None
