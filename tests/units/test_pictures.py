"""`regauge sample`: a grid of what a model of images draws, in a file that every viewer reads."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import regauge as rg
from pico import pico, save
from regauge.cli.app import app
from regauge.errors import ModelError, SettingError
from regauge.report.drawing import grid, png
from regauge.report.pictures import numbers
from toy_var import saved


def pixels_of(data: bytes) -> torch.Tensor:
    """(H, W, C) of a PNG without filters, read by hand."""
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    assert depth == 8
    channels = {0: 1, 2: 3}[kind]
    start = data.index(b"IDAT")
    size = struct.unpack(">I", data[start - 4 : start])[0]
    stop = start + 4 + size
    assert struct.unpack(">I", data[stop : stop + 4])[0] == zlib.crc32(data[start:stop])
    raw = torch.frombuffer(bytearray(zlib.decompress(data[start + 4 : stop])), dtype=torch.uint8)
    rows = raw.view(height, 1 + width * channels)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, channels)


def test_a_grid_by_hand() -> None:
    images = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 1, 56, 56)
    found = grid(images, 2)
    assert found.shape == (2 * 58 + 2, 2 * 58 + 2, 1)
    assert found[2, 2, 0] == 0
    assert found[2, 60, 0] == 128
    assert found[60, 2, 0] == 255
    assert (found[60:, 60:] == 255).all()
    assert grid(images[..., :7, :7], 3).shape == (58 + 2, 3 * 58 + 2, 1)  # small images are shown larger


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_what_was_drawn(channels: int) -> None:
    pixels = torch.randint(256, (5, 7, channels), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(pixels_of(png(pixels)), pixels)
    with pytest.raises(SettingError, match="4 channels"):
        png(torch.zeros(1, 1, 4, dtype=torch.uint8))


def test_an_artifact_draws_beneath_its_original_and_its_report_shows_it(tmp_path: Path) -> None:
    model, out = saved(tmp_path / "model"), tmp_path / "out"
    rg.apply("rtn-w8", model, out)
    assert "<img" not in rg.report(out).read_text(encoding="utf-8")
    path = rg.sample(out, against=model, labels=[3, 0], rows=1, seed=5)
    assert path == out / "regauge" / "samples.png"
    found = pixels_of(path.read_bytes())
    own = rg.load(model).sample([3, 0], 5).images
    assert torch.equal(found[:56], grid(own, 2)[:56])
    assert found.shape[0] == 2 * 56 + 2
    assert "data:image/png;base64," in rg.report(out).read_text(encoding="utf-8")
    path.write_bytes(b"<svg>")  # whatever lies there that is no picture
    assert "<img" not in rg.report(out).read_text(encoding="utf-8")


def test_the_command_draws_a_file(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    run: Any = CliRunner().invoke(
        app,
        f"sample {model} -o {tmp_path / 'a.png'} --labels 1,2 --guidance 0 --subnet full --subnet depth=3 "
        "--subnet depth=0/4",
    )
    assert run.exit_code == 0, run.output
    assert pixels_of((tmp_path / "a.png").read_bytes()).shape == (2 * (54 + 2) + 2, 2 * (54 + 2) + 2, 1)


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    with pytest.raises(SettingError, match="no artifact, so say where"):
        rg.sample(model)
    with pytest.raises(SettingError, match="2000 rows of 4 images"):
        rg.sample(model, tmp_path / "a.png", rows=2000)
    with pytest.raises(SettingError, match="names 2 scales"):
        rg.sample(model, tmp_path / "a.png", subnet=("full", "depth=2"))
    with pytest.raises(SettingError, match="'x' is no class"):
        numbers("1,x")
    with pytest.raises(ModelError, match="LlamaForCausalLM, which draws no images"):
        rg.sample(save(pico("llama"), tmp_path / "llama"), tmp_path / "a.png")
