"""`measure` knows no model library: it takes subjects, and tells a speed-up in its parts."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from regauge.artifact.files import weight_bytes
from regauge.cli import tell
from regauge.engine import apply, measure
from regauge.errors import ModelError
from regauge.measure import compare as module
from regauge.measure.compare import Method, side_by_side
from regauge.measure.cost import ORIGINAL, RUNTIME, Costs, Speed, gain, gains
from regauge.measure.subject import Facts, Subject
from regauge.text.windows import Windows
from tests import tiny

TEXT = Windows(tuple(torch.tensor([i % 7, 1, 2, 3]) for i in range(4)), (0, 1, 2, 3), (3,) * 4, "by hand")


class Toy:
    """A causal model of seven tokens that takes so many milliseconds a call."""

    def __init__(self, sharpness: float, ms: float) -> None:
        self.sharpness, self.ms = sharpness, ms

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        time.sleep(self.ms / 1000)
        logits = self.sharpness * torch.nn.functional.one_hot(input_ids, 7).float()
        layer = SimpleNamespace(keys=torch.zeros(input_ids.shape[1], 2))
        return SimpleNamespace(logits=logits, past_key_values=SimpleNamespace(layers=[layer]))


def subject(name: str, sharpness: float, ms: float, own: float | None = None) -> Subject:
    def ways(_: torch.dtype) -> dict[str, Toy]:
        found = {RUNTIME: Toy(sharpness, ms)}
        return found if own is None else {**found, ORIGINAL: Toy(sharpness, own)}

    return Subject(name, f"nowhere/{name}", lambda _: Toy(sharpness, 0), ways, lambda _: Facts(True, 7, 32))


def a_speed(median: float, half: float = 1.0) -> Speed:
    return Speed(median=median, low=median - half, high=median + half, rounds=3)


def test_a_gain_by_hand() -> None:
    found = gain(a_speed(60), a_speed(30), a_speed(10))
    assert found is not None
    assert (found.compression, found.runtime, found.both) == ("2.00x", "3.00x", "6.00x")
    slower = gain(a_speed(20), a_speed(30), a_speed(29))
    assert slower is not None
    assert (slower.compression, slower.runtime, slower.both) == ("0.67x, slower", "no faster", "0.69x, slower")
    assert gain(None, a_speed(1), a_speed(1)) is None
    alone = gain(a_speed(60), a_speed(30), None)
    assert alone is not None
    assert (alone.compression, alone.runtime, alone.both) == ("2.00x", None, None)
    assert gains({"original": Costs(), "compressed": Costs(decode=a_speed(1))}) == {}


def test_models_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "memory", lambda *_: None)
    monkeypatch.setattr(module, "bandwidth", lambda: 1e9)
    said: list[tuple[str, str]] = []
    found = side_by_side(
        [subject("original", 3.0, 4.0, own=16.0), subject("small", 2.0, 1.0)],
        lambda facts: TEXT,
        Method(rounds=3, say=lambda *told: said.append(told)),
    )
    first, second = found.rows
    assert first.quality is not None
    assert second.quality is not None
    assert (first.quality.kl.value, second.quality.kl.value > 0.01) == (0.0, True)
    assert (first.decode, first.prefill) == (None, None)
    assert second.decode is not None
    ratios = [float(str(part).rstrip("x")) for part in (second.decode.compression, second.decode.runtime)]
    assert 2 < ratios[0] < 5
    assert 2 < ratios[1] < 5
    assert found.original is not None
    assert found.original.decode is not None
    assert first.costs.decode is not None
    assert found.original.decode.median < first.costs.decode.median / 2
    assert first.costs.cache_bytes == second.costs.cache_bytes == 8.0
    assert said == [("open", ""), ("measure", "quality"), ("measure", "speed"), ("measure", "memory")]


def test_an_artifact_first_has_no_library_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "memory", lambda *_: None)
    monkeypatch.setattr(module, "bandwidth", lambda: 1e9)
    found = side_by_side([subject("a", 3.0, 2.0), subject("b", 3.0, 0.5)], lambda _: TEXT, Method(rounds=2))
    assert found.original is None
    assert found.rows[1].decode is not None
    assert found.rows[1].decode.runtime is None


def test_paths_are_opened_by_their_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From two directories to one comparison: the source runs in two ways, the artifact in one."""
    monkeypatch.setattr(module, "memory", lambda *_: None)
    monkeypatch.setattr(module, "bandwidth", lambda: 1e9)
    source = tiny.folder(tmp_path / "source", "llama")
    apply("rtn-w4g32", source, tmp_path / "made")
    found = measure([source, tmp_path / "made"], eval=[tiny.TEXT * 3] * 6, rounds=2)
    assert [row.name for row in found.rows] == ["source", "made"]
    first, second = found.rows
    assert first.quality is not None
    assert second.quality is not None
    assert (first.quality.kl.value, second.quality.kl.value > 0) == (0.0, True)
    assert found.original is not None
    assert second.prefill is not None
    assert second.prefill.runtime is not None
    assert first.costs.bytes == weight_bytes(source)
    assert found.notes == ()
    tell.measurement(found)
    told = capsys.readouterr().out
    for said in ("source, by transformers", "against source", "compression", "made, decode", "made, prefill"):
        assert said in told
    with pytest.raises(ModelError, match="nothing to measure: name a model"):
        measure([])
