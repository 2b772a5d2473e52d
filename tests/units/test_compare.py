"""`regauge compare`: rows, nulls, a store that goes on where it was left, and one sentence for each bad input."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

import regauge as rg
from pico import pico, save
from regauge.cli import main
from regauge.errors import OutputError, RecipeError
from regauge.measure.bootstrap import Interval
from regauge.measure.quality import Quality
from regauge.plan import digest, load
from regauge.ranking import bench, run
from regauge.ranking.null import null
from regauge.ranking.record import Result, Windowed, against
from regauge.ranking.settings import Setting, chosen, setting_of
from regauge.ranking.store import NAME, Store
from tests.tiny import folder as tiny
from tests.tiny import text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text(tmp_path_factory.mktemp("words"), 4000)


def compared(model: Path, words: Path, out: Path, methods: str = "rtn-w4,gptq-w4", **more: Any) -> Any:
    """Rows of a tiny model; few tokens."""
    return rg.compare(model, methods, None, out, calibration=words, eval=words, tokens=1024, quiet=True, **more)


def result(method: str, kl: list[float], model: str = "m", setting: str = "w4a16") -> Result:
    """A result that only its windows tell."""
    one = Interval(value=sum(kl) / len(kl), low=0, high=1)
    quality = Quality(
        tokens=len(kl), documents=len(kl), bytes=9, perplexity=one, bits_per_byte=one, kl=one, kl99=one, agreement=one
    )
    windows = Windowed(np.array(kl), np.ones(len(kl), dtype=np.int64), np.arange(len(kl)))
    return Result(
        model=model,
        name=f"model {model}",
        text="t",
        read="a text",
        recipe=method,
        method=method,
        setting=setting,
        null="",
        seed=0,
        quality=quality,
        bytes=10,
        bits=4.0,
        seconds=1.0,
        peak=0,
        windows=windows,
    )


def test_settings_by_hand() -> None:
    assert Setting.read("w4a16") == Setting(4)
    assert Setting.read(" W4A4KV4 ") == Setting(4, 4, 4)
    assert [str(Setting(4)), str(Setting(8, 8)), str(Setting(4, 4, 4))] == ["w4a16", "w8a8", "w4a4kv4"]
    at = {name: str(setting_of(load(name))) for name in ("gptq-w3g64", "smoothquant", "quarot-w4a8", "nf4", "kivi-4")}
    assert at == {"gptq-w3g64": "w3a16", "smoothquant": "w8a8", "quarot-w4a8": "w4a8", "nf4": "w4a16", "kivi-4": "None"}


def test_a_word_stands_for_a_preset_a_file_or_a_published_row() -> None:
    def named(*words: Any) -> list[str]:
        return [entry.name for entry in chosen(*words)]

    both = named("rtn,gptq", "w4a16")
    assert both[:4] == ["rtn-w4", "gptq-w4g32", "gptq-w4g64", "gptq-w4g128"]
    assert {"gptq-w4", "gptq-q4-k", "gptq-nvfp4"} < set(both)
    assert not {"gptq-w3g64", "gptq-q2-k", "rtn-w4g128"} & set(both)
    assert named(["smoothquant", "rtn-w8a8"], ["w8a8"]) == ["smoothquant", "rtn-w8a8"]
    assert set(named("all", "w8a8,w4a8")) >= {"fp8", "smoothquant", "quarot-w4a8"}
    assert [str(entry.setting) for entry in chosen("smoothquant-w6a6,rtn-w8", None)] == ["w6a6", "w8a16"]
    assert [str(entry.setting) for entry in chosen("quarot-w4a4+kivi-4", "w4a4kv4")] == ["w4a4kv4"]


@pytest.mark.parametrize("at", ["w6a6", "w4a4", "w4a4kv4"])
def test_each_setting_has_its_yardstick_and_what_must_beat_it(at: str) -> None:
    """The yardstick is its own null; all others are held against it, or against it with their own cache."""
    names = {entry.name for entry in chosen("all", at)}
    assert {f"rtn-{at}", f"smoothquant-{at}", f"quarot-{at}"} <= names
    assert null(load(f"rtn-{at}")) is None
    found = null(load(f"smoothquant-{at}"))
    assert found is not None
    assert digest(found) == digest(load(f"rtn-{at}"))


@pytest.mark.parametrize(
    ("methods", "at", "why"),
    [
        ("gptqq", None, "no method is called 'gptqq' .did you mean 'gptq'"),
        ("all", "w5a5", "none of the methods is at w5a5; they are at w2a"),
        ("all", "4bit", "'4bit' is no setting: write bits of weights and inputs"),
        ("rtn-w4,rtn-w8a8", "w8a8", "rtn-w4 is at w4a16, and --at asks for w8a8"),
        ("kivi-4", None, "kivi-4 cannot be compared"),
        (",", None, "nothing to compare"),
        ("no-such.yaml", None, "there is no recipe file no-such.yaml"),
    ],
)
def test_a_wrong_method_or_setting_is_a_sentence(methods: str, at: str | None, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        chosen(methods, at)


def test_a_null_by_hand() -> None:
    found = null(load("quarot-gptq-w3g64"))
    assert found is not None
    assert not found.rewrites
    assert digest(found) == digest(load("rtn-w3g64"))
    assert null(load("rtn-w3g64")) is None


def test_rows_stand_beside_their_nulls_and_a_second_run_makes_nothing(
    model: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = compared(model, words, tmp_path / "out")
    assert [row.result.method for row in found.rows] == sorted(
        ["rtn-w4", "gptq-w4"],
        key=lambda name: next(r.result.quality.kl.value for r in found.rows if r.result.method == name),
    )
    rows = {row.result.method: row for row in found.rows}
    assert rows["rtn-w4"].beats == ""
    gptq = rows["gptq-w4"]
    assert gptq.null == "rtn-w4"
    assert gptq.difference is not None
    assert gptq.difference.value == pytest.approx(gptq.result.quality.kl.value - rows["rtn-w4"].result.quality.kl.value)
    assert found.made == 2
    assert 4 < gptq.result.bits < 8
    assert gptq.result.seconds > 0
    page = (tmp_path / "out" / "ranking.html").read_text(encoding="utf-8")
    assert "gptq-w4" in page
    monkeypatch.setattr(bench, "apply", lambda *_, **__: pytest.fail("it was in the store"))
    again = compared(model, words, tmp_path / "out")
    assert again.made == 0
    assert again.model_dump() == found.model_copy(update={"made": 0}).model_dump()
    assert {path.name for path in (tmp_path / "out").iterdir()} - {".lock"} == {NAME, "ranking.html"}


def test_what_was_done_stays_when_it_is_interrupted(
    model: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = bench.apply, list[str]()

    def once(plan: Any, *rest: Any, **more: Any) -> Any:
        calls.append(plan.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(plan, *rest, **more)

    monkeypatch.setattr(bench, "apply", once)
    with pytest.raises(KeyboardInterrupt):
        compared(model, words, tmp_path / "out", "rtn-w4,rtn-w8")
    found = compared(model, words, tmp_path / "out", "rtn-w4,rtn-w8")
    assert found.made == 1
    assert calls == ["rtn-w4", "rtn-w8", "rtn-w8"]


def test_another_text_seed_or_amount_is_another_result(model: Path, words: Path, tmp_path: Path) -> None:
    assert compared(model, words, tmp_path / "out", "rtn-w8").made == 1
    assert compared(model, words, tmp_path / "out", "rtn-w8", seed=1).made == 1
    other = tmp_path / "other.txt"
    other.write_text("Another text altogether, of no great length but of some. " * 20, encoding="utf-8")
    assert rg.compare(model, "rtn-w8", None, tmp_path / "out", eval=other, quiet=True).made == 1


def test_the_planted_form_is_harder(model: Path, words: Path, tmp_path: Path) -> None:
    plain = compared(model, words, tmp_path / "out", "rtn-w8a8")
    hard = compared(model, words, tmp_path / "out", "rtn-w8a8", planted=True)
    assert hard.model.endswith("(planted)")
    assert hard.rows[0].result.quality.kl.value > 3 * plain.rows[0].result.quality.kl.value
    # the form itself predicts as the model does, to the rounding of what stores it
    assert hard.rows[0].result.quality.tokens == plain.rows[0].result.quality.tokens
    (ranking,) = hard.rankings
    assert (ranking.runs, ranking.pools[0][0].runs) == (2, 2)


def test_a_row_that_the_model_does_not_admit_is_told_and_the_others_are_made(words: Path, tmp_path: Path) -> None:
    where = tiny(tmp_path / "gemma", "gemma2")
    found = compared(where, words, tmp_path / "out", "rtn-w4g32,quarot-gptq-w4g32")
    assert "quarot-gptq-w4g32" in found.refused
    assert "rtn-w4g32" in {row.result.method for row in found.rows}


def test_where_every_row_is_refused_the_reason_is_the_error(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "turned.yaml"
    file.write_text(
        "name: turned\nrewrites: [fold-norm, rotate]\n"
        "weights: {blocks.*: {grid: int4-asym, grain: channel, ranger: minmax, scale: bf16, rounder: nearest}}\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(run, "null", lambda _: None)
    with pytest.raises(rg.errors.RegaugeError, match="post-norm"):
        compared(tiny(tmp_path / "gemma", "gemma2"), words, tmp_path / "none", str(file))


def test_verdicts_by_hand() -> None:
    better = against(result("a", [0.1] * 12), result("n", [0.2 + 0.01 * i for i in range(12)]), 0)
    assert (better.beats, better.null) == ("yes", "n")
    assert against(result("a", [0.3] * 12), result("n", [0.2] * 12), 0).beats == "no"
    mixed = against(result("a", [0.1, 0.3] * 6), result("n", [0.2] * 12), 0)
    assert mixed.beats == "not told"
    assert mixed.difference is not None
    assert mixed.difference.value == pytest.approx(0)
    assert against(result("a", [0.1] * 3), result("n", [0.2] * 3), 0).beats == "not told"  # too few to tell


def test_a_ranking_over_models_says_which_run_would_decide_most() -> None:
    some = [
        result("a", [0.1, 0.1, 0.1], "1"),
        result("b", [0.2, 0.2, 0.2], "1"),
        result("c", [0.3, 0.3, 0.3], "1"),
        result("a", [0.1, 0.1], "2"),
        result("b", [0.2, 0.0], "2"),
    ]
    found = run.ranked([*some, result("z", [0.0], "1", "w8a8")], "w4a16")
    assert [(rank.method, rank.place, rank.runs) for rank in found.pools[0]] == [("a", 1, 2), ("b", 2, 2), ("c", 3, 1)]
    assert found.next == ("c", "model 2")
    apart = run.ranked([some[0], some[4]], "w4a16")
    assert [len(pool) for pool in apart.pools] == [1, 1]
    assert apart.next in (("a", "model 2"), ("b", "model 1"))
    assert run.ranked(some[:3], "w4a16").next is None


def test_the_command_line(
    model: Path, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["compare", str(model), "--methods", "rtn-w8,rtn-w4", "--at", "w8a16", "--eval", str(words), "-q"]
    assert main(line) == 2
    assert "rtn-w4 is at w4a16, and --at asks for w8a16" in capsys.readouterr().err
    line[3] = "rtn-w8"
    assert main([*line, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"][0]["result"]["method"] == "rtn-w8"
    assert "windows" not in told["rows"][0]["result"]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert "beats its null" in said
    assert "0 made now, 1 from compare" in said


def test_a_bad_folder_or_model_is_a_sentence(
    model: Path, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def says(why: str, path: Path = model, code: int = 2) -> None:
        assert main(["compare", str(path), "--methods", "rtn-w8", "--eval", str(words), "-o", str(out), "-q"]) == code
        said = " ".join(capsys.readouterr().err.split())
        assert why in said
        assert "Traceback" not in said

    out = tmp_path / "old"
    out.mkdir()
    with Store.open(out):
        pass
    with sqlite3.connect(out / NAME) as connection:
        connection.execute("UPDATE meta SET value = '7'")
    connection.close()
    says("holds results in format 7 and this version of regauge reads 1")
    (out / NAME).write_bytes(b"no database at all, but long enough to be taken for one" * 20)
    says("cannot be used as a store of results")
    out = tmp_path / "held"
    out.mkdir()
    with FileLock(out / ".lock"):
        says("another run is writing")
    out = tmp_path / "bert"
    says("gives embeddings", save(pico("bert"), tmp_path / "encoder"))
    out = tmp_path / "full"
    monkeypatch.setattr(Store, "put", _full)
    says("the disk is full", code=1)


def _full(self: Store, *_: object) -> None:
    from sqlalchemy.exc import OperationalError

    from regauge.ranking.store import _told

    with _told(self.path):
        raise OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))


def test_a_full_disk_of_a_store_is_told(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store, pytest.raises(OutputError, match="free some space"):
        _full(store)
