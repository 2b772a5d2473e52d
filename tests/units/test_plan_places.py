"""Recipes about every place: which taps, stores, streams and residuals a rule takes, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pico import pico, save
from regauge import parts
from regauge.anatomy.model import Anatomy
from regauge.cli import tell
from regauge.engine import dry_run
from regauge.engine.job import prepare
from regauge.errors import RecipeError, RegaugeError
from regauge.hosts.transformers.source import Source
from regauge.parts import INPUTS
from regauge.plan import Plan, Rule, dump, parse, resolve
from regauge.plan.resolution import inert
from regauge.plan.select import spots, taken

W = "{grid: int4, grain: channel}"
A = "{grid: int8}"
A8, F8 = parts.point(INPUTS, grid="int8"), parts.point(INPUTS, grid="fp8")


def opened(name: str, folder: Path) -> Source:
    return Source.open(save(pico(name), folder / name))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return opened("llama", tmp_path_factory.mktemp("places"))


@pytest.fixture(scope="module")
def anatomy(source: Source) -> Anatomy:
    return source.anatomy


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Anatomy:
    return opened("mixtral", tmp_path_factory.mktemp("places")).anatomy


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Anatomy:
    return opened("bert", tmp_path_factory.mktemp("places")).anatomy


def named(place: str, selector: str, anatomy: Anatomy) -> list[str]:
    return [spot.name for spot in spots(anatomy, place) if taken(selector, spot)]


def test_taps(anatomy: Anatomy, experts: Anatomy) -> None:
    four = ["attn.in", "attn.mixed", "mlp.in", "mlp.hidden"]
    assert named("inputs", "blocks.1.*", anatomy) == [f"blocks.1.{tap}" for tap in four]
    assert named("inputs", "*", anatomy) == [f"blocks.{block}.{tap}" for block in (0, 1) for tap in four]
    assert named("inputs", "kind:hidden", anatomy) == ["blocks.0.mlp.hidden", "blocks.1.mlp.hidden"]
    assert named("inputs", "head.in", anatomy) == ["head.in"]
    assert named("inputs", "h*.in", anatomy) == []
    assert named("inputs", "read-by:blocks.0.*.{down,k}", anatomy) == ["blocks.0.attn.in", "blocks.0.mlp.hidden"]
    assert named("inputs", "read-by:kind:o", anatomy) == ["blocks.0.attn.mixed", "blocks.1.attn.mixed"]
    assert "blocks.0.mlp.in" not in named("inputs", "blocks.*", experts)  # the router alone reads it
    assert named("inputs", "blocks.0.mlp.in", experts) == ["blocks.0.mlp.in"]
    assert named("inputs", "blocks.0.moe.3.*", experts) == ["blocks.0.moe.3.in", "blocks.0.moe.3.hidden"]


def test_stores_streams_blocks_and_residuals(anatomy: Anatomy, encoder: Anatomy) -> None:
    assert named("cache", "*", anatomy) == ["blocks.0.cache", "blocks.1.cache"]
    assert named("cache", "blocks.1.cache", anatomy) == ["blocks.1.cache"]
    assert named("cache", "*", encoder) == []
    assert named("shape", "blocks.*.ffn", anatomy) == ["blocks.0.ffn", "blocks.1.ffn"]
    assert named("shape", "blocks.*.heads", anatomy) == ["blocks.0.heads", "blocks.1.heads"]
    assert named("shape", "kind:block", anatomy) == ["blocks.0", "blocks.1"]
    assert named("shape", "blocks.1", anatomy) == ["blocks.1"]
    assert "residual" not in named("shape", "*", anatomy)
    assert named("shape", "residual", anatomy) == ["residual"]
    assert named("tokens", "*", anatomy) == ["blocks.0.residual"]


def test_an_older_recipe_reads_as_points_of_taps() -> None:
    row = "{grid: int4, grain: channel, activations: int8}"
    assert parse(f"rules: {{blocks.*: {row}}}") == parse(f"weights: {{blocks.*: {W}}}\ninputs: {{blocks.*: {A}}}")
    assert parse(f"rules: {{'*': {row}}}").of("inputs") == (Rule("*", A8),)
    mixed = parse(f"rules: {{embed: full, 'blocks.{{0,1}}.*': {row}, '*.down | kind:o': full, head: {W}}}")
    assert mixed.of("inputs") == (
        Rule("blocks.{0,1}.*", A8),
        Rule("read-by:*.down | read-by:kind:o", None),
        Rule("read-by:head", None),
    )
    assert parse(dump(mixed)) == mixed
    assert "rules" not in dump(mixed)
    assert parse(f"rules: {{'*.q': {row.replace('int8', 'fp8')}}}").of("inputs") == (Rule("read-by:*.q", F8),)
    assert parse(f"rules: {{'*.q': {W}}}").of("inputs") == ()
    with pytest.raises(RecipeError, match="'rules' is the older name of 'weights': write one of them"):
        parse(f"rules: {{a: {W}}}\nweights: {{a: {W}}}")


def test_an_activation_belongs_to_its_tap(anatomy: Anatomy) -> None:
    row = "{grid: int4, grain: channel, activations: int8}"
    found = resolve(parse(f"rules: {{blocks.*: {row}, '*.down': full}}"), anatomy)
    assert set(found.inputs) == {f"blocks.{b}.{tap}" for b in (0, 1) for tap in ("attn.in", "attn.mixed", "mlp.in")}
    assert found.inputs["blocks.0.attn.in"] == A8
    each = ", ".join(f"'*.{kind}': {row}" for kind in "qkv")
    assert set(resolve(parse(f"rules: {{{each}}}"), anatomy).inputs) == {"blocks.0.attn.in", "blocks.1.attn.in"}
    told = resolve(parse(f"rules: {{'*.{{k,v}}': {W}, '*.q': {row}}}"), anatomy).notes
    assert "blocks.0.attn.in is rounded for blocks.0.attn.k, blocks.0.attn.v too, which read it" in told


ONE = "an activation belongs to its tap, so say it once, of 'blocks.0.attn.in'"


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (f"rules: {{'*.q': {{grid: int4, grain: channel, activations: int8}}, '*.{{k,v}}': {W}}}", [ONE]),
        (f"weights: {{'*': {W}}}\ninputs: {{'read-by:*.q': {A}, 'read-by:*.k': {{grid: fp8}}}}", [ONE]),
        (
            f"weights: {{'*.q': {W}}}\ninputs: {{blocks.*.attn.in: {A}}}",
            ["what reads it stays in full precision here", "blocks.0.attn.k, blocks.0.attn.v"],
        ),
        (
            f"inputs: {{blocks.*.mlp.hiden: {A}}}",
            ["'blocks.*.mlp.hiden' matches nothing (did you mean 'blocks.", "hidden'?)"],
        ),
        (f"inputs: {{read-by:embed: {A}}}", ["cannot be quantised before a table that is looked up by index: embed"]),
        (f"inputs: {{'h*': {A}}}", ["selector 'h*' matches nothing"]),
        (f"inputs: {{blocks.0.*: {A}, blocks.*: full}}", ["rule 'blocks.0.*' has no effect"]),
        (
            f"weights: {{'*': {W}}}\ninputs: {{blocks.*: {{grid: int8, grain: 'group:8'}}}}",
            [
                "groups of 8 do not divide a width of 42 (write 'group:8 else token', or a size that divides): "
                "blocks.0.attn.in"
            ],
        ),
        ("cache: {blocks.7.cache: {keys: int4/token}}", ["'blocks.7.cache' matches nothing (did you mean 'blocks."]),
        (
            "shape: {blocks.*.fnn: {unit: neuron}}",
            ["'blocks.*.fnn' matches nothing", "a stream or block is called 'blocks.0'"],
        ),
        (
            "tokens: {blocks.1.residual: {score: detail}}",
            ["'blocks.1.residual' matches nothing (did you mean 'blocks.0.resid"],
        ),
        ("cache: {'blocks.{0': {keys: int4/token}}", ["brace without its partner"]),
        (
            f"weights: {{nothing: {W}}}\ninputs: {{nowhere: {A}}}\ncache: {{none: {{keys: int4/token}}}}",
            ["'nothing' matches nothing", "'nowhere' matches nothing", "'none' matches nothing"],
        ),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_said_at_once(text: str, messages: list[str], anatomy: Anatomy) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(parse(text), anatomy)
    for message in messages:
        assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_encoder_keeps_no_cache(encoder: Anatomy) -> None:
    with pytest.raises(
        RecipeError, match=re.escape("matches nothing (this bert model keeps no keys and values of its past)")
    ):
        resolve(parse("cache: {'*': {keys: int4/token}}"), encoder)


ALL_FIVE = """
name: everywhere
rewrites: [fold-norm]
weights:
  blocks.*: {grid: int4-asym, grain: channel}
inputs:
  blocks.*.mlp.hidden: {grid: int8}
cache:
  "*": {keys: int2-asym/time:32, values: {grid: int2-asym, grain: group:5, scale: f16}, window: 128}
shape:
  blocks.*.ffn: {unit: neuron}
tokens:
  blocks.0.residual: {score: detail, schedule: {part: late, keep: 0.5, scales: 2}, disposal: nothing}
"""


def test_a_recipe_of_all_five_places(anatomy: Anatomy) -> None:
    plan = parse(ALL_FIVE)
    assert list(plan.places) == ["weights", "inputs", "cache", "shape", "tokens"]
    store = plan.of("cache")[0].point
    assert store is not None
    assert [(axis, spec.part, spec.options) for axis, spec in store] == [
        ("keys", "int2-asym/time:32", ()),
        ("values", "int2-asym/group:5", (("scale", "f16"),)),
        ("window", "128", ()),
    ]
    assert parse(dump(plan)) == plan
    assert "keys: int2-asym/time:32, values: {part: int2-asym/group:5, scale: f16}, window: 128}" in dump(plan)
    keys = parts.build("format", store.spec("keys"))
    assert (keys.grid.name, keys.grain.name, keys.scale.name) == ("int2-asym", "time:32", "f16")


def test_what_nothing_can_do_yet_is_said_at_once_and_before_any_work(source: Source) -> None:
    text = ALL_FIVE.replace("shape:\n  blocks.*.ffn: {unit: neuron}\n", "")
    plan = parse(text)
    found = resolve(plan, source.anatomy)
    assert set(found.at("cache")) == {"blocks.0.cache", "blocks.1.cache"}
    assert set(found.at("tokens")) == {"blocks.0.residual"}
    reasons = inert(plan, found)
    told = " ".join(reasons)
    assert "nothing acts on residuals between blocks yet (tokens of blocks.0.residual)" in told
    with pytest.raises(RegaugeError, match="nothing acts on residuals") as caught:
        prepare(plan, source)
    assert all(reason in str(caught.value) for reason in reasons)


BAD = [
    ("weights: {a: {grid: int4, grain: token}}", "a › grain: grain 'token' is for inputs and cache, not for weights"),
    ("inputs: {a: {grid: int8, grain: channel}}", "inputs › a › grain: grain 'channel' is for weights, not for inputs"),
    ("inputs: {a: {grain: token}}", "inputs › a: a rule lacks 'grid'"),
    ("inputs: {a: {grid: int8, rounder: gptq}}", "unknown key 'rounder' in a rule (did you mean 'ranger'?)"),
    ("inputs: {a: {grid: int8, transform: hadamrd}}", "inputs › a › transform: there is no transform 'hadamrd'"),
    ("inputs: {a: int8}", "write 'full' or coordinates such as {grid: …}, not 'int8'"),
    ("inputs: {a: {grid: int8, activations: int8}}", "unknown key 'activations' in a rule"),
    ("cache: {a: {}}", "a rule of cache says nothing; write one of keys, values, window"),
    ("cache: {a: {kyes: int4/token}}", "unknown key 'kyes' in a rule (did you mean 'keys'?)"),
    ("cache: {a: {keys: int4}}", "a format is a grid and a grain, such as int4-asym/group:32, not 'int4'"),
    ("cache: {a: {keys: int4/chanel}}", "cache › a › keys: there is no grain 'chanel'"),
    ("cache: {a: {keys: int4/channel}}", "grain 'channel' is for weights, not for cache"),
    ("cache: {a: {keys: int44/token}}", "there is no grid 'int44' (did you mean 'int4'?)"),
    ("cache: {a: {keys: int4/time}}", "grain 'time' needs size: write time:VALUE"),
    ("cache: {a: {keys: {part: int4/token, sacle: f16}}}", "a format has no option 'sacle' (did you mean 'scale'?)"),
    ("cache: {a: {keys: {grid: int4}}}", "a format lacks 'grain'"),
    ("cache: {a: {window: [1]}}", "cache › a › window: window must be text, not a list"),
    ("cache: {a: {window: .inf}}", "an option must be finite"),
    ("cache: {a: {score: {of: x}}}", "write the name of the score or {part: name, option: value}"),
    ("tokens: {a: {disposal: x}}", "tokens › a: a rule lacks 'score'"),
    ("tokens: {a: {score: ''}}", "there is no score ''"),
    ("shape: {a: {score: x}}", "shape › a: a rule lacks 'unit'"),
    ("cahce: {a: full}", "unknown key 'cahce' in a recipe (did you mean 'cache'?)"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_wrong_recipe_says_what_and_where(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        parse(text)
    assert "recipe, line 1" in str(caught.value)


def test_a_point_knows_its_axes() -> None:
    with pytest.raises(RecipeError, match=re.escape("inputs have no axis 'rounder' (did you mean 'ranger'?)")):
        _ = A8["rounder"]
    with pytest.raises(RecipeError, match="weights need a grain, and this point has none"):
        parts.Point.of("weights", {"grid": parts.Spec("int4")}).spec("grain")
    with pytest.raises(RecipeError, match="there is no place 'wieghts'"):
        parts.Point("wieghts", ())
    assert {A8, parts.point(INPUTS, grid="int8"), F8} == {A8, F8}
    assert Plan("x", {"inputs": (Rule("*", A8),)}).rules == ()


def test_a_dry_run_tells_of_taps(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    found = dry_run("rtn-w8a8", source.path)
    assert [tap.name for tap in found.taps[:4]] == [
        f"blocks.0.{tap}" for tap in ("attn.in", "attn.mixed", "mlp.in", "mlp.hidden")
    ]
    assert found.taps[2].sites == ("blocks.0.mlp.gate", "blocks.0.mlp.up")
    assert found.taps[2].bits == 8
    tell.dry_run(found)
    told = capsys.readouterr().out
    assert (
        "inputs of blocks.*.attn.in, blocks.*.attn.mixed, blocks.*.mlp.in, blocks.*.mlp.hidden: identity int8 token"
        in told
    )
