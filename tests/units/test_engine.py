"""`apply` and `dry_run` from outside: what is written, what is refused, what is left as it was found."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from regauge.artifact.folder import read_receipt
from regauge.engine import apply, dry_run, strengths
from regauge.engine.watchdog import Progress
from regauge.errors import BudgetError, ModelError, OutputError, RecipeError, RegaugeError, ResumeError, TextError
from regauge.plan import load, parse
from regauge.text.corpora import Where
from tests import tiny
from tests.pico import pico, save

READ = {"tokens": 256, "length": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.text(tmp_path_factory.mktemp("text"))


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_the_same_inputs_give_the_same_bytes_and_leave_the_random_state(
    model: Path, text: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for name in ("one", "two"):
        apply("gptq-w4g32", model, tmp_path / name, calibration=text, **READ)
    assert torch.equal(torch.get_rng_state(), state)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] in ([], ["regauge/run-log.json"])
    assert {"config.json", "tokenizer.json", "regauge/recipe.yaml", "regauge/receipt.json"} <= one.keys()
    assert [path.name for path in tmp_path.iterdir()] in (["one", "two"], ["two", "one"])


def test_the_receipt_accounts_for_every_byte_and_every_site(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    receipt = apply("gptq-w4g32", model, out, calibration=text, wire="regauge", **READ)
    assert receipt == read_receipt(out)
    stored = sum(t.numel() * t.element_size() for path in out.glob("*.safetensors") for t in load_file(path).values())
    assert receipt.bytes_after == stored
    norms = 5 * 42 * 4  # two norms in each of two blocks and the last, 42 channels in float32
    assert sum(site.bytes_after for site in receipt.sites) + norms == stored
    assert receipt.bytes_bf16 == 2 * sum(p.numel() for p in pico("llama", vocab_size=258).parameters())
    assert len(receipt.sites) == 2 * 7 + 2
    assert {site.name for site in receipt.sites if site.kept} == {"embed", "head"}
    quantised = [site for site in receipt.sites if site.choice]
    assert all(site.tokens == 256 for site in quantised)
    assert all(0 < (site.error or 0) < 0.5 for site in quantised)
    assert all("groups of 32" in (site.fallback or "") for site in quantised)
    assert receipt.peak_bytes > 0
    assert receipt.seconds > 0
    assert load(out / "regauge" / "recipe.yaml") == load("gptq-w4g32")


@pytest.mark.parametrize("recipe", ["gptq-w4g32", "quarot-gptq-w4g32", "rtn-w8", "smoothquant", "zeroquant-fp"])
def test_the_states_it_streams_are_those_of_the_loaded_artifact(
    recipe: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each block was calibrated on is what the compressed model really computes: the two never share code."""
    from regauge.engine import api
    from regauge.hosts.transformers.load import load as open_artifact

    drives: list[api.Drive] = []

    def watched(*arguments: object) -> api.Drive:
        drives.append(api_drive(*arguments))  # type: ignore[arg-type]  # handed on as given
        return drives[-1]

    api_drive = api.Drive
    monkeypatch.setattr(api, "Drive", watched)
    plan = load(recipe)
    if recipe == "rtn-w8":  # the head too: its statistics are what the last block made
        plan = parse(WITH_HEAD)
    apply(plan, model, tmp_path / "out", calibration=text, **READ)
    states = drives[0].work.states
    assert states is not None
    loaded = open_artifact(tmp_path / "out", dtype=torch.float32)
    seen: list[torch.Tensor] = []
    last = loaded.get_submodule("model.layers")[1 if recipe in ("rtn-w8", "smoothquant") else 0]  # others stop there
    last.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        for batch in drives[0].work.batches:
            loaded(batch)
    for ours, theirs in zip(states.hidden, seen, strict=True):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < STATES[recipe]


WITH_HEAD = """
name: with-head
rules:
  blocks.*: {grid: int8, grain: channel, ranger: absmax, scale: f32, rounder: nearest}
  head: {grid: int4, grain: channel, ranger: minmax, scale: f32, rounder: gptq}
"""
STATES = {"gptq-w4g32": 1e-5, "quarot-gptq-w4g32": 1e-5, "rtn-w8": 1e-5, "smoothquant": 0.02, "zeroquant-fp": 0.02}
"""Where activations are quantised, float32 sums in another order put some on the other side of a step."""


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_of_channels_is_written(bits: int, tmp_path: Path) -> None:
    """Sizes that need no padding, as real models have them."""
    model = save(pico("llama", hidden_size=64, intermediate_size=96, head_dim=8, num_attention_heads=8), tmp_path / "m")
    receipt = apply(f"rtn-w{bits}", model, tmp_path / "out")
    assert receipt.wire == "compressed-tensors"
    zero = 0 if bits == 8 else bits  # the int8 of a channel is symmetric
    assert receipt.sites[1].bits == pytest.approx(bits + (16 + zero) / 64)


def test_what_stands_outside_the_blocks_is_in_the_last_shard(tmp_path: Path) -> None:
    apply("rtn-w8", save(pico("bert"), tmp_path / "bert"), tmp_path / "out", wire="regauge")
    shards = [load_file(path).keys() for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert len(shards) == 4
    assert ["pooler.dense.weight" in keys for keys in shards] == [False, False, False, True]


def test_text_lowers_the_error_that_the_receipt_states(model: Path, text: Path, tmp_path: Path) -> None:
    """Error feedback beats rounding to nearest on the same text: the figures are of the same kind, on real inputs."""
    nearest = parse(NEAREST_BESIDE_TEXT)
    plain = apply(nearest, model, tmp_path / "plain", calibration=text, **READ)
    gptq = apply("gptq-w4g32", model, tmp_path / "gptq", calibration=text, **READ)
    pairs = [(a.error, b.error) for a, b in zip(plain.sites, gptq.sites, strict=True) if a.choice and b.error]
    assert sum(b < (a or 0) for a, b in pairs) >= 0.9 * len(pairs)


NEAREST_BESIDE_TEXT = """
name: nearest-beside-text
rewrites: [{part: smooth-norms, alpha: 0.0}]
rules:
  blocks.*: {grid: int4-asym, grain: channel, ranger: minmax, scale: bf16, rounder: nearest}
"""


@pytest.mark.parametrize("recipe", ["quarot-gptq-w4g32", "smoothquant"])
def test_moves_are_certified_block_by_block_and_as_a_whole(
    recipe: str, model: Path, text: Path, tmp_path: Path
) -> None:
    receipt = apply(recipe, model, tmp_path / "out", calibration=text, **READ)
    assert [move.block for move in receipt.moves] == [None, 0, 1]
    assert all(0 <= move.exact < 1e-12 and move.stored < 1e-4 for move in receipt.moves)
    assert all(move.exact > 0 and move.streams for move in receipt.moves[1:])
    assert receipt.logits_error is not None
    assert 0 < receipt.logits_error < 1e-12


def test_a_searched_strength_has_the_least_loss_of_its_grid(model: Path, text: Path, tmp_path: Path) -> None:
    """Stopped in the middle of its search, a run goes on with the losses that it has."""
    plan = parse(NEAREST_BESIDE_TEXT.replace("{part: smooth-norms, alpha: 0.0}", "smooth-streams"))
    phase = "search of smooth-streams"
    seen: list[Progress] = []

    def stop(event: Progress) -> None:
        if event.phase == phase and event.done == 8:
            raise Stop

    with pytest.raises(Stop):
        apply(plan, model, tmp_path / "out", calibration=text, tokens=128, length=32, progress=stop)
    receipt = apply(plan, model, tmp_path / "out", calibration=text, tokens=128, length=32, progress=seen.append)
    (entry,) = receipt.searched
    grid = entry["grid"]
    assert isinstance(grid, list)
    assert next(event.done for event in seen if event.phase == phase) == 8
    assert len(grid) == 21
    assert entry["loss"] == min(point["loss"] for point in grid)
    assert len({point["loss"] for point in grid}) > 10


@pytest.mark.parametrize(("tokens", "windows"), [(1, 1), (64, 2), (65, 3)])
def test_a_strength_is_searched_on_few_windows(
    tokens: int, windows: int, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, seen = parse(NEAREST_BESIDE_TEXT.replace("{part: smooth-norms, alpha: 0.0}", "smooth-streams")), set()
    monkeypatch.setattr(strengths, "TOKENS", tokens)
    monkeypatch.setattr(strengths, "whole_loss", lambda job, whole, few, runner: seen.add(len(few.inputs)) or 1.0)
    apply(plan, model, tmp_path / "out", calibration=text, tokens=128, length=32)
    assert seen == {windows}


def test_a_rewrite_of_the_whole_model_may_want_statistics_first(model: Path, text: Path, tmp_path: Path) -> None:
    plan = parse(NEAREST_BESIDE_TEXT.replace("{part: smooth-norms, alpha: 0.0}", "{part: permute, streams: residual}"))
    receipt = apply(plan, model, tmp_path / "out", calibration=text, **READ)
    assert [move.streams for move in receipt.moves] == [("residual",)] * 3
    assert receipt.logits_error is not None
    assert receipt.logits_error < 1e-12
    plain = apply("rtn-w4", model, tmp_path / "plain")
    assert [site.bytes_after for site in receipt.sites] == [site.bytes_after for site in plain.sites]
    moved, kept = (
        load_file(next(tmp_path.glob(f"{name}/*-00001-of-*")))["model.embed_tokens.weight"] for name in ("out", "plain")
    )
    assert not torch.equal(moved, kept)
    assert torch.equal(moved.sort(dim=1).values, kept.sort(dim=1).values)


def test_without_text_the_model_samples_its_own(model: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    receipt = apply("gptq-w4g32", model, tmp_path / "out", tokens=128, length=32, progress=seen.append)
    assert receipt.calibration["kind"] == "self-sampled"
    assert receipt.calibration["shape"] == [4, 32]
    assert any("samples its own" in note for note in receipt.notes)
    assert any("samples its own" in event.message for event in seen)
    other = apply("gptq-w4g32", model, tmp_path / "other", tokens=128, length=32, seed=1)
    assert receipt.calibration["sha256"] != other.calibration["sha256"]


def test_a_chat_template_opens_the_windows(tmp_path: Path) -> None:
    template = "{% for m in messages %}<s>user: {{ m['content'] }}</s>{% endfor %}"
    tiny.tokenizer(template=template).save_pretrained(tmp_path / "m")
    save(pico("llama", vocab_size=tiny.VOCABULARY), tmp_path / "m")
    receipt = apply("gptq-w4g32", tmp_path / "m", tmp_path / "out", tokens=64, length=32)
    assert str(receipt.calibration["source"]).endswith("from its chat template")


def test_a_plan_without_text_runs_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regauge.engine.job.host_of", None)
    receipt = apply("rtn-w4", model, tmp_path / "out", calibration="never read")
    assert receipt.calibration == {}
    assert "the recipe reads no text, so the calibration text was not used" in receipt.notes


def test_progress_says_where_it_is(model: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    apply("rtn-w4", model, tmp_path / "out", progress=seen.append)
    assert [(e.phase, e.done, e.total) for e in seen if e.total] == [
        ("blocks", 0, 2),
        ("blocks", 1, 2),
        ("blocks", 2, 2),
    ]
    assert seen[-1].phase == "finish"


def test_rare_experts_are_in_the_receipt(tmp_path: Path, text: Path) -> None:
    model = tiny.folder(tmp_path / "m", "mixtral")
    receipt = apply("gptq-w4g32", model, tmp_path / "out", calibration=text, tokens=64, length=32)
    experts = [site for site in receipt.sites if ".moe." in site.name and site.choice]
    assert len(experts) == 2 * 5 * 3
    assert any("experts" in (site.fallback or "") for site in experts)
    assert all(site.tokens is not None and (site.error or 0) < 1 for site in experts)


REFUSED: dict[str, tuple[type[RegaugeError], str]] = {
    "no such model": (ModelError, "nowhere"),
    "no such preset": (RecipeError, "did you mean 'rtn-w4g128'"),
    "out exists": (OutputError, "exists; choose another directory"),
    "out cannot be written": (OutputError, "cannot be written"),
    "no such text": (TextError, "there is no text at"),
    "too few tokens": (TextError, "gives 96 windows of 32 tokens"),
    "too long windows": (TextError, "longer than the 64 that the model reads"),
    "no tokens": (TextError, "tokens must be 1 or more"),
    "no time": (BudgetError, "the time limit is 0 s"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_are_one_sentence_and_leave_nothing(what: str, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe, source, where, more = "gptq-w4g32", model, text, dict(READ)
    time_limit = None
    if what == "no such model":
        source = tmp_path / "nowhere"
    if what == "no such preset":
        recipe = "rtn-w4g12"
    if what == "out exists":
        out.mkdir()
    if what == "out cannot be written":
        out = tmp_path / "file" / "out"
        (tmp_path / "file").write_text("")
    if what == "no such text":
        where = tmp_path / "missing.txt"
    if what == "too few tokens":
        more["tokens"] = 100_000
    if what == "too long windows":
        more["length"] = 100
    if what == "no tokens":
        more["tokens"] = 0
    if what == "no time":
        time_limit = 1e-6
    error, message = REFUSED[what]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=re.escape(message)):
        apply(recipe, source, out, calibration=where, time_limit=time_limit, **more)
    assert sorted(tmp_path.rglob("*")) == before


def test_all_refusals_come_at_once(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(RegaugeError, match=r"2 things stand in the way: \(1\) there is no text .*\(2\) .*exists"):
        apply("gptq-w4g32", model, tmp_path / "out", calibration=tmp_path / "missing.txt")
    found = dry_run("gptq-w4g32", model, tmp_path / "out", calibration=tmp_path / "missing.txt")
    assert len(found.refusals) == 2


def test_encoders_cannot_sample_their_own_text(tmp_path: Path) -> None:
    model = tiny.folder(tmp_path / "m", "bert")
    with pytest.raises(TextError, match="bert does not generate text to sample its own"):
        apply("gptq-w4g32", model, tmp_path / "out")
    assert apply("rtn-w8a8", model, tmp_path / "out").ratio > 0


def test_a_vision_model_wants_images(tmp_path: Path, text: Path) -> None:
    model = save(pico("vit"), tmp_path / "m")
    with pytest.raises(TextError, match=r"vit reads images; give --calibration an \.npz"):
        apply("gptq-w4g32", model, tmp_path / "out", calibration=text)


def test_missing_tokenizer_only_matters_where_text_is_read(tmp_path: Path, text: Path) -> None:
    model = save(pico("llama"), tmp_path / "m")
    with pytest.raises(ModelError, match="has no tokenizer"):
        apply("gptq-w4g32", model, tmp_path / "out", calibration=text)
    apply("rtn-w4", model, tmp_path / "out")


class Stop(BaseException):
    """What Ctrl-C is: not an Exception."""


def stop_after(blocks: int) -> object:
    def watch(event: Progress) -> None:
        if event.phase == "blocks" and event.done == blocks:
            raise Stop

    return watch


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("deep"), num_hidden_layers=3)


def stopped(model: Path, text: Where, out: Path, recipe: str = "gptq-w4g32", seed: int = 0) -> Path:
    with pytest.raises(Stop):
        apply(recipe, model, out, calibration=text, seed=seed, progress=stop_after(2), **READ)  # type: ignore[arg-type]  # a watcher
    return out.with_name(out.name + ".partial")


@pytest.mark.parametrize("recipe", ["gptq-w4g32", "quarot-gptq-w4g32", "rtn-w4"])
def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_bytes(
    recipe: str, deep: Path, text: Path, tmp_path: Path
) -> None:
    apply(recipe, deep, tmp_path / "whole", calibration=text, **READ)
    partial = stopped(deep, text, tmp_path / "cut", recipe)
    written = {path.name: path.stat().st_ino for path in partial.glob("*.safetensors")}
    assert len(written) == 3
    seen: list[Progress] = []
    apply(recipe, deep, tmp_path / "cut", calibration=text, progress=seen.append, **READ)
    assert next((e.done, e.total) for e in seen if e.total) == (2, 3)
    assert {name: (tmp_path / "cut" / name).stat().st_ino for name in written} == written
    one, two = contents(tmp_path / "whole"), contents(tmp_path / "cut")
    assert [name for name in one.keys() | two.keys() if one.get(name) != two.get(name)] in (
        [],
        ["regauge/run-log.json"],
    )


@pytest.mark.parametrize("recipe", ["gptq-w4g32", "quarot-gptq-w4g32"])
def test_stopped_while_finishing_nothing_is_done_again(
    recipe: str, deep: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states are gone by then, and are not needed."""
    from regauge.engine import api

    whole = apply(recipe, deep, tmp_path / "whole", calibration=text, **READ)

    def killed(staging: api.Staging, files: object) -> None:
        shutil.rmtree(staging.root / "states")
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(api.Staging, "finish", killed)
        with pytest.raises(Stop):
            apply(recipe, deep, tmp_path / "cut", calibration=text, **READ)
    monkeypatch.setattr("regauge.engine.work.round_sites", None)
    cut = apply(recipe, deep, tmp_path / "cut", calibration=text, **READ)
    assert cut.logits_error == whole.logits_error
    one, two = contents(tmp_path / "whole"), contents(tmp_path / "cut")
    assert [name for name in one.keys() | two.keys() if one.get(name) != two.get(name)] in (
        [],
        ["regauge/run-log.json"],
    )


def test_spoilt_states_begin_again_at_the_first_block(deep: Path, text: Path, tmp_path: Path) -> None:
    apply("gptq-w4g32", deep, tmp_path / "whole", calibration=text, **READ)
    partial = stopped(deep, text, tmp_path / "cut")
    for path in (partial / "states").iterdir():
        path.write_bytes(path.read_bytes()[:-8] + os.urandom(8))
    apply("gptq-w4g32", deep, tmp_path / "cut", calibration=text, **READ)
    one, two = contents(tmp_path / "whole"), contents(tmp_path / "cut")
    assert [name for name in one.keys() | two.keys() if one.get(name) != two.get(name)] in (
        [],
        ["regauge/run-log.json"],
    )


@pytest.mark.parametrize("what", ["calibration", "seed", "plan", "source"])
def test_a_changed_input_is_refused_and_named(what: str, deep: Path, text: Path, tmp_path: Path) -> None:
    model = shutil.copytree(deep, tmp_path / "m")
    partial = stopped(model, text, tmp_path / "out")
    before = contents(partial)
    recipe, where, seed = "gptq-w4g32", text, 0
    if what == "calibration":
        where = tiny.text(tmp_path, 2000)
    if what == "seed":
        seed = 1
    if what == "plan":
        recipe = "gptq-w3g32"
    if what == "source":
        path = model / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(ResumeError, match=what):
        apply(recipe, model, tmp_path / "out", calibration=where, seed=seed, **READ)
    assert contents(partial) == before


def test_a_time_limit_stops_where_the_next_run_goes_on(deep: Path, text: Path, tmp_path: Path) -> None:
    def dawdle(event: Progress) -> None:
        if event.done == 0 and event.total:
            clock = __import__("time")
            clock.sleep(1.0)

    with pytest.raises(BudgetError, match="run the same command again"):
        apply("gptq-w4g32", deep, tmp_path / "out", calibration=text, time_limit=1.0, progress=dawdle, **READ)
    receipt = apply("gptq-w4g32", deep, tmp_path / "out", calibration=text, **READ)
    assert len(receipt.sites) == 3 * 7 + 2


def test_a_dry_run_foretells_what_apply_does_and_writes_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = dry_run("gptq-w4g32", model, out, calibration=text, wire="regauge", **READ)
    assert not list(tmp_path.iterdir())
    receipt = apply("gptq-w4g32", model, out, calibration=text, wire="regauge", **READ)
    assert found.bytes_after == receipt.bytes_after
    assert found.bytes_bf16 == receipt.bytes_bf16
    assert found.refusals == ()
    assert [(s.name, s.choice, s.bytes_after) for s in found.sites] == [
        (s.name, s.choice, s.bytes_after) for s in receipt.sites
    ]
    assert found.calibration["sha256"] == receipt.calibration["sha256"]
    assert found.seconds is not None
    assert found.seconds > 0
    assert "runs each block 2 times" in " ".join(found.passes)
    assert found.disk_free > found.disk_needed > found.bytes_after
    json.loads(found.model_dump_json())


def test_a_dry_run_tells_refusals_instead_of_raising(model: Path, text: Path) -> None:
    found = dry_run("nvfp4", model, wire="compressed-tensors")
    assert any("compressed-tensors cannot express" in refusal for refusal in found.refusals)


def test_force_replaces_an_artifact(model: Path, tmp_path: Path) -> None:
    apply("rtn-w4", model, tmp_path / "out")
    apply("rtn-w8", model, tmp_path / "out", force=True)
    assert read_receipt(tmp_path / "out").plan == "rtn-w8"


def test_an_exact_move_that_is_not_is_caught(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the algebra: one reader of each scaled stream is forgotten."""
    from regauge.anatomy import moves as algebra
    from regauge.errors import ExactnessError

    honest = algebra.apply

    def forgetful(moves: object, anatomy: object, weights: dict[str, torch.Tensor], dtype: object = None) -> object:
        found = honest(moves, anatomy, weights, dtype=dtype)  # type: ignore[arg-type]  # handed on as given
        return {n: weights[n].to(t.dtype) if n == "blocks.1.attn.q.weight" else t for n, t in found.items()}

    monkeypatch.setattr("regauge.engine.work.algebra.apply", forgetful)
    plan = parse("name: fold\nrewrites: [fold-norm]\nrules:\n  blocks.*: {grid: int8, grain: channel}\n")
    with pytest.raises(ExactnessError, match=r"fold-norm on blocks\.1\.attn\.in.* of block 1"):
        apply(plan, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
