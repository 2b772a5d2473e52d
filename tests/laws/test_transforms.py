"""Laws of transforms, readings and terms, drawn from the tables; what Hadamard is for; small cases by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from regauge import parts
from regauge.anatomy.model import Anatomy
from regauge.artifact.codec.base import Layout
from regauge.artifact.codec.packed import Packed
from regauge.errors import ArtifactError
from regauge.formats.base import ALL, Codes, Format, Step
from regauge.formats.grains import Group, Token, Whole
from regauge.formats.grids import Int
from regauge.formats.phases import Phases
from regauge.formats.rangers import Dynamic, Static
from regauge.formats.readings import Reading, dynamic, fit, load
from regauge.formats.scales import Float32
from regauge.formats.terms import KINDS, NAMES, LowRank, summed
from regauge.formats.transforms import Crossed, Maker, Same, Scaled, Transform

TRANSFORMS = sorted(parts.TABLE["transform"])
SIZES = (1, 2, 13, 16, 24, 37, 48, 74)


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(name: str, channels: int) -> tuple[Maker, Transform]:
    maker: Maker = parts.build("transform", parts.read("transform", name, "inputs"))
    stats = {"absmax": draws(1, channels).abs() * 9}
    return maker, maker.fit(channels, stats, [draws(2, 5, channels)])


@pytest.mark.parametrize("channels", SIZES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_keeps_the_product_and_comes_back_from_what_is_kept(name: str, channels: int) -> None:
    maker, transform = made(name, channels)
    x_TI, w_OI = draws(3, 7, channels), draws(4, 11, channels)
    wanted = x_TI @ w_OI.T
    assert (transform.forward(x_TI) @ transform.inverse_on(w_OI).T - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    again = maker.load(channels, transform.tensors)
    assert torch.equal(again.forward(x_TI), transform.forward(x_TI))
    assert transform.bytes == sum(t.numel() * t.element_size() for t in transform.tensors.values())
    assert transform.changes == (name != "identity")
    if transform.native is not None and transform.native.pair is not None:  # as kernels apply it: x (left ⊗ right)
        left, right = (side.double() for side in transform.native.pair)
        assert torch.allclose(x_TI @ torch.kron(left, right), transform.forward(x_TI), atol=1e-5)
    if transform.native is not None and transform.native.diagonal_I is not None:
        assert torch.allclose(x_TI * transform.native.diagonal_I, transform.forward(x_TI))


@pytest.mark.parametrize("channels", SIZES)
def test_a_hadamard_is_orthogonal_and_spreads_evenly_where_there_is_one(channels: int) -> None:
    _, transform = made("hadamard", channels)
    turned = transform.forward(torch.eye(channels, dtype=torch.float64))
    assert torch.allclose(turned @ turned.T, torch.eye(channels, dtype=torch.float64), atol=1e-12)
    if channels in (1, 2, 16, 24, 48):
        assert torch.allclose(turned.abs(), torch.full_like(turned, channels**-0.5))
        assert transform.tensors == {}
    else:
        assert set(transform.tensors) == {"factor"}


def test_crossed_is_a_kronecker_product_and_identity_factors_change_nothing() -> None:
    eye = Crossed(torch.eye(3, dtype=torch.float64), torch.eye(5, dtype=torch.float64))
    x_TI, w_OI = draws(5, 4, 15), draws(6, 2, 15)
    assert torch.equal(eye.forward(x_TI), x_TI)
    assert torch.equal(eye.inverse_on(w_OI), w_OI)
    left, right = draws(7, 3, 3), draws(8, 5, 5)
    crossed = Crossed(left, right)
    assert torch.allclose(crossed.forward(x_TI), x_TI @ torch.kron(left, right), atol=1e-12)
    assert torch.allclose(crossed.forward(x_TI) @ crossed.inverse_on(w_OI).T, x_TI @ w_OI.T, atol=1e-11)


def test_transforms_by_hand() -> None:
    _, hadamard = made("hadamard", 4)
    assert hadamard.forward(torch.tensor([8.0, 0, 0, 0])).tolist() == [4.0, 4.0, 4.0, 4.0]
    assert hadamard.forward(torch.tensor([1.0, 2, 3, 4])).tolist() == [5.0, -1.0, -2.0, 0.0]
    scaled = Scaled(torch.tensor([2.0, 0.5]))
    assert scaled.forward(torch.tensor([6.0, 1.0])).tolist() == [3.0, 2.0]
    assert scaled.inverse_on(torch.tensor([[3.0, 8.0]])).tolist() == [[6.0, 4.0]]


def test_int4_inputs_with_outlier_channels_lose_less_after_hadamard() -> None:
    x_TI, w_OI = draws(9, 200, 64), draws(10, 30, 64)
    x_TI[:, [3, 40]] *= 40
    fmt = Format(Int(4), Token(), Dynamic(), Float32())
    wanted, error = x_TI @ w_OI.T, {}
    for name in ("identity", "hadamard"):
        _, transform = made(name, 64)
        y_TO = dynamic(fmt, transform).simulate(x_TI.float()).double() @ transform.inverse_on(w_OI).T
        error[name] = float((y_TO - wanted).norm() / wanted.norm())
    assert error["hadamard"] < 0.7 * error["identity"]


# Readings


@pytest.mark.parametrize("grid", ["int8", "int4-asym", "fp8", "nf4"])
@pytest.mark.parametrize("grain", ["token", "tensor", "group:13", "time:11"])
@pytest.mark.parametrize("ranger", ["dynamic", "static", "minmax"])
def test_inputs_and_caches_are_rounded_as_an_independent_float64_says(grid: str, grain: str, ranger: str) -> None:
    if ranger == "static" and grain == "time:11":
        pytest.skip("a step of several tokens is not known before they are")
    fmt = Format(*(parts.build(a, parts.read(a, n)) for a, n in zip(("grid", "grain", "ranger", "scale"),
                 (grid, grain, ranger, "f32"), strict=True)))  # fmt: skip
    x_TI = draws(11, 22, 26).float()
    reading = dynamic(fmt)
    if ranger == "static":
        reading = fit(fmt, Same(), {"minimum": x_TI.amin(0), "maximum": x_TI.amax(0)})
    found = reading.simulate(x_TI)
    values = fmt.grid.table[~fmt.grid.table.isnan()].double()
    for t in range(22):
        for i in range(26):
            rows = range(22) if grain == "tensor" or ranger == "static" else [t]
            if grain == "time:11":
                rows = range(t // 11 * 11, t // 11 * 11 + 11)
            columns = {"group:13": range(i // 13 * 13, i // 13 * 13 + 13), "time:11": [i]}.get(grain, range(26))
            own = x_TI[list(rows)][:, list(columns)].double()
            low, high = min(float(own.min()), 0.0), max(float(own.max()), 0.0)
            if fmt.grid.symmetric:
                even = 2 * max(-low, high) / (fmt.grid.high - fmt.grid.low)
                step = max(low / fmt.grid.low, high / fmt.grid.high) if ranger == "minmax" else even
                zero = 0.0
            else:
                step = (high - low) / (fmt.grid.high - fmt.grid.low)
                zero = float(round(-low / step))
            z = float(x_TI[t, i]) / step + zero
            best = float((values - min(max(z, fmt.grid.low), fmt.grid.high)).abs().min())
            got = float(found[t, i]) / step + zero
            assert abs(got - min(max(z, fmt.grid.low), fmt.grid.high)) <= best + 1e-3, (t, i)


def test_a_static_step_by_hand_clips_what_calibration_did_not_see() -> None:
    stats = {"minimum": torch.tensor([-1.0, -3.0]), "maximum": torch.tensor([12.75, 2.0])}
    reading = fit(Format(Int(8), Whole(), Static(), Float32()), Same(), stats)
    assert reading.tensors["scale"].tolist() == [[pytest.approx(0.1)]]
    assert reading.simulate(torch.tensor([[1.04, -30.0]])).tolist() == [[pytest.approx(1.0), pytest.approx(-12.8)]]
    groups = fit(Format(Int(8), Group(1), Static(), Float32()), Same(), stats)
    assert [round(float(s), 5) for s in groups.tensors["scale"].flatten()] == [0.1, round(3 / 127.5, 5)]
    again = load(groups.format, parts.build("transform", parts.read("transform", "identity")), 2, groups.tensors)
    x_TI = torch.tensor([[1.04, -30.0], [5.0, 1.0]])
    assert torch.equal(again.simulate(x_TI), groups.simulate(x_TI))


def test_what_is_not_finite_is_seen() -> None:
    reading = dynamic(Format(Int(8), Token(), Dynamic(), Float32()))
    found = reading.simulate(torch.tensor([[1.0, float("inf")], [float("nan"), 2.0], [1.0, 2.0]]))
    assert found[:2].isnan().any(1).all()
    assert found[2].isfinite().all()
    assert reading.simulate(torch.zeros(0, 5)).shape == (0, 5)


# Terms


@dataclass(frozen=True, eq=False)
class MadeUp:
    """A bias to every weight: a term that nothing else knows of."""

    value_1: Tensor
    kind: str = "made-up"
    shape: tuple[int, int] = (3, 4)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"value": self.value_1}

    @property
    def bytes(self) -> int:
        return 4

    def apply(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        return y_TO + x_TI @ self.dense().T

    def dense(self, index: slice | Tensor = ALL) -> Tensor:
        return self.value_1.expand(3, 4)[index]


def test_every_kind_is_its_tensors_and_a_sum() -> None:
    assert KINDS.keys() == NAMES.keys()
    left, right = torch.tensor([[1.0], [2.0], [0.0]]), torch.tensor([[1.0, 0.0, -1.0, 3.0]])
    term = LowRank(left, right)
    assert term.dense().tolist() == [[1.0, 0.0, -1.0, 3.0], [2.0, 0.0, -2.0, 6.0], [0.0, 0.0, 0.0, 0.0]]
    assert term.apply(torch.tensor([[1.0, 9.0, 0.0, 1.0]]), torch.ones(1, 3)).tolist() == [[5.0, 9.0, 1.0]]
    phases = Phases(torch.zeros(4, 1, dtype=torch.uint8), torch.ones(1, 2, 2))
    for one, shape, size in ((term, (3, 4), 28), (phases, (4, 8), 20)):
        again = KINDS[one.kind](one.tensors)
        assert (tuple(again.tensors), again.shape, again.bytes) == (NAMES[one.kind], shape, size)
    assert {term.kind, phases.kind} == set(KINDS)
    with pytest.raises(ValueError, match=r"factors are \[3, 1\] and \[2, 4\]"):
        LowRank(left, torch.ones(2, 4))


def test_a_term_that_nobody_knows_is_summed_here_and_never_written() -> None:
    codes = Codes(torch.full((3, 4), 128, dtype=torch.uint8), Step(torch.ones(3, 1), None, {"scale": torch.ones(3, 1)}))
    fmt = parts.format_of(parts.point("weights", grid="int8", grain="channel", scale="f32"))
    whole = replace(codes, terms=(MadeUp(torch.tensor([0.5])),))
    assert summed(whole, fmt).tolist() == [[0.5] * 4] * 3
    layout = Layout(Anatomy.__new__(Anatomy), Anatomy.__new__(Anatomy), {}, torch.float32)
    with pytest.raises(ArtifactError, match=r"blocks.0.attn.q has a term of kind 'made-up'.*upgrade it"):
        Packed(layout).terms("blocks.0.attn.q", whole)


def test_a_reading_names_itself() -> None:
    fmt = Format(Int(8), Token(), Dynamic(), Float32())
    assert Reading(fmt).name == "int8"
    assert Reading(fmt, made("hadamard", 4)[1]).name == "hadamard int8"
