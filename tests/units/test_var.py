"""VAR: equal to the reference's code, caches equal to teaching, subnets by scale, training that resumes."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import regauge as rg
from regauge.elastic.subnet import Subnet
from regauge.errors import ModelError, SettingError
from regauge.hosts.regauge.configuration_var import VarConfig
from regauge.hosts.regauge.modeling_var import VarForImageGeneration
from regauge.hosts.regauge.quantiser import nearest_tick
from regauge.hosts.regauge.reference import config_of, from_reference, to_reference
from regauge.hosts.regauge.sampling import Taste, draw
from regauge.hosts.regauge.stages import late, layers_of, mask_of
from toy_var import SIZES, saved, toy

REFERENCE = os.environ.get("REGAUGE_VAR_REFERENCE", "")
LIKELIEST = Taste(guidance=0, top_k=1)


@pytest.mark.skipif(not REFERENCE, reason="REGAUGE_VAR_REFERENCE names no clone of FoundationVision/VAR")
@pytest.mark.parametrize(("phi", "shared", "normed"), [(4, False, True), (1, True, True), (0, False, False)])
def test_the_reference_gives_the_same(tmp_path: Path, phi: int, shared: bool, normed: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    case: dict[str, Any] = {"seed": 3, "codes": 64, "phi": phi, "shared": shared, "normed": normed}
    case |= {"sides": (1, 2, 3, 4), "labels": torch.tensor([0, 3, 4])}
    case["pixels"] = torch.rand(3, 3, 64, 64, generator=generator) * 2 - 1
    torch.save(case, tmp_path / "case.pt")
    oracle = Path(__file__).parent.parent / "var_oracle.py"
    run = [sys.executable, str(oracle), REFERENCE, str(tmp_path / "case.pt"), str(tmp_path / "out.pt")]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    model = VarForImageGeneration(config_of(out["transformer"], out["tokenizer"], heads=4)).eval()
    model.load_state_dict(from_reference(out["transformer"], out["tokenizer"]))
    ids = model.vae.encode(case["pixels"])
    assert all(torch.equal(a, b) for a, b in zip(ids, out["tokens"], strict=True))
    found = model(pixel_values=case["pixels"], labels=case["labels"]).logits
    torch.testing.assert_close(found, out["logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(model.vae.decode(ids), out["rebuilt"], rtol=0, atol=1e-4)
    drawn = model.sample(case["labels"], 7, Taste(2.0, 20, 0.9)).images
    torch.testing.assert_close(drawn, out["images"], rtol=0, atol=1e-4)
    for made, given in zip(to_reference(model.config, model.state_dict()), ("transformer", "tokenizer"), strict=True):
        assert made.keys() == out[given].keys()
    assert torch.equal(to_reference(model.config, model.state_dict())[0]["lvl_1L"], out["transformer"]["lvl_1L"])


@pytest.mark.parametrize("shared", [False, True])
def test_state_dicts_of_the_reference_go_and_come_back(shared: bool) -> None:
    model = toy(shared_aln=shared)
    transformer, tokenizer = to_reference(model.config, model.state_dict())
    assert "blocks.0.attn.q_bias" in transformer
    assert "blocks.0.attn.mat_qkv.bias" not in transformer
    again = from_reference({"trainer": {"var_wo_ddp": transformer}}["trainer"]["var_wo_ddp"], tokenizer)
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in model.state_dict().items())
    found, own = config_of(transformer, tokenizer, groups=2).to_dict(), model.config.to_dict()
    assert {key: found[key] for key in SIZES} == {key: own[key] for key in SIZES}
    model.blocks[1].attn.mat_qkv.bias.data[30] = 1
    with pytest.raises(ModelError, match=r"the keys of blocks\.1\.attn have a bias"):
        to_reference(model.config, model.state_dict())
    with pytest.raises(ModelError, match="no checkpoints of VAR"):
        config_of({}, {})


def test_logits_of_a_toy_model_stay_what_they_are() -> None:
    """Written down when the model was first equal to the reference's code."""
    pixels = torch.linspace(-1, 1, 36, dtype=torch.float32).view(1, 1, 6, 6)
    found = toy()(pixel_values=pixels, labels=torch.tensor([2])).logits[0]
    golden = [
        [-1.43297, -2.906421, 0.033276, -0.683906],
        [-0.630658, -1.19404, 2.575201, 1.813845],
        [-0.421536, -0.830145, 2.850293, 0.747702],
    ]
    torch.testing.assert_close(found[[0, 4, 13], :4], torch.tensor(golden), rtol=0, atol=2e-5)


@pytest.mark.parametrize("subnet", [None, "depth=3", ("full", "full", "depth=2"), ("depth=2", "depth=0/1/3", "full")])
def test_what_is_drawn_from_caches_is_what_teaching_finds_likeliest(subnet: Any) -> None:
    model = toy().double()
    labels = torch.tensor([0, 3, 4])
    drawn = model.sample(labels, taste=LIKELIEST, subnet=subnet)
    taught = model(tokens=drawn.tokens, labels=labels, subnet=subnet).logits
    assert torch.equal(taught.argmax(-1), drawn.tokens)
    full = model.sample(labels, taste=LIKELIEST)
    assert (subnet is None) == torch.equal(full.tokens, drawn.tokens)


def test_no_token_sees_those_of_later_scales() -> None:
    model = toy().double()
    tokens = torch.arange(14).view(1, 14) % 16
    other = tokens.clone()
    other[0, 5:] = (other[0, 5:] + 3) % 16
    one, two = (model(tokens=some, labels=torch.tensor([1])).logits for some in (tokens, other))
    torch.testing.assert_close(one[0], two[0], rtol=0, atol=1e-12)  # the last scale is read by none
    other[0, 1] = (other[0, 1] + 3) % 16
    three = model(tokens=other, labels=torch.tensor([1])).logits
    assert torch.equal(one[0, :5], three[0, :5])
    assert (one[0, 5:] - three[0, 5:]).abs().amin(1).max() > 1e-6
    assert mask_of((1, 2), torch.device("cpu")).tolist() == [[True, False, False], [True] * 3, [True] * 3]


def test_guidance_moves_away_from_no_class() -> None:
    model = toy().double()
    plain, guided = (model.sample([0, 1], 3, Taste(guidance, 1)).tokens for guidance in (0.0, 5.0))
    assert torch.equal(plain[:, :1], guided[:, :1])  # at the first scale t is 0
    assert not torch.equal(plain, guided)
    again = model.sample([0, 1], 3, Taste(5.0, 1)).tokens
    assert torch.equal(guided, again)


def test_layers_of_scales() -> None:
    by_count = {count: layers_of(f"depth={count}", 30, 2)[1] for count in (1, 2, 8, 16)}
    assert by_count[16] == (0, *range(1, 30, 2))
    assert by_count[8] == (0, 4, 8, 12, 16, 20, 24, 29)
    assert by_count[2] == (0, 29)
    assert by_count[1] == (0,)
    assert layers_of(late(10, 6, "depth=4"), 8, 10) == (tuple(range(8)),) * 6 + ((0, 2, 4, 7),) * 4
    assert layers_of(late(10, 6, "depth=0.5"), 8, 10)[6] == (0, 2, 4, 7)
    assert layers_of("depth=0/2", 3, 2) == ((0, 2), (0, 2))
    assert layers_of((Subnet(depth=(1,)), "depth=0/2", "depth=2", ""), 3, 4) == ((1,), (0, 2), (0, 2), (0, 1, 2))
    for wrong, message in (
        ("depth=9", "nearest is depth=5"),
        ("ffn=0.5", "depth alone"),
        ("width", "width of a subnet has no value"),
        ("deep=3", "no part of a subnet"),
        ("depth=2/1", "in order"),
        ("depth=0/5", "from 0 to 4"),
        (("full", "full"), "names 2 scales, and the model has 3"),
    ):
        with pytest.raises(SettingError, match=message):
            layers_of(wrong, 5, 3)


def test_the_cache_of_skipped_layers_is_freed_at_the_switch() -> None:
    model = toy()
    a_token = 2 * 2 * 24 * 4  # keys and values of both halves of a guided batch of one
    full = model.sample([0])
    assert full.cache_bytes == (5 * a_token, 25 * a_token, 0)
    half = model.sample([0], subnet=("full", "full", "depth=2"))
    assert half.layers[2] == (0, 4)
    assert half.cache_bytes == (5 * a_token, 10 * a_token, 0)  # at the second scale three layers are read the last time
    assert half.most_cache_bytes == 10 * a_token


def test_phi_of_a_scale_is_the_nearest() -> None:
    """Ten scales and four φ, as the released tokenizer has them."""
    assert [nearest_tick(scale / 9, 4) for scale in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert [nearest_tick(scale / 2, 3) for scale in range(3)] == [0, 1, 2]


def test_a_map_is_the_sum_of_its_scales() -> None:
    model = toy()
    codes = model.vae.quantize
    wanted = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    ids = codes.encode(wanted)
    assert [some.shape for some in ids] == [(2, 1), (2, 4), (2, 9)]
    latents = codes.inputs(ids)
    assert latents.shape == (2, 13, 4)
    first = codes.part(0, ids[0])
    torch.testing.assert_close(latents[:, :4], codes.down(first, 1))
    torch.testing.assert_close(latents[:, 4:], codes.down(first + codes.part(1, ids[1]), 2))
    trained = codes.trained(wanted)
    torch.testing.assert_close(trained.map_BZhw, codes.decode(ids))
    assert trained.hits_SV.sum(1).tolist() == [2, 8, 18]


def test_only_the_likeliest_tokens_are_drawn() -> None:
    chances = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1, 400, 4)
    for taste, allowed in (
        (Taste(top_k=2), {0, 1}),
        (Taste(top_p=0.75), {0, 1}),
        (Taste(top_p=0.9), {0, 1, 2}),
        (Taste(), {0, 1, 2, 3}),
    ):
        drawn = draw(chances, taste, torch.Generator().manual_seed(0))
        assert set(drawn.unique().tolist()) == allowed
    for wrong in ({"guidance": -1.0}, {"top_k": -1}, {"top_p": 1.5}):
        with pytest.raises(SettingError):
            Taste(**wrong)  # type: ignore[arg-type]  # of its kind


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"patch_nums": (1, 3, 2)}, "must rise"),
        ({"patch_nums": (3,)}, "1 scales"),
        ({"image_size": 8}, "must be 6"),
        ({"num_attention_heads": 5}, "does not split into 5 heads"),
        ({"codec_groups": 3}, "do not divide"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"phi_share": 2.0}, "phi_share"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VarConfig(**SIZES | changed)


def test_labels_that_are_none_are_refused() -> None:
    for labels, message in (([], "no labels"), ([5], "from 0 to 3"), ([-1], "from 0 to 3")):
        with pytest.raises(SettingError, match=message):
            toy().sample(labels)
    with pytest.raises(SettingError, match="pixel_values"):
        toy()()


def test_an_artifact_opens_in_regauge_alone(tmp_path: Path) -> None:
    """Stock transformers knows no such type; what is printed names no other library."""
    model = saved(tmp_path / "model")
    receipt = rg.apply("rtn-w8", model, tmp_path / "out")
    assert receipt.wire == "regauge"
    assert "the model: no other library has models of type regauge_var" in receipt.refusals
    page = rg.report(tmp_path / "out").read_text(encoding="utf-8")
    assert "regauge sample" in page
    assert "from_pretrained" not in page
    loaded, plain = rg.load(tmp_path / "out"), rg.load(model)
    pixels = torch.linspace(-1, 1, 36, dtype=torch.float32).view(1, 1, 6, 6)
    one, two = (m(pixel_values=pixels, labels=torch.tensor([2])).logits for m in (loaded, plain))
    assert 0 < float((one - two).abs().max()) < 0.5
    assert type(loaded.blocks[0].attn.mat_qkv).__name__ == "PackedLinear"
    stages = ("full", "full", "depth=2")
    assert loaded.sample([0], subnet=stages).layers == plain.sample([0], subnet=stages).layers


def test_two_threads_draw_at_two_depths() -> None:
    model = toy()
    stages: list[Any] = [None, ("full", "depth=3", "depth=2")]
    alone = [model.sample([1, 2], 4, subnet=one).images for one in stages]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda number: model.sample([1, 2], 4, subnet=stages[number % 2]).images, range(8)))
    assert not torch.equal(alone[0], alone[1])
    assert all(torch.equal(images, alone[number % 2]) for number, images in enumerate(found))


def test_the_script_makes_a_directory_of_two_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy()
    transformer, tokenizer = to_reference(model.config, model.state_dict())
    torch.save({"trainer": {"var_wo_ddp": transformer}}, tmp_path / "var.pth")
    torch.save(tokenizer, tmp_path / "vae.pth")
    script = Path(__file__).parents[2] / "scripts" / "convert_var.py"
    command = [str(script), str(tmp_path / "var.pth"), str(tmp_path / "vae.pth"), "-o", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*command, "--groups", "2"])
    runpy.run_path(str(script), run_name="__main__")
    assert torch.equal(rg.load(tmp_path / "out").sample([0], 1).images, model.sample([0], 1).images)
