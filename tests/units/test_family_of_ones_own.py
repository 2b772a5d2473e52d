"""A user's own family table: given for a command, kept in a folder, or beside the model; carried by the artifact."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import regauge as rg
from regauge.cli.main import main
from regauge.errors import ModelError, UnknownArchitecture
from regauge.hosts.transformers import tables
from regauge.hosts.transformers.laws import check_family
from tests.architectures import build, inputs, randomise
from tests.units.test_architectures import apart, run

MINE = "types: [arcee]\nlike: llama\nsites: {mlp.gate: null}\n"


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """Arcee: no table of regauge's describes it."""
    from transformers import ArceeConfig, ArceeForCausalLM

    sizes = {"hidden_size": 40, "intermediate_size": 52, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = ArceeConfig(num_hidden_layers=2, vocab_size=97, max_position_embeddings=64, head_dim=10, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = ArceeForCausalLM(config)
        randomise(made)
    made.save_pretrained(tmp_path / "model")
    return made.eval()


def written(path: Path, text: str = MINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_given_for_a_command_goes_into_the_artifact(model: Any, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(UnknownArchitecture, match="'arcee'; to add one, copy llama"):
        rg.inspect(tmp_path / "model")
    file, given = written(tmp_path / "mine.yaml"), inputs(model)
    assert main(["inspect", str(tmp_path / "model"), "--family", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "arcee"
    out = tmp_path / "out"
    assert main(["apply", "rtn-w8", str(tmp_path / "model"), "-o", str(out), "--family", str(file), "-q"]) == 0
    file.unlink()
    assert apart(run(rg.load(out), given), run(model, given)) < 0.05
    assert yaml.safe_load((out / "regauge" / "family.yaml").read_text())["types"] == ["arcee"]
    with pytest.raises(UnknownArchitecture):
        rg.inspect(tmp_path / "model")


def test_a_table_beside_the_model_or_in_the_users_folder(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    written(folder / "family.yaml")
    assert rg.inspect(folder).family == "arcee"
    (folder / "family.yaml").unlink()
    monkeypatch.setattr(tables, "user_folder", lambda: tmp_path / "own")
    written(tmp_path / "own" / "arcee.yaml")
    assert rg.inspect(folder).family == "arcee"


def test_the_check_of_a_table(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = written(tmp_path / "mine.yaml"), str(tmp_path / "model")
    assert main(["family", "check", str(file), folder]) == 0
    told = capsys.readouterr().out
    assert "every parameter is described" in told
    assert "as transformers computes it: holds" in told
    assert "rotate on 8 streams: holds" in told
    assert main(["family", "check", str(file), folder, "--json"]) == 0
    assert {law["name"] for law in json.loads(capsys.readouterr().out)["laws"]} >= {"fold", "permute", "scale"}


def test_a_table_that_admits_what_changes_the_function_does_not_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MPT's heads have slopes of their own; bloom's likewise. A table that forgets it is found out, with the stream."""
    build("mpt").save_pretrained(tmp_path / "model")
    file = written(tmp_path / "mine.yaml", "types: [mpt]\nlike: mpt\nstops: []\n")
    assert main(["family", "check", str(file), str(tmp_path / "model")]) == 1
    told = capsys.readouterr().out
    assert re.search(r"permute on \d+ streams: does not hold \(first on blocks\.0\.heads\)", told)
    found = check_family(None, tmp_path / "model")
    assert found.holds
    assert "ALiBi gives each head a slope of its own" in found.stops["permute of blocks.N.heads"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("types: [arcee]\nlike: lama\n", "no table 'lama' to be like"),
        ("types: [arcee]\nlike: llama\nstes: {}\n", "stes: Extra inputs are not permitted"),
        ("types: [arcee]\nlike: llama\nsites: {attn.z: self_attn.q_proj}\n", "site attn.z ends in no kind of site"),
        ("[1, 2]", "holds no family table"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_no_table(text: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=why), tables.family(written(tmp_path / "mine.yaml", text)):
        pass
    with pytest.raises(ModelError, match="there is no file"), tables.family(tmp_path / "none.yaml"):
        pass


def test_a_table_that_forgets_a_parameter_names_it(model: Any, tmp_path: Path) -> None:
    file = written(tmp_path / "mine.yaml", MINE.replace("mlp.gate: null", "mlp.gate: null, mlp.up: null"))
    with pytest.raises(ModelError, match=r"describes no parameter 'model\.layers\.0\.mlp\.up_proj\.weight'"):
        check_family(file, tmp_path / "model")
