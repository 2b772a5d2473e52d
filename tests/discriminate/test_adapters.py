"""Adapters of each precision's own are nearer to the model as it was than one that all share, and that than none."""

from __future__ import annotations

from pathlib import Path

import torch

import regauge as rg
from regauge.elastic.subnet import Subnet
from regauge.engine.raising import Batch, Raising
from regauge.hosts.teaching import Beside
from regauge.hosts.transformers.adapting import Adapting, adapting
from regauge.learn.distillers import DISTILLERS
from regauge.learn.loop import train
from regauge.learn.training import Training
from regauge.plan import parse
from tests.pico import pico, save
from tests.words import save_tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
RECIPE = (
    "name: q\nfamily: {order: none, bits: [4, 2]}\nweights: {blocks.*: {grid: nested:8, grain: group:64, "
    "ranger: minmax, scale: f16-levels:6, rounder: nearest}}\n"
)
IDS = torch.randint(0, 53, (1, 2, 24), generator=torch.Generator().manual_seed(0), dtype=torch.int64, device="cpu")
STEPS = 40


def lost(made: Adapting) -> float:
    """KL from the model as it was, of both precisions together."""
    teacher = made.original().read(IDS[0])
    with torch.no_grad():
        members = [made.read(Subnet(bits=bits), IDS[0]) for bits in made.bits]
    return sum(float(DISTILLERS["kl"](one, teacher)) for one in members)


def test_each_precision_wants_an_adapter_of_its_own(tmp_path: Path) -> None:
    model = save_tokenizer(save(pico("llama", num_hidden_layers=1, **SIZES), tmp_path / "model"))
    rg.apply(parse(RECIPE), model, tmp_path / "out", quiet=True)
    how = Training(sampler="uniform:2", rank=4, rate=0.03, schedule="constant", steps=STEPS)
    found = {}
    for shared in (False, True):
        made = adapting(tmp_path / "out", model, Beside(how.rank, shared))
        found["none"] = lost(made)
        text = [Batch(one) for one in IDS]
        problem = Raising(made, made.original(), how, STEPS, text, text, ())
        made.put(train(problem, how.settings(STEPS, STEPS), by=problem.gradients).parameters)
        found["shared" if shared else "each"] = lost(made)
    assert found["each"] < 0.2 * found["none"]
    assert found["each"] < 0.6 * found["shared"]
