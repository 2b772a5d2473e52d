"""Every command on every kind of wrong input: an exit code, one sentence, nothing left behind, nothing lost."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regauge.cli import main
from tests import tiny
from tests.units.test_bad_input import Desk

LINES: dict[str, list[str]] = {
    "fit": ["fit", "model", "-o", "out", "--budget", "memory=2x", "--calibration", "text.txt"],
    "apply": ["apply", "gptq-w4", "model", "-o", "out", "--calibration", "text.txt"],
    "inspect": ["inspect", "model"],
    "sensitivity": ["inspect", "model", "--sensitivity", "--calibration", "text.txt"],
    "measure": ["measure", "model", "model", "--eval", "text.txt"],
}
"""Commands that read a model; all but `inspect` read text."""


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("pristine") / "model")


@pytest.fixture
def desk(pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    shutil.copytree(pristine, tmp_path / "model")
    tiny.text(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    monkeypatch.chdir(tmp_path)
    return Desk(tmp_path, capsys)


@pytest.fixture(scope="module")
def run(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with the record of a search that could have made it."""
    from regauge.search import record
    from tests.fuzz.desk import a_record

    root = tmp_path_factory.mktemp("run")
    text = tiny.text(root, 8000)
    assert main(["apply", "rtn-w8", str(pristine), "-o", str(root / "run")]) == 0
    record.write(a_record(pristine, text), root / "run")
    return root / "run"


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder", encoding="utf-8")


def _written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def _other_weights(folder: Path) -> None:
    tiny.folder(folder.parent / "other", "gpt2")
    shutil.copy(folder.parent / "other" / "model.safetensors", folder)
    shutil.rmtree(folder.parent / "other")


def _link_out(folder: Path) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    os.symlink(folder.parent / "mine" / "thesis.txt", folder / "generation_config.json")


def _a_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (shutil.rmtree, "there is no directory"),
    "empty": (_emptied, "has no config.json"),
    "a file": (_a_file, "is a file"),
    "an empty config": (_written("config.json", b""), "is not JSON"),
    "a list for a config": (_written("config.json", b"[]"), "is no mapping"),
    "a binary config": (_written("config.json", bytes(range(256))), "is not text in UTF-8"),
    "a folder for a config": (_a_folder, "a directory"),
    "empty weights": (_written("model.safetensors", b""), "truncated"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "weights of another model": (_other_weights, "do not belong together"),
    "a link out": (_link_out, "is a link out of its folder"),
    "a count beyond reason": (
        lambda folder: Desk(folder.parent, None).edit(num_hidden_layers=10**9),  # type: ignore[arg-type]  # says nothing
        "num_hidden_layers 1000000000",
    ),
}


@pytest.mark.parametrize("what", MODELS)
@pytest.mark.parametrize("command", LINES)
def test_a_wrong_model(desk: Desk, command: str, what: str) -> None:
    spoil, told = MODELS[what]
    spoil(desk.model)
    assert told in desk.refused(*LINES[command])


@pytest.mark.parametrize("command", ["fit", "apply", "sensitivity", "measure"])
@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "there is no text"), (b"", "is empty"), (b"a\0b" * 99, "is binary"), (b"\xff\xfe" * 99, "is not UTF-8")],
)
def test_a_wrong_text(desk: Desk, command: str, content: bytes | None, told: str) -> None:
    path = desk.root / "text.txt"
    path.unlink() if content is None else path.write_bytes(content)
    assert told in desk.refused(*LINES[command])


def _in_the_way(name: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text("precious")


OUTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "a file": (_in_the_way("out"), (), "out exists"),
    "a file, by force": (_in_the_way("out"), ("--force",), "was not made by regauge"),
    "a folder of the user's": (lambda root: (root / "mine").rename(root / "out"), (), "out exists"),
    "that, by force": (lambda root: (root / "mine").rename(root / "out"), ("--force",), "was not made by regauge"),
    "a link to it, by force": (lambda root: os.symlink("mine", root / "out"), ("--force",), "was not made by regauge"),
    "a link to nowhere": (lambda root: os.symlink("nowhere", root / "out"), (), "out exists"),
    "a copy of the model": (lambda root: shutil.copytree(root / "model", root / "out"), ("--force",), "not made by"),
    "its partial in use": (_in_the_way("out.partial"), (), "out.partial"),
    "its partial a folder": (lambda root: (root / "mine").rename(root / "out.partial"), ("--force",), "out.partial"),
}


@pytest.mark.parametrize("what", OUTS)
@pytest.mark.parametrize("command", ["fit", "apply", "pick"])
def test_an_out_in_the_way(desk: Desk, run: Path, command: str, what: str) -> None:
    spoil, more, told = OUTS[what]
    if command == "fit" and "partial" in what:
        pytest.skip("fit builds in OUT.search")
    spoil(desk.root)
    line = ["pick", str(run), "0", "-o", "out"] if command == "pick" else LINES[command]
    assert told in desk.refused(*line, *more)


@pytest.mark.parametrize("command", ["fit", "apply"])
def test_the_model_itself_as_out(desk: Desk, command: str) -> None:
    line = [word if word != "out" else "model" for word in LINES[command]]
    assert "not made by regauge" in desk.refused(*line, "--force")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["aply", "rtn-w4", "model", "-o", "out"], "No such command"),
        (["apply", "rtn-w4", "model"], "Missing option"),
        (["apply", "rtn-w4", "-o", "out"], "Missing argument"),
        (["apply", "rtn-w4", "model", "-o", "out", "--sede", "3"], "--sede"),
        (["apply", "rtn-w4", "model", "-o", "out", "--seed", "-1"], "--seed"),
        (["apply", "rtn-w4", "model", "-o", "out", "--seed", "9" * 20], "--seed"),
        (["apply", "rtn-w4", "model", "-o", "out", "--tokens", "none"], "--tokens"),
        (["apply", "rtn-w4", "model", "-o", "out", "--time", "5x"], "5x"),
        (["apply", "mine", "model", "-o", "out"], "mine"),
        (["apply", "model/config.json", "model", "-o", "out"], "config.json"),
        (["fit", "model", "-o", "out", "--time", "-3"], "-3"),
        (["fit", "model", "-o", "out", "--floor", "kl=nan"], "kl"),
        (["fit", "model", "-o", "out", "--budget", "memory=nan"], "memory"),
        (["pick", "model", "first", "-o", "out"], "POINT"),
        (["pick", "model", "-1", "-o", "out"], "-1"),
        (["pick", "nowhere", "0", "-o", "out"], "no run record"),
        (["report", "nowhere"], "no receipt"),
        (["report", "text.txt"], "no receipt"),
        (["report", "mine", "-o", "page.html"], "no receipt"),
        (["explain", "gptq-w4g12"], "gptq-w4g12"),
        (["explain", "nowhere.yaml"], "nowhere.yaml"),
        (["explain", "mine/thesis.txt"], "thesis.txt"),
        (["explain", "x" * 5000], "nothing is called"),
        (["measure"], "Missing argument"),
        (["measure", "model", "nowhere"], "nowhere"),
        (["inspect", "a/b/c"], "a/b/c"),
        (["inspect", "mo\0del"], "mo"),
        (["inspect", "../" + "x" * 5000], "xxx"),
    ],
)
def test_a_wrong_line(desk: Desk, line: list[str], told: str) -> None:
    assert told in desk.refused(*line)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("regauge/run.json", b"", "is not JSON"),
        ("regauge/run.json", b"{}", "not a run record that this version reads: regauge: Field required"),
        ("regauge/run.json", b"[" * 200_000, "is not JSON"),
        ("regauge/run.json", b'{"regauge": "\\ud800"}', "half of a character"),
        ("regauge/receipt.json", b"", "is not JSON"),
        ("regauge/receipt.json", b"null", "is no mapping but a NoneType"),
    ],
)
def test_a_wrong_record(desk: Desk, run: Path, file: str, content: bytes, told: str) -> None:
    shutil.copytree(run, desk.root / "run")
    (desk.root / "run" / file).write_bytes(content)
    assert told in desk.refused("report", "run")
    if "run.json" in file:
        assert told in desk.refused("pick", "run", "0", "-o", "out")


def test_a_point_that_is_none(desk: Desk, run: Path) -> None:
    assert "points 0 to 1" in desk.refused("pick", str(run), "7", "-o", "out")


def test_a_page_where_none_can_be(desk: Desk, run: Path) -> None:
    assert "mine" in desk.refused("report", str(run), "-o", "mine")
    assert "nowhere" in desk.refused("report", str(run), "-o", "text.txt/nowhere/page.html")


def test_files_that_may_not_grow(desk: Desk) -> None:
    """A file beyond what a process may write, as on a full disk: a sentence, no OUT; with room, all is well."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = desk.state()
    desk.capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        code = main(["apply", "rtn-w8", "model", "-o", "out"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = desk.capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 1
    assert "too large" in told
    assert "run the same command again" in told
    assert not (desk.root / "out").exists()
    assert desk.state().items() >= before.items()
    assert main(["apply", "rtn-w8", "model", "-o", "out"]) == 0
    assert not (desk.root / "out.partial").exists()


STOPPED: dict[str, tuple[str, list[str]]] = {
    "fit": ("regauge.search.fit.settle", LINES["fit"]),
    "apply": ("regauge.artifact.staging.Staging.write", LINES["apply"]),
    "inspect": ("regauge.report.inspection._counted", LINES["inspect"]),
    "sensitivity": ("regauge.search.sense.Subject.of", LINES["sensitivity"]),
    "measure": ("regauge.engine.measuring.side_by_side", LINES["measure"]),
    "explain": ("regauge.report.explanation.explain", ["explain", "rtn-w4"]),
    "methods": ("regauge.report.methods.methods", ["methods"]),
}


@pytest.mark.parametrize("command", STOPPED)
def test_control_c(desk: Desk, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted while it works, each command says so in one line and leaves no OUT."""
    place, line = STOPPED[command]
    before = desk.state()

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, stop)
    desk.capsys.readouterr()
    assert main(line) == 130
    told = desk.capsys.readouterr().err.strip().splitlines()
    assert told[-1].startswith("regauge: interrupted; what was finished is kept")
    assert "Traceback" not in "".join(told)
    assert not (desk.root / "out").exists()
    assert desk.state().items() >= before.items()
