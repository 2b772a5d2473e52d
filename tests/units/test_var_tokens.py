"""Tokens that blocks of VAR pass by on late scales: by hand, against their nulls, and through a recipe."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regauge as rg
from regauge.errors import RecipeError
from regauge.plan import parse
from regauge.tokens.maps import Detail, EarlierScale, Late, Lattice, Nothing, Passed, Passing
from toy_var import saved, toy

RULE: dict[str, object] = {"score": "detail", "schedule": "late:0.5", "disposal": "earlier-scale"}


def test_parts_by_hand() -> None:
    x_BLC = torch.tensor([[[0.0], [0.0], [0.0], [8.0]]])  # their mean is 2
    assert Detail()(x_BLC).tolist() == [[4.0, 4.0, 4.0, 36.0]]
    first = Lattice()(torch.zeros(1, 16, 1)).topk(4).indices[0].sort().values.tolist()
    assert max(b - a for a, b in itertools.pairwise(first)) <= 6
    assert [Late(0.5, 2)(tokens, scale, 3) for scale, tokens in enumerate((1, 4, 9))] == [1, 2, 4]
    assert [Late(0.01)(tokens, scale, 3) for scale, tokens in enumerate((1, 4, 9))] == [1, 4, 1]
    earlier = torch.arange(4.0).view(1, 4, 1)
    rows = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert EarlierScale()(earlier, 16).view(4, 4).tolist() == rows
    assert not Nothing()(earlier, 16).any()
    for wrong, message in ((Late, "not 0"), (lambda keep: Late(scales=0), "1 or more")):
        with pytest.raises(ValueError, match=message):
            wrong(keep=0)


def error(rule: Passing, detailed: int = 6) -> float:
    """Of a branch that adds a smooth map twice as large as its tokens, and detail at some places alone."""
    generator = torch.Generator().manual_seed(0)
    smooth = torch.ones(1, 4, 8).cumsum(1)
    fine = EarlierScale()(smooth, 16).clone()
    fine[:, torch.randperm(16, generator=generator)[:detailed]] += 9
    passed = Passed((rule,), 2)
    passed.run(0, "ffn", smooth, lambda x: 2 * x)
    passed.begin(1)
    seen: list[int] = []

    def compute(x_BKC: Tensor) -> Tensor:
        seen.append(x_BKC.shape[1])
        return 2 * x_BKC

    found = passed.run(0, "ffn", fine, compute)
    assert seen == [8]
    return float((found - 2 * fine).square().mean())


def test_each_part_beats_its_null() -> None:
    best = error(Passing())
    assert best == 0
    assert error(Passing(score=Lattice())) > 1
    assert error(Passing(disposal=Nothing())) > 1


def test_a_recipe_lets_blocks_pass_tokens_by(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    recipe = {"name": "some", "tokens": {"blocks.{1,2,3}.residual": RULE | {"schedule": "late:0.3"}}}
    rg.apply(parse(recipe), folder, tmp_path / "out")
    model: Any = rg.load(tmp_path / "out")
    assert [rule is None for rule in model.regauge_tokens] == [True, True, False, False, False]
    plain = rg.load(folder)
    whole, drawn = (one.sample([0, 1], seed=1) for one in (plain, model))
    assert not torch.equal(drawn.tokens, whole.tokens)
    assert torch.equal(drawn.tokens[:, :5], whole.tokens[:, :5])  # scales before the last are read whole
    filling = 3 * 2 * 4 * 4 * 24 * 4  # of three blocks two branches, four guided images, four tokens
    assert drawn.most_cache_bytes == whole.most_cache_bytes + filling
    plain.pass_by((None, *(4 * (Passing(schedule=Late(1.0)),))))
    assert torch.equal(plain.sample([0, 1], seed=1).tokens, whole.tokens)


def test_layers_that_earlier_scales_skipped_read_every_token() -> None:
    model = toy()
    stages = ("full", "depth=0/4", "full")
    plain = model.sample([0], seed=1, subnet=stages)
    model.pass_by((None, None, Passing(), None, None))
    assert model.sample([0], seed=1, subnet=stages).tokens.shape == plain.tokens.shape


def test_what_names_no_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'detial'"):
        rg.apply(parse({"tokens": {"*": {"score": "detial"}}}), saved(tmp_path / "model"), tmp_path / "out")
