"""Python matches the command line: names, options, amounts; what comes back prints as a short table."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command

import regauge as rg
from pico import pico, save
from regauge.cli.app import app
from regauge.engine.watchdog import Progress
from regauge.errors import BudgetError

ONLY_THERE = {"json", "debug", "verbose", "threads"}  # of a process; Python has its own ways
ONLY_HERE = {"progress"}
TRAINS = ("recover", "train")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(pico("llama"), tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    "name", ["fit", "apply", "pick", "measure", "trace", "compare", "recover", "sample", "subnets", "extract", "train"]
)
def test_every_option_has_one_name_in_both_worlds(name: str) -> None:
    command: Any = get_command(app)
    flags = {
        opt.removeprefix("--").replace("-", "_")
        for param in (command.commands["learn"].commands if name in TRAINS else command.commands)[name].params
        for opt in param.opts
        if opt.startswith("--")
    }
    taken = set(inspect.signature(getattr(rg, name) if name != "measure" else rg.api.measure).parameters)
    flags -= set() if name in ("recover", "sample") else {"out"}
    if name == "apply":
        flags -= {"dry_run"}  # a function of its own
    taken = {name.removesuffix("_") for name in taken}  # `for` is a word of Python's own
    positional = {"model", "recipe", "run", "point", "models", "artifact"} | ({"out"} - flags)
    assert flags - ONLY_THERE == taken - ONLY_HERE - positional


def test_measure_and_report_are_packages_that_can_be_called(model: Path, tmp_path: Path) -> None:
    import regauge.measure.cost

    assert isinstance(rg.measure, ModuleType)
    assert regauge.measure.cost.COMPRESSED == "compressed"
    rg.apply("rtn-w8", model, tmp_path / "out")
    page = rg.report(tmp_path / "out")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_amounts_are_as_they_are_typed(model: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"max_memory": "6"}, "max_memory='6'"),
        ({"max_memory": "6GBB"}, "max_memory='6GBB'"),
        ({"time": "soon"}, "time='soon' is not a length of time"),
        ({"time": "0s"}, "time='0s' leaves no time"),
    ):
        with pytest.raises(BudgetError, match=message):
            rg.apply("rtn-w8", model, tmp_path / "out", **options)  # type: ignore[arg-type]  # of either kind
    assert not (tmp_path / "out").exists()
    with pytest.raises(BudgetError, match="memory"):
        rg.fit(model, tmp_path / "out", "memory")  # one budget, not six letters


def test_a_watcher_of_ones_own_is_told(model: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    rg.apply("rtn-w8", model, tmp_path / "out", progress=seen.append)
    assert {"open", "blocks", "finish"} <= {event.phase for event in seen}
    assert all(isinstance(event, Progress) for event in seen)


def test_a_receipt_prints_as_a_short_table(model: Path, tmp_path: Path) -> None:
    receipt = rg.apply("rtn-w8", model, tmp_path / "out")
    told = str(receipt)
    assert told.splitlines()[0].startswith("rtn-w8 of ")
    assert "down" in told
    assert len(told.splitlines()) < 30
    html = receipt._repr_html_()
    assert html.startswith("<p>")
    assert "<table>" in html
    assert "<script" not in receipt.model_copy(update={"source": "<script>x</script>"})._repr_html_()


def test_a_device_that_is_not_there_is_our_error(model: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(rg.errors.SettingError, match="cuda"):
        rg.load(model, device="cuda")


@pytest.mark.parametrize("name", ["fit", "apply", "measure"])
def test_a_device_that_does_not_compute_is_a_sentence_in_both_worlds(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from regauge.cli import main

    call = {"fit": rg.fit, "apply": rg.apply, "measure": rg.api.measure}[name]
    given = {"fit": [model, tmp_path / "out"], "apply": ["rtn-w8", model, tmp_path / "out"], "measure": [model]}[name]
    typed = [str(word) for word in given if word != tmp_path / "out"]
    typed += [] if name == "measure" else ["-o", str(tmp_path / "out")]
    for seen, why in ((0, "torch sees no CUDA device here"), (1, f"regauge {name} computes on the CPU only")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda seen=seen: bool(seen))
        monkeypatch.setattr(torch.cuda, "device_count", lambda seen=seen: seen)
        with pytest.raises(rg.errors.SettingError, match=why):
            call(*given, device="cuda")  # type: ignore[operator]  # of three kinds
        assert main([name, *typed, "--device", "cuda"]) == 2
        said = capsys.readouterr().err
        assert why in " ".join(said.split())
        assert "Traceback" not in said
    assert main([name, *typed, "--device", "gpu"]) == 2
    assert "there is no device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_apply_writes_its_page_in_both_worlds(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from regauge.cli import main

    rg.apply("rtn-w8", model, tmp_path / "one", quiet=True)
    assert main(["apply", "rtn-w8", str(model), "-o", str(tmp_path / "two"), "-q", "--json"]) == 0
    assert capsys.readouterr().out.startswith("{")
    for out in ("one", "two"):
        page = (tmp_path / out / "regauge" / "report.html").read_text(encoding="utf-8")
        assert "What loads it" in page
        assert str(tmp_path / out) in page
