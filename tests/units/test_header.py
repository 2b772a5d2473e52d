"""The header of an artifact: what it says is read back, and whatever others may write in it is checked first."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pico import pico, save
from regauge import parts
from regauge.anatomy.model import Anatomy
from regauge.artifact.codec.base import Layout
from regauge.artifact.codec.taps import by_tap
from regauge.artifact.header import header, read_header
from regauge.errors import ArtifactError, RecipeError
from regauge.hosts.transformers.source import Source
from regauge.parts import INPUTS, WEIGHTS, Point, Spec
from regauge.plan import load

INT4 = parts.point(WEIGHTS, grid="int4", grain="group:10 else channel", rounder="gptq", compensator="lorc:3")
NF4 = parts.point(WEIGHTS, grid="nf4", grain="channel")
A8 = parts.point(INPUTS, grid="int8")


@pytest.fixture(scope="module")
def anatomy(tmp_path_factory: pytest.TempPathFactory) -> Anatomy:
    return Source.open(save(pico("llama-bias"), tmp_path_factory.mktemp("header") / "source")).anatomy


@pytest.fixture(scope="module")
def layout(anatomy: Anatomy) -> Layout:
    choices: dict[str, Point | None] = {
        s.name: INT4 if s.kind == "down" else NF4 for s in anatomy.sites if s.block == 1
    }
    return Layout(anatomy, anatomy, choices, torch.bfloat16, inputs={"blocks.1.mlp.in": A8, "blocks.1.attn.in": A8})


def told(layout: Layout) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(header(layout)))
    return found


def test_what_is_written_is_read_back(layout: Layout, anatomy: Anatomy) -> None:
    raw = told(layout)
    assert raw["format_version"] == 2
    assert [len(group["at"]) for group in raw["weights"]] == [6, 1]
    assert raw["inputs"] == [
        {
            "at": ["blocks.1.mlp.in", "blocks.1.attn.in"],
            "transform": {"part": "identity"},
            "grid": {"part": "int8"},
            "grain": {"part": "token"},
            "ranger": {"part": "dynamic"},
            "scale": {"part": "f32"},
        }
    ]
    assert raw["terms"] == {"low-rank": ["blocks.1.mlp.down"]}
    assert read_header(raw, anatomy, torch.bfloat16) == layout


def test_a_site_reads_what_its_tap_says(layout: Layout, anatomy: Anatomy) -> None:
    assert layout.reading(anatomy.site("blocks.1.attn.v")) == A8
    assert layout.reading(anatomy.site("blocks.1.mlp.down")) is None
    assert layout.reading(anatomy.site("embed")) is None


def test_readings_of_sites_become_readings_of_taps(anatomy: Anatomy) -> None:
    fp8 = parts.point(INPUTS, grid="fp8")
    readings = {"blocks.0.attn.q": A8, "blocks.0.attn.k": fp8, "blocks.1.mlp.gate": A8, "blocks.1.mlp.up": A8}
    inputs, apart = by_tap(anatomy, readings)
    assert inputs == {"blocks.0.attn.in": A8, "blocks.1.mlp.in": A8}
    assert apart == {"blocks.0.attn.k": fp8, "blocks.0.attn.v": None}
    mixed = Layout(anatomy, anatomy, {}, torch.float32, inputs=inputs, apart=apart)
    got = [mixed.reading(anatomy.site(f"blocks.0.attn.{kind}")) for kind in "qkvo"]
    assert got == [A8, fp8, None, None]


def test_version_1_is_read(anatomy: Anatomy) -> None:
    row = {"grid": {"part": "int4"}, "grain": {"part": "group", "size": 6}, "scale": {"part": "bf16"}}
    raw = {
        "quant_method": "regauge",
        "format_version": 1,
        "choices": [
            {"sites": ["blocks.0.attn.q"], "activations": {"part": "int8"}, **row},
            {"sites": ["blocks.0.attn.k"], **row},
        ],
        "anatomy": {"tied": False, "norms": {}, "biases": {}},
    }
    found = read_header(raw, anatomy, torch.float32)
    assert found.choices["blocks.0.attn.k"] == Point.of(
        WEIGHTS, {"grid": Spec("int4"), "grain": Spec("group", (("size", 6),)), "scale": Spec("bf16")}
    )
    assert found.inputs == {"blocks.0.attn.in": A8}
    assert found.apart == {"blocks.0.attn.k": None, "blocks.0.attn.v": None}


def put(raw: dict[str, Any], path: str, value: Any) -> None:
    """Sets `weights.0.grid.part`, or takes it out where the value is `...`."""
    *steps, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    inner: Any = raw
    for step in steps:
        inner = inner[step]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value


AXES = [(WEIGHTS, axis) for axis in parts.AXES[WEIGHTS]] + [(INPUTS, axis) for axis in parts.AXES[INPUTS]]
BAD: list[tuple[str, Any, str]] = [
    ("format_version", 3, "format version 3"),
    ("format_version", 0, "format version 0"),
    ("format_version", True, "format version True"),
    ("format_version", "2", "format version 2"),
    ("weigths", [], "unknown key 'weigths' in the header (did you mean 'weights'?)"),
    ("weights", {}, "weights of the header must be a list, and it is {}"),
    ("weights/0", "all", "an entry of weights of the header must be a mapping, and it is 'all'"),
    ("weights/0/at", "q", "at of a group of weights in the header must be a list, and it is 'q'"),
    ("weights/0/at", ..., "at of a group of weights in the header must be a list, and it is nothing"),
    ("weights/0/at/0", 7, "an entry of at of a group of weights in the header must be text, and it is 7"),
    ("weights/0/at/0", "blocks.7.attn.q", "names 'blocks.7.attn.q', which a llama model of this config has not"),
    ("weights/1/at/0", "blocks.1.attn.q", "lists 'blocks.1.attn.q' twice among its weights"),
    (
        "weights/0/gird",
        {"part": "int4"},
        "unknown key 'gird' in a group of weights in the header (did you mean 'grid'?)",
    ),
    ("weights/0/grid", ..., "a group of weights lacks its grid"),
    ("weights/0/grid", "int4", "grid of weights in the header must be a mapping, and it is 'int4'"),
    ("weights/0/grid/part", 4, "the part of grid of weights in the header must be text, and it is 4"),
    ("weights/0/grid/part", "int44", "there is no grid 'int44' (did you mean 'int4'?)"),
    ("weights/0/grain", {"part": "group", "size": "8"}, "option 'size' of grain 'group' takes int, not '8'"),
    (
        "weights/0/grain",
        {"part": "group", "size": [8]},
        "size of grain of weights in the header is [8], which is no option",
    ),
    ("weights/0/grain", {"part": "group", "size": 0}, "a group has at least one weight, not 0"),
    ("weights/0/grain", {"part": "group"}, "grain 'group' needs size"),
    ("weights/0/grain/part", "token", "grain 'token' is for inputs and cache, not for weights"),
    ("inputs/0/at/0", "blocks.1.attn.q", "names 'blocks.1.attn.q', which a llama model"),
    ("inputs/0/scale/part", "nv", "scale 'nv' is for weights, not for inputs"),
    ("cache", [{"at": ["blocks.9.cache"], "keys": {"part": "int4/token"}}], "names 'blocks.9.cache', which a llama"),
    (
        "cache",
        [{"at": ["blocks.0.cache"], "keys": {"part": "int4/group:7"}}],
        "cannot be kept to: keys: groups of 7 do not divide a width of 10",
    ),
    ("cache", [{"at": ["blocks.0.cache"], "window": {"part": "-1"}}], "a window counts the last tokens, 0 or more"),
    ("cache", [{"at": ["blocks.0.cache"], "window": {"part": "x"}}], "has 'x' as the window of a cache, and no part"),
    ("cache", [{"at": ["blocks.0.cache"], "keys": {"part": "int4"}}], "a format is a grid and a grain"),
    ("cache", [{"at": ["blocks.0.cache"], "keys": {"part": "nf4/token"}}], "grid 'nf4' is for weights and inputs"),
    ("shape", [{"at": ["blocks.0"], "unit": {"part": "neuron"}}], "the header has shape of 'blocks.0', and nothing"),
    ("cache", [{"at": [], "kyes": {"part": "int4/token"}}], "unknown key 'kyes' in a group of cache"),
    ("terms", {"tensor-train": []}, "adds terms of kind 'tensor-train', which this regauge cannot apply"),
    ("terms", {"low-rank": ["embed"]}, "adds a term to 'embed', which has no codes"),
    ("terms", [], "terms of the header must be a mapping"),
    ("sizes", {"blocks.0.mlp.up": [36]}, "gives 'blocks.0.mlp.up' the sizes [36]"),
    ("sizes", {"blocks.9.mlp.up": [36, 42]}, "changes 'blocks.9.mlp.up', which a model of this config has not"),
    ("sizes", {"blocks.0.mlp.up": [36.0, 42]}, "a size of 'blocks.0.mlp.up' must be a whole number, and it is 36.0"),
    ("anatomy/tied", 1, "'tied' of its anatomy must be true or false, and it is 1"),
    ("anatomy/tide", True, "unknown key 'tide' in its anatomy (did you mean 'tied'?)"),
    ("anatomy/norms", {"blocks.0.attn.norm": {"kind": "batch"}}, "changes the norm 'blocks.0.attn.norm' to 'batch'"),
    ("anatomy/biases", {"blocks.0.attn.q": {"kye": "x"}}, "unknown key 'kye' in bias of 'blocks.0.attn.q'"),
    (
        "anatomy/biases",
        {"blocks.9.attn.q": {"key": "x"}},
        "changes 'blocks.9.attn.q', which a model of this config has",
    ),
    ("anatomy/biases", {"blocks.0.attn.q": {"key": 3}}, "key of bias of 'blocks.0.attn.q' must be text"),
    ("anatomy/biases", {"blocks.0.attn.q": {"key": "x", "rows": ["a"]}}, "rows of bias of 'blocks.0.attn.q' must be a"),
]
BAD += [
    (f"{place}/0/{axis}", {"part": "os.path:join"}, f"the {axis} 'os.path:join' of another package")
    for place, axis in AXES
]
BAD += [
    ("weights/0/grain", {"part": "channel", "otherwise": "os.path:join"}, "'os.path:join' of another package"),
    ("weights/0/grain", {"part": "group", "size": 3, "otherwise": "a.b:C else channel"}, "'a.b:C' of another package"),
    ("cache", [{"at": ["x"], "values": {"part": "int4/os.path:join"}}], "'os.path:join' of another package"),
    ("cache", [{"at": ["x"], "score": {"part": "os.path:join"}}], "'os.path:join' of another package"),
    ("tokens", [{"at": ["x"], "disposal": {"part": "os.path:join"}}], "'os.path:join' of another package"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD, ids=lambda value: str(value)[:40])
def test_a_wrong_header_is_one_sentence(path: str, value: Any, message: str, layout: Layout, anatomy: Anatomy) -> None:
    raw = copy.deepcopy(told(layout))
    put(raw, path, value)
    with pytest.raises(ArtifactError, match=re.escape(message)) as caught:
        read_header(raw, anatomy, torch.bfloat16)
    assert "\n" not in str(caught.value)


def test_the_recipe_inside_an_artifact_names_no_code(tmp_path: Path) -> None:
    inside = tmp_path / "artifact" / "regauge"
    inside.mkdir(parents=True)
    for rule in (
        "weights:\n  blocks.*: {grid: int4, grain: channel, rounder: 'my.pkg:Round'}",
        "weights:\n  blocks.*: {grid: int4, grain: 'group:8 else my.pkg:Grain'}",
        "inputs:\n  blocks.*: {grid: 'my.pkg:Grid'}",
        "cache:\n  '*': {keys: int4/my.pkg:Grain}",
        "cache:\n  '*': {score: 'my.pkg:Score'}",
        "rewrites: ['my.pkg:Turn']",
        "rewrites: [{part: rotate, how: 'my.pkg:Turn'}]",
    ):
        (inside / "recipe.yaml").write_text(f"name: theirs\n{rule}\n")
        with pytest.raises(RecipeError, match=r"recipe\.yaml, line \d.*: .*is code of another package"):
            load(tmp_path / "artifact")
        with pytest.raises(RecipeError, match="is code of another package"):
            load(inside / "recipe.yaml")
        own = tmp_path / "mine.yaml"
        own.write_text(f"name: mine\n{rule}\n")
        if "how" not in rule:
            assert load(own).name == "mine"
