"""What a receipt says of a training is read strictly: it is what others wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import regauge as rg
from regauge.cli import main
from tests.pico import pico, save

LOOKED = {
    "text": "novels",
    "tokens": 64,
    "held_out": 16,
    "how": {},
    "processes": 1,
    "steps": 2,
    "members": {"full": {"before": 2.0, "after": 1.0}},
    "unit": "nats a token",
    "losses": [2.0, 1.5],
    "looks": [[0, 2.0], [2, 1.0]],
    "ended": "all steps",
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    rg.apply("rtn-w8", save(pico("llama"), folder / "model"), folder / "out", quiet=True)
    return folder / "out"


def put(out: Path, trained: object) -> None:
    path = out / "regauge" / "receipt.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trained": trained}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"text": "novels"},
        LOOKED | {"looks": []},
        LOOKED | {"steps": -1},
        LOOKED | {"members": {"full": {"before": 2.0}}},
        LOOKED | {"more": 1},
        [1],
    ],
    ids=["parts are missing", "no look", "less than no steps", "half a member", "more than there is", "a list"],
)
def test_a_record_that_is_none_is_one_sentence(out: Path, wrong: object, capsys: pytest.CaptureFixture[str]) -> None:
    put(out, wrong)
    assert main(["report", str(out)]) != 0
    said = capsys.readouterr().err
    assert said.startswith("regauge: ")
    assert "receipt.json" in said
    assert "Traceback" not in said


def test_one_that_is_whole_is_drawn_and_an_empty_one_is_none(out: Path) -> None:
    put(out, LOOKED)
    page = rg.report(out).read_text(encoding="utf-8")
    assert "Members that were trained" in page
    assert "1.0000" in page
    put(out, {})
    assert "Members that were trained" not in rg.report(out).read_text(encoding="utf-8")
