"""Every bad input of a user gets one clear sentence and an exit code, loses nothing, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from regauge.cli import main
from tests.pico import pico, save
from tests.words import save_tokenizer

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(pico("qwen3"), tmp_path_factory.mktemp("pristine") / "model")
    return save_tokenizer(folder)


@dataclass
class Desk:
    """A directory with a good model and a good text, which a test may spoil before it runs a command in it."""

    root: Path
    capsys: Capture

    @property
    def model(self) -> Path:
        return self.root / "model"

    def text(self, content: str | bytes, name: str = "text.txt") -> str:
        path = self.root / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def recipe(self, content: str) -> str:
        return self.text(content, "mine.yaml")

    def edit(self, **changes: Any) -> None:
        path = self.model / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(config))

    def weights(self, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        path = self.model / "model.safetensors"
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    def state(self) -> dict[str, bytes]:
        return {str(path.relative_to(self.root)): path.read_bytes() for path in self.root.rglob("*") if path.is_file()}

    def refused(self, *arguments: str, code: int = 2) -> str:
        """The one sentence of a command that must fail; nothing may be written or changed."""
        before = self.state()
        self.capsys.readouterr()
        found = main(list(arguments))
        told = self.capsys.readouterr()
        assert found == code, told.err
        assert "Traceback" not in told.err
        assert "this is a bug" not in told.err
        lines = [line for line in told.err.splitlines() if not line.startswith(("open: ", "text: "))]
        assert len(lines) == 1, told.err
        assert lines[0].startswith("regauge: ")
        assert told.out == ""
        assert self.state() == before, "something was left behind or lost"
        return lines[0].removeprefix("regauge: ")

    def apply(self, recipe: str = "rtn-w4", *more: str, code: int = 2) -> str:
        return self.refused("apply", recipe, str(self.model), "-o", str(self.root / "out"), *more, code=code)


@pytest.fixture
def desk(pristine: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> Desk:
    shutil.copytree(pristine, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return Desk(tmp_path, capsys)


# The model.


def test_no_such_model(desk: Desk) -> None:
    told = desk.refused("apply", "rtn-w4", str(desk.root / "modle"), "-o", "out")
    assert told == f"there is no directory {desk.root / 'modle'} (did you mean 'model'?)"
    assert "there is no directory nobody/has-this" in desk.refused("inspect", "nobody/has-this")


def test_a_directory_without_config(desk: Desk) -> None:
    (desk.model / "config.json").unlink()
    assert "has no config.json, so it is no transformers model" in desk.apply()


def test_an_unknown_architecture(desk: Desk) -> None:
    desk.edit(model_type="reformer", architectures=["ReformerModelWithLMHead"])
    told = desk.apply()
    assert "reformer" in told
    assert ".yaml" in told, "it names the table to copy"


def test_pickle_weights_only(desk: Desk) -> None:
    (desk.model / "model.safetensors").unlink()
    (desk.model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    told = desk.apply()
    assert "pickle" in told
    assert "safetensors" in told


def test_no_weights_at_all(desk: Desk) -> None:
    (desk.model / "model.safetensors").unlink()
    assert "safetensors" in desk.apply()


def test_a_truncated_file(desk: Desk) -> None:
    path = desk.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    told = desk.apply()
    assert "model.safetensors" in told
    assert "bytes" in told


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 64, b"\x10\0\0\0\0\0\0\0{not json at all}"])
def test_a_corrupt_file(desk: Desk, content: bytes) -> None:
    (desk.model / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in desk.apply()


def test_a_missing_tensor(desk: Desk) -> None:
    def lose(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.down_proj.weight"]

    desk.weights(lose)
    assert "model.layers.1.mlp.down_proj.weight" in desk.apply()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_with_nan(desk: Desk, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value

    desk.weights(spoil)
    told = desk.apply()
    assert "down_proj" in told or "blocks.1.mlp.down" in told
    assert "NaN" in told or "infinity" in told


def test_a_tokenizer_missing_where_text_is_needed(desk: Desk) -> None:
    for path in desk.model.glob("*token*"):
        path.unlink()
    text = desk.text("def return self " * 400)
    assert "has no tokenizer" in desk.apply("gptq-w4", "--calibration", text)


def test_a_source_that_asks_for_remote_code(desk: Desk) -> None:
    desk.edit(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}, model_type="evil", architectures=["Evil"])
    (desk.model / "modeling_evil.py").write_text("raise SystemExit('this ran')\n")
    assert "code" in desk.apply()


# The text.


@pytest.mark.parametrize(
    ("content", "piece"),
    [
        (b"", "is empty"),
        (b" \n\t \n", "is empty"),
        (b"def\0return" * 99, "is binary"),
        (b"\xff\xfe\x80abc" * 99, "is not UTF-8"),
        (b"def return self", "token"),
    ],
)
def test_unusable_calibration_text(desk: Desk, content: bytes, piece: str) -> None:
    assert piece in desk.apply("gptq-w4", "--calibration", desk.text(content))


def test_no_such_text(desk: Desk) -> None:
    assert "there is no text at 'nowhere.txt'" in desk.apply("gptq-w4", "--calibration", "nowhere.txt")


def test_a_directory_without_text(desk: Desk) -> None:
    (desk.root / "empty").mkdir()
    assert "no files" in desk.apply("gptq-w4", "--calibration", str(desk.root / "empty"))


def test_fewer_tokens_than_asked_for(desk: Desk) -> None:
    text = desk.text("def return self " * 100)
    told = desk.apply("gptq-w4", "--calibration", text, "--tokens", "100000")
    assert "100,000" in told or "100000" in told


# The recipe.


@pytest.mark.parametrize(
    ("recipe", "pieces"),
    [
        ("rulez:\n  '*': full\n", ["mine.yaml, line 1", "unknown key 'rulez'", "did you mean 'rules'"]),
        ("rules:\n  '*': {grid: int4, grian: channel}\n", ["mine.yaml, line 2", "did you mean 'grain'"]),
        ("rules:\n  '*': {grid: int4, grain: chanel}\n", ["did you mean 'channel'"]),
        ("rules: [", ["mine.yaml, line 1", "this is not YAML"]),
        ("", ["mine.yaml", "the recipe is empty"]),
        ("rules:\n  blocks.7.*: {grid: int4, grain: channel}\n", ["selector 'blocks.7.*' matches nothing"]),
        ("rules:\n  '*': {grid: int4, grain: 'group:16'}\n", ["groups of 16 do not divide a width of 29"]),
        ("rules:\n  '*': {grid: int4, grain: 'group:0'}\n", ["at least one weight, not 0"]),
        (
            "rules:\n  '*': {grid: int4, grain: channel, ranger: absmax, rounder: importance}\n",
            ["works through ranger search"],
        ),
        (
            "rules:\n  embed: {grid: int4, grain: channel, rounder: gptq}\n",
            ["needs hessian of an input", "a table looked up by index has none"],
        ),
        ("rewrites: [rotate]\n", ["fold-norm"]),
        ("rewrites: [layernorm-to-rms, fold-norm, rotate:residual+valeu]\n", ["rotate"]),
        ("rules:\n  '*': {grid: 'nobody.home:Grid', grain: channel}\n", ["cannot be imported", "nobody"]),
    ],
)
def test_a_wrong_recipe(desk: Desk, recipe: str, pieces: list[str]) -> None:
    told = desk.apply(desk.recipe(recipe))
    for piece in pieces:
        assert piece in told


def test_no_such_preset_or_file(desk: Desk) -> None:
    assert "there is no preset 'gptq-w4g12' (did you mean 'gptq-w4g128'?)" in desk.apply("gptq-w4g12")
    assert "there is no recipe file none.yaml" in desk.apply("none.yaml")


def test_a_format_that_cannot_say_the_recipe(desk: Desk) -> None:
    told = desk.apply("nf4", "--wire", "compressed-tensors")
    assert "compressed-tensors cannot express this plan" in told
    assert "there is no such format (known: compressed-tensors, regauge)" in desk.apply("rtn-w4", "--wire", "gguff")


def test_several_things_wrong_at_once(desk: Desk) -> None:
    (desk.root / "out").mkdir()
    (desk.root / "out" / "mine").write_text("precious")
    recipe = desk.recipe("rules:\n  nothing: full\n  '*': {grid: int4, grain: 'group:16'}\n")
    told = desk.apply(recipe)
    assert "selector 'nothing' matches nothing" in told
    assert "exists" in told


# The output.


def test_an_output_that_exists(desk: Desk) -> None:
    (desk.root / "out").mkdir()
    (desk.root / "out" / "mine").write_text("precious")
    told = desk.apply()
    assert "out exists" in told
    assert "--force" in told
    assert "was not made by regauge" in desk.apply("rtn-w4", "--force")


def test_an_output_that_is_a_file(desk: Desk) -> None:
    (desk.root / "out").write_text("precious")
    assert "out exists" in desk.apply()


def test_an_output_below_a_file(desk: Desk) -> None:
    (desk.root / "file").write_text("precious")
    told = desk.refused("apply", "rtn-w4", str(desk.model), "-o", "file/out", code=2)
    assert "file/out" in told


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_cannot_be_written(desk: Desk) -> None:
    (desk.root / "shut").mkdir(mode=0o500)
    assert "permission denied" in desk.refused("apply", "rtn-w4", str(desk.model), "-o", "shut/out").lower()


# Budgets.


@pytest.mark.parametrize(
    ("budget", "piece"),
    [
        ("memory", "is not a budget; write NAME=AMOUNT"),
        ("memory=", "memory="),
        ("memory=abc", "abc"),
        ("memory=0.3y", "0.3y"),
        ("memmory=0.3x", "did you mean 'memory'"),
        ("latency=2x", "latency"),
        ("memory=-0.3x", "memory=-0.3x"),
        ("decode=5", "decode"),
        ("memory@lots=1GB", "lots"),
        ("memory=0.001x", "memory"),
    ],
)
def test_a_wrong_budget(desk: Desk, budget: str, piece: str) -> None:
    told = desk.refused("fit", str(desk.model), "-o", "out", "--budget", budget)
    assert piece in told


def test_an_impossible_budget_says_how_near_it_came(desk: Desk) -> None:
    told = desk.refused("fit", str(desk.model), "-o", "out", "--budget", "memory=0.01x")
    assert any(character.isdigit() for character in told.replace("0.01", ""))


def test_a_budget_given_twice(desk: Desk) -> None:
    told = desk.refused("fit", str(desk.model), "-o", "out", "--budget", "memory=0.3x", "--budget", "memory=0.4x")
    assert "given twice" in told


@pytest.mark.parametrize("floor", ["kl", "kl=much", "ppl=3", "kl=-1"])
def test_a_wrong_floor(desk: Desk, floor: str) -> None:
    assert floor.partition("=")[0] in desk.refused("fit", str(desk.model), "-o", "out", "--floor", floor)


# What other commands are given.


def test_a_run_that_is_none(desk: Desk) -> None:
    assert "holds no receipt" in desk.refused("report", str(desk.model))
    assert "holds no run record" in desk.refused("pick", str(desk.model), "0", "-o", "out")


# The machine.


def test_a_full_disk(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills while a shard is written: a sentence, no OUT; with room again the same command ends well."""
    from regauge.artifact import staging

    calls = 0
    whole = staging.os.replace

    def full(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(source, target)

    monkeypatch.setattr(staging.os, "replace", full)
    assert main(["apply", "rtn-w4", str(desk.model), "-o", "out"]) == 1
    told = desk.capsys.readouterr()
    assert "the disk is full" in told.err
    assert "Traceback" not in told.err
    assert not (desk.root / "out").exists()
    monkeypatch.undo()
    assert main(["apply", "rtn-w4", str(desk.model), "-o", str(desk.root / "out")]) == 0
    assert not (desk.root / "out.partial").exists()


def test_a_disk_too_small_is_refused_before_any_work(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    from regauge.engine import api

    def small(out: Path, needed: int) -> None:
        from regauge.artifact.staging import check_disk

        check_disk(out, 10**18)

    monkeypatch.setattr(api, "check_disk", small)
    assert "GB free" in desk.apply()


@pytest.mark.long
def test_ctrl_c_and_the_same_command_again(desk: Desk) -> None:
    """Interrupted while it works, `apply` says so, leaves no OUT, and goes on when it is run again."""
    text = desk.text("def return self import for in if else " * 2000)
    command = ["apply", "gptq-w4", str(desk.model), "-o", "out", "--calibration", text, "--tokens", "8192"]
    code = (
        "import signal, sys, os\n"
        # A background shell hands SIGINT down ignored; the terminal that this test stands for does not.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from regauge.artifact.staging import Staging\n"
        "from regauge.cli import main\n"
        "write, n = Staging.write, [0]\n"
        "def slow(*a, **k):\n"
        "    n[0] += 1\n"
        "    if n[0] == 2: print('ready', flush=True); import time; time.sleep(60)\n"
        "    return write(*a, **k)\n"
        "Staging.write = slow\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, *command], cwd=desk.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told.splitlines()[-1].startswith("regauge: interrupted; what was finished is kept")
    assert "Traceback" not in told
    assert not (desk.root / "out").exists()
    assert main(command) == 0
    assert (desk.root / "out" / "config.json").exists()
    assert not (desk.root / "out.partial").exists()


def test_debug_shows_the_traceback() -> None:
    command = [sys.executable, "-m", "regauge", "explain", "rtn-w99"]
    plain = subprocess.run(command, capture_output=True, text=True)
    assert plain.returncode == 2
    assert plain.stderr.startswith("regauge: nothing is called 'rtn-w99'")
    assert plain.stderr.count("\n") == 1
    shown = subprocess.run([*command, "--debug"], capture_output=True, text=True)
    assert shown.returncode == 1
    assert "Traceback" in shown.stderr
    assert "RecipeError: nothing is called 'rtn-w99'" in shown.stderr
