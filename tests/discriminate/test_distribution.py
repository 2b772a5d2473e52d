"""Distribution correction: blocks trained by it attend as the uncompressed ones do; planes of bits multiply exactly."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from regauge.engine.block import effective
from regauge.engine.distribution import apart, log_map, off
from regauge.engine.job import prepare
from regauge.engine.watchdog import Clock, nobody
from regauge.engine.work import Pass
from regauge.errors import RecipeError
from regauge.hosts.heads import Heads
from regauge.hosts.transformers.source import Source
from regauge.kernels.reference import integer_matmul, plane_matmul
from regauge.learn.settings import Settings
from regauge.plan import parse
from regauge.text.calibration import Calibration
from tests.pico import pico, save

SIZES = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
RECIPE = """
name: taught
learning: {{steps: 48, batch: 64, patience: 0, loss: {loss}}}
weights:
  blocks.*: {{grid: int2-asym, grain: channel, ranger: 'learnt-clip:0.05', scale: bf16, rounder: nearest}}
"""


def test_terms_by_hand() -> None:
    y_ND, target_ND = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [2.0, 0.0]])
    assert float(off(y_ND, target_ND)) == pytest.approx(-math.log(24 / 25) / 2, rel=1e-5)
    p, q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.75, 0.0]]).log()
    both = 0.5 * math.log(2) + 0.5 * math.log(2 / 3) + 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    assert float(apart(p, q)) == pytest.approx(both, rel=1e-5)
    assert float(apart(q, p)) == pytest.approx(both, rel=1e-5)


def test_a_map_is_softmax_of_what_each_query_sees() -> None:
    drawn = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 5, 8, generator=drawn), torch.randn(1, 2, 5, 8, generator=drawn)
    found = log_map(Heads(q, k, k, None, 0.3, lambda: q)).exp()
    score = torch.einsum("htd,hsd->hts", q[0], k[0].repeat_interleave(2, 0)) * 0.3
    for head in range(4):
        for t in range(5):
            assert torch.allclose(found[0, head, t, : t + 1], score[head, t, : t + 1].softmax(-1))
    assert float(found[0, :, 0, 1:].abs().max()) == 0
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    added = torch.zeros(5, 5).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (seen, added):
        assert torch.allclose(log_map(Heads(q, k, k, mask, 0.3, lambda: q)).exp(), found)


def test_blocks_trained_by_it_are_distributed_as_they_were(tmp_path: Path) -> None:
    source = Source.open(save(pico("llama", **SIZES), tmp_path / "model"))
    maps, losses = {}, {}
    for loss in ("error", "distribution"):
        job = prepare(parse(RECIPE.format(loss=loss)), source)
        assert job is not None
        work = Pass(job, Calibration(torch.arange(8 * 32).reshape(8, 32) % 23, "counting"))
        outer = work.read(None)
        work.begin(outer.stored, outer.exact)
        moved, *_ = work.local(0, work.read(0))
        looked = work.look(0, moved)
        learnt = work.learn(0, looked, moved, None, Clock(nobody))
        assert learnt is not None
        codes = work.round(job.sites(0), looked.moved, looked.stats, learnt.finished)
        made = effective(looked.moved.stored, codes, job.choices)
        objective = work.objective(0, looked.moved).corrected(looked.moved.exact, work.running()[0].attending)
        correction = objective.correction
        assert correction is not None
        run = objective.bind(made, {})
        with torch.no_grad():
            x_BTD = objective.states.hidden[0]
            maps[loss] = float(apart(correction.seen(run, x_BTD, 0)[1], correction.seen(correction.exact, x_BTD, 0)[1]))
            losses[loss] = sum(float(objective.miss(made, batch)) for batch in range(objective.batches))
    assert maps["distribution"] < 0.95 * maps["error"]
    assert losses["distribution"] < losses["error"]
    with pytest.raises(ValueError, match="the loss is one of error, distribution, not 'cosine'"):
        Settings(loss="cosine")


def test_attention_that_shows_no_map_is_a_sentence(tmp_path: Path) -> None:
    job = prepare(parse(RECIPE.format(loss="distribution")), Source.open(save(pico("llama", **SIZES), tmp_path / "m")))
    assert job is not None
    work = Pass(job, Calibration(torch.arange(32).reshape(1, 32) % 23, "counting"))
    outer = work.read(None)
    work.begin(outer.stored, outer.exact)
    moved, *_ = work.local(0, work.read(0))
    objective = work.objective(0, moved).corrected(moved.exact, lambda _: torch.no_grad())  # nobody is asked
    with pytest.raises(RecipeError, match="compares attention maps, and this model's attention shows none"):
        objective.miss(moved.exact, 0)


def test_planes_of_bits_multiply_exactly() -> None:
    drawn = torch.Generator().manual_seed(1)
    for x_bits in range(1, 9):
        for w_bits in range(1, 9):
            x_TI, w_OI = (
                torch.randint(0, 1 << bits, (rows, 67), generator=drawn).to(torch.uint8)
                for bits, rows in ((x_bits, 3), (w_bits, 5))
            )
            found = plane_matmul(x_TI, w_OI, x_bits, w_bits)
            assert torch.equal(found, x_TI.long() @ w_OI.long().T)
            assert torch.equal(found, integer_matmul(x_TI, w_OI))
    with pytest.raises(ValueError, match="codes of w are below 2"):
        plane_matmul(x_TI, w_OI, 8, 3)
