"""Models of images measured: figures by hand, and what is refused before any work."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch

from regauge.cli import tell
from regauge.engine import apply, measure
from regauge.engine.seeing import labelled
from regauge.errors import ModelError, SettingError, TextError
from regauge.hosts.transformers.host import HOST
from regauge.measure import images as module
from regauge.measure.images import classified, coded, scored
from regauge.measure.quality import paired, summarise
from regauge.measure.subject import CLASSES, SCALES
from regauge.plan import parse
from tests import tiny, toy_resnet, toy_var

ROUND = "name: round\nrewrites: [fold-batch-norm]\nweights: {blocks.*: {grid: int2-asym, grain: channel}}\n"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "memory", lambda *_: None)
    monkeypatch.setattr(module, "bandwidth", lambda **_: 1e9)


def grey(path: Path, count: int = 12, classes: int = 4) -> Path:
    drawn = np.random.default_rng(3)
    x = drawn.integers(0, 256, (count, 6, 6), dtype=np.uint8)
    np.savez(path, x_train=x[:1], y_train=np.zeros(1, int), x_test=x, y_test=drawn.integers(0, classes, count))
    return path


def test_classes_by_hand() -> None:
    """Two classes: what is said of each image is known, so is every figure."""
    seen = classified(torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 1, 0]), "by hand", size=3)
    first = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.25, 0.75], [0.75, 0.25]]))
    other = torch.log(torch.tensor([[0.25, 0.75], [0.25, 0.75], [0.25, 0.75], [0.75, 0.25]]))
    same, moved = (
        summarise(one) for one in scored(seen, [first[:3], first[3:]], [[first[:3], first[3:]], [other[:3], other[3:]]])
    )
    assert (same.kind, same.tokens, same.documents, same.bits_per_byte) == ("classes", 4, 4, None)
    assert same.nats is not None
    assert same.right is not None
    assert same.nats.value == pytest.approx(-(log(0.5) + 3 * log(0.75)) / 4)
    assert (same.right.value, same.kl.value, same.agreement.value) == (1.0, 0.0, 1.0)
    assert moved.right is not None
    assert moved.right_gap is not None
    assert (moved.right.value, moved.right_gap.value, moved.agreement.value) == (0.75, -0.25, 0.75)
    assert moved.error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert moved.kl.value == pytest.approx((0.5 * log(0.5 / 0.25) + 0.5 * log(0.5 / 0.75)) / 4)


def test_tokens_of_images_are_drawn_by_image() -> None:
    """Forty tokens of four images: images are too few for a verdict, though tokens are many."""
    ids_NT = torch.randint(0, 5, (4, 11), generator=torch.Generator().manual_seed(0))
    seen = coded(ids_NT, 5, "by hand")
    drawn = torch.Generator().manual_seed(1)
    first, other = (torch.randn(4, 10, 5, generator=drawn) for _ in range(2))
    one, two = scored(seen, [first], [[first], [other]])
    found = summarise(two)
    assert (found.kind, found.tokens, found.documents, found.drawn) == ("scales", 40, 4, 4)
    assert (found.right, found.right_gap) == (None, None)
    assert found.kl.value == pytest.approx(
        float((first.softmax(-1) * (first.log_softmax(-1) - other.log_softmax(-1))).sum(-1).mean()), rel=1e-5
    )
    assert paired(one, two).verdict == "neither"


def test_a_classifier_beside_what_was_made_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, data = toy_resnet.saved(tmp_path / "m"), toy_resnet.images(tmp_path / "x.npz")
    apply(parse(ROUND), source, tmp_path / "out", calibration=data)
    found = measure([source, tmp_path / "out"], eval=data, rounds=1)
    first, made = (row.quality for row in found.rows)
    assert found.kind == "classes"
    assert (first is not None, made is not None, found.tokens) == (True, True, 48)
    assert first is not None and made is not None  # noqa: PT018  # for the checker of types
    assert first.kl.value == 0 < made.kl.value
    assert made.right is not None and first.right is not None and made.right_gap is not None  # noqa: PT018
    assert made.right_gap.value == pytest.approx(made.right.value - first.right.value)
    assert found.rows[1].costs.decode is not None
    tell.measurement(found)
    told = capsys.readouterr().out
    for said in ("48 images", "nats an image", "right", "KL an image", "same class", "images/s, one at a time"):
        assert said in told
    assert "token" not in told


def test_var_beside_what_was_made_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, data = toy_var.saved(tmp_path / "m"), grey(tmp_path / "x.npz")
    apply(parse("name: r\nweights: {blocks.*: {grid: int4, grain: channel}}\n"), source, tmp_path / "out")
    found = measure([source, tmp_path / "out"], eval=data, rounds=1)
    first, made = (row.quality for row in found.rows)
    assert first is not None and made is not None and first.nats is not None  # noqa: PT018
    assert (found.kind, found.tokens, first.documents) == ("scales", 12 * 14, 12)  # the test part, not the other
    assert first.kl.value == 0 < made.kl.value
    assert found.rows[0].costs.cache_bytes == found.rows[1].costs.cache_bytes
    model = toy_var.toy()
    held, y_N = labelled("m", data, HOST.facts(source))
    with torch.no_grad():
        out = model(pixel_values=held.inputs, labels=y_N)
    assert first.nats.value == pytest.approx(float(out.loss), rel=1e-5)
    tell.measurement(found)
    told = capsys.readouterr().out
    for said in ("168 tokens of images", "nats a token", "pictures/s, 8 together", "cache a picture"):
        assert said in told


def test_facts_of_models_of_images(tmp_path: Path) -> None:
    facts = HOST.facts(toy_resnet.saved(tmp_path / "r"))
    assert (facts.gives, facts.labels, facts.image is not None and facts.image.side) == (CLASSES, 3, 8)
    facts = HOST.facts(toy_var.saved(tmp_path / "v"))
    assert (facts.gives, facts.labels, facts.vocabulary) == (SCALES, 4, 16)
    assert facts.image is not None
    assert (facts.image.tokens, facts.image.channels) == (14, 1)


def of_objects(path: Path) -> None:
    np.savez(path, x=np.array([{}, {}], dtype=object), y=np.zeros(2, int))


def bomb(path: Path) -> None:
    """A header of nine terabytes before a few bytes."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 32, 32, 9), }\n"
    with zipfile.ZipFile(path, "w") as folder:
        folder.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 64)
        folder.writestr("y.npy", b"")


def inflated(path: Path) -> None:
    """Zeros that take a thousandth of their size, cut off."""
    np.savez_compressed(path, x=np.zeros((512, 8, 8, 3), np.uint8), y=np.zeros(512, int))
    path.write_bytes(path.read_bytes()[:-40])


X, Y = np.zeros((5, 8, 8, 3), np.uint8), np.zeros(5, int)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"x": X}, r"holds no classes of images.*'y' \(N\) is needed"),
        ({"y": Y}, r"holds no images: an .npz with an array 'x' \(N, H, W, 3\) of uint8 is needed \(it has 'y'\)"),
        ({}, "holds no images.*it has no array"),
        ({"x": X[:0], "y": Y[:0]}, r"holds no image: 'x' has shape \(0, 8, 8, 3\)"),
        ({"x": X[..., :1], "y": Y}, r"'x' has shape \(5, 8, 8, 1\) and dtype uint8; \(N, H, W, 3\) of uint8 is needed"),
        ({"x": X[:, :0], "y": Y}, r"holds no image: 'x' has shape \(5, 0, 8, 3\)"),
        ({"x": X / 255.0, "y": Y}, "dtype float64"),
        ({"x": X, "y": Y + 3}, "classes 3 to 3, and m knows 0 to 2"),
        ({"x": X, "y": Y - 1}, "classes -1 to -1"),
        ({"x": X, "y": Y[:4]}, r"'y' has shape \(4,\).*5 whole numbers"),
        ({"x": X, "y": Y * 0.5}, "dtype float64; 5 whole numbers"),
        (of_objects, "array of objects, which are never unpickled"),
        (bomb, "9,216,000,000,000 bytes, and 64 follow"),
        (inflated, "holds no images"),
    ],
)
def test_images_that_are_refused(
    held: dict[str, np.ndarray] | Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    source, path = toy_resnet.saved(tmp_path / "m"), tmp_path / "x.npz"
    np.savez(path, **held) if isinstance(held, dict) else held(path)
    with pytest.raises(TextError, match=said):
        measure([source], eval=path)


def test_a_row_count_that_matches_once_thinned_is_refused(tmp_path: Path) -> None:
    """Both arrays thinned to as many rows would be of other images."""
    np.savez(tmp_path / "x.npz", x=np.zeros((6000, 1, 1, 3), np.uint8), y=np.zeros(5000, int))
    with pytest.raises(TextError, match=r"'y' has shape \(5000,\)"):
        measure([toy_resnet.saved(tmp_path / "m")], eval=tmp_path / "x.npz")


def test_the_wrong_kind_of_file_or_option(tmp_path: Path) -> None:
    source, text = toy_resnet.saved(tmp_path / "m"), tiny.text(tmp_path)
    data, language = toy_resnet.images(tmp_path / "x.npz"), tiny.folder(tmp_path / "llama", "llama")
    for given in (None, text, [text]):
        with pytest.raises(TextError, match=r"m is a model of images.*give --eval an \.npz"):
            measure([source], eval=given)
    with pytest.raises(TextError, match=r"x\.npz holds arrays, such as images, and llama reads text"):
        measure([language], eval=data)
    with pytest.raises(SettingError, match="m is a model of images, and --cache and --long are for models of text"):
        measure([source], eval=data, cache="kv8", long=4)
    with pytest.raises(ModelError, match="a class of each image and llama gives next tokens"):
        measure([source, language], eval=data)
    other = toy_resnet.saved(tmp_path / "large", image_size=16)
    with pytest.raises(ModelError, match=r"reads images of 3 × 8 × 8 .* and large images of 3 × 16 × 16"):
        measure([source, other], eval=data)


def test_models_with_other_tokenizers_are_not_compared(tmp_path: Path) -> None:
    first = toy_var.saved(tmp_path / "a")
    toy_var.toy(seed=5).save_pretrained(tmp_path / "b")
    with pytest.raises(ModelError, match="b makes other tokens of images than a"):
        measure([first, tmp_path / "b"], eval=grey(tmp_path / "x.npz"))
