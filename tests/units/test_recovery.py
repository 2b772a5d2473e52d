"""Recovery: what stayed in full precision is trained towards the original; the artifact is whole before and after."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from regauge.artifact.files import read
from regauge.artifact.reader import open_artifact
from regauge.cli import main
from regauge.engine import apply
from regauge.engine.recovery import Asked, recover
from regauge.engine.recovery_cost import planned
from regauge.engine.recovery_text import LOOKS, Amounts, Pace
from regauge.engine.watchdog import Progress
from regauge.errors import ArtifactError, BudgetError, ModelError, RegaugeError, TextError
from regauge.hosts.transformers.load import load
from regauge.learn import left, loop
from regauge.plan import parse
from tests.pico import pico, save
from tests.words import save_tokenizer, text

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TWO = "{grid: int2-asym, grain: group:16, scale: bf16}"
TEXT = [text(3000, seed) for seed in range(2)]
FEW = Amounts(tokens=512, length=32, steps=16)
ONE = Amounts(tokens=64, length=32, steps=1)


def made(folder: Path, family: str = "llama", point: str = TWO, more: str = "", **sizes: Any) -> Path:
    """A compressed pico beside its original, which lies in `folder / "model"`."""
    model = save_tokenizer(save(pico(family, **(sizes or SIZES)), folder / "model"))
    apply(parse(f"name: two\nweights:\n  blocks.*: {point}\n{more}"), model, folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("recover"))


def contents(out: Path) -> dict[str, bytes]:
    files = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    files.pop("regauge/run-log.json")
    return files


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return {name: one for path in sorted(out.glob("*.safetensors")) for name, one in read(path).items()}


def test_it_is_nearer_to_the_original_on_text_that_it_never_saw(artifact: Path, tmp_path: Path) -> None:
    before = contents(artifact)
    told: Any = recover(artifact, TEXT, asked=Asked(FEW, out=tmp_path / "better")).recovered
    assert told["after"] < 0.9 * told["before"]
    assert contents(artifact) == before
    old, new = open_artifact(artifact).block(0), open_artifact(tmp_path / "better").block(0)
    for site, codes in old.codes.items():
        assert torch.equal(codes.codes_OI, new.codes[site].codes_OI)
        assert not torch.equal(codes.step.scale_G1, new.codes[site].step.scale_G1)
    assert not torch.equal(old.weights["blocks.0.attn.norm.gain"], new.weights["blocks.0.attn.norm.gain"])
    again: Any = recover(tmp_path / "better", TEXT, asked=Asked(ONE, out=tmp_path / "again")).recovered
    assert again["before"] == told["after"]  # what was measured is what was stored


@pytest.mark.parametrize(
    ("family", "point", "sizes"),
    [
        ("llama", TWO, SIZES),
        ("gemma2", "{grid: int4, grain: 'channel', rounder: nearest}", {}),
        ("gpt_neox", "{grid: nf4, grain: 'channel', scale: f16}", {}),
        ("llama-tied", "{grid: fp4, grain: 'group:16', ranger: absmax, scale: nv}", SIZES),
    ],
)
def test_where_nothing_is_learnt_nothing_changes(
    family: str, point: str, sizes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor, to the bit; an embedding in full precision and gains with an offset among them."""
    out = made(tmp_path, family, point, **sizes)
    monkeypatch.setattr(left, "RATES", dict.fromkeys(left.RATES, 0.0))
    told: Any = recover(out, TEXT, asked=Asked(ONE, out=tmp_path / "same")).recovered
    assert told["after"] == told["before"]
    was, now = tensors(out), tensors(tmp_path / "same")
    assert was.keys() == now.keys()
    for name, one in was.items():
        offset = family == "gemma2" and "norm" in name  # the module adds 1, and what it then has is what is kept
        assert torch.equal(one + 1, now[name] + 1) if offset else torch.equal(one, now[name])
        assert one.dtype == now[name].dtype


def test_stopped_at_any_step_it_ends_with_the_same_bytes(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """As if the process were gone."""

    def at(step: int) -> Any:
        def watch(event: Progress) -> None:
            if event.phase == "recovering" and event.done == step:
                raise Killed

        return watch

    monkeypatch.setattr(loop, "EVERY", 0.0)
    asked = Asked(Amounts(tokens=512, length=32, steps=9), out=tmp_path / "cut")
    for step in (3, 4, 8):
        with pytest.raises(Killed):
            recover(artifact, TEXT, asked=asked, progress=at(step))
        assert not (tmp_path / "cut").exists()
    seen: list[int] = []
    recover(artifact, TEXT, asked=asked, progress=lambda e: seen.append(e.done) if e.phase == "recovering" else None)
    assert min(seen) >= 7  # it went on
    whole = Asked(asked.amounts, out=tmp_path / "whole")
    recover(artifact, TEXT, asked=whole)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_block_that_is_run_again_has_the_same_gradients(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a model too large to keep what is computed on the way."""
    from regauge.engine import pupil

    recover(artifact, TEXT, asked=Asked(Amounts(tokens=256, length=32, steps=3), out=tmp_path / "kept"))
    monkeypatch.setattr(pupil, "HELD", 0)
    recover(artifact, TEXT, asked=Asked(Amounts(tokens=256, length=32, steps=3), out=tmp_path / "again"))
    assert contents(tmp_path / "kept") == contents(tmp_path / "again")


def test_low_rank_terms_are_added_and_loaded(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="compressed-tensors, which has no low-rank terms"):
        recover(artifact, TEXT, asked=Asked(FEW, rank=2, out=tmp_path / "no"))
    own = made(tmp_path, more="  embed: {grid: int8, grain: channel}\n")
    receipt = recover(own, TEXT, asked=Asked(FEW, rank=2))
    told: Any = receipt.recovered
    assert told["after"] < told["before"]
    found = open_artifact(own)
    block = found.block(1)
    (term,) = block.codes["blocks.1.mlp.down"].terms
    assert term.shape == (32, 48)
    assert term.tensors["left"].shape == (32, 2)
    assert bool((term.tensors["left"] != 0).any())
    assert receipt.bytes_after == sum(one.numel() * one.element_size() for one in tensors(own).values())
    x_TI = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    down = load(own, dtype=torch.float32).get_submodule("model.layers.1.mlp.down_proj")
    assert torch.allclose(down(x_TI), x_TI @ found.dense(block, "blocks.1.mlp.down").T, atol=1e-4)


def test_what_is_asked_wrongly_is_refused_before_any_work(artifact: Path, tmp_path: Path) -> None:
    before, out = contents(artifact), tmp_path / "out"
    other = save_tokenizer(save(pico("llama", 1, **SIZES), tmp_path / "other"))
    bare = tmp_path / "bare"
    shutil.copytree(artifact, bare)
    (bare / "regauge" / "receipt.json").unlink()
    wrong: list[tuple[type[RegaugeError], str, Any]] = [
        (ModelError, "is not what .* was made of", lambda: recover(artifact, TEXT, other, Asked(FEW, out=out))),
        (TextError, "too few to hold some out", lambda: recover(artifact, ["def"], asked=Asked(FEW, out=out))),
        (BudgetError, "a rank is 0", lambda: Asked(rank=-1)),
        (BudgetError, "1 or more steps", lambda: Asked(Amounts(steps=0))),
        (BudgetError, "does not suffice", lambda: recover(artifact, TEXT, asked=Asked(Amounts(time=1e-3), out=out))),
        (ArtifactError, "has no receipt", lambda: recover(bare, TEXT, asked=Asked(FEW, out=out))),
    ]
    for kind, message, call in wrong:
        with pytest.raises(kind, match=message):
            call()
        assert not out.exists()
    assert contents(artifact) == before


def test_the_command_says_what_it_would_do_and_what_it_did(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(TEXT), encoding="utf-8")
    typed = [
        "learn",
        "recover",
        str(artifact),
        "--text",
        str(file),
        "--length",
        "32",
        "--steps",
        "4",
        "--tokens",
        "256",
    ]
    assert main([*typed, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "nothing is written" in said
    assert "4 steps of 1,024 tokens at most" in said
    assert main([*typed, "-o", str(tmp_path / "better"), "-q"]) == 0
    assert "KL to the original" in capsys.readouterr().out
    assert (tmp_path / "better" / "regauge" / "report.html").exists()
    assert planned(artifact, TEXT, asked=Asked(FEW)).memory > 0


def test_steps_follow_from_the_time_there_is() -> None:
    pace = Pace(heard=0.001, step=1.0, look=2.0)
    assert pace.steps(1000, 1000, 1 << 30) == int((850 - (LOOKS + 2) * 2) / 2)  # each step's text is heard too
    assert pace.steps(1000, 1000, 10_000) == 850 - (LOOKS + 2) * 2 - 10
