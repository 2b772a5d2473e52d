"""The one loop: what it keeps, that it can be stopped anywhere, and what it says when something is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from regauge.errors import BudgetError, RecipeError
from regauge.learn import loop
from regauge.learn.base import Finished, Learned, LearntRange, LearntRounding, Parameters, Problem, Rates, Trial
from regauge.learn.cost import Size, cost
from regauge.learn.loop import DONE, NOT_FINITE, PATIENCE, State, Watch, order, train
from regauge.learn.optimisers import OPTIMISERS, AdamW, Optimiser
from regauge.learn.settings import KEYS, Settings
from regauge.learn.settings import OPTIMISERS as NAMED
from regauge.learn.sites import Together
from regauge.plan import diff as differences
from regauge.plan import digest, dump, parse


@dataclass(frozen=True, eq=False)
class Line:
    """Fits a line through points, a batch of them at a time."""

    x_BN: Tensor
    y_BN: Tensor
    rates: Rates

    @property
    def batches(self) -> int:
        return len(self.x_BN)

    def init(self) -> Parameters:
        return {"slope": torch.zeros(1), "shift": torch.zeros(1)}

    def loss(self, parameters: Parameters, batch: int, progress: float) -> Tensor:
        found: Tensor = (
            (parameters["slope"] * self.x_BN[batch] + parameters["shift"] - self.y_BN[batch]).square().mean()
        )
        return found

    def error(self, parameters: Parameters) -> float:
        return float((parameters["slope"] * self.x_BN + parameters["shift"] - self.y_BN).square().mean())


def line(rate: float = 0.05, batches: int = 5) -> Line:
    x_BN = torch.randn(batches, 7, generator=torch.Generator().manual_seed(3))
    return Line(x_BN, 3 * x_BN - 1, {"slope": rate, "shift": rate})


def same(a: State, b: State) -> bool:
    one, other = a.tensors(), b.tensors()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_learns_and_never_keeps_worse_than_the_start() -> None:
    state = train(line(), Settings(steps=200, patience=0))
    assert state.ended == DONE
    assert state.step == 200
    assert state.least < 0.01 * state.first
    assert line().error(state.best) == state.least


def test_a_rate_of_zero_leaves_the_start() -> None:
    state = train(line(rate=0.0), Settings(steps=20, patience=0))
    assert state.least == state.first
    assert torch.equal(state.best["slope"], torch.zeros(1))


def test_a_rate_that_is_far_too_high_keeps_the_best_of_all_it_saw() -> None:
    seen: list[float] = []

    class Seen(Line):
        def error(self, parameters: Parameters) -> float:
            seen.append(super().error(parameters))
            return seen[-1]

    base = line(rate=3.0)
    state = train(Seen(base.x_BN, base.y_BN, base.rates), Settings(steps=50, patience=0))
    assert state.least == min(seen)
    assert len(seen) == 11  # before the first step, and after each of ten readings


@pytest.mark.parametrize("stop", range(1, 23))
def test_a_loop_that_goes_on_from_any_step_ends_the_same_to_the_bit(stop: int) -> None:
    settings = Settings(steps=23, patience=0, schedule="cosine")
    whole = train(line(), settings, seed=7)
    kept: list[dict[str, Tensor]] = []

    def halt(done: int, total: int) -> None:
        if done == stop:
            raise BudgetError("time is up")

    with pytest.raises(BudgetError, match="time is up"):
        train(line(), settings, seed=7, watch=Watch(keep=lambda s: kept.append(s.tensors()), tick=halt))
    state = State.of({name: tensor.clone() for name, tensor in kept[-1].items()})
    assert state.step == stop
    assert same(train(line(), settings, seed=7, state=state), whole)


def test_going_on_without_the_optimisers_state_ends_elsewhere() -> None:
    """What the test above would miss if the state did not matter."""
    settings = Settings(steps=23, patience=0)
    whole = train(line(), settings)
    kept: list[State] = []
    train(line(), replace(settings, steps=11), watch=Watch(tick=lambda *_: None, keep=kept.append))
    half = train(line(), replace(settings, steps=11))
    fresh = replace(half, ended=0, optimiser=AdamW().init(half.parameters))
    assert not same(train(line(), settings, state=fresh), whole)


def test_states_are_kept_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "EVERY", 0.0)
    kept: list[int] = []
    train(line(), Settings(steps=4, patience=0), watch=Watch(keep=lambda state: kept.append(state.step)))
    assert kept == [1, 2, 3, 4]


@pytest.mark.parametrize(("long", "steps"), [(0.1, [21, 41, 61]), (0.8, [21])])
def test_a_state_that_takes_long_to_keep_is_kept_as_much_more_seldom(
    monkeypatch: pytest.MonkeyPatch, long: float, steps: list[int]
) -> None:
    """Half a second a step: every 10 seconds, and after one that took four times 0.2 seconds every 40."""
    now, kept = [0.0], list[int]()

    def clock() -> float:
        return now[0]

    def tick(*_: int) -> None:
        now[0] += 0.5

    def keep(state: State) -> None:
        now[0] += long
        kept.append(state.step)

    monkeypatch.setattr("regauge.learn.loop.time.monotonic", clock)
    train(line(), Settings(steps=70, patience=0), watch=Watch(keep=keep, tick=tick))
    assert kept == steps


def test_a_state_survives_as_tensors_to_the_bit() -> None:
    state = train(line(), Settings(steps=7, patience=0))
    back = State.of(state.tensors())
    assert same(back, state)
    assert (back.step, back.first, back.least, back.ended) == (state.step, state.first, state.least, state.ended)


def test_the_seed_decides_and_nothing_else() -> None:
    settings = Settings(steps=9, patience=0)
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first = train(line(), settings, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(12)
    assert same(train(line(), settings, seed=1), first)
    assert not same(train(line(), settings, seed=2), first)


def test_every_reading_holds_each_batch_once_in_an_order_of_its_own() -> None:
    orders = [order(0, reading, 9).tolist() for reading in range(20)]
    assert all(sorted(one) == list(range(9)) for one in orders)
    assert len({tuple(one) for one in orders}) == 20


def test_it_stops_when_nothing_gets_better() -> None:
    state = train(line(rate=0.0), Settings(steps=100, patience=3))
    assert state.ended == PATIENCE
    assert state.step == 15  # three readings of five batches


@pytest.mark.parametrize("where", ["loss", "gradient", "error"])
def test_what_is_not_finite_ends_it_and_the_best_stays(where: str) -> None:
    class Broken(Line):
        def loss(self, parameters: Parameters, batch: int, progress: float) -> Tensor:
            found = super().loss(parameters, batch, progress)
            if progress < 0.5:
                return found
            if where == "gradient":
                return found + (parameters["slope"] - parameters["slope"]).sqrt().sum()  # 0, with a slope of infinity
            return found * math.nan if where == "loss" else found

        def error(self, parameters: Parameters) -> float:
            found = super().error(parameters)
            return math.nan if where == "error" and found < 0.5 else found

    base = line(rate=0.2)
    state = train(Broken(base.x_BN, base.y_BN, base.rates), Settings(steps=60, patience=0))
    assert state.ended == NOT_FINITE
    assert 0 < state.step < 60
    assert math.isfinite(state.least)
    assert state.least < state.first
    assert all(bool(value.isfinite().all()) for value in state.best.values())


def test_a_start_that_is_not_finite_is_left_at_once() -> None:
    base = line()
    state = train(Line(base.x_BN, base.y_BN * math.nan, base.rates), Settings(steps=10))
    assert (state.step, state.ended) == (0, NOT_FINITE)


def test_a_parameter_without_a_part_in_the_loss_stays() -> None:
    class Idle(Line):
        def init(self) -> Parameters:
            return {**super().init(), "idle": torch.ones(2)}

    base = line()
    state = train(Idle(base.x_BN, base.y_BN, {**base.rates, "idle": 0.1}), Settings(steps=5, patience=0))
    assert torch.equal(state.parameters["idle"], torch.ones(2))


@pytest.mark.parametrize(("schedule", "halfway"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_schedules_by_hand(schedule: str, halfway: float) -> None:
    settings = Settings(schedule=schedule)
    assert settings.factor(0.0) == 1.0
    assert settings.factor(0.5) == pytest.approx(halfway, abs=1e-12)


def test_a_schedule_reaches_the_optimiser() -> None:
    constant = train(line(), Settings(steps=10, patience=0))
    linear = train(line(), Settings(steps=10, patience=0, schedule="linear"))
    assert not torch.equal(constant.parameters["slope"], linear.parameters["slope"])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_torchs(decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(size, generator=generator) for name, size in (("a", (5, 3)), ("b", (4,)))}
    rates = {"a": 0.1, "b": 0.003}
    theirs = {name: value.clone().requires_grad_() for name, value in start.items()}
    groups = [{"params": [value], "lr": rates[name]} for name, value in theirs.items()]
    torchs = torch.optim.AdamW(groups, weight_decay=decay)
    ours, optimiser = start, AdamW(decay=decay)
    state = optimiser.init(ours)
    for _ in range(30):
        gradients = {name: torch.randn(value.shape, generator=generator) for name, value in start.items()}
        for name, value in theirs.items():
            value.grad = gradients[name].clone()
        torchs.step()
        ours, state = optimiser(ours, gradients, state, rates)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.detach(), rtol=1e-5, atol=1e-6)


def test_protocols_and_names() -> None:
    assert isinstance(line(), Problem)
    assert isinstance(Together({}), Learned)
    assert all(isinstance(optimiser, Optimiser) for optimiser in OPTIMISERS.values())
    assert tuple(OPTIMISERS) == NAMED
    assert set(KEYS) == set(Settings.__dataclass_fields__)
    assert (Finished({}) | Finished({})).formats == {}


def test_parts_of_a_block_see_what_those_before_them_made() -> None:
    @dataclass(frozen=True)
    class Times:
        """Multiplies the weight by what it learnt."""

        scope: str = "block"

        @property
        def rates(self) -> Mapping[str, float]:
            return {"by": 1.0}

        def init(self, trial: Trial) -> Parameters:
            return {"by": torch.tensor(2.0)}

        def apply(self, parameters: Parameters, trial: Trial, progress: float) -> Trial:
            return replace(trial, weights={"w": trial.weights["w"] * parameters["by"] + 1})

        def finish(self, parameters: Parameters, trial: Trial) -> Finished:
            assert float(trial.weights["w"]) in (1.0, 3.0)
            return Finished()

    both = Together({"first": Times(), "second": Times()})
    trial = Trial({"w": torch.tensor(1.0)})
    start = both.init(trial)
    assert set(start) == set(both.rates) == {"first › by", "second › by"}
    assert float(both.apply(start, trial, 0.0).weights["w"]) == 7.0  # (1 · 2 + 1) · 2 + 1
    both.finish(start, trial)


def test_cost_grows_with_steps_and_with_the_block() -> None:
    size = Size(weights=10**6, trained=10**6, parameters=10**4, width=4096, tokens=8192)
    small = cost(size, Settings(steps=100), 1e-11)
    assert cost(size, Settings(steps=1000), 1e-11).seconds > 8 * small.seconds
    assert (
        cost(replace(size, trained=4 * 10**6, weights=4 * 10**6), Settings(steps=100), 1e-11).bytes > 1.5 * small.bytes
    )
    assert small.seconds > 100 * 3 * 2 * 10**6 * 2048 * 1e-11


RECIPE = "name: a\nlearning: {steps: 10, schedule: cosine}\nweights:\n  blocks.*: {grid: int3-asym, grain: channel}\n"


def test_how_to_learn_prints_back_and_counts() -> None:
    plan = parse(RECIPE)
    assert plan.learning == {"steps": 10, "schedule": "cosine"}
    assert parse(dump(plan)) == plan
    other = parse(RECIPE.replace("10", "11"))
    assert (
        digest(plan) != digest(other) != digest(parse(RECIPE.replace("learning: {steps: 10, schedule: cosine}\n", "")))
    )
    assert "learning" in differences(plan, other)[0]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{steps: 0}", "learning › steps: learning takes 1 or more steps, not 0"),
        ("{batch: -3}", "learning takes 1 or more tokens a batch, not -3"),
        ("{steps: many}", "steps must be a whole number, not 'many'"),
        ("{steps: 1.5}", "steps must be a whole number, not 1.5"),
        ("{step: 3}", "unknown key 'step' in learning (did you mean 'steps'?)"),
        ("{schedule: linnear}", "the schedule is one of constant, linear, cosine, warmed, stable, not 'linnear'"),
        ("{optimiser: sgd}", "the optimiser is one of adamw, momentum, sign, not 'sgd'"),
        ("{patience: -1}", "patience is 0 (never stop early) or more, not -1"),
        ("3", "learning must be a mapping"),
    ],
)
def test_what_a_user_may_get_wrong(written: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(RECIPE.replace("{steps: 10, schedule: cosine}", written))
    assert said in str(caught.value)
    assert "line 2" in str(caught.value)


def test_the_parts_that_are_learnt_keep_the_contract() -> None:
    from regauge.formats.learnt import LearntClip, LearntShare
    from regauge.rounding.learnt import LearntOffset

    assert isinstance(LearntClip(), LearntRange)
    assert isinstance(LearntShare(), LearntRange)
    assert isinstance(LearntOffset(), LearntRounding)


def test_a_rate_left_open_is_one_over_the_number_of_steps() -> None:
    base, settings = line(), Settings(steps=40, optimiser="sign", patience=0)
    left, said = (
        train(Line(base.x_BN, base.y_BN, {"slope": rate, "shift": 0.0}), settings).parameters["slope"]
        for rate in (None, 1 / 40)
    )
    assert torch.equal(left, said)
    assert float(left) == pytest.approx(1, abs=0.1)
