"""What explain and methods say of how much a preset that trains gained."""

from __future__ import annotations

import pytest

from regauge.plan import load, presets
from regauge.report import trained
from regauge.report.explanation import explain
from regauge.report.methods import methods
from regauge.report.trained import kept, sentence, told

ROW = {
    "command": "python benchmarks/trained_families.py --rows todm",
    "model": "code-llama-5m",
    "unit": "perplexity",
    "null": "alone",
    "figures": {"depth=4,ffn=0.6": [19.22, 20.21, -4.9, 0.5], "depth=2": [40.5, 45.97], "c": [1, 2], "d": [3, 4]},
}
SAID = "perplexity of depth=4,ffn=0.6 19.22, alone 20.21 (-4.9 ± 0.5 %); depth=2 40.5, alone 45.97; c 1, alone 2"


def test_a_row_in_a_sentence() -> None:
    assert sentence(ROW) == SAID


def test_what_is_kept_is_of_presets_that_train() -> None:
    assert set(kept()) <= set(presets())
    for name, row in kept().items():
        assert load(name).train, name
        assert set(row) == set(ROW), name
        assert told(name)


def test_explain_and_methods_tell_it_with_command_and_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "kept", lambda: {"todm": ROW})
    how = "code-llama-5m; python benchmarks/trained_families.py --rows todm"
    (row,) = (one for one in methods("todm") if one.names == ("todm",))
    assert row.measured == f"todm: {SAID} ({how})"
    assert how in " ".join(explain("todm").split())
    (other,) = (one for one in methods("deps") if one.names == ("deps",))
    assert SAID not in other.measured
