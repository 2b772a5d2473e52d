"""What a user chooses beside a preset: embedding and head, groups that do not divide, names from other tools."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import regauge as rg
from pico import pico, save
from regauge.cli import main
from regauge.errors import RecipeError
from regauge.plan import load, presets
from regauge.plan.elsewhere import LIST, known_elsewhere
from regauge.plan.outer import with_outer
from regauge.plan.presets import finer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return save(pico("llama"), folder)  # not tied


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths of 192 and 256: groups of 128 cut one of them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=192, intermediate_size=256, num_hidden_layers=1, num_attention_heads=3, vocab_size=53
    )
    folder = tmp_path_factory.mktemp("wide")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_embedding_and_head_take_what_is_written(model: Path, tmp_path: Path) -> None:
    receipt = rg.apply("rtn-w8", model, tmp_path / "out", embed="int8", head="int6-g32")
    took = {site.name: site.choice for site in receipt.sites}
    assert took["embed"] is not None
    assert (took["embed"]["grid"], took["embed"]["grain"]) == ("int8", "channel")
    assert took["head"] is not None
    assert took["head"]["grid"] == "int6"
    loaded = rg.load(tmp_path / "out", dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert loaded(input_ids=ids).logits.isfinite().all()


def test_full_takes_a_recipes_own_choice_back() -> None:
    plan = with_outer(with_outer(load("rtn-w8"), embed="int8"), embed="full")
    assert plan.rules[-1].point is None
    assert with_outer(load("rtn-w8")) is load("rtn-w8")


@pytest.mark.parametrize("text", ["int9", "8", "int8-g", "int8-g0", "", "INT8", "int6-x32", "group:32"])
def test_what_is_no_format_is_a_sentence(text: str) -> None:
    with pytest.raises(RecipeError, match="--embed") as caught:
        with_outer(load("rtn-w8"), embed=text)
    assert len(str(caught.value)) < 300


def test_a_tied_head_is_not_chosen_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tied = save(pico("llama-tied"), tmp_path / "tied")
    assert main(["apply", "rtn-w8", str(tied), "-o", str(tmp_path / "out"), "--head", "int8"]) == 2
    assert "head is tied to embed" in capsys.readouterr().err


def test_a_preset_falls_to_smaller_groups_before_a_channel() -> None:
    assert finer(128) == "group:64 else group:32 else channel"
    assert finer(32) == "channel"
    assert "group:64" in str(load("rtn-w4g128").rules[0].point)


def test_all_matrices_take_one_group_where_that_keeps_the_file_readable_by_others(wide: Path, tmp_path: Path) -> None:
    told = rg.dry_run("rtn-w4g128", wide)
    assert told.wire == "compressed-tensors"
    grains = {str(site.choice["grain"]) for site in told.sites if site.choice is not None}
    assert grains == {"group:64"}
    own = rg.dry_run("rtn-w4g128", wide, wire="regauge")  # our own says both
    assert {str(s.choice["grain"]) for s in own.sites if s.choice is not None} == {"group:64", "group:128"}
    code_book = rg.dry_run("fp4-g128", wide)  # nothing is gained there: others do not read it at all
    assert {str(s.choice["grain"]) for s in code_book.sites if s.choice is not None} == {"group:64", "group:128"}


@pytest.mark.parametrize("name", ["Q4_K_M", "q8_0", "IQ2_XXS", "awq", "AWQ-w4-g128", "w4a16", "autoround"])
def test_names_of_other_tools_lead_to_ours(name: str) -> None:
    for ask in (load, rg.explain):
        with pytest.raises(RecipeError, match=name) as caught:
            ask(name)  # type: ignore[operator]  # both take a name
        assert "regauge" in str(caught.value) or "nearest" in str(caught.value)


def test_every_name_that_is_led_to_exists() -> None:
    for known in LIST:
        for bits in "48":
            here = known.here.replace(r"\g<bits>", bits)
            assert not here or here in presets(), here
    assert known_elsewhere("gptq-w4g128") == ""
