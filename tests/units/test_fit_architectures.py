"""`fit` on current architectures with little effort, on a text; those that predict no next token are refused first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import regauge as rg
from regauge.errors import ModelError
from regauge.hosts.transformers.sampling import whole_model
from regauge.hosts.transformers.source import Source
from regauge.search.fit import fit
from regauge.search.loop import finish
from tests import architectures
from tests.tiny import TEXT, VOCABULARY, tokenizer
from tests.units.test_architectures import SHARING, shares
from tests.units.test_search_fit import WORDS, small

SEARCHED = [
    "gemma2", "gemma3_text", "gemma3", "granite", "olmo2", "qwen2_moe", "gpt_oss", "deepseek_v3", "falcon",
    "falcon-40b", "mamba", "jamba", "lfm2",
]  # fmt: skip


def folder(where: Path, name: str, **more: Any) -> Path:
    """One of the list in bfloat16, or with shared keys and values, its tokenizer beside it."""
    make = shares if name in SHARING else architectures.build
    make(name, dtype=torch.bfloat16, vocab_size=VOCABULARY, **more).save_pretrained(where)
    tokenizer().save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{TEXT}{WORDS[i % 10]} {i}.\n\n" for i in range(60)), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::regauge.errors.FallbackWarning")
@pytest.mark.parametrize("name", [*SEARCHED, *SHARING])
def test_fit_completes(name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    monkeypatch.setattr(finish, "costs", lambda *_: {})
    monkeypatch.setattr(finish, "_samples", lambda *_: ())
    found = fit(folder(tmp_path / "model", name), tmp_path / "out", budgets=["memory=0.9x"], calibration=text, seed=1)
    assert found.verdicts[0].met
    assert found.quality is not None
    assert found.quality.kl.value < 0.02
    loaded = rg.load(tmp_path / "out")
    assert loaded.generate(torch.tensor([[65, 66]]), max_new_tokens=2, do_sample=False).shape == (1, 4)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("roberta", "bart", "clip", "whisper")]


@pytest.mark.parametrize("name", ["bert", "t5", *SLOW])
def test_fit_refuses_what_predicts_no_next_token_before_all_else(name: str, tmp_path: Path) -> None:
    """Not by a budget that no such model could keep, nor for want of a tokenizer."""
    architectures.build(name).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"measures next-token KL, and \S+ predicts no next token; use apply with a"):
        fit(tmp_path / "model", tmp_path / "out", budgets=["memory=0.01x"], dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_narrow_experts_in_16_bits_run_though_torch_refuses_to_group_them(name: str, tmp_path: Path) -> None:
    """Rows of 52 numbers of 2 bytes begin at no multiple of 16; stock transformers fails with such a model."""
    where = folder(tmp_path / "model", name)
    ids = torch.tensor([[65, 66, 67, 68, 69]])
    eager = architectures.build(name, vocab_size=VOCABULARY).double()
    with torch.no_grad():
        wanted = eager(input_ids=ids).logits.float()
        for model in (rg.load(where), whole_model(Source.open(where))):
            found = model(input_ids=ids).logits.float()
            assert float((found - wanted).norm() / wanted.norm()) < 0.03


def test_wide_experts_are_left_to_the_grouped_product(tmp_path: Path) -> None:
    loaded = rg.load(folder(tmp_path / "model", "mixtral", intermediate_size=56))
    assert loaded.config._experts_implementation == "grouped_mm"
