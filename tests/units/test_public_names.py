"""Public names and command-line flags are frozen: a change here is a change for every user."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from typer.main import get_command

import regauge
from regauge.cli.app import app

NAMES = [
    "Plan",
    "Receipt",
    "Subnet",
    "apply",
    "cache",
    "compare",
    "dry_run",
    "errors",
    "explain",
    "extract",
    "fit",
    "inspect",
    "load",
    "measure",
    "methods",
    "pick",
    "recover",
    "refill",
    "report",
    "sample",
    "shared_prefix",
    "stream",
    "subnets",
    "trace",
    "train",
    "use",
]

FLAGS = {
    "fit": [
        "MODEL",
        "--budget",
        "--cache",
        "--calibration",
        "--debug",
        "--device",
        "--drafts",
        "--dry-run",
        "--eval",
        "--family",
        "--floor",
        "--for",
        "--force",
        "--json",
        "--length",
        "--max-memory",
        "--members",
        "--methods",
        "--out",
        "--quiet",
        "--recover",
        "--revision",
        "--seed",
        "--threads",
        "--time",
        "--tokens",
        "--verbose",
        "-o",
        "-q",
        "-v",
    ],
    "pick": [
        "RUN",
        "POINT",
        "--budget",
        "--debug",
        "--force",
        "--json",
        "--out",
        "--quiet",
        "--threads",
        "--verbose",
        "-o",
        "-q",
        "-v",
    ],
    "apply": [
        "RECIPE",
        "MODEL",
        "--cache",
        "--calibration",
        "--debug",
        "--device",
        "--dry-run",
        "--embed",
        "--family",
        "--force",
        "--head",
        "--json",
        "--length",
        "--max-memory",
        "--out",
        "--quiet",
        "--revision",
        "--seed",
        "--threads",
        "--time",
        "--tokens",
        "--verbose",
        "--wire",
        "-o",
        "-q",
        "-v",
    ],
    "inspect": [
        "MODEL",
        "--calibration",
        "--context",
        "--debug",
        "--family",
        "--json",
        "--memory",
        "--positions",
        "--quiet",
        "--revision",
        "--seed",
        "--sensitivity",
        "--streams",
        "--threads",
        "--verbose",
        "-q",
        "-v",
    ],
    "methods": ["[WORD]", "--bits", "--debug", "--json", "--loads-in", "--paper"],
    "explain": ["[NAME]", "--debug", "--json"],
    "measure": [
        "A [B ...]",
        "--arithmetic",
        "--cache",
        "--debug",
        "--device",
        "--eval",
        "--json",
        "--long",
        "--max-memory",
        "--quiet",
        "--seed",
        "--tasks",
        "--threads",
        "--verbose",
        "-q",
        "-v",
    ],
    "trace": ["MODEL", "--debug", "--family", "--integers", "--json", "--seed", "--threads"],
    "compare": [
        "MODEL",
        "--at",
        "--calibration",
        "--debug",
        "--eval",
        "--family",
        "--json",
        "--max-memory",
        "--methods",
        "--out",
        "--planted",
        "--quiet",
        "--revision",
        "--seed",
        "--threads",
        "--tokens",
        "--verbose",
        "-o",
        "-q",
        "-v",
    ],
    "subnets": [
        "OUT",
        "--debug",
        "--eval",
        "--json",
        "--page",
        "--quiet",
        "--seed",
        "--subnet",
        "--threads",
        "--verbose",
        "-q",
        "-v",
    ],
    "extract": [
        "OUT",
        "--calibration",
        "--debug",
        "--force",
        "--json",
        "--out",
        "--subnet",
        "--threads",
        "-o",
    ],
    "report": ["RUN", "--debug", "--out", "-o"],
    "chat": [
        "OUT",
        "--against",
        "--cache",
        "--debug",
        "--device",
        "--prompt",
        "--seed",
        "--temperature",
        "--threads",
        "--tokens",
    ],
    "sample": [
        "OUT",
        "--against",
        "--cache",
        "--debug",
        "--guidance",
        "--labels",
        "--out",
        "--rows",
        "--seed",
        "--subnet",
        "--threads",
        "--top-k",
        "--top-p",
        "-o",
    ],
    "serve": ["OUT", "--cache", "--debug", "--device", "--host", "--port", "--threads"],
    "doctor": ["--debug", "--json"],
    "learn": [],
    "family": [],
}


def test_the_names() -> None:
    assert regauge.__all__ == NAMES
    assert dir(regauge) == sorted([*NAMES, "__version__"])
    with pytest.raises(AttributeError, match="has no attribute 'applly'"):
        _ = regauge.applly  # type: ignore[attr-defined]  # the point of the test


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there(name: str) -> None:
    assert getattr(regauge, name) is not None


def commands() -> dict[str, Any]:
    return dict(get_command(app).commands)  # type: ignore[attr-defined]  # a group has commands


def test_the_commands() -> None:
    assert list(commands()) == list(FLAGS)


@pytest.mark.parametrize("command", FLAGS)
def test_the_flags(command: str) -> None:
    found = commands()[command].params
    words = [item.metavar or item.opts[0] for item in found if not item.opts[0].startswith("-")]
    flags = sorted(flag for item in found for flag in item.opts if flag.startswith("-"))
    assert [*words, *flags] == FLAGS[command]


def test_importing_is_light() -> None:
    code = (
        "import sys, regauge, regauge.cli.app, regauge.plan\n"
        "regauge.plan.presets(); regauge.plan.load('rtn-w4')\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'scipy', 'numpy', 'plotly'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
