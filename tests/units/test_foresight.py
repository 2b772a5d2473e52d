"""What dry runs predict of quality: against what a run then gives, and a reason wherever nothing is predicted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import regauge as rg
from pico import pico, save
from regauge.cli import main
from regauge.engine import foresight
from regauge.engine.foresight import Foresight, Lost, nearest, told
from regauge.hosts.transformers.source import Source
from regauge.plan import load
from regauge.plan.resolution import resolve
from regauge.search import record
from regauge.search.fit import fit
from tests.tiny import folder

IDS = torch.randint(0, 200, (4, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int64, device="cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("foresight") / "model", "llama-tied", hidden_size=96, intermediate_size=128)


@pytest.mark.parametrize("embed", [None, "int4-g32"])
def test_rounding_to_nearest_is_what_its_artifact_costs(embed: str | None, model: Path, tmp_path: Path) -> None:
    rg.apply("rtn-w4g32", model, tmp_path / "out", embed=embed, quiet=True)
    source = Source.open(model)
    choices = resolve(load(tmp_path / "out"), source.anatomy).choices
    (lost,) = nearest(source, IDS, [{name: point for name, point in choices.items() if point is not None}])
    log_p, log_q = (
        torch.log_softmax(rg.load(path, dtype=torch.float32)(IDS).logits.detach().float(), -1)
        for path in (model, tmp_path / "out")
    )
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert lost.kl == pytest.approx(kl, rel=0.05)
    assert lost.changed == pytest.approx(float((log_p.argmax(-1) != log_q.argmax(-1)).float().mean()), abs=0.03)


def test_a_better_rounder_leaves_a_part() -> None:
    found = told(Lost(0.4, 0.2), 0.25, "here")
    assert (found.low, found.high) == pytest.approx((0.1 / foresight.OFF, 0.1 * foresight.OFF))
    assert found.stays == pytest.approx(90.0)  # a quarter of the KL changes half as many tokens
    assert str(found).startswith("predicted: KL 0.033 to 0.3 nats a token, about 90 of 100 next tokens stay; from here")
    assert str(Foresight.nothing("so")) == "quality is not predicted: so"


@pytest.mark.parametrize(
    ("preset", "why"),
    [
        ("rtn-w8a8", "what rounding activations costs hangs on their outliers"),
        ("neurons-75", "what taking units out costs is only seen by doing it"),
        ("omniquant-lwc-w4g64", "nothing is known of what a learnt range or a correction gains"),
    ],
)
def test_what_is_not_predicted_says_why(preset: str, why: str, model: Path) -> None:
    found = rg.dry_run(preset, model)
    assert found.quality == f"quality is not predicted: {why}"
    assert found.kl is None


def test_a_model_without_next_tokens_or_too_large_says_why(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = save(pico("bert"), tmp_path / "bert")
    assert rg.dry_run("rtn-w8", encoder).quality == "quality is not predicted: it predicts no next token"
    monkeypatch.setattr(foresight, "MOST", 1000)
    assert "does not run a model of" in rg.dry_run("rtn-w8", model).quality


def test_both_dry_runs_say_it_on_the_screen(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    for words in (["apply", "rtn-w4g32", str(model)], ["fit", str(model), "--budget", "memory=0.5x"]):
        assert main([*words, "-o", out, "--dry-run"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "predicted: KL " in said
        assert "of 100 next tokens stay; from " in said
    notes = fit(model, out, floor="kl=0.1", dry_run=True).notes
    assert notes[-1] == "quality is not predicted: a floor is kept by measurement"
    tight = float(fit(model, out, ["memory=0.35x"], dry_run=True).notes[-1].split()[2])
    assert tight > 1.5 * float(said.partition("predicted: KL ")[2].split()[0]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["rtn-w4g128", "nf4", "gptq-w4g32"])
@pytest.mark.parametrize("name", ["bundled", "novel-llama-8m"])
def test_a_prediction_holds_within_its_range(
    preset: str, name: str, bundled: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source, text = bundled, Path(torch.__file__).parent / "optim"
    if name != "bundled":
        shared: Path = request.getfixturevalue("shared")  # skips where it is absent
        source, text = shared / "models" / name, shared / "data" / "novels-heldout"
    told_ = rg.dry_run(preset, source)
    assert told_.kl is not None
    rg.apply(preset, source, tmp_path / "out", quiet=True)
    found = rg.api.measure(source, tmp_path / "out", eval=text, quiet=True).rows[1].quality
    assert found is not None
    assert told_.kl[0] <= found.kl.value <= told_.kl[1]


@pytest.mark.slow
def test_what_fit_finds_is_as_its_dry_run_says(bundled: Path, tmp_path: Path) -> None:
    low, high = fit(bundled, tmp_path / "out", ["memory=0.30x"], dry_run=True).notes[-1].split()[2:5:2]
    fit(bundled, tmp_path / "out", ["memory=0.30x"], time_limit=60)
    found = record.read(tmp_path / "out").quality
    assert found is not None
    assert float(low) <= found.kl.value <= float(high)
