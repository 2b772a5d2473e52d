"""Large matrices a strip at a time, moved or rounded: the same bytes as all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regauge import parts
from regauge.engine import apply, strips
from regauge.parts import WEIGHTS, Point, Spec
from regauge.rounding import pieces
from tests import tiny


def a_point(grain: str, rounder: str) -> Point:
    named = {"grid": "int4-asym", "ranger": "minmax", "scale": "bf16", "rounder": rounder}
    specs = {axis: Spec(name) for axis, name in named.items()}
    return Point.of(WEIGHTS, specs | {"grain": parts.read("grain", grain, WEIGHTS)})


@pytest.mark.parametrize("tied", [False, True])
def test_a_rotated_model_has_the_same_bytes_moved_by_strips(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = tiny.folder(tmp_path / "m", tie_word_embeddings=tied), tiny.text(tmp_path)
    apply("quarot-gptq-w4g32", model, tmp_path / "whole", calibration=text)
    asked: list[int] = []
    real = strips.algebra.apply
    monkeypatch.setattr(strips, "STRIP", 1 << 10)
    monkeypatch.setattr(
        strips.algebra,
        "apply",
        lambda *given, **named: (asked.extend([1] * ("embed.weight" in given[2])), real(*given, **named))[1],
    )
    apply("quarot-gptq-w4g32", model, tmp_path / "strips", calibration=text)
    assert len(asked) > 4  # strips of the table
    files = sorted((tmp_path / "whole").glob("*.safetensors"))
    assert len(files) > 0
    for path in files:
        assert (tmp_path / "strips" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("rounder", ["nearest", "gptq"])
@pytest.mark.parametrize("grain", ["group:32", "channel"])
def test_pieces_of_a_matrix_have_the_codes_of_the_whole(
    grain: str, rounder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    w_OI, x_TI = torch.randn(70, 64, generator=generator), torch.randn(300, 64, generator=generator)
    stats = {"hessian": x_TI.T @ x_TI / 300}
    point = a_point(grain, rounder)
    fmt, run = parts.format_of(point), parts.rounder_of(point)
    whole = run(w_OI, fmt, stats)
    sizes: list[int] = []
    monkeypatch.setattr(pieces, "PIECE", 64 * 16)
    monkeypatch.setattr(pieces, "ROWS", 16)
    found = pieces.piecewise(lambda w, *given: (sizes.append(len(w)), run(w, *given))[1], w_OI, fmt, stats)
    assert sizes == [16, 16, 16, 16, 6]
    assert torch.equal(found.codes_OI, whole.codes_OI)
    assert torch.equal(fmt.decode(found), fmt.decode(whole))
    some = torch.tensor([3, 69, 3])
    assert torch.equal(fmt.decode(pieces.of_rows(found, some)), fmt.decode(whole)[some])


def test_what_rows_share_keeps_a_matrix_whole() -> None:
    shared = parts.format_of(a_point("tensor", "nearest"))
    assert not pieces.alone(shared, (8, 64))
    assert pieces.pieces(shared, (1 << 20, 64)) == [slice(0, 1 << 20)]
