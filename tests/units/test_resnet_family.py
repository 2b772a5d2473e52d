"""A family of residual networks: depth of stages, channels, statistics of batch norms, and training on images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import regauge as rg
from regauge.artifact.folder import read_receipt
from regauge.artifact.statistics import FILE, read_statistics, statistics_bytes
from regauge.elastic.family import family_of
from regauge.elastic.legal import cut_of, reasons, settled
from regauge.elastic.stages import staged
from regauge.engine import apply
from regauge.engine.extracting import extract
from regauge.engine.recovery_text import Amounts
from regauge.engine.training import train
from regauge.engine.training_classes import places
from regauge.engine.training_cost import planned
from regauge.engine.training_recipe import Asked
from regauge.errors import ArtifactError, RecipeError, RegaugeError, SettingError, TextError
from regauge.hosts.transformers.source import Source
from regauge.learn.pictures import moved
from regauge.plan import Plan, parse
from regauge.report.view import raised
from tests import tiny
from toy_resnet import images, pixels, saved

FAMILY = (
    "family: {depth: [3, 2], ffn: [0.5], kernel: [3, 1], layers: stages, multiple: 1, members: {small: "
    "'depth=2,ffn=0.5'}}\n"
)
TRAIN = "train: {sampler: sandwich:1, distiller: kl, labels: 0.5, steps: 6, batch: 8, rate: 0.01, moved: 1}\n"
MEMBERS = (
    "depth=3", "depth=2", "ffn=0.5", "depth=2,ffn=0.5", "depth=0/2/3", "ffn=1/0.5/0.5/1", "kernel=1", "kernel=3",
    "kernel=3/1/3/1", "kernel=1,depth=2", "kernel=1,ffn=0.5", "kernel=1/3/3,depth=3,ffn=1/0.5/1",
)  # fmt: skip


def recipe(*more: str) -> Plan:
    return parse("name: images\n" + FAMILY + "".join(more))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("resnet")
    source = saved(where / "m", layer_kernels=(3, 5, 3, 5))
    apply(recipe(), source, where / "out", calibration=images(where / "x.npz"))
    return where / "out"


def test_the_first_blocks_of_each_stage_stay(tmp_path: Path) -> None:
    anatomy = Source.open(saved(tmp_path / "m")).anatomy
    assert anatomy.plumbing.stays == (2,)
    assert [staged(count, anatomy) for count in (1, 2, 3, 4)] == [(0,), (0, 2), (0, 1, 2), (0, 1, 2, 3)]
    even = family_of({"depth": [2]})
    assert reasons(even, anatomy) == [
        "depth 2: block 2 changes the size of what flows through it, so it stays; layers: stages keeps the first "
        "blocks of each stage"
    ]
    own = family_of({"depth": [2, 3], "layers": "stages"})
    assert not reasons(own, anatomy)
    assert cut_of(settled("depth=3", own, anatomy), own, anatomy).blocks == (0, 1, 2)
    with pytest.raises(SettingError, match=r"depth=0/1: block 2 changes .* the nearest that is: depth=2"):
        settled("depth=0/1", own, anatomy)


@pytest.mark.parametrize("subnet", MEMBERS)
def test_a_member_taken_out_gives_the_same_bits(subnet: str, family: Path, tmp_path: Path) -> None:
    model = rg.load(family, dtype=torch.float32)
    model.regauge.recalibrate(subnet, model, [pixels(8)])
    (family / FILE).write_bytes(statistics_bytes(model.regauge.learnt.statistics))
    try:
        extract(family, subnet, tmp_path / "one")
        with rg.use(model, subnet), torch.no_grad():
            inside = model(pixel_values=pixels()).logits
        loaded = [rg.load(tmp_path / "one", dtype=torch.float32), rg.load(family, dtype=torch.float32, subnet=subnet)]
    finally:
        (family / FILE).unlink()
    with torch.no_grad():
        assert all(torch.equal(one(pixel_values=pixels()).logits, inside) for one in loaded)
    assert not (tmp_path / "one" / FILE).exists()


def test_a_member_is_a_view_with_statistics_of_its_own(family: Path) -> None:
    model = rg.load(family, dtype=torch.float32)
    small = model.regauge.member("small")
    assert small.blocks[1].conv1.weight.data_ptr() == model.blocks[2].conv1.weight.data_ptr()
    with torch.no_grad():
        whole, before = (one(pixel_values=pixels()).logits for one in (model, small))
    held = model.blocks[2].bn1.mean.clone()
    found = model.regauge.recalibrate("small", model, [pixels(8)])
    assert sorted(found)[:2] == ["blocks.0.mlp.down.norm.mean", "blocks.0.mlp.down.norm.var"]
    assert len(found["blocks.2.mlp.up.norm.mean"]) == len(held) // 2
    with torch.no_grad():
        assert not torch.equal(model.regauge.member("small")(pixel_values=pixels()).logits, before)
        assert torch.equal(model(pixel_values=pixels()).logits, whole)
    assert torch.equal(model.blocks[2].bn1.mean, held)


def test_channels_are_sorted_by_what_they_contribute(family: Path) -> None:
    """The first half of the channels is nearer to the whole than the last half, in the convolution that reads them."""
    model = rg.load(family, dtype=torch.float32)
    seen = {}
    block = model.blocks[3]
    handle = block.conv2.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    data = np.load(family.parent / "x.npz")["x"]
    with torch.no_grad():
        model(pixel_values=torch.from_numpy(data).permute(0, 3, 1, 2) / 127.5 - 1)
    handle.remove()
    energy = seen["x"].square().mean((0, 2, 3)) * block.conv2.weight.square().sum((0, 2, 3))
    assert energy[:6].sum() > energy[-6:].sum()


def test_what_is_learnt_from_images(family: Path, tmp_path: Path) -> None:
    source, data = family.parent / "m", family.parent / "x.npz"
    receipt = train(recipe(TRAIN), source, tmp_path / "out", data)
    trained = receipt.trained
    assert trained is not None
    assert (trained.unit, trained.tokens, trained.held_out) == ("nats an image", 40, 4)
    assert set(trained.members) == {"full", "depth=2,ffn=0.5"}
    assert "nats an image on 4 images held out" in raised(receipt)[0].caption
    model = rg.load(tmp_path / "out", dtype=torch.float32)
    known = read_statistics(tmp_path / "out", model.regauge.anatomy)
    assert set(known) == {"depth=2,ffn=0.5"}
    small = model.regauge.member("small")
    held = known["depth=2,ffn=0.5"]["blocks.2.mlp.up.norm.var"]
    torch.testing.assert_close(small.blocks[1].bn1.var.detach(), held)
    again = train(recipe(TRAIN), source, tmp_path / "again", data)
    assert again.trained is not None
    assert again.trained.losses == trained.losses


def test_images_that_cannot_be_learnt_from(tmp_path: Path) -> None:
    source = saved(tmp_path / "m")

    def asked(data: object, plan: Plan | None = None) -> None:
        train(plan or recipe(TRAIN), source, tmp_path / "out", data, Asked(Amounts(steps=1)))  # type: ignore[arg-type]

    with pytest.raises(TextError, match="give --text a file of them"):
        asked(None)
    x = np.zeros((24, 8, 8, 3), dtype=np.uint8)
    for name, held, told in (
        ("none", {"x": x}, "holds no classes of images"),
        ("short", {"x": x[:9], "y": np.zeros(9, dtype=int)}, "holds 9 images, too few"),
        ("odd", {"x": x, "y": np.zeros(23, dtype=int)}, "'y' has shape"),
        ("far", {"x": x, "y": np.full(24, 3)}, "classes 3 to 3, and the model knows 0 to 2"),
    ):
        np.savez(tmp_path / f"{name}.npz", **held)
        with pytest.raises(TextError, match=told):
            asked(tmp_path / f"{name}.npz")
    with pytest.raises(RecipeError, match="compares states of tokens"):
        asked(images(tmp_path / "x.npz"), recipe(TRAIN.replace("kl", "features")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("run", [train, planned])
def test_a_model_of_text_learns_nothing_from_images(run: Callable[..., object], tmp_path: Path) -> None:
    asked = tiny.folder(tmp_path / "m"), *([tmp_path / "out"] * (run is train)), tiny.text(tmp_path)
    with pytest.raises(
        RecipeError, match=r"learns from labelled images, moved by up to 4 pixels, and llama is no network"
    ):
        run("once-for-all-images", *asked)
    assert not (tmp_path / "out").exists()


def test_damaged_statistics_are_told(family: Path) -> None:
    anatomy = Source.open(family.parent / "m").anatomy
    good = {"depth=2": {"blocks.0.mlp.up.norm.var": torch.ones(6)}}
    for wrong in (
        {"depth=2": {"blocks.0.mlp.up.norm.var": -torch.ones(6)}},
        {"depth=2": {"blocks.0.mlp.up.norm.gain": torch.ones(6)}},
        {"depth=2": {"blocks.0.mlp.up.norm.mean": torch.ones(7)}},
        {"": good["depth=2"]},
    ):
        (family / FILE).write_bytes(statistics_bytes(wrong))
        with pytest.raises(ArtifactError, match="does not fit the model"):
            read_statistics(family, anatomy)
    (family / FILE).write_bytes(statistics_bytes(good))
    assert read_statistics(family, anatomy).keys() == good.keys()
    (family / FILE).unlink()


def test_images_are_moved_and_mirrored_by_their_seed() -> None:
    x = pixels(64)
    one, other = (moved(x, 2, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert torch.equal(one, moved(x, 2, torch.Generator().manual_seed(1)))
    assert not torch.equal(one, other)
    still = moved(x, 0, torch.Generator().manual_seed(1))
    kept = [torch.equal(a, b) or torch.equal(a, b.flip(2)) for a, b in zip(still, x, strict=True)]
    assert all(kept)


def test_a_family_needs_a_stage_rule(tmp_path: Path) -> None:
    with pytest.raises(RegaugeError, match="layers: stages keeps the first blocks"):
        apply(parse("name: even\nfamily: {depth: [2]}\n"), saved(tmp_path / "m"), tmp_path / "out",
              calibration=images(tmp_path / "x.npz"))  # fmt: skip


def test_what_a_training_would_take_is_counted_by_places(tmp_path: Path) -> None:
    """An image of 8 pixels: 64 places in the first stage, 16 in the second."""
    source = Source.open(saved(tmp_path / "m", layer_kernels=(3, 5, 3, 5)))
    assert [places(source, source.anatomy.site(f"blocks.{block}.mlp.up")) for block in (0, 2, 3)] == [64, 16, 16]
    assert places(source, source.anatomy.site("head")) == 1
    found = planned(recipe(TRAIN), tmp_path / "m", images(tmp_path / "x.npz"))
    assert (found.batch, found.passes, found.choices) == (8, 3.0, "kernel (3), depth (3), ffn (2)")
    with pytest.raises(TextError, match="give --text a file of them"):
        planned(recipe(TRAIN), tmp_path / "m")


def test_a_smaller_kernel_is_the_middle_of_the_whole_one(tmp_path: Path) -> None:
    """Of 5 x 5 the 3 x 3 inside, of 3 x 3 the centre, over the same memory; edges are as wide as the kernel needs."""
    model = rg.load(kernels(tmp_path), dtype=torch.float32)
    small, least = (model.regauge.member(f"kernel={side}").blocks[1].conv1 for side in (3, 1))
    whole = model.blocks[1].conv1
    assert torch.equal(small.weight, whole.weight[:, :, 1:4, 1:4])
    assert torch.equal(least.weight[:, :, 0, 0], whole.weight[:, :, 2, 2])
    assert small.weight.untyped_storage().data_ptr() == whole.weight.untyped_storage().data_ptr()
    assert (whole.padding, small.padding, least.padding) == ((2, 2), (1, 1), (0, 0))
    assert model.regauge.member("kernel=3").blocks[0].conv1.weight.shape[2:] == (3, 3)
    assert model.regauge.member("kernel=3").config.layer_kernels == [3, 3, 3, 3]
    assert model.config.layer_kernels == [3, 5, 3, 5]


def kernels(where: Path, more: str = "", name: str = "out") -> Path:
    if not (where / "m").exists():
        saved(where / "m", layer_kernels=(3, 5, 3, 5))
    apply(recipe(more), where / "m", where / name, calibration=images(where / "x.npz"))
    return where / name


CODES = "weights: {blocks.*: {grid: int4-asym, grain: %s, ranger: minmax, scale: f32, rounder: nearest}}\n"
FOLD = "rewrites: [fold-batch-norm]\n"


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kernels(tmp_path_factory.mktemp("coded"), FOLD + CODES % "channel")


@pytest.mark.parametrize("subnet", ["kernel=1", "kernel=3/1/3/1", "kernel=1,ffn=0.5", "kernel=3,depth=3,ffn=0.5"])
def test_a_member_of_codes_decodes_the_middle_of_its_kernels(subnet: str, coded: Path, tmp_path: Path) -> None:
    extract(coded, subnet, tmp_path / "one")
    model = rg.load(coded, dtype=torch.float32)
    with torch.no_grad():
        inside = model.regauge.member(subnet)(pixel_values=pixels()).logits
        for one in (rg.load(tmp_path / "one", dtype=torch.float32), rg.load(coded, dtype=torch.float32, subnet=subnet)):
            assert torch.equal(one(pixel_values=pixels()).logits, inside)
    assert not torch.equal(inside, model(pixel_values=pixels()).logits)


def test_a_step_of_several_places_has_no_smaller_kernel(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"kernel=3: blocks\.1\.mlp\.up has several steps a row, each of several places"
    ):
        kernels(tmp_path, CODES % "group:5 else channel")


def test_kernels_as_a_family_says_them(tmp_path: Path) -> None:
    anatomy = Source.open(saved(tmp_path / "m", layer_kernels=(3, 5, 3, 5))).anatomy
    own = family_of({"depth": [3], "kernel": [3, 1], "layers": "stages"})
    assert not reasons(own, anatomy)
    said = {
        text: str(settled(text, own, anatomy))
        for text in ("kernel=5", "kernel=3/3/3/3", "kernel=3/5/3/5", "kernel=1/3/3/1")
    }
    assert list(said.values()) == ["full", "kernel=3", "full", "kernel=1/3/3/1"]
    assert cut_of(settled("depth=3,kernel=1/3/3", own, anatomy), own, anatomy).kernels == {0: 1, 1: 3}
    for text, told in (
        ("kernel=7", r"kernel=7, of 5, 3, 1; the nearest that is: full"),
        ("kernel=1/3", r"kernel has 2 numbers for 4 blocks"),
        ("kernel=2", r"kernel=2 of a subnet is not an odd number"),
    ):
        with pytest.raises(SettingError, match=told):
            settled(text, own, anatomy)
    with pytest.raises(SettingError, match="this family has kernels of one size"):
        settled("kernel=1", family_of({"depth": [3], "layers": "stages"}), anatomy)
    with pytest.raises(ValueError, match="odd numbers, and 4 is none"):
        family_of({"kernel": [4]})
    assert reasons(family_of({"kernel": [7, 5]}), anatomy) == ["kernel 7: the largest kernels are 5 x 5"]
    text = Source.open(tiny.folder(tmp_path / "text")).anatomy
    assert reasons(family_of({"kernel": [1]}), text) == [
        "kernel: the model has no convolutions in its blocks whose kernels could be smaller"
    ]


def test_a_member_taken_out_with_images_has_statistics_of_its_own(family: Path, tmp_path: Path) -> None:
    """Those that `recalibrate` takes on the same images; the whole's where none are given."""
    data = family.parent / "x.npz"
    model = rg.load(family, dtype=torch.float32)
    for subnet in ("kernel=1,depth=3", "full"):
        out = tmp_path / subnet
        rg.extract(family, subnet, out, calibration=data)
        one = rg.load(out, dtype=torch.float32)
        x = torch.from_numpy(np.load(data)["x"]).permute(0, 3, 1, 2) / 127.5 - 1
        found = model.regauge.recalibrate(subnet, model, [x])
        torch.testing.assert_close(one.stem_norm.var.detach(), found["embed.patch.norm.var"])
        torch.testing.assert_close(one.blocks[2].bn2.mean.detach(), found["blocks.2.mlp.down.norm.mean"])
        assert any("taken anew on x.npz (48 images)" in note for note in read_receipt(out).notes)
    extract(family, "kernel=1,depth=3", tmp_path / "as-it-was")
    plain = rg.load(tmp_path / "as-it-was", dtype=torch.float32)
    assert torch.equal(plain.stem_norm.var, rg.load(family, dtype=torch.float32).stem_norm.var)
    for given, told in ((tmp_path / "none.npz", "none.npz"), (__file__, "holds no images: give --calibration an .npz")):
        with pytest.raises(TextError, match=told):
            extract(family, "kernel=1", tmp_path / "out", calibration=given)
    assert not (tmp_path / "out").exists()


def test_a_member_without_batch_norms_takes_no_images(coded: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="takes statistics of batch norms anew, and this regauge_resnet has none"):
        extract(coded, "kernel=1", tmp_path / "out", calibration=coded.parent / "x.npz")
    assert not (tmp_path / "out").exists()
