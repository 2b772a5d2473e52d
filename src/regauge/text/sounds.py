"""What a model of sound reads while it is calibrated: windows of samples, cut from recordings.

Legend: N windows, S samples in each.
"""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from regauge.errors import TextError
from regauge.text import arrays
from regauge.text.arrays import named
from regauge.text.calibration import Calibration

WANTED = "a .wav file of 16-bit samples, a folder of them, or an .npz with an array 'x' (N, S) of float32 is needed"
FULL = 32768.0
"""The largest size of a 16-bit sample."""


def sounds(path: Path, count: int, samples: int, rate: int, stride: int) -> Calibration:
    """Windows of recordings, in order, each of mean 0 and variance 1 as feature extractors of such models make them.

    Args:
        path: a .wav file (several channels are averaged), a folder of them, or an .npz with `x` (N, S), float32.
        count: windows at most; samples: in each; rate: samples a second that the model reads.
        stride: samples between two frames, which is what a token costs.

    Raises:
        TextError: there is no such file, it holds something else, another rate, or less than one window.
    """
    found = _array(path, samples) if named(path) else _recordings(path, count, samples, rate)
    if not len(found):
        raise TextError(f"{path} holds less than one window of {samples:,} samples ({samples / rate:.1f} s of sound).")
    x_NS = found[:count]
    if not bool(x_NS.isfinite().all()):
        raise TextError(f"{path} holds samples that are not finite.")
    x_NS = (x_NS - x_NS.mean(1, keepdim=True)) / x_NS.var(1, keepdim=True, correction=0).add(1e-7).sqrt()
    return Calibration(x_NS, f"{path.name} ({len(x_NS)} windows of sound)", kind="sound", each=samples // stride)


def _array(path: Path, samples: int) -> Tensor:
    x_NS = arrays.array(path, ["x"], f"sound: {WANTED.removesuffix(' is needed')}")
    if x_NS.dtype != np.float32 or x_NS.ndim != 2:
        raise TextError(f"{path}: 'x' has shape {x_NS.shape} and dtype {x_NS.dtype}; {WANTED}.")
    return torch.from_numpy(x_NS[:, : x_NS.shape[1] // samples * samples].reshape(-1, samples))


def _recordings(path: Path, count: int, samples: int, rate: int) -> Tensor:
    files = sorted(path.rglob("*.wav")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise TextError(f"{path} holds no sound: {WANTED}.")
    windows: list[Tensor] = []
    for file in files:
        windows += torch.split(_recording(file, rate), samples)
        windows = [window for window in windows if len(window) == samples]
        if len(windows) >= count:
            break
    return torch.stack(windows) if windows else torch.empty((0, samples), dtype=torch.float32, device="cpu")


def _recording(file: Path, rate: int) -> Tensor:
    try:
        with wave.open(str(file), "rb") as sound:
            width, channels, own = sound.getsampwidth(), sound.getnchannels(), sound.getframerate()
            data = sound.readframes(sound.getnframes()) if width == 2 else b""
    except (OSError, EOFError, wave.Error) as error:
        raise TextError(f"{file} is no recording that can be read ({error}): {WANTED}.") from error
    if width != 2:
        raise TextError(f"{file} has samples of {8 * width} bits: {WANTED}.")
    if own != rate:
        raise TextError(f"{file} has {own:,} samples a second, and the model reads {rate:,}: resample it first.")
    whole = np.frombuffer(data, dtype="<i2", count=len(data) // (2 * channels) * channels).astype(np.float32)
    return torch.from_numpy(whole.reshape(-1, channels).mean(1) / FULL)
