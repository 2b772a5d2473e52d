"""A learnt clip of inputs, and a cache that training sees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regauge import parts
from regauge.artifact.reader import open_artifact
from regauge.cache.scheme import Scheme
from regauge.engine import apply
from regauge.engine.stored import stored
from regauge.formats.base import Format
from regauge.formats.grains import Channel, Token
from regauge.formats.grids import Int
from regauge.formats.rangers import AbsMax
from regauge.formats.reaches import LearntReach
from regauge.formats.readings import clipped, load
from regauge.formats.scales import BFloat16, Float32
from regauge.formats.transforms import Identity, Same
from regauge.hosts.transformers.load import load as load_model
from regauge.hosts.transformers.source import Source
from regauge.learn.base import Parameters, Taught, Trial
from regauge.learn.loop import train
from regauge.learn.settings import Settings
from regauge.learn.sites import OnTap, on_sites
from regauge.plan import parse
from regauge.plan.stores import block_cache
from regauge.runtime.store.packed import Packed
from tests.lessons import OneMatrix
from tests.pico import pico, save
from tests.words import save_tokenizer, text

WEIGHTS = Format(Int(8), Channel(), AbsMax(), BFloat16())


@dataclass(frozen=True, eq=False)
class Linear(OneMatrix):
    def loss(self, parameters: Parameters, batch: int, progress: float) -> Tensor:
        return self._error(parameters, self.x_TI.chunk(2)[batch])

    def error(self, parameters: Parameters) -> float:
        return float(self._error(parameters, self.x_TI))

    def _error(self, parameters: Parameters, x_TI: Tensor) -> Tensor:
        tried = self.parts.apply(parameters, self.trial, 1.0)
        target_TO = x_TI @ self.trial.weights["w.weight"].T
        return (tried.inputs["w"](x_TI) @ tried.weights["w.weight"].T - target_TO).square().mean()


def linear(clip: LearntReach) -> Linear:
    """Inputs of a Gaussian in three bits, whose best range is far shorter than the whole."""
    generator = torch.Generator().manual_seed(0)
    w_OI, x_TI = (torch.randn(n, 256, generator=generator, dtype=torch.float32) for n in (16, 64))
    taps = [OnTap("in", ("w",), 256, Format(Int(3), Token(), clip, Float32()), clip=clip)]
    return Linear(on_sites({"w": Taught()}, {"w": WEIGHTS}, taps=taps), Trial({"w.weight": w_OI}), x_TI)


def test_a_share_is_learnt_and_beats_the_whole_range() -> None:
    problem = linear(LearntReach(0.1))
    state = train(problem, Settings(steps=60, batch=32, schedule="cosine", patience=0))
    share = float(problem.parts.finish(state.best, problem.trial).shares["in"])
    assert 0.5 < share < 0.8
    assert state.least < 0.75 * state.first
    assert train(linear(LearntReach(0.0)), Settings(steps=4, batch=32)).least == state.first


def test_clipped_by_hand() -> None:
    """(8, 1, -2) at half its range: reach 4, step 4 / 7.5, codes (7, 2, -4) of (15, 1.875, -3.75)."""
    fmt = Format(Int(4), Token(), LearntReach(), Float32())
    reading = clipped(fmt, Same(), torch.tensor([0.5], dtype=torch.float32))
    found = reading.codes(torch.tensor([[8.0, 1.0, -2.0]], dtype=torch.float32))
    assert found.z_TI.tolist() == [[7.0, 2.0, -4.0]]
    assert found.step.scale_G1.tolist() == [[pytest.approx(4 / 7.5)]]
    again = load(fmt, Identity(), 3, reading.tensors)
    assert torch.equal(again.simulate(torch.ones(2, 3)), reading.simulate(torch.ones(2, 3)))


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    fmt = Format(Int(4), Token(), LearntReach(), Float32())
    with pytest.raises(ValueError, match="a share of a range is above 0 and at most 1"):
        load(fmt, Identity(), 3, {"share": torch.tensor([share], dtype=torch.float32)})


def test_an_artifact_keeps_it_and_runs_with_it(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = save_tokenizer(save(pico("llama", **sizes), tmp_path / "model"))
    read: dict[str, Any] = {"calibration": [text(1500)], "tokens": 256, "length": 32}
    reading = "transform: identity, grid: int3, grain: token, ranger: "
    recipe = (
        "name: clipped\nlearning: {steps: 24, batch: 128, schedule: cosine, patience: 0}\n"
        f"weights:\n  blocks.*: {{grid: int8, grain: channel}}\ninputs:\n  blocks.*: {{{reading}%s}}\n"
    )
    told = apply(parse(recipe % "'learnt-reach:0.2'"), model, tmp_path / "out", **read).learnt
    assert all(float(str(one["after"])) < float(str(one["before"])) for one in told)
    share = open_artifact(tmp_path / "out").block(0).extras["blocks.0.mlp.in.share"]
    assert share.shape == (1,)
    assert 0.3 < float(share) < 0.95
    plain = parse((recipe % "dynamic").replace("learning", "#"))
    apply(plain, model, tmp_path / "plain", **read)
    ids = torch.arange(24).reshape(2, 12) % 50
    whole, ours, base = (
        load_model(p, dtype=torch.float32)(ids).logits for p in (model, tmp_path / "out", tmp_path / "plain")
    )
    assert not torch.equal(ours, base)
    assert float((ours - whole).square().sum()) < float((base - whole).square().sum())


def test_what_training_sees_of_a_cache_is_what_the_cache_gives_back(tmp_path: Path) -> None:
    anatomy = Source.open(save(pico("llama", head_dim=16), tmp_path / "model")).anatomy
    point = parts.point("cache", keys="int4-asym/token", values="int2-asym/token", transform="hadamard")
    scheme: Scheme = block_cache(point, anatomy.attention(0)).scheme
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(1, 3, scheme.tokens, 16, generator=generator, dtype=torch.float32) for _ in range(2))
    store = Packed(scheme)
    store.append(keys, values)
    kept = stored(anatomy, point, 0)
    for word, given, back in zip(("keys", "values"), (keys, values), store.read(), strict=True):
        assert float((given - back).abs().max()) > 0.05
        assert torch.allclose(kept[word].simulate(given), back, atol=2e-3)
        seen = given.clone().requires_grad_()
        assert torch.equal(kept[word].passed(seen), kept[word].simulate(given))
    grouped = parts.point("cache", keys="int4-asym/time:32", values="int4-asym/token")
    assert set(stored(anatomy, grouped, 0)) == {"values"}
    assert stored(anatomy, None, 0) == {}
