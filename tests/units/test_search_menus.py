"""What `fit` may choose from: only what a runtime loads, only what some presets make of a matrix; texts as asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from regauge.artifact.codec.base import Layout
from regauge.artifact.codec.schemes import refusals
from regauge.artifact.folder import read_config
from regauge.cli import main
from regauge.errors import BudgetError, RecipeError, SettingError, TextError
from regauge.hosts.transformers.source import Source
from regauge.plan.resolution import resolve
from regauge.search import record
from regauge.search.fit import fit, pick
from regauge.search.loop.desk import Effort
from regauge.search.menus import Menu, groups_of, parse
from regauge.search.options import FULL, plan_of
from tests.tiny import TEXT, folder
from tests.units.test_search_fit import _small  # noqa: F401  # a fixture

SIZES = {"hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 6, "num_key_value_heads": 2}
SIZES["head_dim"] = 16
"""What groups of 32 divide; keys and values alone are too small to be worth rounding."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("menus") / "model", "llama", **SIZES)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{TEXT}{i % 10} {i}.\n\n" for i in range(60)), encoding="utf-8")
    return path


def names(model: Path, *menu: object) -> dict[str, list[str]]:
    groups = groups_of(Source.open(model).anatomy, Menu(*menu))  # type: ignore[arg-type]  # a target and methods
    return {group.name: [option.name for option in group.options] for group in groups}


@pytest.mark.parametrize("target", ["transformers", "vllm", "sglang"])
def test_whatever_is_chosen_for_others_can_be_said_to_them(model: Path, target: str) -> None:
    source = Source.open(model)
    groups = groups_of(source.anatomy, Menu(target))
    for shift in range(7):  # mixtures: what each has alone says nothing of several
        picks = {group.name: group.options[(place + shift) % len(group.options)] for place, group in enumerate(groups)}
        plan = plan_of(picks, groups, "mixed", "", 512, 128)
        choices = resolve(plan, source.anatomy).choices
        assert refusals(Layout(source.anatomy, source.anatomy, choices, torch.float32)) == []
    found = names(model, target)
    assert "embed" not in found
    bits = {option.bits for group in groups for option in group.options if option.choice is not None}
    assert bits == ({2, 3, 4, 5, 6, 8} if target == "transformers" else {4, 8})
    stacked = [group for group in groups if {site.kind for site in group.sites} == {"q", "k", "v"}]
    assert len(stacked) == (0 if target == "transformers" else source.anatomy.blocks)
    assert ("head" in found) == (target == "transformers")


def test_methods_are_the_points_that_their_presets_give(model: Path) -> None:
    found = names(model, None, ("gptq-w4g32", "rtn-w8"))
    assert set(map(tuple, found.values())) == {("gptq-w4g32", "rtn-w8", FULL)}
    assert all(name.startswith("blocks.") for name in found)  # presets name neither embedding nor head
    (group, *_) = groups_of(Source.open(model).anatomy, Menu(None, ("rtn-w8",)))
    point = group.option("rtn-w8").choice
    assert point is not None
    assert (point.name("grid"), point.name("grain"), point.name("rounder")) == ("int8", "channel", "nearest")
    both = names(model, None, ("gptq-w4g128", "gptq-w4g32"))["blocks.0.attn.q"]
    assert both == ["gptq-w4g128", FULL]  # 96 channels fall to groups of 32: one point is one option
    assert {"imatrix-w2g32", "imatrix-w8g32"} < set(names(model, None, ("imatrix",))["blocks.0.mlp.down"])


def test_one_format_with_zero_points_loads_elsewhere_and_several_do_not(model: Path) -> None:
    assert names(model, "vllm", ("gptq-w4g32",))["blocks.0.attn.q"] == ["gptq-w4g32", FULL]
    assert names(model, "vllm", ("gptq-w4g32", "rtn-w8"))["blocks.0.attn.q"] == ["rtn-w8", FULL]


@pytest.mark.parametrize(
    ("target", "methods", "error", "why"),
    [
        ("vlm", None, SettingError, "nothing is known of the runtime 'vlm' (did you mean 'vllm'?)"),
        (None, "gtq-w4g128", RecipeError, "there is no preset 'gtq-w4g128' (did you mean 'gptq-w4g128'?)"),
        (None, " , ", RecipeError, "--methods names none"),
        (None, "smoothquant", RecipeError, "also rewrites the model before it is rounded"),
        (None, "rtn-w8a8,rtn-w8", RecipeError, "rtn-w8a8 also rounds activations; use 'regauge apply rtn-w8a8'"),
        (None, "neurons-75", RecipeError, "also takes units out"),
        (None, "omniquant", RecipeError, "also rewrites the model before it is rounded"),
        (None, "omniquant-lwc-w4g128", RecipeError, "also learns by the error of whole blocks"),
        ("vllm", "nf4,gptq-w3g32", RecipeError, "vllm multiplies by integers of 4 and 8 bits"),
        ("vllm", "gptq-w4g32,rtn-w4", RecipeError, "reads zero points only where every quantised matrix has the same"),
        ("transformers", "nf4", RecipeError, "--for transformers and --methods nf4 leave nothing to choose from"),
    ],
)
def test_what_leaves_nothing_to_choose_from_is_a_sentence_before_any_work(
    target: str | None, methods: str | None, error: type[Exception], why: str, model: Path, tmp_path: Path
) -> None:
    for dry_run in (True, False):
        with pytest.raises(error) as found:
            fit(model, tmp_path / "out", for_=target, methods=methods, dry_run=dry_run)
        assert why in str(found.value)
    assert not list(tmp_path.iterdir())


def test_texts_are_as_long_as_asked(model: Path, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="--tokens 100 is less than two windows of 64 tokens; give 128 or more"):
        fit(model, tmp_path / "out", tokens=100, length=64)
    with pytest.raises(TextError, match=r"longer than the .* that the model reads at once"):
        fit(model, tmp_path / "out", length=1 << 20)
    with pytest.raises(TextError, match="give --length 16 or more"):
        fit(model, tmp_path / "out", length=4)
    (told,) = [note for note in fit(model, tmp_path / "out", tokens=900, dry_run=True).notes if "passes" in note]
    assert "the artifact over 900" in told
    assert "one forward over 900 calibration" in told


def test_less_time_takes_no_fewer_tokens_than_asked() -> None:
    asked = Effort().calibrating(20000)
    assert [effort.calibration for effort in asked.lesser()] == [20000] * 4
    assert [effort.calibration for effort in Effort().lesser()][-1] == 4096
    assert asked.sized(10**10).calibration == 20000
    assert Effort().calibrating(1000).seen == 1000


def test_a_menu_is_spelt_in_both_worlds() -> None:
    assert parse("vllm", "rtn-w8, gptq-w8,rtn-w8") == parse("vllm", ["rtn-w8", "gptq-w8"])
    assert parse(None, None) == Menu()


def test_fit_for_another_runtime_writes_its_format_and_pick_knows_the_menu(
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    words = ["fit", str(model), "-o", str(out), "--calibration", str(text), "-q", "--json", "--for", "vllm"]
    words += ["--methods", "rtn-w8,gptq-w8,imatrix-w4g32", "--length", "64", "--tokens", "512"]
    with pytest.raises(BudgetError, match="the smallest that we can make"):
        fit(model, out, ["memory=0.1x"], for_="vllm")
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["calibration"]["methods"] == ["rtn-w8", "gptq-w8", "imatrix-w4g32"]
    run = record.read(out)
    assert {site.option for site in run.sites} <= {"rtn-w8", "gptq-w8", FULL}
    assert read_config(out)["quantization_config"]["quant_method"] == "compressed-tensors"
    assert run.texts[0].tokens == 512
    other = (run.chosen + 1) % len(run.points)
    receipt = pick(out, other, tmp_path / "other")
    assert receipt.wire == "compressed-tensors"
    assert receipt.calibration["shape"] == [8, 64]
