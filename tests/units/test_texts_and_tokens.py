"""Texts that a model cannot read are refused in a sentence, by every command that reads one; none is cut in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import regauge as rg
from regauge.engine import measure
from regauge.errors import ModelError, RegaugeError, TextError
from regauge.hosts.transformers import sampling
from regauge.hosts.transformers.sampling import opening
from regauge.hosts.transformers.source import Source, read_tokenizer
from regauge.search.fit import fit
from regauge.search.sense import sensitivity
from regauge.search.subject import reader
from regauge.text.calibration import Calibration
from regauge.text.split import Sizes, prepare
from tests import tiny

ROWS = 150  # of a table too small for the tokenizer, whose space is 220


def attempt(call: Callable[[], Any], refusal: type[RegaugeError]) -> tuple[Any, str]:
    """What a call gives, or None and what its refusal says."""
    try:
        return call(), ""
    except refusal as error:
        return None, str(error)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.folder(tmp_path_factory.mktemp("small") / "model", "llama")
    tiny.save(tiny.pico("llama", vocab_size=ROWS, hidden_size=96, intermediate_size=70), folder)
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("good") / "model", "llama-tied")


READERS: dict[str, Callable[[Path, Path, Path], object]] = {
    "apply": lambda model, text, out: rg.apply("gptq-w4g32", model, out, calibration=text, tokens=256, length=32),
    "dry run": lambda model, text, out: rg.dry_run("gptq-w4g32", model, out, calibration=text).refusals,
    "fit": lambda model, text, out: fit(model, out, budgets=["memory=0.5x"], calibration=text),
    "fit, held out": lambda model, text, out: fit(model, out, budgets=["memory=0.5x"], eval=text),
    "inspect": lambda model, text, out: sensitivity(model, calibration=text),
    "measure": lambda model, text, out: measure([model], eval=text),
}


@pytest.mark.parametrize("command", READERS)
def test_ids_beyond_the_table_name_the_id_and_the_size(command: str, small: Path, tmp_path: Path) -> None:
    text = tiny.text(tmp_path, 12000)
    said = r"token 2\d\d \('.*'\), which the tokenizer has and the model has not: its table of embeddings has 150 rows"
    if command == "dry run":
        told = READERS[command](small, text, tmp_path / "out")
        assert isinstance(told, tuple)
        assert "which the tokenizer has and the model has not" in " ".join(told)
        return
    with pytest.raises(TextError, match=said):
        READERS[command](small, text, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [1, 30, 200, 700, 1500, 3000, 6000, 20000])
def test_a_short_text_serves_or_is_refused(size: int, good: Path) -> None:
    """What is left for calibration makes whole windows, joined from ends where no document holds one."""
    source = Source.open(good)
    given = reader(source, 0)
    texts = [(tiny.TEXT * (size // len(tiny.TEXT) + 1))[:size]]
    found, told = attempt(lambda: prepare(given, texts, None, Sizes(4096, 256, 256)), TextError)
    if found is None:
        assert any(word in told for word in ("longer text", "shorter --length"))
        assert size < 6000, "that is enough"
        return
    assert found.windows_NT.shape[1] == found.length
    assert found.tokens == found.windows_NT.numel()
    batches = found.batches(4096, 2048)
    assert sum(batch.numel() for batch in batches) == found.tokens
    assert len(batches) > 0


def test_the_windows_of_a_search_are_those_that_apply_reads(good: Path, tmp_path: Path) -> None:
    texts = prepare(reader(Source.open(good), 3), tiny.text(tmp_path, 20000), None, Sizes(2048, 256, 256), seed=3)
    receipt = rg.apply(
        "gptq-w4g32", good, tmp_path / "out",
        calibration=list(texts.calibration), tokens=texts.tokens, length=texts.length, seed=3,
    )  # fmt: skip
    assert receipt.calibration["text_sha256"] == texts.records[0].sha256
    assert receipt.calibration["sha256"] == Calibration(texts.windows_NT, "").sha256


TEMPLATES = {
    "{% for m in messages %}{{ m['content'] }}{% endfor %}": "writes nothing",
    "": "does not write them",
    "always the same": "does not write them",
    "{{ 1 / 0 }}": "cannot be run: ZeroDivisionError",
    "{{ raise_exception('no') }}": "cannot be run: TemplateError no",
    "{% for": "cannot be run: TemplateSyntaxError",
    "{{ messages[7]['content'] }}": "cannot be run: UndefinedError",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}": "cannot be run: RecursionError",
    "{% for i in range(10 ** 9) %}{% endfor %}": "cannot be run: OverflowError",
    "{{ ''.__class__.__mro__ }}": "cannot be run: SecurityError",
    "{{ 'word ' * 60 }}{{ messages[0]['content'] }}": "writes 300 tokens before them",
}


@pytest.mark.parametrize("template", [t for t in TEMPLATES if t])
def test_a_chat_template_that_opens_no_turn_is_passed_over_and_said(template: str) -> None:
    start, told = opening(tiny.tokenizer(template=template), 258, 0)
    assert start == [256]
    assert told.startswith("the start of a text (its chat template")
    assert TEMPLATES[template] in told


def test_an_opening_has_rows_in_the_table() -> None:
    """Neither the template's tokens nor BOS nor EOS may lie beyond it."""
    chat = tiny.tokenizer(template="<s> {{ messages[0]['content'] }}")
    assert opening(chat, 258, 0)[1] == "its chat template"
    start, told = opening(chat, 200, 0)
    assert max(start) < 200
    assert told.startswith("a random token (its chat template")
    assert "the model's table has 200 rows" in told


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "null"),
        ("tokenizer.json", '{"version": "1.0"}'),
        ("tokenizer.json", json.dumps({"model": {"type": "Martian"}})),
        ("tokenizer.json", ""),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "7"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", json.dumps({"tokenizer_class": "set_seed"})),
        ("tokenizer_config.json", json.dumps({"extra_special_tokens": 7})),
        ("tokenizer_config.json", json.dumps({"auto_map": {"AutoTokenizer": ["x.Y", None]}})),
        ("special_tokens_map.json", "[]"),
    ],
)
def test_a_tokenizer_that_cannot_be_read(name: str, content: str, good: Path, tmp_path: Path) -> None:
    """A sentence, or a tokenizer that still reads: never another library's error."""
    tiny.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((good / "config.json").read_bytes())
    (tmp_path / name).write_text(content, encoding="utf-8")
    found, told = attempt(lambda: read_tokenizer(tmp_path), ModelError)
    if found is None:
        assert told.startswith(f"the tokenizer in {tmp_path} cannot be read: ")
        assert "\n" not in told
        return
    assert name != "tokenizer.json"
    assert found.encode("a", add_special_tokens=False) == tiny.tokenizer().encode("a", add_special_tokens=False)


def test_a_small_model_is_sampled_from_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source.open(tiny.folder(tmp_path, dtype=torch.bfloat16))
    for most, dtype in ((source.parameters(), torch.float32), (source.parameters() - 1, torch.bfloat16)):
        monkeypatch.setattr(sampling, "SMALL", most)
        assert sampling.whole_model(source).dtype == dtype


def test_ids_that_are_known_pass(good: Path, tmp_path: Path) -> None:
    receipt = rg.apply("gptq-w4g32", good, tmp_path / "out", calibration=tiny.text(tmp_path), tokens=256, length=32)
    assert receipt.calibration["shape"] == [8, 32]
    assert torch.isfinite(torch.tensor([site.error or 0.0 for site in receipt.sites])).all()
