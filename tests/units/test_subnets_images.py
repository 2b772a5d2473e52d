"""`regauge subnets` of families of models of images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import regauge as rg
from regauge.cli import main
from regauge.engine import apply
from regauge.engine.extracting import extract
from regauge.engine.seeing import images_of
from regauge.errors import TextError
from regauge.hosts.transformers.host import HOST
from regauge.measure.images import read
from regauge.measure.subject import Facts
from regauge.plan import parse
from tests import toy_resnet, toy_var
from tests.units.test_measure_images import grey

RESNET = """
name: images
family: {depth: [2], ffn: [0.5], layers: stages, members: {small: "depth=2,ffn=0.5"}}
"""
VAR = "name: images\nfamily: {depth: [3], ffn: [0.5], members: {small: depth=3}}\n"


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    where = tmp_path_factory.mktemp("classes")
    data = toy_resnet.images(where / "x.npz")
    apply(parse(RESNET), toy_resnet.saved(where / "m"), where / "out", calibration=data)
    return where / "out", data


@pytest.fixture(scope="module")
def drawing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    where = tmp_path_factory.mktemp("drawing")
    data = grey(where / "x.npz")
    apply(parse(VAR), toy_var.saved(where / "m"), where / "out", calibration=data)
    return where / "out", data


def test_members_of_a_classifier(
    classes: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = classes
    page = tmp_path / "page.html"
    asked = ["subnets", str(out), "--subnet", "ffn=0.5", "--subnet", "small", "--eval", str(data), "--quiet"]
    assert main([*asked, "--json", "--page", str(page)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["drafting"]) == ("classes", None)
    assert [one["subnet"] for one in found["members"]] == ["full", "ffn=0.5", "depth=2,ffn=0.5"]
    whole, _, small = found["members"]
    assert whole["quality"]["kl"]["value"] == 0 < small["quality"]["kl"]["value"]
    assert whole["bytes"] > small["bytes"]
    assert extract(out, "small", tmp_path / "small").bytes == pytest.approx(small["bytes"], rel=0.02)
    assert "ffn=0.5, depth=2,ffn=0.5; a member has its own where" in found["notes"][0]
    drawn = page.read_text(encoding="utf-8")
    assert drawn.count('<g class="dot uniform">') == 2
    for said in ("images/s, one at a time", "same class", "nats an image", "less than the whole"):
        assert said in drawn
    assert "tokens/s" not in drawn


def test_a_member_with_statistics_of_its_own_is_measured_with_them(classes: tuple[Path, Path]) -> None:
    """What `subnets` measures is what runs inside `use`; without its own the member is noted."""
    out, data = classes
    facts, model = HOST.facts(out), rg.load(out, dtype=torch.float32)
    seen = images_of("out", out, data, facts)
    before = torch.cat(list(read(model.regauge.member("small"), seen)))
    pixels = [arguments["pixel_values"] for arguments in seen.arguments]
    model.regauge.recalibrate("small", model, pixels)
    assert not torch.equal(torch.cat(list(read(model.regauge.member("small"), seen))), before)


def test_members_of_a_model_that_draws(
    drawing: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A member by itself, as `extract` writes it, and on late scales, which loses less and takes all that there is."""
    out, data = drawing
    asked = ["subnets", str(out), "--eval", str(data), "--quiet"]
    assert main([*asked, "--json", "--page", str(tmp_path / "page.html")]) == 0
    found = json.loads(capsys.readouterr().out)
    members = {(one["subnet"], one["late"]): one for one in found["members"]}
    assert found["kind"] == "scales"
    assert list(members) == [
        ("full", False), ("depth=3", False), ("depth=3", True), ("ffn=0.5", False), ("depth=3,ffn=0.5", False),
    ]  # fmt: skip
    whole, alone, late = (members[one] for one in list(members)[:3])
    assert (alone["name"], late["name"]) == ("small", "")
    assert 0 == whole["quality"]["kl"]["value"] < late["quality"]["kl"]["value"] < alone["quality"]["kl"]["value"]
    assert late["bytes"] == whole["bytes"] > alone["bytes"]
    assert extract(out, "small", tmp_path / "small").bytes == pytest.approx(alone["bytes"], rel=0.05)
    drawn = (tmp_path / "page.html").read_text(encoding="utf-8")
    for said in ("depth=3, late", "pictures/s, one at a time", "late scales of an image", "same likeliest token"):
        assert said in drawn


def test_without_images_there_is_no_quality(
    classes: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, _ = classes
    assert main(["subnets", str(out), "--subnet", "small", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "give --eval images.npz for quality" in said
    assert "images/s, 64 together" in said
    text = tmp_path / "a.txt"
    text.write_text("words " * 99)
    assert main(["subnets", str(out), "--eval", str(text), "--quiet"]) == 2
    assert "out is a model of images" in capsys.readouterr().err


def test_a_family_needs_the_classes_of_its_images(classes: tuple[Path, Path]) -> None:
    out, data = classes
    facts = HOST.facts(out)
    with pytest.raises(TextError, match="classes 0 to 2, and out knows 0 to 1"):
        images_of("out", out, data, Facts(facts.gives, 0, None, labels=2, image=facts.image))
