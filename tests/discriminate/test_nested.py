"""Codes for all levels at once, and steps of each level's own, are worth something at the levels below the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from regauge.formats.base import Format
from regauge.formats.grains import Group
from regauge.formats.planes import Float16Levels, level
from regauge.formats.prefixes import Nested
from regauge.formats.rangers import MinMax
from regauge.rounding.levels import Levels

FMT = Format(Nested(8), Group(32), MinMax(), Float16Levels(6))


def toy() -> tuple[Tensor, Tensor]:
    """Weights, and the Hessian of inputs that go together."""
    generator = torch.Generator().manual_seed(7)
    mixed_II = torch.randn(96, 96, generator=generator) * torch.linspace(1.0, 0.05, 96)
    x_TI = torch.randn(2000, 96, generator=generator) @ mixed_II
    return torch.randn(32, 96, generator=generator), x_TI.T @ x_TI / 2000


def errors(rounder: Levels) -> dict[int, float]:
    """Bits → error of the output."""
    w_OI, hessian_II = toy()
    codes = rounder(w_OI, FMT, {"hessian": hessian_II})
    found = {}
    for bits in range(2, 9):
        one, fmt = level(codes, FMT, bits)
        gap_OI = w_OI - fmt.decode(one)
        found[bits] = float(((gap_OI @ hessian_II) * gap_OI).sum())
    return found


JOINT = Levels(tilt=0.5, passes=0)


def test_all_levels_at_once_beat_what_is_cut_off_the_whole() -> None:
    joint, top = errors(JOINT), errors(Levels(grow="top"))
    assert all(joint[bits] < 0.97 * top[bits] for bits in (2, 3))
    assert all(joint[bits] < 0.9 * top[bits] for bits in (4, 5, 6, 7))
    assert top[8] < joint[8] < top[7]


def test_a_seed_is_as_good_as_alone_and_the_rest_is_worse() -> None:
    seed, joint = errors(Levels(grow="seed", seed=4)), errors(JOINT)
    assert seed[4] < 0.8 * joint[4]
    assert seed[8] > joint[8]


def test_steps_of_a_level_of_its_own_lower_its_error() -> None:
    fitted, plain = errors(JOINT), errors(replace(JOINT, refit=False))
    assert all(fitted[bits] < 0.95 * plain[bits] for bits in (2, 3, 4))
    assert fitted[8] == plain[8]


def test_levels_that_alone_count_are_nearer_and_the_others_further() -> None:
    few, every = errors(Levels(passes=2, levels="4/3/2")), errors(Levels(passes=2))
    assert all(few[bits] < 0.96 * every[bits] for bits in (2, 3, 4))
    assert few[6] > 1.2 * every[6]


def test_planes_round_what_the_levels_before_leave() -> None:
    planes, joint, seed = errors(Levels(grow="planes")), errors(JOINT), errors(Levels(grow="seed", seed=2))
    assert planes[2] == pytest.approx(seed[2], rel=0.02)
    assert planes[2] < 0.6 * joint[2]
    assert planes[4] < 0.4 * planes[2]
    assert planes[6] < 0.8 * planes[4]
    assert planes[8] > 100 * joint[8]  # inside its first cells nothing reaches what feedback has moved beyond them


def test_codes_that_are_looked_at_again_are_better_at_every_level() -> None:
    again, once = errors(replace(JOINT, passes=2)), errors(JOINT)
    assert all(again[bits] < 0.985 * once[bits] for bits in range(2, 9))
    assert all(again[bits] < 0.95 * once[bits] for bits in (4, 5, 8))
