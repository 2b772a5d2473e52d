"""Rows without training: AWQ's scales and clipping, low rank by the inputs, feedback for the inputs that are there."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from torch import Tensor

from regauge import parts
from regauge.anatomy.model import Anatomy, Weights
from regauge.anatomy.moves import apply
from regauge.engine.block import round_site
from regauge.errors import RecipeError
from regauge.formats.base import Format
from regauge.formats.grains import Channel, Group
from regauge.formats.grids import E2M1, Int
from regauge.formats.rangers import MinMax
from regauge.formats.scales import BFloat16, TwoLevel
from regauge.formats.terms import summed
from regauge.parts import Spec
from regauge.rewrites import SmoothReaders
from regauge.rewrites.reading import POWERS, power
from regauge.rounding.clipping import SHARES, Clipped
from regauge.rounding.compensators import LoRC, WeightedLowRank, low_rank, root, weighted_low_rank
from regauge.rounding.retargeting import Retargeted, target
from regauge.rounding.rounders import GPTQ, Nearest
from tests.toy import Shape, build, forward, seeing

SMALL = Shape(hidden=32, heads=4, kv_heads=2, head_dim=8, rotary=8, neurons=48, vocab=53)
IDS = torch.arange(64).view(4, 16) % 53
FMT = Format(Int(3, False), Group(16), MinMax(), BFloat16())


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(seed: int, tokens: int, inputs: int) -> Tensor:
    return draws(seed, tokens, inputs) @ draws(seed + 1, inputs, inputs) / inputs**0.5


def moment(x_TI: Tensor) -> Tensor:
    return (x_TI.double().T @ x_TI.double()) / len(x_TI)


def salient() -> tuple[Anatomy, Weights]:
    """Two channels of each norm that come in twenty times as loud as the others, weights alike."""
    anatomy, weights = build(SMALL, 3)
    for b in range(anatomy.blocks):
        weights[f"blocks.{b}.attn.norm.gain"][[3, 11]] *= 20
        weights[f"blocks.{b}.mlp.norm.gain"][[7]] *= 20
    return anatomy, weights


def means(anatomy: Anatomy, weights: Weights) -> dict[str, dict[str, Tensor]]:
    stats: dict[str, dict[str, Tensor]] = {}

    def look(name: str, x: Tensor) -> Tensor:
        stats[name] = {"absmean": x.flatten(0, -2).abs().mean(0), "count": torch.tensor(64)}
        return x

    with seeing(look):
        forward(anatomy, weights, IDS)
    return stats


class Rounding:
    """The error of the logits when some sites are rounded to nearest; remembers what it was asked."""

    def __init__(self, anatomy: Anatomy, weights: Weights) -> None:
        self.anatomy, self.weights, self.target = anatomy, weights, forward(anatomy, weights, IDS)
        self.asked: dict[tuple[str, ...], list[float]] = {}

    def __call__(self, weights: Weights, sites: Collection[str] | None = None) -> float:
        assert sites is not None
        now = {**self.weights, **weights}
        for site in sites:
            w_OI = now[f"{site}.weight"]
            now[f"{site}.weight"] = FMT.decode(FMT.encode(w_OI.float())).to(w_OI.dtype)
        found = float((forward(self.anatomy, now, IDS) - self.target).square().mean())
        self.asked.setdefault(tuple(sites), []).append(found)
        return found


def test_the_scale_of_a_channel_by_hand() -> None:
    """√ of 1, 4 and 16 is 1, 2 and 4; over the root of the greatest times the least, 2."""
    assert power(torch.tensor([1.0, 4.0, 16.0]), 0.5).tolist() == [0.5, 1.0, 2.0]
    assert power(torch.tensor([0.3, 5.0]), 0.0).tolist() == [1.0, 1.0]
    assert bool(power(torch.tensor([0.0, 1.0]), 0.95).isfinite().all())  # a dead channel


def test_each_set_of_readers_takes_the_power_that_loses_least() -> None:
    anatomy, weights = salient()
    some = {name: t for name, t in weights.items() if name.startswith("blocks.0.")}
    objective = Rounding(anatomy, weights)
    after, moves = SmoothReaders()(anatomy, some, means(anatomy, weights), objective, 0)
    moved = {**weights, **apply(moves, anatomy, some)}
    assert (forward(after, moved, IDS) - objective.target).abs().max() < 1e-10 * objective.target.abs().max()
    sets = {tuple(sorted(f"blocks.0.{name}" for name in names)) for names in (
        ("attn.q", "attn.k", "attn.v"), ("attn.o",), ("mlp.gate", "mlp.up"), ("mlp.down",))}  # fmt: skip
    assert objective.asked.keys() == sets
    loud = objective.asked[("blocks.0.attn.k", "blocks.0.attn.q", "blocks.0.attn.v")]
    assert len(loud) == len(POWERS) == 20
    assert min(loud) < 0.7 * loud[0]  # the first is unscaled
    now = objective({name: t for name, t in moved.items() if name.startswith("blocks.0.attn")}, ("blocks.0.attn.q",))
    before = objective({}, ("blocks.0.attn.q",))
    assert now < before


def test_readers_that_gain_nothing_are_left_to_the_bit() -> None:
    anatomy, weights = salient()
    some = {name: t for name, t in weights.items() if name.startswith("blocks.1.")}
    after, moves = SmoothReaders("norm")(anatomy, some, means(anatomy, weights), lambda *_: 1.0, 1)
    assert moves == []
    assert any("read what they read before" in note for note in after.notes)
    with pytest.raises(RecipeError, match="chosen by a block's error, and nothing gives it here"):
        SmoothReaders()(anatomy, some, {}, None, 1)
    with pytest.raises(RecipeError, match="'heads' is no kind of stream to smooth"):
        SmoothReaders("norm+heads")


def cost(w_OI: Tensor, w_hat_OI: Tensor, h_II: Tensor) -> float:
    e_OI = (w_OI - w_hat_OI).double()
    return float((e_OI @ h_II * e_OI).sum())


@pytest.mark.parametrize(
    "fmt", [FMT, Format(E2M1(), Group(16), MinMax(), TwoLevel()), Format(Int(2), Channel(), MinMax(), BFloat16())]
)
def test_clipping_takes_the_best_share_of_each_group(fmt: Format) -> None:
    """Where weights are loud inputs are quiet; inputs of different groups do not meet here, so groups add up."""
    w_OI = draws(1, 6, 32)
    w_OI[:, ::8] *= 4
    x_TI = correlated(2, 200, 32)
    x_TI[:, ::8] *= 0.05
    h_II = moment(x_TI)
    if fmt.grain.span((6, 32)) == 16:
        h_II[:16, 16:] = 0
        h_II[16:, :16] = 0
    codes = Clipped()(w_OI, fmt, {"hessian": h_II})
    plain = fmt.encode(w_OI)
    assert cost(w_OI, fmt.decode(codes), h_II) < 0.9 * cost(w_OI, fmt.decode(plain), h_II)
    bound, best = fmt.bound(w_OI), 0.0
    most_G1 = fmt.grain.split(w_OI).abs().amax(1, keepdim=True)
    for row in range(6):
        for start in range(0, 32, fmt.grain.span((6, 32))):
            some = slice(start, start + fmt.grain.span((6, 32)))
            tried = []
            for share in SHARES:
                end_OI = fmt.grain.spread(most_G1 * share, (6, 32))
                step = bound.fit(w_OI.clamp(-end_OI, end_OI))
                got_OI = bound.decode(bound.encode(w_OI, step))
                tried.append(cost(w_OI[row : row + 1, some], got_OI[row : row + 1, some], h_II[some, some]))
            best += min(tried)
    assert cost(w_OI, fmt.decode(codes), h_II) == pytest.approx(best, rel=1e-5)
    assert torch.equal(bound.load(codes.step.fields).scale_G1, codes.step.scale_G1)


def test_clipping_leaves_weights_on_the_grid_alone() -> None:
    w_OI = FMT.decode(FMT.encode(draws(3, 4, 32)))
    codes = Clipped()(w_OI, FMT, {"hessian": moment(correlated(4, 99, 32))})
    assert torch.equal(codes.codes_OI, FMT.encode(w_OI).codes_OI)
    assert torch.equal(codes.step.scale_G1, FMT.fit(w_OI).scale_G1)


@pytest.mark.parametrize("rank", [1, 4, 13])
def test_low_rank_by_the_inputs_leaves_the_sum_of_the_tail(rank: int) -> None:
    e_OI, h_II = draws(5, 13, 24).double(), moment(correlated(6, 300, 24))
    lower_II = root(h_II, 0.0)
    left, right = weighted_low_rank(e_OI, lower_II, rank)
    tail = float(torch.linalg.svdvals(e_OI @ lower_II)[rank:].square().sum())
    assert cost(e_OI, left @ right, h_II) == pytest.approx(tail, rel=1e-6, abs=1e-12)
    if rank < 13:
        plain_left, plain_right = low_rank(e_OI, rank)
        assert tail < 0.95 * cost(e_OI, plain_left @ plain_right, h_II)


def test_low_rank_of_inputs_that_do_not_meet_is_the_diagonal_form() -> None:
    e_OI, d_I = draws(7, 9, 16).double(), draws(8, 16).double().abs() + 0.1
    left, right = weighted_low_rank(e_OI, root(torch.diag(d_I**2), 0.0), 3)
    by_hand_left, by_hand_right = low_rank(e_OI * d_I, 3)
    assert torch.allclose(left @ right, by_hand_left @ (by_hand_right / d_I), atol=1e-10)
    even, plain = (f @ g for f, g in (weighted_low_rank(e_OI, root(torch.eye(16), 0.0), 3), low_rank(e_OI, 3)))
    assert torch.allclose(even, plain, atol=1e-10)


def test_what_is_stored_beats_the_plain_low_rank_where_inputs_meet() -> None:
    w_OI, h_II = draws(9, 40, 48), moment(correlated(10, 400, 48))
    w_hat_OI = FMT.decode(Nearest()(w_OI, FMT, {}))

    def left_over(found: WeightedLowRank | LoRC) -> float:
        (term,) = found(w_OI, w_hat_OI, {"hessian": h_II})
        assert term.bytes == found.bytes((40, 48)) == 2 * 8 * 88
        return cost(w_OI, w_hat_OI + term.dense().float(), h_II)

    assert left_over(WeightedLowRank(8)) < 0.8 * left_over(LoRC(8))
    assert bool(root(torch.zeros(4, 4), 0.01).eq(torch.eye(4)).all())  # nothing came in
    assert bool(root(moment(draws(11, 2, 6)), 0.0).isfinite().all())  # fewer tokens than inputs


@pytest.mark.parametrize(("bits", "rounder", "most"), [(4, "nearest", 0.95), (2, "gptq", 1.0)])
def test_what_the_low_rank_leaves_is_rounded_anew_and_the_better_kept(bits: int, rounder: str, most: float) -> None:
    """To nearest it gains; with feedback and few bits the first codes stay: a second rounding loses a tenth."""
    w_OI, stats = draws(12, 48, 64), {"hessian": moment(correlated(13, 600, 64))}
    base, errors = parts.point("weights", grid=f"int{bits}-asym", grain="group:32", rounder=rounder), []
    for again in (0, 1):
        point = base.but(compensator=Spec("low-rank-weighted", (("again", again), ("rank", 4))))
        found = summed(round_site(w_OI, point, stats), parts.format_of(point))
        errors.append(cost(w_OI, found, stats["hessian"]))
    assert errors[1] <= most * errors[0]
    with pytest.raises(ValueError, match="a rank is 1 or more, again and damp are 0 or more"):
        WeightedLowRank(2, again=-1)


def streams(tokens: int, seed: int = 20) -> tuple[Tensor, Tensor]:
    """What the uncompressed model reads, and the compressed one: a linear error and noise."""
    x_TI = correlated(seed, tokens, 32) if seed == 20 else draws(seed, tokens, 32) @ draws(21, 32, 32) / 32**0.5
    wrong_II = torch.eye(32) + 0.05 * draws(30, 32, 32)
    return x_TI, x_TI @ wrong_II + 0.02 * draws(seed + 9, tokens, 32)


def drifted(x_TI: Tensor, own_TI: Tensor) -> dict[str, Tensor]:
    return {"hessian": moment(own_TI), "drift": ((x_TI - own_TI).double().T @ own_TI.double()) / len(x_TI)}


def test_feedback_for_the_inputs_that_are_there_makes_good_what_came_before() -> None:
    w_OI = draws(14, 24, 32)
    stats = drifted(*streams(2000))
    x_TI, own_TI = streams(500, seed=40)  # never seen

    def miss(found: GPTQ | Retargeted) -> float:
        return float((x_TI @ w_OI.T - own_TI @ FINE.decode(found(w_OI, FINE, stats)).T).square().sum())

    FINE = Format(Int(4, False), Group(16), MinMax(), BFloat16())
    errors = [miss(found) for found in (GPTQ(), Retargeted(0.5), Retargeted(1.0))]
    assert errors[2] < 0.5 * errors[0]
    assert errors[2] < errors[1] < errors[0]


def test_on_a_fine_grid_it_reaches_the_least_squares() -> None:
    w_OI, (x_TI, own_TI) = draws(15, 8, 32), streams(600)
    star_OI = target(w_OI.double(), drifted(x_TI, own_TI)["hessian"], drifted(x_TI, own_TI)["drift"], 1.0, 0.0)
    best_IO = torch.linalg.lstsq(own_TI.double(), x_TI.double() @ w_OI.double().T).solution
    assert torch.allclose(star_OI, best_IO.T, atol=1e-6)


@pytest.mark.parametrize("order", ["none", "activation"])
def test_where_both_streams_are_one_it_is_gptq_to_the_bit(order: str) -> None:
    w_OI, (x_TI, _) = draws(16, 24, 32), streams(300)
    plain = GPTQ(order=order, static_groups=order != "none")(w_OI, FMT, drifted(x_TI, x_TI))
    ours = Retargeted(order=order, static_groups=order != "none")(w_OI, FMT, drifted(x_TI, x_TI))
    assert torch.equal(plain.codes_OI, ours.codes_OI)
    assert torch.equal(plain.step.scale_G1, ours.step.scale_G1)
    still = Retargeted(0.0)(w_OI, FMT, drifted(*streams(300)))
    assert torch.equal(still.codes_OI, GPTQ()(w_OI, FMT, drifted(*streams(300))).codes_OI)
    alone = Retargeted()(w_OI, FMT, {"hessian": moment(x_TI)})
    assert "nothing is known of what the uncompressed model reads" in alone.notes[0]
    with pytest.raises(ValueError, match="the share of the way is from 0 to 1, not 2"):
        Retargeted(2.0)
