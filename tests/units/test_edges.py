"""Edges and constants on which random mutants of the source once lived (`scripts/mutants.py`), by hand."""

from __future__ import annotations

import platform
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from regauge import parts
from regauge.artifact.codec.schemes import scheme_of
from regauge.engine import duration, objective
from regauge.engine.job import prepare
from regauge.engine.receipts import versions
from regauge.formats.grains import Block, Channel, Fallback
from regauge.hosts.states import States
from regauge.hosts.transformers.source import Source
from regauge.measure.cost import RUNTIME, Speed
from regauge.parts import WEIGHTS, Point
from regauge.plan import parse
from regauge.runtime.matrices import int4
from regauge.search import profile
from regauge.search.budgets import Budget
from regauge.search.loop import finish
from regauge.search.loop.settle import Settled
from tests.pico import pico, save
from units.test_artifact_wire import SAID


def test_versions_are_those_that_run() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source.open(save(pico("llama"), tmp_path_factory.mktemp("edges") / "model"))


def test_milliseconds_are_the_other_way_round_than_tokens_a_second(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = {RUNTIME: Speed(median=50, low=49, high=51, rounds=3)}
    host = SimpleNamespace(
        ways_of_source=lambda _: SimpleNamespace(runtime=None, own=None, native=True),
        context=lambda _: 99,
        unsaid=lambda: pytest.MonkeyPatch.context(),
    )
    monkeypatch.setattr(profile, "host_of", lambda _: host)
    monkeypatch.setattr(profile, "speeds", lambda *_: {"decode": speed})
    assert profile.source_ms(source, 1) == ({"decode": 20.0}, {"decode": 20.0}, True)


@pytest.mark.parametrize(
    ("batches", "tokens", "tried"), [(4, 16, 4), (6, 4096, 2), (9, 4096, 2), (3, 5000, 1), (3, 16384, 1)]
)
def test_an_objective_runs_on_as_much_text_as_it_says(batches: int, tokens: int, tried: int) -> None:
    hidden = tuple(torch.zeros(1, tokens, 1) for _ in range(batches))
    states = States(tuple({} for _ in hidden), hidden, tuple(() for _ in hidden))
    seen: list[int] = []

    def bind(weights: Any, change: Any) -> Callable[[Tensor, int], Tensor]:
        def run(x_BTD: Tensor, batch: int) -> Tensor:
            seen.append(batch)
            return x_BTD + 1

        return run

    made = objective.Objective(states, states, bind, lambda weights, sites: weights, {})
    made({})
    assert len(seen) == tried
    assert len(seen) * tokens <= max(objective.TRIED, tokens)


def test_the_bytes_of_a_point_are_its_codes_steps_and_terms() -> None:
    """(8, 32) of int4 with a bf16 step a row, and two factors of rank 3 in bf16."""
    raw = {"grid": "int4", "grain": "channel", "ranger": "absmax", "scale": "bf16"}
    plain, more = (
        Point.of(WEIGHTS, {axis: parts.read(axis, text, WEIGHTS) for axis, text in some.items()})
        for some in (raw, raw | {"compensator": "lorc:3"})
    )
    assert parts.bytes_of(plain, (8, 32)) == 8 * 32 // 2 + 8 * 2
    assert parts.bytes_of(more, (8, 32)) == 8 * 32 // 2 + 8 * 2 + 2 * 3 * (8 + 32)


def test_what_explain_says_of_integers_is_their_range() -> None:
    assert parts.part("grid", "int4").what == "integers -8 to 7, no zero point"
    assert parts.part("grid", "int3").what == "integers -4 to 3, no zero point"
    assert parts.part("grid", "int4-asym").what == "integers 0 to 15 with a zero point"


@pytest.mark.parametrize("form", ["fp8", "nvfp4", "mxfp4"])
def test_other_tools_are_told_that_floats_are_symmetric(form: str) -> None:
    scheme = scheme_of(SAID[form].point, (64, 64))
    assert not isinstance(scheme, str), scheme
    told = dict(scheme.weights)
    assert (told["symmetric"], told["dynamic"], told["type"]) == (True, False, "float")


def test_a_fallback_looks_at_rows_and_columns_apart() -> None:
    """Blocks of 3 × 5 divide 6 × 5 and neither 5 × 6 nor squares of either side."""
    grain = Fallback(Block(3, 5), Channel())
    for shape, groups in (((6, 5), (2, 15)), ((5, 6), (5, 6))):
        w_OI = torch.arange(30.0).view(shape)
        w_GK = grain.split(w_OI)
        assert tuple(w_GK.shape) == groups
        assert grain.groups(shape) == groups
        assert grain.join(w_GK, w_OI).equal(w_OI)


@pytest.mark.parametrize(("amount", "met"), [(999, False), (1000, True), (1001, True)])
def test_a_budget_is_met_by_exactly_its_bytes(amount: int, met: bool) -> None:
    settled = object.__new__(Settled)  # of which nothing but the bytes of what was built is asked
    object.__setattr__(settled, "built", SimpleNamespace(bytes=900))
    budget = Budget(resource="memory", amount=amount, relative=False, context=8, text=f"memory@8={amount}")
    verdict = finish._budget(settled, budget, 100.0, 5000)
    assert (verdict.met, verdict.measured, verdict.limit) == (met, 1000, amount)
    assert verdict.how.endswith("and of the cache at 8 tokens")


def test_what_learning_is_estimated_to_take_grows_with_its_text(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more pass over the blocks, forward and back, beside the loop itself: by the widths of the matrices."""
    rows = "weights: {{blocks.*: {{grid: int4, grain: channel, ranger: {}}}}}\n"
    jobs = [prepare(parse("name: x\n" + rows.format(ranger)), source) for ranger in ("learnt-clip", "minmax")]
    monkeypatch.setattr(duration, "_each", lambda _: {})
    monkeypatch.setattr(duration, "speed", lambda *_: 1.0)
    monkeypatch.setattr(duration.learning_cost, "learning_cost", lambda *_: SimpleNamespace(seconds=0.0))
    inner = sum(site.shape[0] * site.shape[1] for site in source.anatomy.sites if site.block is not None)
    read = source.bytes_bf16() * 2e-9
    taught, plain = (duration.seconds(job, 100) for job in jobs)
    assert plain == pytest.approx(read)
    passes = (1 + duration.SEEN * bool(jobs[0].needs)) * 2 * inner * 100 * 1.5
    assert taught == pytest.approx(read + passes + 2 * inner * 100 * 1.5)


def test_what_a_search_by_block_and_a_text_of_its_own_are_estimated_to_take(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty-one runs of each block on 8,192 tokens at most; two operations a parameter, a token at a time, drawn."""
    rows = "weights: {blocks.*: {grid: int4, grain: channel, ranger: minmax}}\n"
    job = prepare(parse(f"name: x\n{rows}rewrites: [{{part: smooth-streams, alpha: block}}]\n"), source)
    monkeypatch.setattr(duration, "_each", lambda _: {})
    monkeypatch.setattr(duration, "speed", lambda *_: 1.0)
    monkeypatch.setattr(duration.learning_cost, "learning_cost", lambda *_: SimpleNamespace(seconds=0.0))
    inner = sum(site.shape[0] * site.shape[1] for site in source.anatomy.sites if site.block is not None)
    assert len(job.local) == 1
    assert job.certified
    for tokens, tried in ((100, 100), (10000, 8192)):
        passes = (2 + duration.SEEN * bool(job.needs)) * 3 * inner * tokens
        once = source.bytes_bf16() * 2e-9 + passes + 3 * inner * tokens + 21 * 3 * inner * tried
        once += 240 * source.parameters()  # of the certificate
        assert duration.seconds(job, tokens) == pytest.approx(once)
        drawn = duration.seconds(job, tokens, sampled=True) - duration.seconds(job, tokens)
        assert drawn == pytest.approx(4 * source.parameters() * tokens)


@pytest.mark.parametrize("rows", [16, 32, 48, 64])
def test_each_row_of_a_block_of_torchs_layout_stands_in_one_nibble(rows: int) -> None:
    assert int4._order(rows).flatten().sort().values.equal(torch.arange(rows))
