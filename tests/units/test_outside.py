"""Embedding and head by rows: what they make of a text is what the whole matrices make of it, and no matrix is cast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from regauge.hosts.transformers import outside
from regauge.hosts.transformers.host import HOST
from regauge.hosts.transformers.source import Source
from tests.pico import pico, save


def opened(where: Path, family: str = "llama", **changes: object) -> Source:
    return Source.open(save(pico(family, 0, vocab_size=61, **changes).to(torch.bfloat16), where / "model"))


@pytest.mark.parametrize("strip", [7, 61, 8192])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_by_strips_are_those_of_the_whole_head(
    tied: bool, strip: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "STRIP", strip)
    source = opened(tmp_path, tie_word_embeddings=tied)
    ids = torch.randint(0, 61, (3, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (found,) = HOST.runner(source).logits([ids])
        expected = HOST.whole(source).float()(input_ids=ids).logits
    assert found.dtype is torch.float32
    assert torch.allclose(found, expected, atol=1e-5)


def test_rows_that_are_made_stand_in_place_of_both_matrices(tmp_path: Path) -> None:
    source, asked = opened(tmp_path), list[int]()
    runner, outer = HOST.runner(source), source.block(None)
    ids = torch.tensor([[5, 5, 9, 60]])
    changed = {name: outer[name] * 1.5 for name in ("embed.weight", "head.weight")}

    def rows(name: str) -> object:
        def make(which: Tensor | slice) -> Tensor:
            made = changed[name][which]
            asked.append(len(made))
            return made

        return make

    with torch.no_grad():
        states = runner.begin([ids], outer, rows={"embed": rows("embed.weight")})  # type: ignore[dict-item]  # a Rows
        assert asked == [3]  # each token once
        expected = runner.begin([ids], {**outer, **changed})
        assert torch.equal(states.hidden[0], expected.hidden[0])
        (found,) = runner.tail(outer, states, rows={"head": rows("head.weight")})  # type: ignore[dict-item]  # a Rows
        (true,) = runner.tail({**outer, **changed}, expected)
        (other,) = runner.tail(outer, expected)
    assert torch.equal(found, true)
    assert not torch.equal(found, other)


def test_a_module_that_is_more_than_a_table_is_given_all_rows(tmp_path: Path) -> None:
    source = opened(tmp_path, "gemma3")  # scales what it looks up
    runner, outer = HOST.runner(source), source.block(None)
    ids, changed = torch.tensor([[5, 9]]), outer["embed.weight"] * 2
    with torch.no_grad():
        states = runner.begin([ids], outer, rows={"embed": lambda which: changed[which]})
        expected = runner.begin([ids], {**outer, "embed.weight": changed, "head.weight": changed})
    assert torch.equal(states.hidden[0], expected.hidden[0])


def test_gradients_go_through_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(tmp_path)
    runner, outer, found = HOST.runner(source), source.block(None), []
    for strip in (7, 8192):
        monkeypatch.setattr(outside, "STRIP", strip)
        states = runner.begin([torch.tensor([[3, 4, 5]])], outer)
        hidden = states.hidden[0].detach().requires_grad_()
        (logits,) = runner.tail(outer, states.with_hidden([hidden]))
        found += torch.autograd.grad(logits.square().sum(), hidden)
    assert float(found[0].abs().max()) > 0
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert "forward" not in vars(runner.shell.get_submodule("lm_head"))
