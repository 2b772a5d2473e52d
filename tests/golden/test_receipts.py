"""Golden receipts: every preset file on one pico model. A refactor gives the same receipts; a change of method shows.

To accept a change: `REGAUGE_GOLDEN=write python -m pytest tests/golden`, and read the difference before committing it.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from regauge import apply
from regauge.artifact.receipt import Receipt, SiteReceipt
from regauge.hosts import host_of
from regauge.plan import Plan, digest, load, patterns
from tests.pico import pico, save
from tests.words import save_tokenizer, text
from toy_resnet import images, saved

STORED = Path(__file__).with_name("receipts.json")
STEPS, FEW = 80, 10  # of training; few of what trains transforms, a step of which is long
WRITE = os.environ.get("REGAUGE_GOLDEN") == "write"
NAMES = [
    next((name for name, point in pattern.points().items() if point.get("bits", 4) == 4), next(iter(pattern.points())))
    for pattern in patterns()
]
OTHERS = {
    "echoatt-23": "deep", "once-for-all-images": "convolved", "smoe-dropout": "divided", "trellis-o-w2": "wide"
}  # fmt: skip
"""Presets that are not of an ordinary model of text, and what each is applied to."""
SETTINGS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(save(pico("llama", **SETTINGS), tmp_path_factory.mktemp("golden") / "model"))


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of blocks enough for some to take another's attention map."""
    made = pico("llama", **SETTINGS | {"num_hidden_layers": 4})
    return save_tokenizer(save(made, tmp_path_factory.mktemp("golden") / "deep"))


@pytest.fixture(scope="module")
def divided(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, divided into experts."""
    made = tmp_path_factory.mktemp("golden") / "divided"
    made.mkdir()
    return host_of(model).divided(host_of(model).open(model), 8, made).path


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of widths that words of 64 weights divide."""
    made = pico("llama", **SETTINGS | {"intermediate_size": 128})
    return save_tokenizer(save(made, tmp_path_factory.mktemp("golden") / "wide"))


@pytest.fixture(scope="module")
def convolved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A residual network, with images beside it."""
    where = tmp_path_factory.mktemp("golden")
    images(where / "images.npz")
    widths, inner = (5, 5, 5, 11, 11, 11), (8, 8, 8, 12, 12, 12)
    sizes = {"num_hidden_layers": 6, "layer_strides": (1, 1, 1, 2, 1, 1), "layer_kernels": (3,) * 6}
    return saved(where / "convolved", layer_widths=widths, layer_neurons=inner, **sizes)


def told(receipt: Receipt) -> dict[str, Any]:
    """What must not change, and the figures that may by rounding on another machine (`errors`)."""
    taps = {tap.name: f"{' '.join(map(str, tap.reading.values()))} | {', '.join(tap.sites)}" for tap in receipt.taps}
    return ({"taps": taps} if taps else {}) | {
        "plan_hash": receipt.plan_hash,
        "wire": receipt.wire,
        "refusals": list(receipt.refusals),
        "notes": list(receipt.notes),
        "bytes_after": receipt.bytes_after,
        "bytes_bf16": receipt.bytes_bf16,
        "sites": {site.name: row(site) for site in receipt.sites},
        "moves": [f"{move.rewrite} {move.block} {len(move.streams)} streams" for move in receipt.moves],
        "errors": {site.name: float(f"{site.error:.4g}") for site in receipt.sites if site.error is not None},
    }


def row(site: SiteReceipt) -> str:
    """One site in one line, so that a difference reads well."""
    choice = "full" if site.choice is None else " ".join(str(value) for value in site.choice.values())
    why = site.fallback or site.kept or ""
    return f"{choice} | {site.bits:.4f} bits, {site.bytes_after} bytes | {site.tokens} tokens | {why}"


def briefly(name: str) -> Plan:
    """A preset with no more steps of training than are needed to see that it trains; of a trained family, how it
    begins."""
    plan, most = replace(load(name), train={}), FEW if name.startswith(("flatquant", "nested-learnt")) else STEPS
    if int(str(plan.learning.get("steps", 0))) <= most:
        return plan
    return replace(plan, learning={**plan.learning, "steps": most})


@pytest.mark.parametrize("name", NAMES)
def test_receipt(name: str, model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = model if name not in OTHERS else request.getfixturevalue(OTHERS[name])
    receipt = apply(
        briefly(name),
        source,
        tmp_path / "out",
        calibration=source.parent / "images.npz" if OTHERS.get(name) == "convolved" else [text(3000)],
        tokens=512,
        length=32,
    )
    for move in receipt.moves:
        assert move.exact <= move.tolerance
        assert move.stored <= move.tolerance_stored
    found = json.loads(json.dumps(told(receipt)))
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    if WRITE:
        stored[name] = json.loads(json.dumps(found))
        STORED.write_text(json.dumps(dict(sorted(stored.items())), indent=1, ensure_ascii=False) + "\n")
    assert name in stored, "a new preset: write its golden receipt"
    expected = stored[name]
    errors, now = expected.pop("errors"), found.pop("errors")
    assert found == expected
    near = (
        0.2 if name.startswith(("flatquant", "nested-learnt")) else 0.02
    )  # a few steps differ by how many threads sum
    assert now == pytest.approx(errors, rel=near, abs=1e-9)


def test_no_golden_receipt_is_left_over() -> None:
    assert set(json.loads(STORED.read_text())) == set(NAMES)


def test_plans_of_all_names_are_frozen() -> None:
    """The hash of every preset's plan, so that no number in a file moves unseen."""
    stored = STORED.with_name("plans.json")
    found = {name: digest(load(name)) for pattern in patterns() for name in pattern.points()}
    if WRITE:
        stored.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(stored.read_text())
