"""Sound for calibration: recordings cut into windows, and a model of sound calibrated by them."""

from __future__ import annotations

import re
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

import regauge as rg
from regauge.errors import TextError
from regauge.text.sounds import sounds
from tests.architectures import build, inputs


def record(path: Path, samples: np.ndarray, rate: int = 16_000, width: int = 2) -> Path:
    """Writes a .wav file of (S,) or (S, channels) samples."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(300.0, 9000.0, count).clip(-32000, 32000)


def test_windows_are_cut_in_order_and_normalised(tmp_path: Path) -> None:
    x = noise(25)
    record(tmp_path / "a.wav", x)
    record(tmp_path / "b.wav", np.stack([x, x], 1))
    found = sounds(tmp_path, 9, 10, 16_000, 5)
    assert found.inputs.shape == (4, 10)
    assert found.tokens == 8
    assert [len(part) for part in found.batches(5)] == [2, 2]
    first = x.astype("<i2")[:10].astype(np.float64)
    assert torch.allclose(found.inputs[0], torch.from_numpy((first - first.mean()) / first.std()).float(), atol=1e-4)
    assert torch.equal(found.inputs[:2], found.inputs[2:]), "channels are averaged"
    assert sounds(tmp_path, 1, 10, 16_000, 5).inputs.shape == (1, 10)


def test_an_array_is_cut_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=noise(46).astype(np.float32).reshape(2, 23))
    assert sounds(tmp_path / "x.npz", 9, 10, 16_000, 5).inputs.shape == (4, 10)


def test_what_is_no_sound_costs_a_sentence(tmp_path: Path) -> None:
    def refused(name: str, why: str) -> None:
        with pytest.raises(TextError, match=re.escape(why)):
            sounds(tmp_path / name, 9, 10, 16_000, 5)

    record(tmp_path / "slow.wav", noise(40), rate=8_000)
    record(tmp_path / "wide.wav", noise(40), width=1)
    record(tmp_path / "short.wav", noise(9))
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "none").mkdir()
    np.savez(tmp_path / "y.npz", y=np.zeros(3))
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 20), dtype=np.int16))
    np.savez(tmp_path / "nan.npz", x=np.full((3, 20), np.nan, dtype=np.float32))
    refused("slow.wav", "has 8,000 samples a second, and the model reads 16,000: resample it first")
    refused("wide.wav", "has samples of 8 bits")
    refused("short.wav", "holds less than one window of 10 samples")
    refused("text.wav", "is no recording that can be read")
    refused("empty.wav", "is no recording that can be read")
    refused("none", "holds no sound")
    refused("missing", "holds no sound")
    refused("y.npz", "holds no sound")
    refused("x.npz", "'x' has shape (3, 20) and dtype int16")
    refused("nan.npz", "not finite")


def test_a_model_of_sound_is_calibrated_by_it(tmp_path: Path) -> None:
    model = build("hubert")
    model.save_pretrained(tmp_path / "model")
    record(tmp_path / "a.wav", noise(40_000))
    with pytest.raises(TextError, match=r"hubert reads sound; give --calibration a folder of \.wav files"):
        rg.apply("gptq-w4g32", tmp_path / "model", out=tmp_path / "none")
    rg.apply("gptq-w4g32", tmp_path / "model", out=tmp_path / "gptq", calibration=tmp_path / "a.wav", tokens=2048)
    rg.apply("rtn-w4g32", tmp_path / "model", out=tmp_path / "rtn")
    given = inputs(model)
    with torch.no_grad():
        wanted = model(**given).logits
        errors = [float((rg.load(tmp_path / out)(**given).logits - wanted).norm()) for out in ("gptq", "rtn")]
    assert errors[0] < errors[1]
