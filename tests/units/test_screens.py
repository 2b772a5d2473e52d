"""What a person sees at 80 and at 200 columns: no line is wider than the screen, and no word is broken."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import regauge as rg
from regauge.cli import main
from regauge.cli.app import app

Capture = pytest.CaptureFixture[str]
Seen = Callable[[list[str], int], str]
COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback is not None]


@pytest.fixture
def screen(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What a command prints on a terminal of so many columns."""

    def seen(words: list[str], columns: int) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERMINAL_WIDTH", str(columns))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        assert main(words) == 0
        return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)

    return seen


@pytest.fixture(scope="module")
def made(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("screens") / "out"
    rg.apply("rtn-w4g32", bundled, out)
    return out


def words_of(text: str) -> set[str]:
    return set(re.sub(r"[─━│╭╮╰╯]", " ", text).split())


def whole(screen: Seen, words: list[str], bare: Path | None = None) -> None:
    for place, columns in enumerate((1000, 200, 80)):
        if bare is not None:
            shutil.rmtree(bare, ignore_errors=True)
        text = screen(words, columns)
        text = re.sub(r"\b\d[\d.,]*( (s|MB|kB|GFLOP/s|GB/s|min)\b)?", "N", text)  # what is measured anew each time
        if place == 0:
            known = words_of(text) | {"MB", "kB", "GB", "GB/s", "GFLOP/s", "s", "min"}
            continue
        broken = words_of(text) - known
        assert not {word for word in broken if word.rstrip(";:,.") not in known and word.rstrip(";") not in known}, (
            f"{columns} columns: {sorted(broken)[:5]}"
        )
        wide = [line for line in text.splitlines() if len(line.rstrip()) > columns and len(line.split()) > 1]
        assert not wide, f"{columns} columns: {wide[0]}"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_the_screen(name: str, screen: Seen) -> None:
    text = screen([name, "--help"], 80)
    assert "Usage:" in text
    assert max(map(len, text.splitlines())) <= 80


def test_inspect_fits_the_screen(screen: Seen, bundled: Path) -> None:
    whole(screen, ["inspect", str(bundled), "--streams"])


def test_methods_and_explain_fit_the_screen(screen: Seen) -> None:
    whole(screen, ["methods", "--bits", "4"])
    whole(screen, ["explain", "gptq-w4g128"])


def test_a_dry_run_and_a_receipt_fit_the_screen(screen: Seen, bundled: Path, tmp_path: Path) -> None:
    whole(screen, ["apply", "rtn-w4g32", str(bundled), "-o", str(tmp_path / "out"), "--dry-run"])
    whole(screen, ["apply", "rtn-w4g32", str(bundled), "-o", str(tmp_path / "out"), "-q"], tmp_path / "out")


def test_doctor_fits_the_screen(screen: Seen) -> None:
    whole(screen, ["doctor"])


@pytest.mark.parametrize(
    "words",
    [["inspect", "MODEL"], ["methods"], ["explain", "rtn-w8"], ["doctor"], ["apply", "rtn-w8", "MODEL", "--dry-run"]],
)
def test_json_stands_beside_each(words: list[str], bundled: Path, tmp_path: Path, capsys: Capture) -> None:
    given = [str(bundled) if word == "MODEL" else word for word in words]
    given += ["-o", str(tmp_path / "out")] if words[0] == "apply" else []
    assert main([*given, "--json"]) == 0
    json.loads(capsys.readouterr().out)
