"""How much calibration text is read: the bounds by hand, where it stops, and what the receipt says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from regauge.artifact.receipt import Receipt
from regauge.engine import apply, enough
from regauge.parts import WEIGHTS
from regauge.plan import parse
from tests import tiny

PLAN = {
    "name": "p",
    "calibration": {"tokens": 2048, "length": 32},
    "rules": {"blocks.*": {"grid": "int3", "grain": "channel", "ranger": "absmax", "scale": "f32", "rounder": "gptq"}},
}


@pytest.mark.parametrize(
    ("parameters", "recipe", "wanted"),
    [
        (8e6, 262144, 262144),
        (135e6, 262144, 262144),  # 3.6e13 / 135e6 = 266,667
        (400e6, 262144, 65536),  # 90,000: the power of two below
        (1.1e9, 262144, 32768),
        (8e9, 262144, 32768),  # 4,500 would be too few
        (8e9, 8192, 8192),  # never more than the recipe says
    ],
)
def test_large_models_read_fewer_tokens_by_hand(parameters: float, recipe: int, wanted: int) -> None:
    assert enough.bound(int(parameters), recipe) == wanted


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model"))


def run(model: Path, where: Path, monkeypatch: pytest.MonkeyPatch, gain: float, **reads: Any) -> Receipt:
    monkeypatch.setattr(enough, "LEAST", 256)
    monkeypatch.setattr(enough, "GAIN", gain)
    return apply(parse(PLAN), model, where / "out", calibration=tiny.text(where, 40000), **reads)


def test_it_stops_where_a_doubling_gains_too_little(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(model, tmp_path, monkeypatch, gain=1.0).calibration
    assert found["shape"] == [8, 32]  # the first try of 256 tokens, for nothing gains all of the error
    assert found["enough"] == {"tokens": 256, "offered": 2048, "gains": found["enough"]["gains"]}  # type: ignore[index]
    assert len(found["enough"]["gains"]) == 1


def test_it_reads_all_where_every_doubling_gains(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(model, tmp_path, monkeypatch, gain=-100.0).calibration
    assert found["shape"] == [64, 32]
    assert len(found["enough"]["gains"]) == 2  # type: ignore[index]  # 512 and 1,024; the last 256 are kept aside


def test_a_number_that_the_user_gives_is_taken_as_it_is(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(model, tmp_path, monkeypatch, gain=1.0, tokens=1024).calibration
    assert found["shape"] == [32, 32]
    assert "enough" not in found


def test_more_text_loses_less_on_text_kept_aside() -> None:
    """64 inputs of rank about 16: 32 rows of text leave most of XᵀX unknown, 2,048 know it."""
    generator = torch.Generator().manual_seed(0)
    mix_II = torch.randn(64, 64, generator=generator) * torch.logspace(0, -2, 64)[:, None]
    x_TI = torch.randn(6144, 64, generator=generator) @ mix_II
    point = parse(PLAN).of(WEIGHTS)[0].point
    assert point is not None
    w_RI = torch.randn(32, 64, generator=generator)

    def loss(tokens: int) -> float:
        seen, aside = ({"hessian": rows.T @ rows / len(rows)} for rows in (x_TI[:tokens], x_TI[4096:]))
        return enough.Tried(w_RI, point, seen, aside).loss()

    assert loss(32) > 1.5 * loss(2048)
    assert loss(2048) == pytest.approx(loss(4096), rel=0.05)
