"""`measure` knows no model library: it takes subjects, and tells a speed-up in its parts."""

from __future__ import annotations

import gc
import json
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from regauge.artifact.files import weight_bytes
from regauge.cli import tell
from regauge.engine import apply, measure, measuring
from regauge.errors import BudgetError, ModelError
from regauge.hosts.transformers import load, ways
from regauge.hosts.transformers.host import HOST
from regauge.measure import compare as module
from regauge.measure import images
from regauge.measure.compare import Method, side_by_side
from regauge.measure.cost import ORIGINAL, RUNTIME, Costs, Model, Speed, gain, gains
from regauge.measure.likeness import embeddings, read
from regauge.measure.subject import CLASSES, EMBEDDINGS, LABEL, LABELS, NEXT, Facts, Outputs, Subject, comparable
from regauge.text.windows import Windows
from tests import tiny
from tests.pico import pico, save

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

    def outputs(batches: Sequence[Mapping[str, torch.Tensor]], prompt: int | None = None) -> Outputs:
        return lambda: (Toy(sharpness, 0)(**batch).logits for batch in batches)

    return Subject(name, f"nowhere/{name}", lambda: Facts(NEXT, 7, 32), outputs, ways)


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
    monkeypatch.setattr(module, "bandwidth", lambda **_: 1e9)
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
    monkeypatch.setattr(module, "bandwidth", lambda **_: 1e9)
    found = side_by_side([subject("a", 3.0, 2.0), subject("b", 3.0, 0.5)], lambda _: TEXT, Method(rounds=2))
    assert found.original is None
    assert found.rows[1].decode is not None
    assert found.rows[1].decode.runtime is None


def test_paths_are_opened_by_their_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From two directories to one comparison: the source runs in two ways, the artifact in one."""
    monkeypatch.setattr(module, "memory", lambda *_: None)
    monkeypatch.setattr(module, "bandwidth", lambda **_: 1e9)
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


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Facts(NEXT, 8, 32), "a has a vocabulary of 7 tokens and b of 8: models are compared on the same tokens"),
        (Facts(EMBEDDINGS, 7, 32), "a gives next tokens and b gives embeddings"),
        (Facts("what a Thing makes of a text", 7, 32), "and b gives what a Thing makes of a text"),
        (
            Facts("regression of 1 outputs (Thing)", 7, 32),
            "next tokens, .* or embeddings, and b gives regress",
        ),
    ],
)
def test_models_that_are_not_compared_are_refused_before_any_is_read(other: Facts, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        comparable(["a", "b"], [Facts(NEXT, 7, 32), other])
    with pytest.raises(ModelError, match="a tells 3 labels apart and b 4"):
        comparable(["a", "b"], [Facts(LABEL, 7, 32, 3), Facts(LABEL, 7, 32, 4)])


KINDS = {
    "llama": ("LlamaForCausalLM", NEXT),
    "llama-headless": ("LlamaModel", EMBEDDINGS),
    "llama classifier": ("LlamaForSequenceClassification", LABEL),
    "qwen3 tagger": ("Qwen3ForTokenClassification", LABELS),
    "bert": ("BertModel", EMBEDDINGS),
    "bert-mlm": ("BertForMaskedLM", LABELS),
    "bert regression": ("BertForSequenceClassification", "regression of 1 outputs"),
    "bert questions": ("BertForQuestionAnswering", "what a BertForQuestionAnswering makes of a text"),
    "vit": ("ViTForImageClassification", CLASSES),
}


def a_model(name: str, where: Path) -> Path:
    """A checkpoint of a class that a family has beside its first, with a tokenizer."""
    family, architecture = name.split(" ")[0], KINDS[name][0]
    tiny.tokenizer().save_pretrained(where)
    more = {} if family == "vit" else {"vocab_size": tiny.VOCABULARY}
    model = pico(family, **more)
    if type(model).__name__ != architecture:
        config = model.config
        config.architectures, config.num_labels = [architecture], 1 if "regression" in name else 3
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, architecture)(config).eval()
    return save(model, where)


@pytest.mark.parametrize("name", KINDS)
def test_every_class_is_compared_or_refused_in_a_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "memory", lambda *_: None)
    monkeypatch.setattr(module, "bandwidth", lambda **_: 1e9)
    monkeypatch.setattr(module, "_speeds", lambda *_: ({"decode": {}, "prefill": {}}, {}, {}))
    source, gives = a_model(name, tmp_path / "source"), KINDS[name][1]
    text: Any = [tiny.TEXT * 3, tiny.TEXT, tiny.TEXT[:40]] * 2
    if gives == CLASSES:
        monkeypatch.setattr(images, "memory", lambda *_: None)
        monkeypatch.setattr(images, "bandwidth", lambda **_: 1e9)
        text = tmp_path / "x.npz"
        facts = HOST.facts(source)
        assert facts.image is not None
        shape = (24, facts.image.side, facts.image.side, facts.image.channels)
        x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        np.savez(text, x=x, y=np.arange(24) % facts.labels)
    if gives not in (CLASSES, NEXT, LABEL, LABELS, EMBEDDINGS):
        with pytest.raises(ModelError, match=gives):
            measure([source, source], eval=text)
        return
    apply("rtn-w8", source, tmp_path / "made")
    found = measure([source, tmp_path / "made", source], eval=text)
    _, made, same = found.rows
    if gives in (CLASSES, NEXT):
        assert made.quality is not None
        assert same.quality is not None
        assert 0 < made.quality.kl.value < 0.05
        assert same.quality.kl.value == 0
    elif gives == EMBEDDINGS:
        assert made.cosine is not None
        assert same.cosine is not None
        assert 0.99 < made.cosine < 1
        assert same.cosine == pytest.approx(1, abs=1e-6)
    else:
        assert made.labels is not None
        assert same.labels is not None
        assert 0 < made.labels.kl.value < 0.05
        assert (same.labels.kl.value, same.labels.agreement.value) == (pytest.approx(0, abs=1e-6), 1)
        assert made.labels.documents == 6
    tell.measurement(found)
    assert "made" in capsys.readouterr().out


def test_the_same_vocabulary_with_other_tokens_is_refused(tmp_path: Path) -> None:
    first, other = tiny.folder(tmp_path / "first", "llama"), tiny.folder(tmp_path / "other", "llama")
    ids = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = ids["model"]["vocab"]
    vocabulary["q"], vocabulary["u"] = vocabulary["u"], vocabulary["q"]
    (other / "tokenizer.json").write_text(json.dumps(ids), encoding="utf-8")
    with pytest.raises(ModelError, match=r"has another tokenizer than .*first: it cuts '<s>The quick"):
        measure([first, other], eval=[tiny.TEXT * 3] * 6)


def test_padding_is_no_part_of_what_is_compared(tmp_path: Path) -> None:
    """Windows of unlike lengths share a batch; each gives what it gives alone."""
    source = a_model("bert", tmp_path / "source")
    rows = tuple(torch.arange(1, n) for n in (9, 4, 6))
    text = Windows(rows, (0, 1, 2), (1, 1, 1), "by hand")
    facts = HOST.facts(source)
    together, alone = read(text, facts, 2048), read(text, facts, 1)
    assert (len(together.batches), len(alone.batches)) == (1, 3)
    found = [embeddings(HOST.outputs(source, one.arguments)(), one) for one in (together, alone)]
    assert torch.allclose(*found, atol=1e-5)


def test_quality_is_read_from_one_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain checkpoint is never whole in memory, and artifacts are open one after another."""
    source = tiny.folder(tmp_path / "source", "llama")
    apply("rtn-w8", source, tmp_path / "made")
    monkeypatch.setattr(ways, "whole_model", lambda *_: pytest.fail("a whole model was read"))
    alive: list[weakref.ref[Any]] = []
    real = load.load

    def opened(path: Path, **options: Any) -> Any:
        assert Path(path) != source, "a whole model was read"
        gc.collect()
        assert not any(one() is not None for one in alive), "two artifacts at once"
        model = real(path, **options)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(load, "load", opened)
    monkeypatch.setattr(module, "_costs", lambda subjects, *_: ({one.name: Costs() for one in subjects}, Costs()))
    monkeypatch.setattr(module, "bandwidth", lambda **_: 1e9)
    found = measure([source, tmp_path / "made", source, tmp_path / "made"], eval=[tiny.TEXT * 3] * 6)
    kls = [row.quality.kl.value for row in found.rows if row.quality is not None]
    assert kls[0] == kls[2] == 0
    assert kls[1] == kls[3] > 0
    assert len(alive) == 4  # for facts and for quality, each


def test_models_are_timed_apart_where_two_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "memory", lambda *_: None)
    monkeypatch.setattr(module, "bandwidth", lambda **_: 1e9)
    held: list[str] = []

    def counted(one: Subject) -> Subject:
        def ways(dtype: torch.dtype) -> Mapping[str, Model]:
            held.append(one.name)
            return one.ways(dtype)

        return replace(one, ways=ways)

    subjects = [counted(subject("original", 3.0, 4.0, own=16.0)), counted(subject("small", 2.0, 1.0))]
    together = side_by_side(subjects, lambda _: TEXT, Method(rounds=3))
    assert held == ["original", "small"]
    apart = side_by_side(subjects, lambda _: TEXT, Method(rounds=3, apart=True))
    assert held[2:] == ["original", "small"] * 3
    assert [row.quality for row in apart.rows] == [row.quality for row in together.rows]
    assert apart.rows[1].costs.decode is not None
    assert apart.rows[1].costs.decode.rounds == 3
    assert apart.original is not None


def test_a_bound_on_memory_is_kept_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.folder(tmp_path / "source", "llama")
    asked: list[Method] = []

    def begun(*given: Any) -> None:
        asked.append(given[2])
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "side_by_side", begun)
    with pytest.raises(BudgetError, match=r"takes [\d,]+ bytes of memory at the least, and --max-memory allows 1,000"):
        measure([source], eval=[tiny.TEXT] * 6, max_memory=1000)
    assert not asked
    apply("rtn-w4g32", source, tmp_path / "made")
    monkeypatch.setattr(measuring, "weight_bytes", lambda _: 10**9)
    monkeypatch.setattr(measuring, "anonymous_bytes", lambda: 0)
    both = [source, tmp_path / "made", tmp_path / "made"]
    for bound in (10**12, 2 * 10**9 + measuring.LIBRARIES, 2 * 10**9):
        with pytest.raises(KeyboardInterrupt):
            measure(both, eval=[tiny.TEXT] * 6, max_memory=bound)
    assert [method.apart for method in asked] == [False, False, True]
    with pytest.raises(BudgetError):
        measure(both, eval=[tiny.TEXT] * 6, max_memory=10**9)
