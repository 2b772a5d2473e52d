"""What makes ways of training a family differ: who is drawn when, and what a teacher's distance punishes."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from regauge.elastic.subnet import Subnet
from regauge.learn.distillers import DISTILLERS, Alpha, Divergence, Embedding, Features, Read, Relations, distiller_of
from regauge.learn.lots import Drawn
from regauge.learn.optimisers import Momentum
from regauge.learn.samplers import (
    SAMPLERS,
    Balanced,
    Exits,
    Named,
    Phases,
    Progressive,
    Sandwich,
    Shrinking,
    Smallest,
    Uniform,
)
from regauge.learn.settings import Settings
from regauge.learn.space import WHOLE, Choice, Space, Turn
from regauge.learn.training import DISTILLERS as NAMED

SPACE = Space(
    {
        "depth": (WHOLE, Choice(6, 0.75), Choice(4, 0.5)),
        "ffn": (WHOLE, Choice(0.75, 0.75), Choice(0.5, 0.5)),
    },
    8,
)
EACH = Space(SPACE.choices, 8, each=True)


def turns(count: int = 400) -> list[Turn]:
    return [Turn(step, count, seed=3) for step in range(count)]


def drawn(sampler: object, space: Space = SPACE, count: int = 400) -> list[tuple[Drawn, ...]]:
    return [sampler(space, turn) for turn in turns(count)]  # type: ignore[operator]  # a sampler


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_a_function_of_seed_and_step(name: str) -> None:
    first, again = (drawn(SAMPLERS[name]()) for _ in range(2))
    assert first == again
    for step in first:
        sizes = [SPACE.size(one.subnet) for one in step]
        assert sizes == sorted(sizes, reverse=True)
        assert step
    assert SAMPLERS[name]().whole == any(one.subnet.full for step in first for one in step)
    if name not in ("exits", "growing", "smallest"):
        assert first != [SAMPLERS[name]()(SPACE, Turn(step, 400, seed=4)) for step in range(400)]


def test_a_sandwich_has_both_ends_and_uniform_draws_do_not() -> None:
    assert all({Subnet(), SPACE.smallest} <= {one.subnet for one in step} for step in drawn(Sandwich(1)))
    assert not all({Subnet(), SPACE.smallest} <= {one.subnet for one in step} for step in drawn(Uniform(3)))
    assert SPACE.smallest == Subnet(depth=4, ffn=0.5)


def test_progressive_opens_one_dimension_after_another() -> None:
    seen = [{one.subnet for one in step} for step in drawn(Progressive(4), count=500)]
    phases = [set().union(*seen[at : at + 100]) for at in range(0, 500, 100)]
    assert phases[0] == {Subnet()}
    assert phases[1] == {Subnet(), Subnet(depth=6)}
    assert phases[2] == {Subnet(), Subnet(depth=6), Subnet(depth=4)}
    assert {one.ffn for one in phases[3]} == {None, 0.75}
    assert len(phases[4]) == 9  # all choices of both


def test_shrinking_waits_and_then_weighs_in_slowly() -> None:
    steps = drawn(Shrinking(1, start=0.5, ramp=0.25, epsilon=0.01), count=100)
    assert all(step == (Drawn(Subnet()),) for step in steps[:50])
    weights = [step[-1].weight for step in steps[50:]]
    assert weights[0] == pytest.approx(0.01)
    assert weights[:25] == sorted(weights[:25])
    assert weights[12] == pytest.approx(0.01 + 0.99 * 0.48)
    assert set(weights[25:]) == {1.0}
    assert all(step[0] == Drawn(Subnet()) for step in steps)  # the whole, which teaches, weighs as ever


def test_phases_move_from_the_whole_to_members() -> None:
    sampler = Phases(rare=0.2, joint=1 / 6, transition=1 / 2)
    assert [round(sampler.often(at), 3) for at in (0, 1 / 6, 5 / 12, 2 / 3, 1)] == [0.2, 0.2, 0.6, 1.0, 1.0]
    share = [sum(not step[0].subnet.full for step in part) for part in (drawn(sampler)[:60], drawn(sampler)[270:])]
    assert share[0] < 25
    assert share[1] == 130


def test_named_spends_every_pass_on_a_member_with_a_name_each_as_often() -> None:
    """Members by lot spend most passes on sizes between; here 300 passes are 100 of each."""
    named = {Subnet(depth=6): 0.75, Subnet(depth=4, ffn=0.5): 0.25}
    space = Space(SPACE.choices, 8, named=named)
    for count in (1, 2):
        found = Counter(one.subnet for step in drawn(Named(count), space, 300 // count) for one in step)
        assert found == {Subnet(): 100, **dict.fromkeys(named, 100)}
    by_lot = Counter(one.subnet for step in drawn(Uniform(1), space, 300) for one in step)
    assert sum(by_lot[one] for one in (Subnet(), *named)) < 150


def test_balanced_draws_every_size_and_uniform_by_block_draws_the_middle() -> None:
    """With a width for each block, the mean of eight is nearly always in the middle (arXiv 2405.20202, figure 3)."""

    def spread(sampler: object) -> tuple[float, int]:
        ffn = [one.subnet.ffn or 1.0 for step in drawn(sampler, EACH, 1000) for one in step]
        means = [sum(one) / len(one) if isinstance(one, tuple) else one for one in ffn]
        return torch.tensor(means).std().item(), sum(not 0.6 < mean < 0.9 for mean in means)

    balanced, uniform = spread(Balanced(1)), spread(Uniform(1))
    assert balanced[0] > 1.5 * uniform[0]
    assert balanced[1] > 4 * uniform[1]


def test_each_block_may_have_its_own_width_and_as_many_as_run() -> None:
    found = {one.subnet for step in drawn(Uniform(1), EACH) for one in step}
    assert any(isinstance(one.ffn, tuple) and len(set(one.ffn)) > 1 for one in found)
    for one in found:
        blocks = one.depth or 8
        assert one.ffn is None or (isinstance(one.ffn, tuple) and len(one.ffn) == blocks)


def test_exits_weigh_by_depth_and_smallest_is_alone() -> None:
    assert Exits()(SPACE, Turn(0, 1)) == (
        Drawn(Subnet(), 1.0),
        Drawn(Subnet(depth=6), 0.75),
        Drawn(Subnet(depth=4), 0.5),
    )
    assert Counter(one.subnet for step in drawn(Smallest()) for one in step) == {SPACE.smallest: 400}


def read(logits: torch.Tensor) -> Read:
    return Read(logits, logits)


def test_distillers_are_named_where_torch_is_not() -> None:
    assert tuple(DISTILLERS) == NAMED


def test_divergence_by_hand() -> None:
    teacher, member = torch.tensor([[[math.log(3.0), 0.0]]]), torch.zeros(1, 1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # p = 3/4, 1/4; q = 1/2, 1/2
    assert Divergence()(read(member), read(teacher)).item() == pytest.approx(expected)


def test_alpha_punishes_what_a_member_makes_up_where_kl_does_not() -> None:
    """A member with mass where the teacher has none: KL(p ‖ q) hardly sees it, α = −1 does (arXiv 2102.07954)."""
    teacher = torch.tensor([[[8.0, 0.0, 0.0]]])
    wide, kl, alpha = torch.tensor([[[2.0, 1.0, 1.0]]]), Divergence(), Alpha(bound=1e9)
    assert alpha(read(wide), read(teacher)) > 2 * kl(read(wide), read(teacher))
    same = torch.tensor([[[1.0, 0.5, -1.0]]])
    assert alpha(read(same), read(same)).item() == pytest.approx(0.0, abs=1e-6)


def test_alpha_bounds_its_gradient() -> None:
    teacher, member = torch.tensor([[[20.0, 0.0]]]), torch.tensor([[[0.0, 0.0]]], requires_grad=True)
    (bound,) = torch.autograd.grad(Alpha()(read(member), read(teacher)), member)
    (free,) = torch.autograd.grad(Alpha(bound=1e9)(read(member), read(teacher)), member)
    assert bound.abs().max() < 5
    assert free.abs().max() > 100 * bound.abs().max()


def test_the_gradient_of_alpha_is_that_of_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    member = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    p, q = torch.softmax(teacher.float(), -1), torch.softmax(member.float(), -1)
    value = 0.5 * ((q.square() / p).sum(-1) - 1).mean()
    (expected,) = torch.autograd.grad(value, member)
    ours = Alpha(low=-1.0, high=-1.0, bound=1e9)(read(member), read(teacher))
    (found,) = torch.autograd.grad(ours, member)
    assert ours.item() == pytest.approx(value.item(), rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_relations_know_no_width_and_features_know_the_first_channels() -> None:
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(2, 4, 8, generator=generator)
    turned = wide @ torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    assert Relations()(Read(turned), Read(wide)).item() == pytest.approx(0.0, abs=1e-6)
    assert Features()(Read(turned), Read(wide)).item() > 0.5
    assert Features()(Read(wide[..., :5]), Read(wide)).item() == pytest.approx(0.0, abs=1e-6)


def test_an_embedding_is_of_the_text_and_not_of_its_padding() -> None:
    hidden, mask = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(2)), torch.tensor([[1, 1, 0]])
    other = hidden.clone()
    other[:, 2] += 100
    assert Embedding()(Read(other, mask_BT=mask), Read(hidden, mask_BT=mask)).item() == pytest.approx(0.0, abs=1e-6)
    opposite = Embedding()(Read(-hidden, mask_BT=mask), Read(hidden, mask_BT=mask)).item()
    assert opposite == pytest.approx(4.0, rel=1e-5)  # two unit vectors that point apart


def test_tokens_teach_what_their_mean_alone_does_not() -> None:
    """A linear student of 24 channels, from ten texts of six tokens: ten means leave it open, sixty tokens do not.
    Errors are of the embeddings of texts that it never saw, after as many steps."""
    generator = torch.Generator().manual_seed(4)
    x_BTD, new_BTD = (torch.randn(count, 6, 24, generator=generator) for count in (10, 200))
    w_DD = torch.randn(24, 24, generator=generator)

    def missed(distiller: str) -> float:
        own = torch.eye(24).requires_grad_()
        optimiser = torch.optim.Adam([own], lr=0.03)
        for _ in range(300):
            optimiser.zero_grad()
            distiller_of(distiller)(Read(x_BTD @ own), Read(x_BTD @ w_DD)).backward()
            optimiser.step()
        return Embedding()(Read(new_BTD @ own), Read(new_BTD @ w_DD)).item()

    assert missed("embedding+features") < 0.2 * missed("embedding")


def test_a_sum_of_distances_is_their_sum() -> None:
    generator = torch.Generator().manual_seed(5)
    some = Read(torch.randn(2, 3, 4, generator=generator)), Read(torch.randn(2, 3, 4, generator=generator))
    both = Embedding()(*some) + Features()(*some)
    assert distiller_of("embedding+features")(*some).item() == pytest.approx(both.item())
    assert distiller_of("features") == DISTILLERS["features"]


def test_schedules_by_hand() -> None:
    warmed, stable = Settings(steps=100, schedule="warmed"), Settings(steps=100, schedule="stable")
    assert warmed.factor(0.0) == pytest.approx(0.2)  # the first of five steps up
    assert warmed.factor(0.5) == pytest.approx(0.5)
    assert [stable.factor(at) for at in (0.3, 0.8, 0.9)] == pytest.approx([1.0, 1.0, 0.5])


def test_momentum_is_torchs() -> None:
    ours, theirs = {"w": torch.ones(3)}, torch.nn.Parameter(torch.ones(3))
    torchs = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, nesterov=True)
    state = Momentum().init(ours)
    for step in range(3):
        gradient = torch.tensor([1.0, -2.0, 0.5]) * (step + 1)
        theirs.grad = gradient.clone()
        torchs.step()
        ours, state = Momentum()(ours, {"w": gradient}, state, {"w": 0.1})
        torch.testing.assert_close(ours["w"], theirs.detach())


def test_widths_are_drawn_flat_where_each_block_by_itself_would_make_a_bell() -> None:
    """Mean bits of members whose blocks differ: of five equal ranges the balanced sampler fills all about alike."""
    space = Space({"bits": tuple(Choice(bits, bits / 4) for bits in (4, 3, 2))}, 24, each=True)

    def shares(sampler: Balanced | Uniform) -> list[float]:
        found: Counter[int] = Counter()
        for (one,) in drawn(sampler, space, count=2000):
            bits = one.subnet.bits
            values = bits if isinstance(bits, tuple) else (bits or 0,)
            found[min(int((sum(values) / len(values) - 2) / 2 * 5), 4)] += 1
        return [found[at] / 2000 for at in range(5)]

    flat, bell = shares(Balanced(1)), shares(Uniform(1))
    assert max(abs(one - 0.2) for one in flat) < 0.03
    assert bell[2] > 0.7
    assert bell[0] + bell[4] < 0.01
