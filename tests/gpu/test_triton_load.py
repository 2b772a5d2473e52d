"""`rg.load(device="cuda")`, end to end on a pico model: logits are those of the reference on a CPU.

On a card these are the real kernels; without one, triton's interpreter on tensors of the CPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import regauge as rg
from artifacts import Choice, make
from regauge import parts
from regauge.plan import load, patterns
from regauge.runtime import capabilities
from regauge.runtime.matrices.modules import PackedMatrix
from tests.pico import pico, save

pytestmark = pytest.mark.gpu
SETTINGS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
}
IDS = torch.tensor([[3, 1, 4, 1, 5]])


def formats() -> dict[str, Choice]:
    """Preset → how its blocks' weights and inputs are stored; of presets that store alike, the first."""
    found: dict[str, Choice] = {}
    for pattern in patterns():
        plan = load(name := next(iter(pattern.points())))
        reads = {rule.select: rule.point for rule in plan.of("inputs")}
        for rule in plan.of("weights"):
            if rule.point is not None:
                point = rule.point.but(rounder=parts.Spec("nearest"), ranger=parts.Spec("minmax"), compensator=None)
                how = Choice(point, reads.get(rule.select))
                static = (
                    how.reading is not None and how.reading.name("ranger") == "static"
                )  # needs text to calibrate on
                if how not in found.values() and not static:
                    found[name] = how
    return found


FORMATS = formats()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(pico("llama", **SETTINGS), tmp_path_factory.mktemp("pico") / "model")


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_the_references(
    name: str, model: Path, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = FORMATS[name]
    made = make(model, tmp_path / "out", lambda site: how if site.block is not None else None, prefer="regauge")
    found = rg.load(made.path, device="cuda", dtype="float32")
    ways = {m.way.name for m in found.modules() if isinstance(m, PackedMatrix)}
    read = capabilities.read_of(how.reading)
    answer = capabilities.ask(parts.format_of(how.point), (64, 64), read, torch.float32, "cuda")
    assert any(way.startswith(answer.kernel) for way in ways), (answer, ways)
    assert ("simulated" in " ".join(ways)) == (not answer.native)
    assert {p.device.type for p in found.parameters()} == {device.type}
    with torch.no_grad():
        logits = found(IDS.to(device)).logits.cpu()
    monkeypatch.setattr(capabilities, "installed", lambda library: False)
    reference = rg.load(made.path, dtype="float32")
    assert {m.way.name.partition(",")[0] for m in reference.modules() if isinstance(m, PackedMatrix)} == {"decoded"}
    with torch.no_grad():
        wanted = reference(IDS).logits
    assert float((logits - wanted).norm() / wanted.norm()) < (1e-5 if how.reading is None else 2e-2)


def test_a_packed_embedding_and_head_and_generation(model: Path, tmp_path: Path, device: torch.device) -> None:
    """Look-ups, tied heads and generate, a token at a time."""
    how = FORMATS["nf4"]
    made = make(model, tmp_path / "out", lambda site: how, prefer="regauge")
    found, beside = rg.load(made.path, device="cuda", dtype="float32"), rg.load(made.path, dtype="float32")
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    tokens = found.generate(IDS.to(device), **options)
    assert tokens.shape == (1, 8)
    with torch.no_grad():
        logits, wanted = found(tokens).logits.cpu(), beside(tokens.cpu()).logits
    assert float((logits - wanted).norm() / wanted.norm()) < 1e-3


def test_a_plain_checkpoint(model: Path, device: torch.device) -> None:
    found = rg.load(model, device="cuda")
    assert {p.device.type for p in found.parameters()} == {device.type}
