"""VAR is trained from random weights: losses fall, a stopped run goes on to the same ones, subnets by their phases."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import regauge as rg
from regauge.elastic.family import Family
from regauge.elastic.subnet import Subnet
from regauge.engine.training_images import pictures as pictures_of
from regauge.errors import ModelError, TextError
from regauge.hosts import host_of
from regauge.hosts.regauge.lessons import Lessons
from regauge.hosts.regauge.stages import bridged, late
from regauge.hosts.regauge.training import (
    Course,
    Phases,
    TokenizerLoss,
    TransformerLoss,
    freeze_key_bias,
    generator_of,
    initialise,
    tokens_of,
    train,
)
from regauge.hosts.transformers.table import anatomy_of
from regauge.learn.distillers import labels as nll
from toy_var import saved, toy


def pictures(count: int = 16) -> torch.Tensor:
    """A bright square at one of four places."""
    found = torch.full((count, 1, 6, 6), -1.0)
    for number in range(count):
        x, y = 3 * (number % 2), 3 * (number // 2 % 2)
        found[number, 0, x : x + 3, y : y + 3] = 1
    return found


def test_tokenizer_and_transformer_learn() -> None:
    model, images = toy(), pictures()
    codec = train(model.vae, TokenizerLoss(model.vae, images, 8), Course(20, 8, 5e-3, warm=2)).losses
    assert sum(codec[-5:]) < 0.7 * sum(codec[:5])
    model.vae.requires_grad_(False)
    tokens = tokens_of(model.vae, images.split(8))
    initialise(model, 0)
    freeze_key_bias(model)
    labels = torch.arange(16) % 4
    found = train(model, TransformerLoss(model, tokens, labels, 8), Course(20, 8, 1e-2, warm=2)).losses
    assert sum(found[-5:]) < 0.75 * sum(found[:5])
    for block in model.blocks:
        queries, keys, values = block.attn.mat_qkv.bias.chunk(3)
        assert not keys.any()
        assert queries.any()
        assert values.any()


def test_a_run_that_was_stopped_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    images, whole = pictures(), Course(6, 4, 1e-3, warm=2, every=0)

    def run(state: Path | None, stop: int | None = None) -> list[float]:
        model = toy()

        def say(step: int, loss: float) -> None:
            if step == stop:
                raise KeyboardInterrupt

        return train(model.vae, TokenizerLoss(model.vae, images, 4), whole, state, say).losses

    straight = run(None)
    state = tmp_path / "tokenizer.state"
    with pytest.raises(KeyboardInterrupt):
        run(state, 3)
    assert run(state) == straight
    assert run(state) == straight  # a run that is done stays as it is
    model = toy()
    with pytest.raises(ModelError, match="of another course"):
        train(model.vae, TokenizerLoss(model.vae, images, 4), Course(7, 4, 1e-3), state)


def test_courses_of_two_seeds_draw_otherwise() -> None:
    drawn = {float(torch.rand(1, generator=generator_of(seed, step))) for seed in range(4) for step in range(4)}
    assert len(drawn) == 16


def test_a_code_that_nobody_takes_moves_to_where_maps_are() -> None:
    model = toy()
    codes = model.vae.quantize.embedding.weight
    loss = TokenizerLoss(model.vae, pictures(), 4, patience=2)
    loss(1, generator_of(0, 1))
    with torch.no_grad():
        codes[5] = 1e3
    far = []
    for step in (2, 3):
        loss(step, generator_of(0, step))
        far.append(float(codes[5].detach().abs().max()))
    assert far[0] == 1e3
    assert far[1] < 100


def test_the_share_of_subnets_moves_in_phases() -> None:
    """2511.16546: a fifth, then rising, then always."""
    phases = Phases(joint=0.25, transition=0.75, first=0.2)
    found = [phases.share(done) for done in (0.0, 0.24, 0.25, 0.5, 0.75, 1.0)]
    assert found == pytest.approx([0.2, 0.2, 0.2, 0.6, 1.0, 1.0])
    assert Phases(1.0, 1.0, 0.5).share(0.99) == 0.5


def test_a_step_of_the_subnet_leaves_alone_what_only_late_scales_skip() -> None:
    """Bridge scales keep gradients in all layers; the loss is that of the subnet when it is drawn."""
    model, images = toy(), pictures(8)
    tokens, labels = tokens_of(model.vae, [images]), torch.zeros(8, dtype=torch.int64)
    subnet = late(3, 2, "depth=2")
    always = TransformerLoss(model, tokens, labels, 8, subnet, Phases(0.0, 0.0))
    never = TransformerLoss(model, tokens, labels, 8, subnet, Phases(1.0, 1.0, first=0.0))
    plain = TransformerLoss(model, tokens, labels, 8)
    losses = [one(0, generator_of(0, 0)).item() for one in (always, never, plain)]
    assert losses[0] != losses[1]
    assert losses[1] == losses[2]
    always(0, generator_of(0, 0)).backward()
    assert all(block.ffn.fc1.weight.grad.abs().sum() > 0 for block in model.blocks)


def drawn(folder: Path, **more: object) -> Path:
    """Pictures and their classes in a file."""
    found = {"x": ((pictures(40)[:, 0] + 1) * 127).to(torch.uint8).numpy(), "y": np.arange(40) % 4} | more
    np.savez(folder / "pictures.npz", **found)
    return folder / "pictures.npz"


def test_learn_variant_trains_the_whole_and_its_half_on_late_scales(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    receipt: Any = rg.train("variant", model, tmp_path / "out", text=drawn(tmp_path), steps=12)
    told = receipt.trained
    assert told.unit == "nats a token"
    assert set(told.members) == {"full", "depth=2"}
    assert all(one.after < one.before for one in told.members.values())
    before, after = rg.load(model), rg.load(tmp_path / "out")
    assert torch.equal(before.vae.quantize.embedding.weight, after.vae.quantize.embedding.weight)
    assert not torch.equal(before.head.weight, after.head.weight)
    assert after.sample([0], subnet=("full", "full", "depth=2")).layers[2] == (0, 4)
    with pytest.raises(TextError, match="and this model draws 4 from 0 on"):
        rg.train("variant", model, tmp_path / "wrong", text=drawn(tmp_path, y=np.arange(40) % 10))


def test_images_to_train_on_are_checked(tmp_path: Path) -> None:
    source = host_of(saved(tmp_path / "model")).open(tmp_path / "model")
    with pytest.raises(TextError, match=r"give --text an \.npz of images"):
        pictures_of(source, "docs/index.md", 0)
    for more, message in (
        ({"y": np.arange(39)}, r"'y' has shape \(39,\) and dtype int64; 40 whole numbers"),
        ({"y": np.ones(40)}, "dtype float64; 40 whole numbers"),
        ({"x": np.zeros((9, 6, 6), np.uint8), "y": np.arange(9)}, "9 images, too few"),
    ):
        with pytest.raises(TextError, match=message):
            pictures_of(source, drawn(tmp_path, **more), 0)
    np.savez(tmp_path / "none.npz", x=np.zeros((40, 6, 6), np.uint8))
    with pytest.raises(TextError, match="holds no classes"):
        pictures_of(source, tmp_path / "none.npz", 0)
    found = pictures_of(source, drawn(tmp_path), 1)
    ids = found.ids(0, 40)
    assert ids.shape == (40, 15)
    assert 0 < int((ids[:, 0] == 4).sum()) < 12  # a tenth of the classes is hidden
    assert sorted(found.y_N.tolist()) == sorted(list(range(4)) * 10)


def test_of_a_long_file_images_and_classes_are_of_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regauge.engine.training_images.MOST", 24)
    source = host_of(saved(tmp_path / "model")).open(tmp_path / "model")
    bright = np.arange(40, dtype=np.uint8)
    x = np.broadcast_to(bright[:, None, None], (40, 6, 6))
    found = pictures_of(source, drawn(tmp_path, x=x, y=bright.astype(np.int64)), 1)
    assert len(found.y_N) == 24
    assert ((found.x_NChw[:, 0, 0, 0] + 1) * 127.5).round().long().tolist() == found.y_N.tolist()


def test_a_lesson_is_the_loss_of_the_model_itself() -> None:
    model = toy()
    lessons = Lessons(model, Family(), anatomy_of(model.config, model))
    ids = torch.cat([torch.tensor([[0], [4]]), torch.arange(28).view(2, 14) % 16], 1)
    for subnet, stages in ((Subnet(), None), (Subnet(depth=2), ("full", "full", "depth=2"))):
        read = lessons.read(subnet, ids)
        own = model(tokens=ids[:, 1:], labels=ids[:, 0], subnet=stages).loss
        torch.testing.assert_close(nll(read, ids), own)
    assert torch.equal(lessons.original().read(ids).logits_BTV, lessons.read(Subnet(), ids).logits_BTV)
    nll(read, ids).backward()
    keys = lessons.gradients["blocks.0.attn.mat_qkv.bias"].chunk(3)
    assert not keys[1].any()
    assert keys[2].any()
    assert not any(key.startswith("vae.") for key in lessons.parameters)
    lessons.put({key: value.clone() for key, value in lessons.parameters.items()})
    assert not any(one.any() for one in lessons.gradients.values())
    assert [bridged(scales, "depth=2").count("full") for scales in (2, 3, 4, 10)] == [1, 2, 2, 6]


def test_the_script_trains_every_stage_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 255, (8, 28, 28), np.uint8)
    np.savez(tmp_path / "x.npz", x_train=images, y_train=np.arange(8, dtype=np.uint8))
    script = Path(__file__).parents[2] / "scripts" / "train_var.py"
    few = ["--tokenizer-steps", "2", "--steps", "2", "--variant-steps", "2", "--batch", "2", "--tokenizer-batch", "2"]
    command = [str(script), "mnist16", "--data", str(tmp_path / "x.npz"), "-o", str(tmp_path / "out"), *few]
    monkeypatch.setattr(sys, "argv", command)
    losses = []
    for _ in range(2):  # the second finds all of it done
        with pytest.raises(SystemExit):
            runpy.run_path(str(script), run_name="__main__")
        losses.append(json.loads((tmp_path / "out" / "losses.json").read_text(encoding="utf-8")))
    assert losses[0] == losses[1]
    assert {name: len(some) for name, some in losses[0].items()} == {
        "tokenizer": 2,
        "transformer": 2,
        "variant": 2,
        "fixed": 2,
    }
    assert len(list((tmp_path / "out").glob("*/model.safetensors"))) == 3
