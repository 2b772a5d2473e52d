"""Rows of caches against their nulls at equal bytes, on trained models and real text. All of it takes minutes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
sys.path[:0] = [str(ROOT / "benchmarks")]

pytestmark = pytest.mark.slow
NOVEL = SHARED / "models" / "novel-llama-8m"


@pytest.fixture(scope="module")
def scored() -> Any:
    """Row → mean KL of two windows of a novel, a quarter of the prompt kept, chosen behind the whole of it."""
    if not NOVEL.exists():
        pytest.skip("the model of novels is not here")
    import cache_quality as bench
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from regauge.hosts.transformers.attending import attend
    from regauge.hosts.transformers.table import anatomy_of

    model = AutoModelForCausalLM.from_pretrained(NOVEL, dtype=torch.float32).eval()
    text = (SHARED / "data" / "novels-heldout" / "Thackeray_Esmond_1852.txt").read_text(encoding="utf-8")
    found = AutoTokenizer.from_pretrained(NOVEL)(text[40000:60000])["input_ids"]
    ids_BT: Tensor = torch.tensor([found[:1024], found[1024:2048]])
    attend(model)
    rows = bench.plans(model, anatomy_of(model.config, model), 0.25, 32)
    with torch.no_grad():
        whole_BTV = model(ids_BT).logits

    def score(name: str) -> float:
        with torch.no_grad():
            return float(bench.measure(model, rows[name], ids_BT, whole_BTV, (896, 896)).mean())

    return score


def test_window_attention_beats_chance_and_the_newest(scored: Any) -> None:
    best = scored("snapkv")
    assert best < 0.5 * scored("random")
    assert best < 0.5 * scored("streaming")


def test_minicache_as_published_beats_dropping_every_second_layer(scored: Any) -> None:
    assert scored("minicache") < scored("every second dropped")


def test_kinds_of_heads_cost_no_more_than_an_even_budget(scored: Any) -> None:
    assert scored("not smoothed, by kind") < 1.1 * scored("snapkv, not smoothed")


def test_four_bits_cost_little(scored: Any) -> None:
    assert scored("kivi-4") < 0.01


@pytest.mark.parametrize("kind", ["scale", "bias"])
def test_outliers_in_channels_of_keys_pass_by_channel_and_fail_by_token(kind: str) -> None:
    """Both are exact moves: two channels of 32 times the size that queries take back, and a bias that is the same for
    all scores of a query."""
    import cache_quality as bench
    from transformers import AutoModelForCausalLM

    from regauge.hosts.transformers.attending import attend
    from regauge.hosts.transformers.table import anatomy_of

    where = ROOT / "bundled" / "code-llama-5m" if kind == "scale" else SHARED / "models" / "novel-neox-9m"
    if not where.exists():
        pytest.skip("the model of novels is not here")
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
    ids_BT = torch.randint(0, 500, (1, 320), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    with torch.no_grad():
        before_BTV = model(ids_BT).logits
        bench.plant(model, kind)
        whole_BTV = model(ids_BT).logits
        assert float(bench.divergence(before_BTV, whole_BTV).mean()) < 1e-6
        attend(model)
        rows = bench.plans(model, anatomy_of(model.config, model), 0.25, 32)
        by_channel, by_token = (
            float(bench.measure(model, rows[name], ids_BT, whole_BTV, (256, 256)).mean())
            for name in ("kivi-4", "kivi-4, keys by token")
        )
    assert by_channel < 0.01 < by_token
