"""The two wires: what goes in comes out; stock transformers computes what we compute; every refusal has its reason."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts import Choice, choice, decode, encode, layout_of, make, outputs
from pico import batches, pico, save
from regauge.anatomy.model import Site
from regauge.anatomy.storage import gather
from regauge.artifact import files
from regauge.artifact.codec.base import Layout
from regauge.artifact.codec.choose import choose
from regauge.errors import ArtifactError, RefusedError
from regauge.hosts.transformers.load import load
from regauge.hosts.transformers.table import anatomy_of
from regauge.kernels.cpu.library import available, level

SMALL = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
SAID = {
    "int2": choice("int2", "channel", "bf16"),
    "int3": choice("int3", "group:32", "bf16"),
    "int4": choice("int4", "group:32", "bf16"),
    "int5": choice("int5", "group:16", "f16"),
    "int8": choice("int8", "channel", "f32"),
    "int4-asym": choice("int4-asym", "group:32", "bf16", "minmax"),
    "int3-asym": choice("int3-asym", "channel", "f32", "minmax"),
    "w8a8": choice("int8", "channel", "f32", inputs="int8"),
    "w4a8": choice("int4", "group:32", "bf16", inputs="int8"),
    "fp8": choice("fp8", "channel", "f32", inputs="fp8"),
    "fp8-weights": choice("fp8", "channel", "f32"),
    "nvfp4": choice("fp4", "group:16", "nv"),
    "mxfp4": choice("fp4", "group:32", "e8m0"),
}
UNSAID = {
    "nf4": (choice("nf4", "channel", "bf16"), "no nf4 weights"),
    "fp4-bf16": (choice("fp4", "group:32", "bf16"), "e4m3 steps in groups of 16 or powers of two in groups of 32"),
    "fp6": (choice("fp6", "channel", "bf16"), "no fp6 weights"),
    "int4-m1": (choice("int4", "group:32", "m1"), "cannot be stored as m1"),
    "lorc": (choice("int4", "channel", "bf16", lorc=2), "'lorc' adds back"),
    "super-low": (choice("int4-asym", "channel", "super-low:6", "minmax"), "cannot be stored as super-low:6"),
    "asym-w8a8": (choice("int8-asym", "channel", "f32", "minmax", "int8"), "drops the quantisation of activations"),
    "int4-fp8": (choice("int4", "channel", "f32", inputs="fp8"), "not tried"),
}


def stock(path: Path, **options: Any) -> Any:
    """The artifact as stock transformers loads and decompresses it."""
    import transformers

    architecture = json.loads((path / "config.json").read_text())["architectures"][0]
    kind = transformers.AutoModelForCausalLM if "LM" in architecture else transformers.AutoModel
    with contextlib.redirect_stderr(io.StringIO()):
        model = kind.from_pretrained(path, **options).eval()
        with torch.inference_mode():
            model(torch.zeros(1, 1, dtype=torch.int64))  # decompresses
    return model


def linears(site: Site, how: Choice) -> Choice | None:
    return how if site.block is not None or site.kind == "head" else None


@pytest.mark.parametrize("form", SAID)
def test_stock_transformers_has_our_weights_and_logits(form: str, tmp_path: Path) -> None:
    how, four = SAID[form], form in ("nvfp4", "mxfp4")
    dtype = torch.bfloat16 if four else torch.float32
    model = pico("llama", dtype=dtype, **SMALL)
    made = make(save(model, tmp_path / "source"), tmp_path / "out", lambda site: linears(site, how))
    assert (made.wire.name, made.refusals) == ("compressed-tensors", ())
    theirs, ours = stock(made.path), load(made.path)
    for path in ("model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj", "lm_head"):
        part = ours.get_submodule(path).parts[0]
        weight = theirs.get_submodule(path).weight
        torch.testing.assert_close(part.rows(0, part.shape[0]).to(dtype), weight.to(dtype), rtol=0, atol=0)
    ids = batches(model)[0]
    # A difference in the last bit may move an activation to the next code: one in 127 of the largest.
    rough = 3e-2 if how.activations is not None or dtype == torch.bfloat16 else 1e-5
    y, z = outputs(theirs, ids), outputs(ours, ids)
    assert (y - z).abs().max() <= rough * y.abs().max()


def mixed(site: Site) -> Choice | None:
    kinds = {"q": "int4", "k": "int4", "v": "int4", "o": "int3", "gate": "w8a8", "up": "w8a8", "down": "fp8"}
    return SAID[kinds[site.kind]] if site.kind in kinds else None


@pytest.mark.parametrize("name", ["llama", "llama-tied", "phi3", "gpt_neox", "opt", "bert", "gemma3"])
def test_stock_transformers_and_mixed_formats(name: str, tmp_path: Path) -> None:
    small = {k: v for k, v in SMALL.items() if k in ("hidden_size", "num_attention_heads", "intermediate_size")}
    changes: dict[str, Any] = {
        "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "num_attention_heads": 4, "ffn_dim": 96},
        "gpt_neox": small,
        "bert": small,
        "phi3": {k: v for k, v in SMALL.items() if k != "head_dim"},
    }.get(name, SMALL)
    model = pico(name, **changes)
    made = make(save(model, tmp_path / "source"), tmp_path / "out", mixed)
    assert (made.wire.name, made.refusals) == ("compressed-tensors", ())
    config = json.loads((made.path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    ids = batches(model)[0]
    y, z = outputs(stock(made.path), ids), outputs(load(made.path), ids)
    assert (y - z).abs().max() <= 3e-2 * y.abs().max()


NOVEL = {
    "int4 g128": choice("int4", "group:128 else channel", "bf16"),
    "int4 asym": choice("int4-asym", "channel", "bf16", "minmax"),
    "int8": SAID["int8"],
    "w8a8": SAID["w8a8"],
    "fp8": SAID["fp8"],
    "nvfp4": SAID["nvfp4"],
    "mxfp4": SAID["mxfp4"],
}


EVERY_DAY = ("int4 g128", "w8a8", "mixed")
"""The others take seconds each, and `test_stock_transformers_loads_it` has every form on a small model."""


@pytest.mark.parametrize(
    "form", [*EVERY_DAY, *(pytest.param(form, marks=pytest.mark.slow) for form in NOVEL if form not in EVERY_DAY)]
)
def test_a_trained_model_in_stock_transformers(form: str, shared: Path, tmp_path: Path) -> None:
    """In bfloat16 the two differ by no more than bfloat16 itself makes stock transformers differ from its float32; a
    prompt through weights of 4 bits and fewer, whose activations have 8 bits a group then, by less than twice that."""
    pick: Callable[[Site], Choice | None] = lambda site: NOVEL[form] if site.block is not None else None  # noqa: E731  # one of two
    made = make(shared / "models" / "novel-llama-8m", tmp_path / "out", mixed_novel if form == "mixed" else pick)
    assert (made.wire.name, made.refusals) == ("compressed-tensors", ())
    ids = torch.randint(8192, (2, 48), generator=torch.Generator().manual_seed(3))
    theirs, ours = outputs(stock(made.path), ids), outputs(load(made.path), ids)
    exact = outputs(load(made.path, dtype=torch.float32), ids)
    noise = (theirs - exact).abs().mean()
    eight_bits = level() == "vnni" and form in ("int4 g128", "int4 asym", "nvfp4", "mxfp4")
    assert (ours - theirs).abs().mean() <= (2 if eight_bits else 1.5) * noise
    assert (ours - exact).abs().mean() <= (1.75 if eight_bits else 1.25) * noise
    assert noise < 0.05 * exact.std()
    if form not in ("nvfp4", "mxfp4", "w8a8", "fp8", "mixed"):
        wide = outputs(stock(made.path, dtype=torch.float32), ids)
        assert (wide - exact).abs().max() <= 1e-2 * noise if form != "int4 asym" else 2 * noise


def mixed_novel(site: Site) -> Choice | None:
    kinds = {"q": "int4", "k": "int4", "v": "int4", "o": "int3", "gate": "w8a8", "up": "w8a8", "down": "int8"}
    return SAID[kinds[site.kind]] if site.kind in kinds else None


def layout(
    name: str, pick: Callable[[Site], Choice | None], dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Layout:
    model = pico(name, dtype=dtype, **changes)
    anatomy = anatomy_of(model.config, model)
    return layout_of(anatomy, anatomy, {site.name: pick(site) for site in anatomy.sites}, dtype)


@pytest.mark.parametrize("form", UNSAID)
def test_what_compressed_tensors_cannot_say(form: str) -> None:
    how, reason = UNSAID[form]
    chosen = choose(layout("llama", lambda site: linears(site, how), **SMALL))
    assert chosen.wire.name == "regauge"
    assert any(reason in told for told in chosen.refusals), chosen.refusals


@pytest.mark.parametrize(
    ("name", "pick", "reason"),
    [
        ("gpt2", lambda s: linears(s, SAID["int8"]), "Conv1D"),
        ("mixtral", lambda s: SAID["int8"] if s.expert is not None else None, "stacks of experts"),
        ("mixtral", lambda s: SAID["int8"] if s.kind == "router" else None, "routers"),
        ("llama", lambda s: SAID["int8"] if s.name == "embed" else None, "quantised embedding"),
        ("phi3", lambda s: SAID["int8"] if s.kind == "q" else None, "shares a matrix"),
        ("phi3", lambda s: choice("fp4", "group:16", "nv") if s.kind in "qkv" else None, "global step of NVFP4"),
        ("llama", lambda s: choice("int4-asym" if s.kind == "q" else "int4"), "zero points"),
    ],
)
def test_what_stock_modules_cannot_hold(name: str, pick: Callable[[Site], Choice | None], reason: str) -> None:
    chosen = choose(layout(name, pick))
    assert chosen.wire.name == "regauge"
    assert any(reason in told for told in chosen.refusals), chosen.refusals
    with pytest.raises(RefusedError, match="compressed-tensors cannot express"):
        choose(layout(name, pick), "compressed-tensors")


def test_fp4_in_a_float32_model_is_refused() -> None:
    """Stock transformers really fails there: its fp4 weights are bfloat16 whatever the model is."""
    chosen = choose(layout("llama", lambda s: linears(s, SAID["nvfp4"]), torch.float32, **SMALL))
    assert "bfloat16" in " ".join(chosen.refusals)


def test_a_wire_can_be_asked_for_by_name() -> None:
    said = layout("llama", lambda s: linears(s, SAID["int8"]))
    assert choose(said).wire.name == "compressed-tensors"
    assert choose(said, "regauge").wire.name == "regauge"
    with pytest.raises(RefusedError, match="did you mean 'regauge'"):
        choose(said, "reguage")


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("form", ["int3-asym", "nf4", "fp8", "lorc", "super-low"])
@pytest.mark.parametrize("prefer", [None, "regauge"])
def test_what_goes_in_comes_out(name: str, form: str, prefer: str | None) -> None:
    how = SAID[form] if form in SAID else UNSAID[form][0]
    model = pico(name, dtype=torch.bfloat16).requires_grad_(False)
    anatomy = anatomy_of(model.config, model)
    choices: dict[str, Choice | None] = {s.name: how for s in anatomy.sites if s.block is not None}
    wire = choose(layout_of(anatomy, anatomy, choices, torch.bfloat16), prefer).wire
    weights = gather(anatomy, dict(model.named_parameters()))
    codes = {site: encode(weights.pop(f"{site}.weight").float(), how) for site in choices}
    full, back = wire.unpack(wire.pack(weights, codes))
    assert back.keys() == codes.keys()
    for site, found in back.items():
        assert found.codes_OI.equal(codes[site].codes_OI)
        assert decode(found, how).equal(decode(codes[site], how))
    for key, tensor in full.items():
        assert tensor.equal(model.get_parameter(key))


def test_names_on_disk_are_those_of_compressed_tensors() -> None:
    """By hand: a 2 x 8 matrix of 4 bits is two words a row; zero points go down the columns."""
    model = pico("llama").requires_grad_(False)
    anatomy = anatomy_of(model.config, model)
    how = choice("int4-asym", "channel", "f32", "minmax")
    wire = choose(layout_of(anatomy, anatomy, {"blocks.0.attn.q": how}, torch.float32)).wire
    tensors = wire.pack({}, {"blocks.0.attn.q": encode(torch.randn(60, 42), how)})
    stem = "model.layers.0.self_attn.q_proj.weight"
    assert {name.removeprefix(stem): (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "_packed": (torch.int32, (60, 6)),
        "_scale": (torch.float32, (60, 1)),
        "_shape": (torch.int64, (2,)),
        "_zero_point": (torch.int32, (8, 1)),
    }


def test_a_checkpoint_that_compressed_tensors_itself_wrote(tmp_path: Path) -> None:
    """Its packer, its targets (`Linear`), its config: we compute what stock transformers does."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = pico("llama", **SMALL)
    weights = {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    groups = {"g": {"targets": ["Linear"], "weights": weights}}
    with contextlib.redirect_stderr(io.StringIO()):
        apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
        for name, parameter in model.named_parameters():
            if name.endswith("weight_scale"):
                w_OI = model.get_parameter(name.removesuffix("_scale")).detach()
                parameter.data = w_OI.view(w_OI.shape[0], -1, 32).abs().amax(-1) / 3.5
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(tmp_path / "theirs")
        compressor.update_config(str(tmp_path / "theirs"))
    ids = batches(model)[0]
    ours = load(tmp_path / "theirs")
    assert ours.model.layers[0].mlp.up_proj.parts[0].way.name == ("panels" if available() else "decoded")
    assert ours.lm_head.weight.shape == (53, 64)
    torch.testing.assert_close(outputs(ours, ids), outputs(stock(tmp_path / "theirs"), ids), rtol=1e-4, atol=1e-5)


def test_zero_points_that_older_versions_left_unpacked(tmp_path: Path) -> None:
    """Signed bytes (O, G) beside packed codes: the same matrices."""
    form = choice("int4-asym", "group:14")
    source = save(pico("llama"), tmp_path / "source")
    made = make(source, tmp_path / "out", lambda site: form if site.kind in ("q", "k") else None).path
    wanted = load(made)(torch.arange(7)[None]).logits
    for path in made.glob("*.safetensors"):
        tensors = files.read(path)
        for name in [name for name in tensors if name.endswith("zero_point")]:
            rows = int(tensors[name.replace("zero_point", "shape")][0])
            codes = torch.stack([(tensors[name] >> 4 * i) & 15 for i in range(8)], 1)
            tensors[name] = (codes.reshape(-1, tensors[name].shape[1])[:rows] - 8).to(torch.int8).contiguous()
        files.write(path, tensors)
    assert torch.equal(load(made)(torch.arange(7)[None]).logits, wanted)


def test_groups_in_activation_order_are_refused(tmp_path: Path) -> None:
    source = save(pico("llama"), tmp_path / "source")
    made = make(source, tmp_path / "out", lambda site: choice("int4", "group:14") if site.kind == "q" else None).path
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["actorder"] = "group"
    (made / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ArtifactError, match="groups are in activation order"):
        load(made)
