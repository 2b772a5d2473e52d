"""Presets: flat, printed back to themselves, their parts built and their figures those of their formats."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest
import yaml

from regauge import parts
from regauge.errors import RecipeError
from regauge.parts import SHAPE, TABLE, Spec
from regauge.plan import diff, digest, dump, load, parse, patterns, preset_text, presets
from regauge.plan.forms import needs_of
from regauge.plan.sorting import sorting
from regauge.report.explanation import explain, facts, listing

FILES = sorted(file for file in (files("regauge") / "presets").iterdir() if file.name.endswith(".yaml"))


def test_the_issues_presets_are_there() -> None:
    names = presets()
    assert {
        f"{method}-w{bits}{group}" for method in ("rtn", "gptq") for bits in range(2, 9) for group in ("", "g128")
    } <= set(names)
    others = "imatrix-w4g32 smoothquant smoothquant-plus quarot-gptq-w4g128 fp8 fp8-weight-only fp4-g32 nvfp4 mxfp4 nf4"
    assert set(others.split()) <= set(names)
    assert "rtn-w8a8" in names
    assert len(names) == len(set(names))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_is_flat(file: object) -> None:
    text = file.read_text(encoding="utf-8")  # type: ignore[attr-defined]  # a Traversable
    lines = [line for line in text.splitlines() if not line.endswith(":") and not line.startswith("check:")]
    assert len(lines) < 12  # under a dozen, headings and checks aside
    rows = yaml.safe_load(text)
    known = (
        "name title cite differs row check calibration learning where rewrites family weights inputs cache attention"
    )
    known += " shape tokens products train"
    assert set(rows) <= set(known.split())
    assert rows["title"]
    assert rows["differs"]
    assert "cite" in rows or "no paper" in rows["differs"]
    for cite in rows.get("cite", []):
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}|https://\S+", cite)


@pytest.mark.parametrize("name", presets())
def test_a_preset_prints_back_to_itself(name: str) -> None:
    plan = load(name)
    assert plan.name == name
    assert dump(plan) == preset_text(name)
    assert parse(dump(plan)) == plan
    assert diff(plan, parse(dump(plan))) == ()
    assert digest(parse(dump(plan))) == digest(plan)
    assert "$" not in dump(plan)


def test_presets_of_different_names_do_different_things() -> None:
    seen: dict[str, str] = {}
    for name in presets():
        assert seen.setdefault(digest(load(name)), name) == name


@pytest.mark.parametrize("name", presets())
def test_every_part_of_a_preset_can_be_built(name: str) -> None:
    plan = load(name)
    reads = any(parts.build("rewrite", spec).needs for spec in sorting(plan))
    for rule in plan.rules:
        assert rule.point is not None
        parts.format_of(rule.point)
        reads |= bool(parts.rounder_of(rule.point).needs | parts.format_of(rule.point).ranger.needs)
    for rule in plan.of(SHAPE):
        assert rule.point is not None
        for axis, spec in rule.point:
            parts.build(axis, spec)
        reads = True  # what no move keeps is measured on text
    reads |= bool(needs_of({rule.select: rule.point for rule in plan.of("attention") if rule.point is not None}))
    assert reads == bool(plan.calibration), "a preset says how much text it reads if and only if it reads any"


@pytest.mark.parametrize(("axis", "name"), [(axis, name) for axis, table in TABLE.items() for name in table])
def test_every_part_is_named_built_and_told(axis: str, name: str) -> None:
    short = parts.part(axis, name).short
    needs = [key for key, option in parts.options(axis, name).items() if option.default is option.empty]
    made = parts.build(axis, parts.read(axis, f"{name}:8" if short in needs else name))
    if axis in ("grid", "ranger", "scale"):
        assert made.name.partition(":")[0] == name  # its bits stand behind
    told = explain(name)
    assert f"{name} ({axis}): {parts.describe(axis, name)}" in told
    assert parts.load(axis, name).__doc__
    assert not parts.describe(axis, name).endswith(".")


def test_bits_a_weight_by_hand() -> None:
    def bits(name: str) -> object:
        rules = facts(name)[0]["rules"]
        assert isinstance(rules, list)
        return rules[0]["bits"]

    assert bits("rtn-w4g128") == pytest.approx(4 + 16 / 128 + 4 / 128)
    assert bits("rtn-w4") == pytest.approx(4 + (16 + 4) / 4096)
    assert bits("rtn-w8a8") == pytest.approx(8 + 32 / 4096)
    assert bits("nvfp4") == pytest.approx(4 + 8 / 16 + 32 / 4096**2)
    assert bits("mxfp4") == pytest.approx(4 + 8 / 32)
    assert bits("nf4") == pytest.approx(4 + 16 / 64)
    assert bits("fp8") == pytest.approx(8 + 32 / 4096)
    assert bits("zeroquant-fp") == pytest.approx(4 + 8 / 256 + 32 / 4096 + 8 * 16 * 2 / 4096)


def test_how_it_is_stored() -> None:
    assert "4.16 bits a weight on 4096 × 4096\n  stored as compressed-tensors, pack-quantized\n" in explain(
        "gptq-w4g128"
    )
    assert "compressed-tensors, int-quantized" in explain("smoothquant")
    assert "compressed-tensors, float-quantized" in explain("fp8")
    assert "compressed-tensors, nvfp4-pack-quantized" in explain("nvfp4")
    assert "compressed-tensors, mxfp4-pack-quantized" in explain("mxfp4")
    assert "regauge's packed format: it has no nf4 weights" in explain("nf4")
    assert "regauge's packed format: it has no field for what 'lorc' adds back" in " ".join(
        explain("zeroquant-fp").split()
    )


def test_explain_a_preset() -> None:
    told = explain("gptq-w4g128")
    for piece in (
        "gptq-w4g128: GPTQ, int4, one step for 128 weights",
        "https://arxiv.org/abs/2210.17323",
        "calibration text is read for hessian; 262144 tokens in windows of 2048",
        "4.16 bits a weight",
        "column by column",
        "differs",
        "keeps    embeddings, head",
        "grain: group:128 else group:64 else group:32 else channel",
    ):
        assert piece in told
    assert "none is read" in explain("rtn-w4")
    assert "tries 21 values of alpha, each a pass of the whole model" in " ".join(explain("smoothquant-plus").split())
    assert all(len(line) < 160 for name in presets() for line in explain(name).splitlines() if "{grid" not in line)


def test_explain_a_part_and_a_name_of_both() -> None:
    assert "damp = 0.01" in explain("gptq")
    told = explain("gptq-ordered")
    assert "used by  flatquant-w4a4kv4, gptq-w{2-8}g{32,64,128}" in told
    both = explain("nf4")
    assert "nf4: NormalFloat4" in both
    assert "nf4 (grid):" in both
    assert "size (needed)" in explain("group")
    assert "group:VALUE sets size" in explain("group")


@pytest.mark.parametrize("name", ["flash-attention", "fast-attention"])
def test_explain_of_what_every_loaded_model_has(name: str) -> None:
    told = " ".join(explain(name).split())
    assert "had through torch's SDPA on a GPU, and through our step on a CPU; no recipe asks for it" in told
    assert "a token 1.32 ms step by step, 0.13 through SDPA, 0.08 through our step" in told
    with pytest.raises(RecipeError, match="did you mean 'flash-attention'"):
        explain("flash-atention")


def test_explain_lists_everything() -> None:
    rows = listing()
    assert list(rows) == ["preset", *TABLE]
    told = explain()
    assert "gptq-w{2-8}g{32,64,128}" in told
    for axis, table in TABLE.items():
        assert f"\n{axis}\n" in told
        assert {row["name"] for row in rows[axis]} == set(table)
    assert len(rows["preset"]) == len(patterns()) == len(FILES)


def test_explain_a_file(tmp_path: object) -> None:
    path = f"{tmp_path}/mine.yaml"
    with open(path, "w", encoding="utf-8") as file:
        file.write("name: mine\nrules:\n  head: full\n  blocks.*: {grid: int3, grain: tensor}\n")
    told = explain(path)
    assert "head: full precision" in told
    assert "weights of blocks.*: 3.00 bits a weight" in told


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gtpq", "nothing is called 'gtpq' (did you mean 'gptq'?)"),
        ("gptq-w4g127", "did you mean 'gptq-w4g12"),
        ("zzzz", "nothing is called 'zzzz'; 'regauge explain' without a name lists presets and parts"),
    ],
)
def test_an_unknown_name(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        explain(name)


def test_an_unknown_option_or_axis() -> None:
    with pytest.raises(RecipeError, match=re.escape("grain 'group' has no option 'sise' (did you mean 'size'?)")):
        parts.build("grain", Spec("group", (("sise", 4),)))
    with pytest.raises(RecipeError, match="there is no axis 'gird'"):
        parts.build("gird", Spec("int4"))
    with pytest.raises(RecipeError, match="a group has at least one weight, not 0"):
        parts.build("grain", Spec("group", (("size", 0),)))
    with pytest.raises(RecipeError, match="has no option 'bits'"):
        parts.build("grid", Spec("int4", (("bits", 8),)))
