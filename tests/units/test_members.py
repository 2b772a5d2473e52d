"""Members of a loaded family: what runs inside it is, bit for bit, what its extract gives."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import threading
import timeit
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import regauge as rg
from regauge.artifact import cutting
from regauge.artifact.codec.sizes import tensor_bytes
from regauge.artifact.cutting import layout_of, opened
from regauge.artifact.families import FILE, member_at
from regauge.artifact.folder import read_receipt
from regauge.cache.scheme import CachePlan
from regauge.engine import apply, dry_run
from regauge.engine.extracting import extract
from regauge.errors import ArtifactError, RecipeError, SettingError
from regauge.hosts.transformers.source import Source
from regauge.kernels.cpu.interface import has
from tests import tiny
from tests.families import IDS, PAIRS, SINGLE, WEIGHTS, given, made, recipe, same

Make = Callable[[str, str], Path]
SOME = (("llama", "plain"), ("llama", "int4"), ("gpt_neox", "int8"))
OTHERS = (
    *(("llama", weights) for weights in ("int8", "asym", "mixed", "w8a8", "low-rank")),
    *(("gpt_neox", weights) for weights in ("plain", "int4", "asym")),
)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """An architecture and formats → a family of it, made once."""
    known: dict[tuple[str, str], Path] = {}

    def family(name: str, weights: str) -> Path:
        if (name, weights) not in known:
            known[name, weights] = made(tmp_path_factory.mktemp(f"{name}-{weights}"), name, weights)
        return known[name, weights]

    return family


def steps(model: Any) -> int:
    """Tokens that went through a model's native step."""
    native = getattr(model, "regauge_step", None)
    return 0 if native is None else int(native.steps)


@pytest.mark.parametrize(("name", "weights"), SOME)
def test_a_member_is_its_extract_to_the_bit(make: Make, name: str, weights: str, tmp_path: Path) -> None:
    out = make(name, weights)
    model = rg.load(out)
    for number, text in enumerate(("depth=2", "ffn=1/0.5/0.75/0.5", "heads=1", "width=48", "depth=3,ffn=0.5,heads=2")):
        done = extract(out, text, tmp_path / str(number))
        alone = rg.load(tmp_path / str(number))
        with rg.use(model, text) as active:
            assert str(active) == done.subnet == str(alone.regauge.active)
            assert same(given(model), given(alone)), text
        assert steps(model.regauge.member(text)) == steps(alone) == 2 * (weights != "plain")


@pytest.mark.parametrize(("name", "weights"), [("gpt_neox", "int8"), ("llama", "low-rank")])
def test_bytes_of_a_member_are_those_of_its_file(make: Make, name: str, weights: str, tmp_path: Path) -> None:
    """Low-rank factors and biases among them, wherever they are told."""
    out = make(name, weights)
    done = extract(out, "depth=2,ffn=0.5", tmp_path / "alone")
    _, _, member = member_at(out, "depth=2,ffn=0.5")
    own = layout_of(opened(out).layout, member)
    names = 2 * 8 * 4 * 2 * (name == "gpt_neox")  # what compressed-tensors says of each module, two numbers
    assert done.bytes == tensor_bytes(own) + names
    norms = sum(norm.size * len(norm.slots) * own.dtype.itemsize for norm in own.anatomy.norms)
    assert sum(site.bytes_after for site in read_receipt(tmp_path / "alone").sites) == done.bytes - norms - names


@pytest.mark.parametrize(("name", "weights"), SOME)
def test_a_member_that_is_loaded_alone_is_the_same(make: Make, name: str, weights: str) -> None:
    out = make(name, weights)
    model = rg.load(out)
    for text in ("depth=1/3", "heads=2/1/2/1", "ffn=0.75,width=48", "small", "full"):
        alone = rg.load(out, subnet=text)
        with rg.use(model, text) as active:
            assert alone.regauge.active == active
            assert same(given(model), given(alone)), text
            assert same(given(model, IDS[:1]), given(alone, IDS[:1])), text  # torch multiplies one token otherwise


def test_inputs_of_members_lie_together_and_the_whole_computes_what_it_would_otherwise(
    make: Make, tmp_path: Path
) -> None:
    out = make("llama", "int4")
    model = rg.load(out)
    block = model.model.layers[0]
    held = [layer.parts[0].native for layer in (block.mlp.down_proj, block.self_attn.o_proj, block.mlp.up_proj)]
    assert {one.stride < 0 for one in held} == {has("rg_has_cuts")}
    shutil.copytree(out, tmp_path / "plain", ignore=shutil.ignore_patterns(Path(FILE).name))
    plain = rg.load(tmp_path / "plain")
    assert plain.model.layers[0].mlp.down_proj.parts[0].native.stride == 0
    plain.lm_head.weight = model.lm_head.weight  # which lies column by column: tests/units/test_columns.py
    assert same(given(model), given(plain))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "weights"), [*SOME, *OTHERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_dimension_and_every_pair(
    make: Make, name: str, weights: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    out = make(name, weights)
    model = rg.load(out, dtype=dtype)
    for number, text in enumerate((*SINGLE, *PAIRS)):
        extract(out, text, tmp_path / str(number))
        alone = rg.load(tmp_path / str(number), dtype=dtype)
        with rg.use(model, text):
            assert same(given(model), given(alone)), text
            assert same(given(model), given(rg.load(out, dtype=dtype, subnet=text))), text
        assert steps(model.regauge.member(text)) == 2 * steps(alone)


def test_even_sizes_are_a_stock_checkpoint_and_uneven_ones_bring_a_loader(make: Make, tmp_path: Path) -> None:
    import transformers

    out = make("llama", "plain")
    even = extract(out, "depth=3,ffn=0.5,heads=2,width=48", tmp_path / "even")
    assert even.wire == "compressed-tensors"
    assert not even.unsaid
    config = json.loads((tmp_path / "even" / "config.json").read_text())
    sizes = ("num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_size")
    assert [config[name] for name in sizes] == [3, 64, 4, 2, 48]
    assert "quantization_config" not in config
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "even")
    assert same(given(stock), given(rg.load(out, subnet="depth=3,ffn=0.5,heads=2,width=48")))
    uneven = extract(out, "ffn=1/0.5/1/1", tmp_path / "uneven")
    assert uneven.wire == "regauge"
    assert "config.json has one number for all blocks" in uneven.unsaid
    through = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "uneven", trust_remote_code=True)
    assert same(given(through), given(rg.load(out, subnet="ffn=1/0.5/1/1")))


def test_a_packed_member_is_read_by_stock_code(make: Make, tmp_path: Path) -> None:
    import transformers

    out = make("gpt_neox", "int8")
    assert extract(out, "depth=2,ffn=0.5", tmp_path / "out").wire == "compressed-tensors"
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = rg.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(stock(IDS).logits, ours(IDS).logits, atol=2e-3)


def test_the_whole_is_the_source_and_a_member_is_not(make: Make) -> None:
    out = make("llama", "plain")
    model, source = rg.load(out), rg.load(out.parent / "model")
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, source(IDS).logits, atol=1e-4)
        with rg.use(model, "ffn=0.5"):
            assert not torch.allclose(model(IDS).logits, source(IDS).logits, atol=1e-1)


def test_the_first_units_contribute_most(make: Make) -> None:
    """Sorted by what they contribute, the better half of the neurons loses less than the other half does."""
    out = make("llama", "plain")
    sorted_, plain = Source.open(out), Source.open(out.parent / "model")
    for block in range(4):
        down = [
            source.read([f"blocks.{block}.mlp.down.weight"])[f"blocks.{block}.mlp.down.weight"]
            for source in (sorted_, plain)
        ]
        assert not torch.equal(*down)
        assert torch.allclose(down[0].square().sum(0).sort().values, down[1].square().sum(0).sort().values)


def test_a_member_shares_the_memory_of_the_whole(make: Make) -> None:
    for weights in ("plain", "int4"):
        model = rg.load(make("llama", weights))
        homes = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        member = model.regauge.member("depth=3,ffn=0.5,heads=1,width=48")
        own = [t for t in (*member.parameters(), *member.buffers()) if t.untyped_storage().data_ptr() not in homes]
        assert sum(t.numel() for t in own) == 0


def test_requests_name_their_member(make: Make) -> None:
    out = make("llama", "int4")
    model = rg.load(out)
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = {text: rg.load(out, subnet=text).generate(IDS, **how) for text in ("depth=2", "full", "small,".strip(","))}
    assert not torch.equal(wanted["depth=2"], wanted["full"])
    assert torch.equal(model.generate(IDS, subnet="depth=2", **how), wanted["depth=2"])
    assert torch.equal(model.generate(IDS, **how), wanted["full"])
    with rg.use(model, "depth=2"):
        assert torch.equal(model.generate(IDS, **how), wanted["depth=2"])
        assert torch.equal(model.generate(IDS, subnet="full", **how), wanted["full"])
        assert torch.equal(model.generate(IDS, subnet=rg.Subnet(depth=2, ffn=0.5), **how), wanted["small"])
    asked = copy.deepcopy(model.generation_config)
    asked.subnet = "depth=2"
    assert torch.equal(model.generate(IDS, generation_config=asked, **how), wanted["depth=2"])
    model.generation_config.subnet = "depth=2"
    assert torch.equal(model.generate(IDS, **how), wanted["depth=2"])
    assert list(rg.stream(model, IDS[0], max_new_tokens=6, stop=[])) == wanted["full"][0, -6:].tolist()
    with rg.use(model, "depth=2"):
        assert list(rg.stream(model, IDS[0], max_new_tokens=6, stop=[])) == wanted["depth=2"][0, -6:].tolist()


def test_a_request_survives_in_a_file(make: Make, tmp_path: Path) -> None:
    """What `transformers serve` makes of a request's own generation config."""
    from transformers import GenerationConfig

    model = rg.load(make("llama", "plain"))
    GenerationConfig(subnet="depth=2", max_new_tokens=4, do_sample=False, pad_token_id=0).save_pretrained(tmp_path)
    asked = GenerationConfig.from_pretrained(tmp_path)
    assert asked.subnet == "depth=2"
    found = model.generate(IDS, generation_config=asked)
    assert torch.equal(found, model.generate(IDS, subnet="depth=2", max_new_tokens=4, do_sample=False, pad_token_id=0))
    assert [str(one) for one in model.regauge.members()] == ["depth=2"]


def test_what_runs_is_said(make: Make) -> None:
    model = rg.load(make("llama", "plain"))
    assert str(model.regauge.active) == "full"
    with rg.use(model, "depth=2") as outer:
        assert model.regauge.active == outer == rg.Subnet(depth=2)
        with rg.use(model, "full"):
            assert model.regauge.active.full
        assert model.regauge.active == outer
        with pytest.raises(ZeroDivisionError), rg.use(model, "ffn=0.5"):
            raise ZeroDivisionError
        assert model.regauge.active == outer
    assert model.regauge.active.full
    assert [str(one) for one in model.regauge.members()] == ["depth=2", "ffn=0.5"]


def test_a_cache_is_of_the_member_that_filled_it(make: Make) -> None:
    model = rg.load(make("llama", "int4"))
    with torch.no_grad():
        whole = model(IDS, use_cache=True).past_key_values
        with rg.use(model, "depth=2"):
            with pytest.raises(SettingError, match=r"filled by the member full, and depth=2 runs now.*rg\.refill"):
                model(IDS[:, :1], past_key_values=whole)
            small = model(IDS, use_cache=True).past_key_values
            model(IDS[:, :1], past_key_values=small)
            with pytest.raises(SettingError, match="filled by the member full"):
                model.generate(IDS[:, :1], past_key_values=whole, max_new_tokens=2)
        with pytest.raises(SettingError, match="filled by the member depth=2, and full runs now"):
            model(IDS[:, :1], past_key_values=small)
        with pytest.raises(SettingError, match=r"filled by the member depth=2, and ffn=0\.5 runs now"):
            model.generate(IDS[:, :1], past_key_values=copy.deepcopy(small), max_new_tokens=2, subnet="ffn=0.5")
        filled = rg.refill(model, IDS[:, :-1], "depth=2")
        with rg.use(model, "depth=2"):
            once, again = model(IDS).logits[:, -1], model(IDS[:, -1:], past_key_values=filled).logits[:, -1]
        assert torch.allclose(once, again, atol=1e-3)
        whole.reset()
        with rg.use(model, "ffn=0.5"):
            model(IDS, past_key_values=whole)  # an empty cache is anybody's


def test_a_member_keeps_what_its_cache_says(make: Make) -> None:
    out = make("llama", "int4")
    model = rg.load(out)
    with rg.use(model, "depth=2,cache=kv8"), torch.no_grad():
        held = model(IDS, use_cache=True).past_key_values
    plan: CachePlan = held.plan
    assert plan.name == "kv8"
    assert len(held.layers) == 2
    assert model.regauge_cache is None
    alone = rg.load(out, subnet="depth=2,cache=kv8")
    with rg.use(model, "depth=2,cache=kv8"):
        assert same(given(model), given(alone))
    kept = rg.load(out, cache="kv8")
    with rg.use(kept, "depth=2"), torch.no_grad():
        assert len(kept(IDS, use_cache=True).past_key_values.plan.blocks) == 2


@pytest.mark.parametrize("weights", ["plain", "int4"])
def test_two_threads_run_two_members_at_once(make: Make, weights: str) -> None:
    model = rg.load(make("llama", weights))
    texts = ("depth=2", "ffn=0.5")
    wanted = {}
    for text in texts:
        with rg.use(model, text):
            wanted[text] = given(model)
    wrong: list[str] = []
    barrier = threading.Barrier(2)

    def run(text: str) -> None:
        for _ in range(5):
            with rg.use(model, text):
                barrier.wait()
                if str(model.regauge.active) != text or not same(given(model), wanted[text]):
                    wrong.append(text)
        if not model.regauge.active.full:
            wrong.append("full")

    threads = [threading.Thread(target=run, args=(text,)) for text in texts]
    with rg.use(model, "heads=1"):  # another thread's choice is not theirs
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_switch_takes_microseconds_and_no_memory(make: Make) -> None:
    model = rg.load(make("llama", "int4"))

    def switch() -> None:
        with rg.use(model, "depth=2"):
            pass

    switch()
    assert min(timeit.repeat(switch, number=200, repeat=5)) / 200 < 50e-6
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    for _ in range(100):
        switch()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held - before < 256  # nothing stays
    assert peak - before < 2048  # the `with` itself


def test_what_is_not_legal_is_refused(make: Make) -> None:
    out = make("llama", "plain")
    model = rg.load(out)
    for ask in (
        lambda: rg.use(model, "ffn=0.6"),
        lambda: model.generate(IDS, subnet="ffn=0.6", max_new_tokens=1),
        lambda: rg.load(out, subnet="ffn=0.6"),
        lambda: model.regauge.member("ffn=0.6"),
    ):
        with pytest.raises(SettingError, match=r"ffn=0\.6, of 1\.0, 0\.75, 0\.5; the nearest that is: ffn=0\.5"):
            ask()
    with pytest.raises(SettingError, match="no family, so it has no members"):
        rg.use(rg.load(out.parent / "model"), "depth=2")
    with pytest.raises(SettingError, match="is no family, so it has no members"):
        rg.load(out.parent / "model", subnet="depth=2")
    with pytest.raises(SettingError, match="subnet= is not for models in a window"):
        rg.load(out, subnet="depth=2", memory="2GB")


def test_members_follow_the_model(make: Make) -> None:
    """A cast or a copy of the whole leaves no member that looks at what was."""
    model = rg.load(make("llama", "plain"))
    with rg.use(model, "depth=2"), torch.no_grad():
        before = model(IDS).logits
    model.to(torch.float64)
    with rg.use(model, "depth=2"), torch.no_grad():
        wide = model(IDS).logits
    assert wide.dtype == torch.float64
    assert torch.allclose(wide.float(), before, atol=1e-4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with rg.use(other, "depth=2"), torch.no_grad():
            assert torch.equal(other(IDS).logits, wide)
        assert other.regauge is not model.regauge


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"family": {"depth": [9]}}, "depth 9: the model has 4 blocks"),
        ({"family": {"ffn": [0.5, 1e9]}}, "shares above 0 and at most 1"),
        ({"family": {"heads": [1 << 40]}}, "whole numbers above 0"),
        ({"family": {"depth": [True]}}, "and True is none"),
        ({"family": {"depth": list(range(1, 400))}}, "399 choices"),
        ({"family": {"depth": [2], "code": "os:system"}}, "unknown key 'code'"),
        ({"family": {"depth": [2], "members": {"a": "depth=3"}}}, "is not legal here"),
        ({"family": {"depth": [2], "members": {"a" * 99: "depth=2"}}}, "no name of a member"),
        ({"family": {"cache": ["a.b:C"]}}, ""),
        ({"family": {}}, "offers nothing"),
        ({"family": [1]}, "holds no family"),
        ({"version": 2}, "is of version 2 and this regauge reads 1"),
        ({"more": 1}, "holds no family"),
    ],
)
def test_a_file_that_lies_is_refused(make: Make, change: dict[str, Any], why: str, tmp_path: Path) -> None:
    out = make("llama", "plain")
    lying = tmp_path / "out"
    lying.mkdir()
    for path in out.rglob("*"):
        if path.is_file():
            (lying / path.relative_to(out)).parent.mkdir(parents=True, exist_ok=True)
            (lying / path.relative_to(out)).write_bytes(path.read_bytes())
    raw = json.loads((out / FILE).read_text())
    (lying / FILE).write_text(json.dumps(raw | change))
    if why:
        for options in ({}, {"subnet": "depth=2"}):
            with pytest.raises(ArtifactError) as error:
                rg.load(lying, **options)
            assert why in str(error.value)
    else:
        with pytest.raises(RecipeError, match="no preset"):  # a name that came with a file names no code
            rg.use(rg.load(lying), "cache=a.b:C")


@pytest.mark.parametrize(
    "change",
    [
        {"version": 3},
        {"columns": {"blocks.0.mlp.down": 8}},
        {"columns": {"blocks.0.mlp.down": 1 << 40}},
        {"columns": {"blocks.9.mlp.down": 128}},
        {"columns": {"blocks.0.mlp.down": "128"}},
        {"columns": [1]},
        {"subnet": "x=1"},
        {"subnet": 3},
        {"more": 1},
    ],
)
def test_what_stands_beside_a_member_is_read_strictly(make: Make, change: dict[str, Any], tmp_path: Path) -> None:
    extract(make("llama", "int8"), "ffn=0.5", tmp_path / "out")
    path = tmp_path / "out" / cutting.FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match=r"cut\.json"):
        rg.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "weights", "why"),
    [
        ("family: {depth: [9]}\n", "plain", "depth 9: the model has 4 blocks"),
        ("family: {heads: [1]}\n", "weights: {blocks.*: {grid: int4, grain: group:96 else channel}}\n", "heads=1"),
        ("family: {ffn: [0.5], multiple: 8}\n", "int4", ""),
        ("family: {experts: [1]}\n", "plain", "the model has no experts"),
        (
            "family: {ffn: [0.5]}\n",
            WEIGHTS["int8"] + "inputs: {blocks.*.mlp.hidden: {transform: hadamard, grid: int8, grain: token}}\n",
            "blocks.0.mlp.hidden is read through hadamard, which mixes all of its channels",
        ),
        (
            "family: {depth: [2]}\n",
            "attention: {blocks.2.attention: {share: 'of:1'}}\n",
            "have no members",
        ),
    ],
)
def test_what_cannot_be_a_family_is_refused_before_any_work(
    make: Make, family: str, weights: str, why: str, tmp_path: Path
) -> None:
    source = make("llama", "plain").parent / "model"
    found = dry_run(recipe(weights, family), source, tmp_path / "out", calibration=tiny.text(tmp_path, 6000))
    assert any(why in one for one in found.refusals) if why else not found.refusals


def test_shares_that_are_rounded_are_told(make: Make) -> None:
    source = make("llama", "plain").parent / "model"
    plan = recipe("int4", "family: {order: none, ffn: [0.7, 0.5], heads: [2]}\n")
    receipt = apply(plan, source, source.parent / "told")
    assert "family: ffn 0.7 is 96 of 128, in steps of 16" in receipt.notes
    assert not any("ffn 0.5" in note for note in receipt.notes)
    model = rg.load(source.parent / "told")
    assert model.regauge.member("ffn=0.7").model.layers[0].mlp.down_proj.in_features == 96


def test_a_fused_matrix_of_rows_is_refused_by_name(tmp_path: Path) -> None:
    source = tiny.folder(tmp_path / "model", "phi3", num_hidden_layers=2)
    plan = recipe("", "family: {order: none, ffn: [0.5]}\n")
    refused = dry_run(plan, source).refusals
    assert any("mlp.gate lies behind another in one matrix" in why or "lies behind another" in why for why in refused)
