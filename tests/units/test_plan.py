"""Plans: strict parse with places, printing back, hash, difference, selectors and resolution."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from regauge import parts
from regauge.anatomy.model import Anatomy, Site, Slot
from regauge.errors import RecipeError
from regauge.parts import Spec
from regauge.plan import Plan, Rule, diff, digest, dump, load, parse, resolve
from regauge.plan.select import matches

ROW = "{grid: int4, grain: channel, ranger: absmax, scale: bf16, rounder: nearest}"


def site(name: str, kind: str, shape: tuple[int, int], block: int | None, tap: str | None = "in") -> Site:
    return Site(name, kind, shape, Slot(name), block=block, tap=tap)


def anatomy(tied: bool = False, hidden: int = 96) -> Anatomy:
    """Two blocks with an expert router between prime widths."""
    sites = [
        site("embed", "embed", (101, hidden), None, None),
        site("embed.position", "position", (31, hidden), None, None),
    ]
    for block in range(2):
        at = f"blocks.{block}"
        sites += [site(f"{at}.attn.{kind}", kind, (hidden, hidden), block) for kind in ("q", "k", "v", "o")]
        sites += [site(f"{at}.moe.router", "router", (3, hidden), block)]
        sites += [site(f"{at}.moe.{e}.up", "up", (131, hidden), block) for e in range(3)]
        sites += [site(f"{at}.moe.{e}.down", "down", (hidden, 131), block) for e in range(3)]
    sites.append(site("head", "head", (101, hidden), None))
    return Anatomy("pico", 2, hidden, tuple(sites), (), (), tied)


def named(rule: str) -> list[str]:
    return [found.name for found in anatomy().sites if matches(rule, found)]


BAD = [
    ("name: x\nrulez:\n  a: full", "recipe, line 2: rulez: unknown key 'rulez'"),
    ("ruls: {a: full}", "recipe, line 1: ruls: unknown key 'ruls' in a recipe (did you mean 'rules'?)"),
    (
        "name: x\nrules:\n  blocks.*: {gird: int4}",
        "recipe, line 3: rules › blocks.* › gird: unknown key 'gird' in a rule",
    ),
    ("rules: {a: {grid: int44, grain: channel}}", "rules › a › grid: there is no grid 'int44' (did you mean 'int4'?)"),
    ("rules: {a: {grid: int4}}", "recipe, line 1: rules › a: a rule lacks 'grain'"),
    ("rules: {a: full, a: full}", "rules › a: 'a' is written twice"),
    ("rules: {a: fulll}", "write 'full' or coordinates such as {grid: int4, grain: channel}, not 'fulll'"),
    ("rules: [a, b]", "rules must be a mapping, not a list"),
    ("rewrites: fold-norm", "rewrites must be a list, not 'fold-norm'"),
    ("rewrites: [fold-nrom]", "there is no rewrite 'fold-nrom' (did you mean 'fold-norm'?)"),
    (
        "name: x",
        "a recipe needs 'rewrites', a 'family' or rules for a place (weights, inputs, cache, attention, shape, tokens)",
    ),
    ("name: [", "recipe, line 1: this is not YAML"),
    ("name: x\nrules:\n  a: {grid: int4\nb: 1", "this is not YAML"),
    ("", "recipe: the recipe is empty"),
    ("- a", "a recipe must be a mapping, not a list"),
    ("calibration: {tokens: -4}\nrules: {a: full}", "tokens must be a whole number above 0, not -4"),
    ("calibration: {tokns: 4}\nrules: {a: full}", "unknown key 'tokns' in calibration (did you mean 'tokens'?)"),
    ("rules: {a: {grid: int4, grain: group}}", "grain 'group' needs size: write group:VALUE"),
    ("rules: {a: {grid: int4, grain: 'group:x'}}", "option 'size' of grain 'group' takes int, not 'x'"),
    ("rules: {a: {grid: int4, grain: channel:3}}", "grain 'channel' has no main option"),
    ("rules: {a: {grid: int4, grain: channel, rounder: gptq else nearest}}", "only a grain can fall back"),
    ("rules: {a: {grid: int4, grain: group:32 else chanel}}", "there is no grain 'chanel' (did you mean 'channel'?)"),
    (
        "rules:\n  a:\n    grid: int4\n    grain: channel\n    rounder: {part: gptq, dmap: 0.1}",
        "recipe, line 5: rules › a › rounder: rounder 'gptq' has no option 'dmap' (did you mean 'damp'?)",
    ),
    (
        "rules: {a: {grid: int4, grain: channel, rounder: {part: gptq, damp: much}}}",
        "option 'damp' of rounder 'gptq' takes float, not 'much'",
    ),
    (
        "rules: {a: {grid: int4, grain: channel, rounder: {part: gptq, damp: .nan}}}",
        "an option must be finite, not nan",
    ),
    ("rules: {a: {grid: int4, grain: {part: 'group:8', size: 4}}}", "'size' is set twice"),
    ("rules: {a: {grid: int4, grain: {size: 4}}}", "write the name of the grain or {part: name, option: value}"),
    ("rules: {a: {grid: [int4], grain: channel}}", "grid must be text, not a list"),
    ("rules: {1: {grid: int4, grain: channel, 2: x}}", "unknown key '2' in a rule"),
    ("&a [*a]", "an alias that holds itself"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_wrong_recipe_says_what_and_where(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        parse(text)
    assert str(caught.value).count("recipe, line") <= 1
    assert "\n" not in str(caught.value)


def test_a_recipe_prints_back_to_itself() -> None:
    text = (
        "name: mine\n"
        'title: "one: two # three"\n'
        "cite: [arXiv:2210.17323]\n"
        "calibration: {tokens: 77, length: 7}\n"
        "rewrites: [layernorm-to-rms, fold-norm, smooth-norms:0.5]\n"
        "weights:\n"
        "  blocks.*: {grid: int4-asym, grain: group:128 else channel, ranger: minmax, scale: bf16, "
        "rounder: {part: gptq, damp: 0.05}, compensator: lorc:8}\n"
        '  "*.down": full\n'
        "  kind:up | blocks.{0,1}.attn.q: {grid: int2, grain: group:32 else group:8 else channel, ranger: absmax, "
        "scale: f32, rounder: nearest}\n"
        "inputs:\n"
        "  blocks.*.mlp.hidden: {transform: identity, grid: fp8, grain: token, ranger: dynamic, scale: f32}\n"
    )
    plan = parse(text)
    assert dump(plan) == text
    assert parse(dump(plan)) == plan
    assert plan.rules[1] == Rule("*.down", None)
    first = plan.rules[0].point
    assert first is not None
    assert first["rounder"] == Spec("gptq", (("damp", 0.05),))
    assert first["grain"] == Spec("group", (("otherwise", "channel"), ("size", 128)))
    assert plan.of("inputs") == (Rule("blocks.*.mlp.hidden", parts.point("inputs", grid="fp8")),)


def test_defaults_are_printed() -> None:
    plan = parse("rules: {a: {grid: int4, grain: channel}}")
    assert dump(plan) == (
        "name: recipe\nweights:\n  a: {grid: int4, grain: channel, ranger: minmax, scale: bf16, rounder: nearest}\n"
    )


def test_a_mapping_is_a_recipe_too() -> None:
    rows = {"name": "m", "rules": {"blocks.*": {"grid": "int4", "grain": "group:32"}, "head": "full"}}
    assert parse(rows) == parse("name: m\nrules:\n  blocks.*: {grid: int4, grain: group:32}\n  head: full\n")


def test_parts_of_other_packages_are_named_by_path() -> None:
    text = (
        "name: m\nweights:\n  a: {grid: my.grids:Seven, grain: channel, ranger: absmax, scale: f32, rounder: nearest}\n"
    )
    assert dump(parse(text)) == text
    with pytest.raises(RecipeError, match=r"grid 'my\.grids:Seven' cannot be imported: No module named 'my'"):
        resolve(parse(text.replace("  a:", "  '*.q':")), anatomy())


def test_the_hash_is_of_what_is_done() -> None:
    plan = parse(f"name: a\ntitle: x\nrules: {{'*.q': {ROW}}}")
    assert digest(plan) == digest(parse(f"name: b\nrules: {{'*.q': {ROW}}}"))
    assert len(digest(plan)) == 64
    others = [
        f"rules: {{'*.k': {ROW}}}",
        f"rules: {{'*.q': {ROW.replace('int4', 'int3')}}}",
        f"rewrites: [fold-norm]\nrules: {{'*.q': {ROW}}}",
        f"calibration: {{tokens: 5}}\nrules: {{'*.q': {ROW}}}",
        "rules: {'*.q': full}",
    ]
    assert len({digest(plan), *(digest(parse(other)) for other in others)}) == 6


def test_difference_names_each_rule() -> None:
    a = parse(f"rewrites: [fold-norm]\nrules: {{'*.q': {ROW}, head: full}}")
    b = parse(f"rules: {{'*.q': {ROW.replace('int4', 'int3')}, embed: full, head: full}}")
    assert diff(a, a) == ()
    lines = diff(a, b)
    assert lines[0] == "rewrites: fold-norm → none"
    assert lines[1].startswith("weights › *.q: grid int4, grain channel")
    assert lines[2] == "weights › embed: absent → full"
    assert diff(parse("rules: {a: full, b: full}"), parse("rules: {b: full, a: full}")) == (
        "weights: the same in another order",
    )


def test_wildcards_leave_special_sites_alone() -> None:
    assert all(".attn." in name or name.endswith((".up", ".down")) for name in named("*"))
    assert len(named("*")) == 2 * (4 + 6)
    assert named("blocks.*") == named("*")
    assert named("embed") == ["embed"]
    assert named("embed.*") == []
    assert named("embed.position") == ["embed.position"]
    assert named("h*") == []
    assert named("blocks.*.moe.router") == ["blocks.0.moe.router", "blocks.1.moe.router"]
    assert named("kind:router | kind:head") == ["blocks.0.moe.router", "blocks.1.moe.router", "head"]
    assert named("kind:*") == named("*")


def test_globs_braces_and_alternatives() -> None:
    assert named("blocks.1.attn.{q,k}") == ["blocks.1.attn.q", "blocks.1.attn.k"]
    assert named("blocks.[1-9].attn.q") == ["blocks.1.attn.q"]
    assert named("blocks.?.attn.q | kind:o") == [
        "blocks.0.attn.q",
        "blocks.0.attn.o",
        "blocks.1.attn.q",
        "blocks.1.attn.o",
    ]
    assert named("blocks.{0,1}.moe.{0,2}.up") == [f"blocks.{b}.moe.{e}.up" for b in (0, 1) for e in (0, 2)]
    assert named("attn.q") == []
    for bad in ("blocks.{0,1", "a |", "| b"):
        with pytest.raises(RecipeError, match=r"brace without its partner|empty alternative"):
            named(bad)


def test_the_last_match_wins_and_the_rest_is_kept() -> None:
    found = resolve(parse(f"rules: {{'*': {ROW}, 'blocks.1.*': full, blocks.1.attn.q: {ROW}}}"), anatomy())
    assert list(found.choices) == [item.name for item in anatomy().sites]
    assert found.choices["blocks.0.attn.q"] == found.choices["blocks.1.attn.q"] != None  # noqa: E711  # one chain
    assert found.choices["blocks.1.attn.k"] is None
    assert found.kept["blocks.1.attn.k"] == "a rule says full"
    assert found.kept["embed"] == "no rule names this embed"
    assert found.kept["blocks.0.moe.router"] == "no rule names this router"
    assert "embed kept in full precision: no rule names this embed" in found.notes


def test_fallbacks_are_taken_and_told() -> None:
    row = ROW.replace("channel", "group:32 else channel")
    found = resolve(parse(f"rules: {{'*': {row}}}"), anatomy())
    up, down = found.choices["blocks.0.moe.1.up"], found.choices["blocks.0.moe.1.down"]
    assert up is not None
    assert down is not None
    assert up["grain"] == Spec("group", (("size", 32),))
    assert down["grain"] == Spec("channel")
    assert set(found.fallbacks) == {f"blocks.{b}.moe.{e}.down" for b in range(2) for e in range(3)}
    assert found.fallbacks["blocks.0.moe.1.down"] == "groups of 32 do not divide a width of 131: channel instead"
    assert any("(6 sites) fell back: groups of 32" in note for note in found.notes)
    chain = ROW.replace("channel", "group:64 else group:48 else channel")
    second = resolve(parse(f"rules: {{'*': {chain}}}"), anatomy()).choices["blocks.0.attn.q"]
    assert second is not None
    assert second["grain"] == Spec("group", (("size", 48),))


def test_every_reason_at_once() -> None:
    text = f"""
    rules:
      "*": {ROW.replace("channel", "group:64")}
      embed: {ROW.replace("nearest", "gptq").replace("}", ", activations: int8}")}
    """
    with pytest.raises(RecipeError) as caught:
        resolve(parse(text), anatomy())
    told = str(caught.value)
    assert "groups of 64 do not divide a width of 96" in told
    assert "groups of 64 do not divide a width of 131" in told
    assert "write 'group:64 else channel'" in told
    assert "rounder 'gptq' needs hessian of an input" in told
    assert "activations cannot be quantised before a table" in told


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (f"{{blocks.*.attn.qq: {ROW}}}", "selector 'blocks.*.attn.qq' matches nothing (a site is called"),
        (f"{{embed.*: {ROW}}}", "matches nothing (wildcards leave out embed"),
        (f"{{blocks.0.attn.q: {ROW}, '*': full}}", "rule 'blocks.0.attn.q' has no effect"),
        (
            f"{{'*': {ROW.replace('nearest', 'importance')}}}",
            "rounder 'importance' works through ranger search or least-squares, and 'absmax' is set",
        ),
        (
            f"{{'*': {ROW.replace('nearest', '{part: gptq, order: activation}')}}}",
            "rounder 'gptq': order 'activation' mixes the columns of groups, so it needs static_groups: true",
        ),
        (f"{{'blocks.{{0': {ROW}}}", "brace without its partner"),
    ],
)
def test_contradictions_and_rules_that_do_nothing_are_errors(rules: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        resolve(parse(f"rules: {rules}"), anatomy())


def test_a_tied_head_has_the_embeddings_bytes() -> None:
    tied = anatomy(tied=True)
    found = resolve(parse(f"rules: {{embed: {ROW}}}"), tied)
    assert found.choices["embed"] is not None
    assert found.choices["head"] is None
    assert found.kept["head"] == "tied to embed: it has the embedding's bytes"
    with pytest.raises(RecipeError, match="head is tied to embed"):
        resolve(parse(f"rules: {{head: {ROW}}}"), tied)
    assert resolve(parse(f"rules: {{embed: {ROW}, head: {ROW}}}"), tied).choices["head"] is None


def test_a_recipe_of_moves_alone() -> None:
    found = resolve(parse("rewrites: [fold-norm]"), anatomy())
    assert set(found.choices.values()) == {None}


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\nrules: {{'*': {ROW}}}\n")
    assert load(path).name == "mine"
    path.write_text("name: mine\nrulez: {}\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml, line 2: rulez"):
        load(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not text in UTF-8"):
        load(path)
    with pytest.raises(RecipeError, match="there is no recipe file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match=r"there is no preset 'rtn-w4g12' \(did you mean 'rtn-w4g128'\?\)"):
        load("rtn-w4g12")
    inside = tmp_path / "artifact" / "regauge"
    inside.mkdir(parents=True)
    (inside / "recipe.yaml").write_text(dump(load("rtn-w4")))
    assert load(tmp_path / "artifact") == load("rtn-w4")


def test_plans_are_values() -> None:
    point, same = (parts.point("weights", grid=grid, grain="channel") for grid in ("int4", "int4"))
    assert Plan("a", {"weights": (Rule("*", point),)}) == Plan("a", {"weights": (Rule("*", same),), "cache": ()})
    assert len({point, same}) == 1


def test_a_recipe_of_aliases_is_refused_at_once() -> None:
    """A hundred bytes of YAML can stand for a billion values."""
    rows = "".join(f"x{i}: &x{i} [{','.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 9))
    with pytest.raises(RecipeError, match=r"at most 100,000 values"):
        parse("name: x\nx0: &x0 [a, a, a, a, a, a, a, a, a]\n" + rows + "weights: {}\n")
    for text in ("[" * 10_000, "a: " + "[" * 200 + "]" * 200, "a: " + "{b: " * 200 + "1" + "}" * 200):
        with pytest.raises(
            RecipeError, match=r"nests without end|nests at most 50 deep|nested at most 50 deep|not YAML"
        ):
            parse(text)
    with pytest.raises(RecipeError, match=r"at most 1,000,000 characters"):
        parse("#" * 1_000_001)


def test_explain_calls_no_part_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os.path

    from regauge.report.explanation import explain

    monkeypatch.setattr(os.path, "isdir", lambda *_: pytest.fail("it was called"))
    path = tmp_path / "r.yaml"
    for row in (
        "weights: {blocks.*: {grid: 'os.path:isdir', grain: channel}}",
        "weights: {blocks.*: {grid: int4, grain: channel, rounder: 'os.path:isdir'}}",
        "inputs: {blocks.*: {grid: 'os.path:isdir'}}",
        "rewrites: ['os.path:isdir']\nweights: {blocks.*: {grid: int4, grain: channel}}",
    ):
        path.write_text(f"name: r\n{row}\n", encoding="utf-8")
        assert "os.path:isdir" in explain(str(path))


def test_a_name_is_written_in_its_own_letters() -> None:
    plan = parse('name: "für: größere Modelle 模型"\nweights: {mlp: {grid: int4, grain: channel}}\n')
    assert '"für: größere Modelle 模型"' in dump(plan)
    assert parse(dump(plan)) == plan
