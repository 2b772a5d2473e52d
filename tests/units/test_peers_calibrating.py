"""Peers that calibrate: the tokens they are given, what is watched, what is counted for all. No timing is judged."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "peers"), str(ROOT / "scripts")]

import windows  # noqa: E402
import write_random_model  # noqa: E402
from common import calibrating  # noqa: E402
from common.watched import watched  # noqa: E402

ADAPTOR = """
import json, pathlib, sys
model, out, text, tokens, length = sys.argv[1:]
blocks = json.loads((pathlib.Path(model) / "config.json").read_text())["num_hidden_layers"]
if text == "bad":
    sys.exit("it is broken")
print("noise")
phases = {"convert": -3.0, "blocks": 100.0 * blocks}
print(json.dumps({"seconds": 1.0, "tokens": int(tokens), "phases": phases, "versions": {"x": "1"}}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("random") / "model"
    write_random_model.write(out, write_random_model.SIZES["tiny"])
    return out


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adaptors of a few lines, run by this interpreter."""
    for name in ("calibrate_autoround", "calibrate_llmcompressor", "calibrate_llama"):
        (tmp_path / f"{name}.py").write_text(ADAPTOR, encoding="utf-8")
    monkeypatch.setattr(calibrating, "PEERS", tmp_path)
    monkeypatch.setattr(calibrating, "python", lambda _: Path(sys.executable))
    monkeypatch.setattr(calibrating, "tool", lambda _: Path(sys.executable))


def job(model: Path, tmp_path: Path, tokens: int, length: int) -> windows.Job:
    (tmp_path / "text.txt").write_text("".join(chr(97 + at % 26) for at in range(1000)), encoding="utf-8")
    return windows.Job(model, tmp_path / "out", tmp_path / "text.txt", tokens, length, 0.0)


def test_windows_lie_evenly_over_the_text_behind_what_opens_one(model: Path, tmp_path: Path) -> None:
    found = windows.windows(job(model, tmp_path, 50, 11))  # 5 windows of <s> and 10 bytes; 990 / 4 between them
    assert [ids[0] for ids in found] == [256] * 5
    assert [len(ids) for ids in found] == [11] * 5
    starts = [0, 247, 495, 742, 990]
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    assert [ids[1] for ids in found] == [letters[chr(97 + start % 26)] for start in starts]


def test_a_text_too_short_is_refused_with_both_numbers(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has 1,000 tokens; 101 windows of 10 need 1,010"):
        windows.windows(job(model, tmp_path, 101 * 11, 11))


def test_groups_divide_every_width(model: Path) -> None:
    assert windows.group(model) == 64  # widths 64 and 128


def test_the_first_blocks_of_a_checkpoint(model: Path, tmp_path: Path) -> None:
    made = calibrating.shortened(model, tmp_path / "short", 1)
    kept = json.loads((made / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    assert {name.split(".")[2] for name in kept if name.startswith("model.layers.")} == {"0"}
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= set(kept)
    assert json.loads((made / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"] == 1
    assert all((made / shard).is_file() for shard in kept.values())


def test_memory_of_children_counts_and_so_does_the_disk(tmp_path: Path) -> None:
    inner = "import time; kept = bytearray(b'x') * 80_000_000; time.sleep(0.3)"
    outer = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}]); open('f', 'wb').write(b'x' * 9000)"
    )
    found = watched(
        [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {outer}; sys.exit('end')"], [tmp_path]
    )
    assert found.peak > 80_000_000
    assert found.disk >= 9000
    assert (found.code, found.complaints.strip()) == (1, "end")


def test_a_peer_that_is_not_there_says_how_it_is_installed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrating, "python", lambda name: tmp_path / name)
    said = calibrating.run("auto-round", model, tmp_path / "out", tmp_path, (4, 16, 0))
    assert said == "not installed: python benchmarks/peers/setup.py autoround"


@pytest.mark.usefixtures("installed")
def test_what_is_apart_is_left_out_and_few_blocks_count_for_all(model: Path, tmp_path: Path) -> None:
    def told(name: str, few: int) -> calibrating.Told:
        found = calibrating.run(name, model, tmp_path / f"out{few}{name}", Path("good"), (4, 16, few))
        assert isinstance(found, calibrating.Told)
        return found

    few, whole, apart = told("auto-round", 1), told("auto-round", 0), told("llama.cpp Q4_K_M", 1)
    assert few.tokens == 64
    assert few.seconds - few.ran.wall == pytest.approx(100.0)  # 1 block of 2 took 100 s: the other as long
    assert "timed on 1 of 2 blocks" in few.note
    assert whole.seconds == whole.ran.wall
    assert apart.seconds - apart.ran.wall == pytest.approx(3.0)
    assert "without convert" in apart.note


@pytest.mark.usefixtures("installed")
def test_a_peer_that_fails_is_a_row_with_its_last_words(model: Path, tmp_path: Path) -> None:
    assert (
        calibrating.run("auto-round", model, tmp_path / "out", Path("bad"), (4, 16, 0)) == "ended with 1: it is broken"
    )
