"""Families without training: blocks ranked by what they do to text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regauge.artifact.families import read_family
from regauge.elastic.order import ranked
from regauge.engine import apply
from regauge.engine.ranking import influence
from regauge.hosts import host_of
from regauge.plan import parse
from tests import tiny

READ = {"tokens": 512, "length": 32}


def test_a_block_that_turns_nothing_has_no_influence() -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    assert influence([x], [2 * x]) == pytest.approx(0, abs=1e-6)
    assert influence([x, x], [x, -x]) == pytest.approx(1)
    assert ranked([0.1, 0.3, 0.0, 0.3]) == (1, 3, 0, 2)


def test_an_idle_block_is_ranked_last(tmp_path: Path) -> None:
    """The second of four blocks adds nothing; spread evenly it would stay, and a block that works would go."""
    from transformers import AutoModelForCausalLM

    source = tiny.folder(tmp_path / "model", num_hidden_layers=4)
    model = AutoModelForCausalLM.from_pretrained(source)
    block = model.model.layers[1]
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    model.save_pretrained(source)
    text = tiny.text(tmp_path)
    plan = parse("name: f\nfamily: {depth: [3], ffn: [0.5], layers: ranked}\n")
    done = apply(plan, source, tmp_path / "out", calibration=text, **READ)
    family = read_family(tmp_path / "out", host_of(source).open(source).anatomy)
    assert family is not None
    assert family.ranked[-1] == 1
    assert family.blocks(3, 4) == (0, 2, 3)
    assert any(note.startswith("blocks by their influence, most first: ") for note in done.notes)
    even = apply(
        parse("name: f\nfamily: {depth: [3], ffn: [0.5]}\n"), source, tmp_path / "even", calibration=text, **READ
    )
    assert not any("influence" in note for note in even.notes)
