"""What makes a family of kernels worth training: drawn blocks learn to do with the middle of theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from regauge.elastic.family import family_of
from regauge.elastic.subnet import Subnet
from regauge.engine.raising import space_of
from regauge.engine.training import train
from regauge.hosts.transformers.source import Source
from regauge.learn.samplers import SAMPLERS
from regauge.learn.space import Turn
from regauge.plan import parse
from toy_resnet import saved

SIZES = {"num_hidden_layers": 2, "layer_widths": (5, 11), "layer_neurons": (6, 7), "layer_strides": (1, 2)}
RECIPE = """
name: kernels
family: {kernel: [1], ffn: [0.5], layers: stages, order: none, multiple: 1, members: {points: kernel=1}}
train: {sampler: %s, distiller: none, teacher: largest, labels: 1, steps: 12, batch: 24, rate: 0.03}
"""


def colours(path: Path) -> Path:
    """Images whose class is their colour: no place needs to see another."""
    drawn = np.random.default_rng(5)
    y = drawn.integers(0, 3, 120)
    x = drawn.integers(0, 120, (120, 8, 8, 3))
    x[np.arange(120), :, :, y] += 100
    np.savez(path, x=x.astype(np.uint8), y=y)
    return path


def test_kernels_that_are_drawn_learn(tmp_path: Path) -> None:
    """The same steps leave the member of 1 x 1 kernels far behind where no step draws it."""
    model = saved(tmp_path / "m", layer_kernels=(3, 3), **SIZES)
    after = {}
    for name, sampler in (("drawn", "named"), ("not", "exits")):  # exits: the whole alone, where depth has no choices
        receipt = train(parse(RECIPE % sampler), model, tmp_path / name, colours(tmp_path / "x.npz"))
        assert receipt.trained is not None
        after[name] = receipt.trained.members["kernel=1"].after
    assert after["drawn"] < 0.7 * after["not"]


def test_each_block_draws_a_kernel_of_its_own_and_kernels_open_first(tmp_path: Path) -> None:
    anatomy = Source.open(saved(tmp_path / "m", layer_kernels=(3, 5), **SIZES)).anatomy
    family = family_of({"ffn": [0.5], "kernel": [3, 1], "layers": "stages", "members": {"uneven": "kernel=1/3"}})
    space = space_of(family, anatomy, each=True)
    assert list(space.choices) == ["kernel", "ffn"]
    assert [round(one.share, 3) for one in space.choices["kernel"]] == [1, 0.68, 0.076]  # of 9 and 25: 9/25, 1/9, 1/25
    assert space.named[Subnet(kernel=(1, 3))] == pytest.approx((0.076 + 0.68) / 2, abs=1e-3)
    seen = [SAMPLERS["progressive"](1)(space, Turn(step, 300, seed=1))[0].subnet for step in range(300)]
    assert {one.kernel for one in seen[:75]} == {None}
    assert {one.ffn for one in seen[:220]} == {None}
    kernels = {one.kernel for one in seen[75:] if one.kernel is not None}
    assert (1, 5) in kernels
    assert (3, 1) in kernels
    level = SAMPLERS["balanced"](1)
    assert all(isinstance(level(space, Turn(step, 9))[0].subnet.kernel, tuple | None) for step in range(9))
