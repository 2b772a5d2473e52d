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
from regauge.plan.resolution import learnt_of_tap
from regauge.runtime import capabilities
from regauge.runtime.matrices.modules import PackedMatrix
from tests.pico import pico, save

pytestmark = pytest.mark.gpu
SETTINGS = {
    "hidden_size": 64,
    "intermediate_size": 128,
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
                if how not in found.values() and not keeps(how.reading):
                    found[name] = how
    return found


def keeps(reading: parts.Point | None) -> bool:
    """Whether it needs text first: a static step, or a transform that is learnt."""
    return reading is not None and (reading.name("ranger") == "static" or bool(learnt_of_tap(reading)))


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
    assert any("simulated" in way or way.startswith("decoded") for way in ways) == (not answer.native)
    assert {p.device.type for p in found.parameters()} == {device.type}
    with torch.no_grad():
        logits = found(IDS.to(device)).logits.cpu()
    monkeypatch.setattr(capabilities, "installed", lambda library: False)
    reference = rg.load(made.path, dtype="float32")
    assert {m.way.name.partition(",")[0] for m in reference.modules() if isinstance(m, PackedMatrix)} == {"decoded"}
    products = recorded(reference)
    with torch.no_grad():
        wanted = reference(IDS).logits
    assert products
    for where, (inputs, product) in products.items():
        with torch.no_grad():
            seen = found.get_submodule(where)(inputs.to(device)).cpu()
        assert apart(seen, product) < 1e-5, where
    if how.reading is None or parts.format_of(how.reading).grid.bits > 4:  # the least of 4-bit inputs is -7.5 steps: a
        assert apart(logits, wanted) < (1e-5 if how.reading is None else 2e-2)  # tie, a fifteenth of the range wide


def apart(seen: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((seen - wanted).norm() / wanted.norm())


def recorded(model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Packed matrix → what it reads and what it gives, once the model has run."""
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedMatrix):
            module.register_forward_hook(lambda _, read, given, name=name: kept.update({name: (read[0], given)}))
    return kept


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
