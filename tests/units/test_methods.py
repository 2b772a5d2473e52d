"""`regauge methods`: every preset and part, under the names of the list of methods, with figures that were measured."""

from __future__ import annotations

import dataclasses
import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import regauge as rg
from regauge.cli.app import app
from regauge.errors import RecipeError
from regauge.parts import MEASURE, PLACES, REWRITES, TABLE, WEIGHTS
from regauge.plan import load, patterns, presets
from regauge.report.methods import OF_CACHE, PRESET, STANDING, UNMEASURED, methods
from regauge.report.standing import HAD

ROOT = Path(__file__).resolve().parents[2]

SOME = (PRESET, OF_CACHE)

MEASURED = json.loads((files("regauge") / "presets" / "measured.json").read_text(encoding="utf-8"))


def test_every_preset_and_part_is_listed_once() -> None:
    found = methods()
    assert [name for one in found if one.kind in SOME for name in one.names] == presets()
    assert [one.name for one in found if one.kind == STANDING] == list(HAD)
    listed = [(one.kind, one.name) for one in found if one.kind not in (*SOME, STANDING)]
    assert listed == [(axis, name) for axis, table in TABLE.items() for name in table]
    for one in found:
        assert one.what
        assert one.places
        assert one.kind == STANDING or set(one.places) <= {*PLACES, REWRITES, MEASURE, "family"}
        assert one.measured
    assert rg.methods("gptq") == methods("gptq")


def test_every_preset_has_a_row_or_says_why_not() -> None:
    for pattern in patterns():
        row = load(next(iter(pattern.points()))).row
        assert re.fullmatch(r"[a-z0-9-]+|none, .{10,}", row), f"{pattern.file}: row {row!r}"


def test_every_method_names_the_tests_that_fail_without_its_idea() -> None:
    """All but formats and yardsticks, which have no idea beyond their grid, and torch's own; and each test is there."""
    plans = [load(next(iter(pattern.points()))) for pattern in patterns()]
    for plan in plans:
        assert plan.check or "it is a format" in plan.row or "yardstick" in plan.row, f"{plan.name} has no check"
    for check in {check for found in (*plans, *HAD.values()) for check in found.check}:
        file, test = check.split("::")
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), check


def test_rows_are_those_of_the_list(shared: Path) -> None:
    listed = shared / "rows.yaml"
    if not listed.exists():
        pytest.skip("the list of methods (../shared/rows.yaml) is not on this machine")
    names = {row["name"] for row in yaml.safe_load(listed.read_text(encoding="utf-8"))["rows"]}
    for one in methods():
        assert not one.row or one.row in names, f"{one.name} names the row {one.row!r}, which the list has not"


def test_figures_are_of_presets_that_are_there_and_beat_nearest_where_they_should() -> None:
    rows = MEASURED["rows"]
    assert set(rows) <= set(presets())
    assert {"command", "unit", "model", "text", "null", "machine"} <= set(MEASURED)
    for name in rows:
        assert load(name).of(WEIGHTS) or name == "kv8" or rows[name]["null"]  # else it names what it is held against
    assert rows["smoothquant"]["verdict"] != "worse"  # the bundled model's inputs have no large channels to smooth
    for name in ("gptq-w4g32", "gptq-w4", "quarot-gptq-w4g32", "imatrix-w4g32", "neurons-75"):
        assert rows[name]["verdict"] == "better", f"{name}: {rows[name]}"
        assert rows[name]["kl"][0] < rows[name]["null_kl"][0]


def test_what_a_preset_costs_and_gained() -> None:
    (one,) = (one for one in methods() if "gptq-w4g32" in one.names and one.row == "gptq")
    assert one.paper == ("arXiv:2210.17323",)
    assert one.places == ("weights",)
    assert one.cost == "reads 262144 tokens of text, 2.14 to 8.75 bits a weight"
    kl, null = MEASURED["rows"]["gptq-w4g32"]["kl"][0], MEASURED["rows"]["gptq-w4g32"]["null_kl"][0]
    assert one.measured.startswith(f"gptq-w4g32: KL {kl:.2g}, nearest {null:.2g} (better); gptq-w4g64: KL ")
    more = len(one.figures) - 3
    assert one.measured.endswith(f"; {more} more with --json" if more else ")")
    (alone,) = (one for one in methods(bits=4) if "gptq-w4g32" in one.names)
    assert set(alone.figures) == {"gptq-w4g32", "gptq-w4g64", "gptq-w4g128"}
    assert "more" not in alone.measured
    assert alone.figures["gptq-w4g32"] == MEASURED["rows"]["gptq-w4g32"]
    (zero,) = methods("zeroquant-fp")[:1]
    assert zero.places == ("weights", "inputs")
    parts = {one.name: one for one in methods() if one.kind == "rounder"}
    assert "gptq-w4g32" in parts["gptq-ordered"].measured
    assert {one.name: one for one in methods() if one.kind == "grain"}["time"].measured == UNMEASURED


def test_words_find_rows() -> None:
    assert {one.name for one in methods("2307.09782")} == {
        "zeroquant-fp",
        "zeroquant-fp-m1",
        "fp4-g{32,64,128}",
        "m1",
        "m2",
        "lorc",
    }
    assert {one.name for one in methods("INPUTS")} >= {"smoothquant", "token", "dynamic", "identity"}
    with pytest.raises(RecipeError, match=re.escape("no method has 'gtpq' in it (did you mean 'gptq'?); 'regauge m")):
        methods("gtpq")


def test_the_command() -> None:
    runner = CliRunner()
    told = runner.invoke(app, ["methods", "smoothquant"])
    assert told.exit_code == 0
    assert "2211.10438" in told.output
    found = json.loads(runner.invoke(app, ["methods", "--json"]).output)
    assert [row["name"] for row in found] == [one.name for one in methods()]
    assert set(found[0]) == {field.name for field in dataclasses.fields(methods()[0])}
    assert {row["row"] for row in found} >= {
        "gptq",
        "smoothquant",
        "smoothquant-plus",
        "quarot",
        "imatrix",
        "zeroquant-fp",
    }
