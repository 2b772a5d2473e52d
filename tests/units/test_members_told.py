"""`regauge subnets` and `regauge extract`, and the same in Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import regauge as rg
from regauge.amounts import told
from regauge.cli import main
from regauge.errors import SettingError
from tests import tiny
from tests.families import made


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("family"), "llama", "int4")


def test_members_are_measured_beside_the_whole(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(tiny.text(tmp_path, 3000))
    page = tmp_path / "members.html"
    asked = ["subnets", str(out), "--subnet", "depth=2", "--subnet", "small", "--eval", text, "--quiet"]
    asked += ["--page", str(page)]
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["subnet"] for one in found["members"]] == ["full", "depth=2", "depth=2,ffn=0.5"]
    assert [one["name"] for one in found["members"]] == ["", "", "small"]
    assert [one["blocks"] for one in found["members"]] == [[0, 1, 2, 3], [0, 3], [0, 3]]
    sizes = [one["bytes"] for one in found["members"]]
    assert sizes == sorted(sizes, reverse=True)
    whole, _, small = found["members"]
    assert whole["quality"]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert small["quality"]["kl"]["value"] > 0.01
    assert min(one[what]["median"] for one in found["members"] for what in ("decode", "prefill")) > 0
    assert found["offers"]["depth"] == ["3", "2"]
    assert whole["drafts"] is None
    assert small["drafts"]["drafts"] == "depth=2,ffn=0.5"
    assert [way["drafts"] for way in found["drafting"]["ways"]] == ["lookup", "depth=2", "depth=2,ffn=0.5"]
    assert len(found["drafting"]["steps"]) == 8
    assert found["drafting"]["steps"][0] == 1.0
    drawn = page.read_text(encoding="utf-8")
    assert drawn.count('<g class="dot uniform">') == 2
    assert f"<title>small: {told(small['bytes'])}, KL {small['quality']['kl']['value']:.5f} in memory</title>" in drawn
    assert rg.extract(out, "small", tmp_path / "small").bytes == pytest.approx(small["bytes"], rel=0.02)


def test_what_is_worth_a_look(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without text there is no quality of an artifact in codes, and every choice is there by itself."""
    assert main(["subnets", str(out), "--quiet"]) == 0
    said = capsys.readouterr().out
    for subnet in ("full", "depth=3", "ffn=0.75", "heads=1", "width=48", "cache=kv8", "small"):
        assert subnet in said
    assert "give --eval TEXT for quality" in said
    assert "perplexity" not in said


def test_a_page_that_cannot_be_written_is_one_sentence(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    where = tmp_path / "file" / "members.html"
    assert main(["subnets", str(out), "--subnet", "small", "--quiet", "--page", str(where)]) != 0
    assert "the report could not be written to" in capsys.readouterr().err


def test_one_member_is_written(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extract", str(out), "--subnet", "small", "-o", str(tmp_path / "small")]) == 0
    assert "depth=2,ffn=0.5" in capsys.readouterr().out
    assert str(rg.load(tmp_path / "small").regauge.active) == "depth=2,ffn=0.5"
    assert main(["extract", str(out), "--subnet", "small", "-o", str(tmp_path / "small")]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["extract", str(out), "--subnet", "depth=1", "-o", str(tmp_path / "other")]) == 2
    assert "the nearest that is: depth=2" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert main(["extract", str(out.parent / "model"), "--subnet", "depth=2", "-o", str(tmp_path / "other")]) == 2
    assert "is no family" in capsys.readouterr().err
    with pytest.raises(SettingError, match="is no family, so it has no members"):
        rg.subnets(out.parent / "model", quiet=True)
